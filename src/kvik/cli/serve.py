"""`kvik serve MODEL`: the OpenAI-compatible HTTP server."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.cli.engine import check_sampling
from kvik.cli.options import Parser, add_engine_flags, add_flags, read_engine_options, read_flags
from kvik.errors import ConfigError
from kvik.log import configure
from kvik.openai_format import check_defaults
from kvik.sampling_params import SamplingParams
from kvik.server_config import ServerConfig
from kvik.settings import SERVER, load_server_settings

if TYPE_CHECKING:
    from kvik.server.process import ChildSettings

__all__ = ["run"]

_SECRETS = ("api_key", "ssl_keyfile_password")
_NEEDED = ("fastapi", "uvicorn", "zmq", "prometheus_client")


def run(argv: Sequence[str]) -> int:
    """Serve until interrupted."""
    parser = Parser("kvik serve", "Serve a model over HTTP with OpenAI's API. Sampling flags are defaults of requests.")
    add_flags(parser, SERVER)
    add_engine_flags(parser)
    args = parser.parse(argv)
    options = read_engine_options(args)
    server_settings = load_server_settings(read_flags(args, SERVER), os.environ, args.config)
    if args.print_config:
        for name, value, origin in [*server_settings.rows(), *options.engine.rows()]:
            shown = "(not shown)" if name in _SECRETS and origin != "default" else value
            print(f"{name:<24}  {shown:<24}  {origin}")
        return 0
    config = server_settings.make().with_processes(_usable_cores())
    engine = options.engine.make()
    check_sampling(options)
    overrides = {name: setting.value for name, setting in options.sampling.given.items()}
    SamplingParams(**overrides)
    check_defaults(overrides)
    _check_installation()
    configure(args.log_level)
    from kvik.models.hub import resolve_model
    from kvik.server.process import ChildSettings
    from kvik.server.supervisor import Supervisor, bind, check_tls

    api_keys = _api_keys(config)
    check_tls(config)
    sockets = bind(config)
    folder = resolve_model(engine.model, engine.revision, load_format=engine.load_format)
    settings = ChildSettings(
        endpoint="",
        engine=dataclasses.replace(engine, model=str(folder)),
        server=config,
        model_names=_names(config, engine.model),
        overrides=overrides,
        log_level=args.log_level,
        api_keys=api_keys,
    )
    address, port = sockets[0].getsockname()[:2]
    url = f"{'https' if config.ssl_certfile else 'http'}://{f'[{address}]' if ':' in address else address}:{port}"
    return Supervisor(settings, sockets, lambda line: _greet(url, settings, line)).run()


def _usable_cores() -> int:
    """As `runtime.platform.usable_cores`, without torch: this process computes nothing."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_installation() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"kvik serve needs {', '.join(missing)}: pip install 'kvik[server]'")
    import zmq

    if not zmq.has("ipc"):
        raise ConfigError("kvik serve needs ZeroMQ with ipc sockets, which this installation's has not")


def _api_keys(config: ServerConfig) -> tuple[str, ...]:
    """Every key, from flags and file. Raises ConfigError for a file that cannot be read or holds none."""
    if config.api_key_file is None:
        return config.api_key
    try:
        lines = Path(config.api_key_file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read api_key_file {config.api_key_file}: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"api_key_file {config.api_key_file} holds no key")
    return config.api_key + keys


def _names(config: ServerConfig, model: str) -> tuple[str, ...]:
    """Names of the model: as configured, else as given; a folder also has its own name, which is the one shown."""
    if config.served_model_name:
        return config.served_model_name
    folder = Path(os.path.expanduser(model))
    return tuple(dict.fromkeys((folder.resolve().name, model))) if folder.is_dir() else (model,)


def _greet(url: str, settings: ChildSettings, line: str) -> None:
    facts = json.loads(line)
    head = f"{settings.model_names[0]} on {facts['device']} ({facts['dtype']}), context {facts['context']} tokens"
    _say(
        f"{head}, {facts['num_seqs']} sequences at once\n{facts['ledger']}\n"
        f"serving on {url}  (API: {url}/v1, description: {url}/docs)"
    )


def _say(text: str) -> None:
    """Print, unless nobody can take it: a server does not end because the disk under its log is full."""
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), f"{text}\n".encode())  # unbuffered: nothing is left to fail at the end
