"""The `kvik` command: finds the subcommand, imports it alone, and turns errors into one line and an exit code.

Exit codes: 0 success, 1 an output could not be written, --fail-on-error found failures or verify-determinism found a
mismatch, 2 an error of Kvik's own tree (a wrong option, model or request), 130 interrupted, 141 the reader of the
output went away.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from kvik import __version__
from kvik.errors import ConfigError, KvikError, did_you_mean

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "generate": "complete prompts, streaming to the terminal",
    "chat": "talk with a model in the terminal",
    "serve": "serve a model over HTTP with the OpenAI API",
    "batch": "run a file of OpenAI batch requests",
    "info": "show the machine, a model, and the memory that it would take",
    "bench": "measure throughput or latency, of an engine or of a running server",
    "tune": "measure which GPU kernels compute a model fastest, and keep that",
    "quantize": "write a model folder with quantised weights",
    "verify-determinism": "compare a model's outputs under many schedules, bit for bit",
}
INTERRUPTED = 130
CLOSED_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # whoever started this closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? rather than ending the program
    try:
        code = _run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        exec("")  # `python -m` would end by the signal after all if it came inside an exec, such as that of a dataclass
        code = _fail("", INTERRUPTED)
    except BrokenPipeError:
        _drop_stdout()
        code = CLOSED_PIPE
    except KvikError as error:
        code = _fail(f"kvik: error: {error}", 2, debug=_debug(args))
    except OSError as error:
        _drop_stdout()
        code = _fail(f"kvik: error: {error}", 1, debug=_debug(args))
    return code


def _run(args: list[str]) -> int:
    command = next((arg for arg in args if not arg.startswith("-")), None)
    flags = args if command is None else args[: args.index(command)]
    if "--version" in flags:
        print(f"kvik {__version__}")
        return 0
    if command is None or "--help" in flags or "-h" in flags:
        print(_usage())
        return 0 if flags else 2
    unknown = [flag for flag in flags if flag != "--debug"]
    if unknown or command not in COMMANDS:
        wrong = unknown[0] if unknown else command
        raise ConfigError(f"there is no command {wrong!r}{did_you_mean(wrong, COMMANDS)}; kvik --help lists them")
    run = importlib.import_module(f"kvik.cli.{command.replace('-', '_')}").run
    code: int = run(args[len(flags) + 1 :])
    return code


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}} {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: kvik COMMAND [...]",
            "",
            *lines,
            "",
            "kvik COMMAND --help shows the options of a command; kvik --version shows the version.",
            'Try: kvik generate demo "Once upon a time"',
        ]
    )


def _debug(args: list[str]) -> bool:
    return "--debug" in (args[: args.index("--")] if "--" in args else args)


def _fail(message: str, code: int, *, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    print(message, file=sys.stderr)
    return code


def _drop_stdout() -> None:
    """Point standard output nowhere, so that the interpreter's last flush does not fail a second time."""
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
