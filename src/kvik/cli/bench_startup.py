"""`kvik bench startup MODEL`: how long an engine takes until it is ready, phase by phase, each time in a new process.

A child process (`python -m kvik.cli.bench_startup TIME`, with the same arguments) starts the engine, answers two
requests, and prints one JSON object. Times begin at TIME, when its parent starts it, so that imports count.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.cli.bench import append, footer
from kvik.cli.engine import open_engine, render_config
from kvik.cli.environment import commit, machine, versions
from kvik.cli.options import Parser, add_engine_flags, read_engine_options, results_file
from kvik.errors import ConfigError, KvikError
from kvik.sampling_params import SamplingParams

if TYPE_CHECKING:
    from kvik.config import EngineConfig
    from kvik.llm_engine import LLMEngine

__all__ = ["run"]

_PROMPT_TOKENS = 128
_READ_BYTES = 16 << 20
_DESCRIPTION = """Measure the start of an engine, each time in a new process: how long until it is ready, and why.

The first start does not count: it brings files into the system's cache, and fills that of Triton. With --cold each
start gets an empty cache of Triton, so that all GPU kernels are compiled."""


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse(argv)
    options = read_engine_options(args)
    if args.runs < 1:
        raise ConfigError(f"--runs must be at least 1, got {args.runs}")
    if args.print_config:
        print(render_config(options, sampling=False))
        return 0
    starts = [_start(argv, cold=args.cold) for _ in range(args.runs + 1)][1:]
    record = _record(args, starts)
    print(_render(record))
    if args.json:
        append(Path(args.json), record)
    return 0


def _parser() -> Parser:
    parser = Parser("kvik bench startup", _DESCRIPTION)
    add_engine_flags(parser, sampling=False)
    parser.add_argument("--cold", action="store_true", help="compile all GPU kernels anew in each start")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="starts to take the best of")
    parser.add_argument("--json", type=results_file, metavar="FILE", help="append the result to a file, as one line")
    return parser


# In the process that prints


def _start(argv: Sequence[str], *, cold: bool) -> dict[str, Any]:
    """What a child process measured. Raises KvikError with its message when the engine does not start."""
    with tempfile.TemporaryDirectory(prefix="kvik-triton-") as empty:
        environment = {**os.environ, "TRITON_CACHE_DIR": empty} if cold else None
        command = [sys.executable, "-m", "kvik.cli.bench_startup", repr(time.time()), *argv]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if child.returncode:
        raise KvikError(f"the process that starts the engine ended with code {child.returncode}")
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    if "error" in found:
        raise KvikError(found["error"])
    if cold and found["kernels"] is None:
        raise ConfigError("--cold empties the cache of GPU kernels, and this engine runs on the CPU; leave it out")
    return found


def _record(args: argparse.Namespace, starts: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything about the best start, as it is written to a results file."""
    best = min(starts, key=lambda start: float(start["result"]["ready_s"]))
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "mode": "startup",
        "cold": args.cold,
        "runs": args.runs,
        **best,
        "all_ready_s": [start["result"]["ready_s"] for start in starts],
        "machine": {**machine(), "device": best["device"]},
        "versions": versions(),
        "commit": commit(),
    }


def _render(record: dict[str, Any]) -> str:
    result, kernels, files = record["result"], record["kernels"], record["files"]
    others = ", ".join(f"{seconds:.2f}" for seconds in sorted(record["all_ready_s"])[1:])
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in result["phases"].items())
    lines = [
        f"start of {record['model']}, {record['parameters']:,} parameters, {record['dtype']};"
        f" {'kernels compiled anew' if record['cold'] else 'warm caches'}, best of {record['runs']}",
        f"  {'ready':<16} {result['ready_s']:.2f} s" + (f"; other starts {others}" if others else ""),
        f"  {'of which':<16} {phases}",
        f"  {'first token':<16} {1e3 * result['first_token_s']:,.1f} ms after ready; of the next request"
        f" {1e3 * result['next_first_token_s']:,.1f} ms",
    ]
    if files is not None:
        speed = files["bytes"] / result["phases"]["weights"] / 1e9
        ratio = result["phases"]["weights"] / files["read_s"]
        lines.append(
            f"  {'weights':<16} {files['bytes'] / 1e9:.2f} GB at {speed:.1f} GB/s: {ratio:.2f} times what one thread"
            " takes to read them"
        )
    if kernels is not None:
        start, first = kernels["start"], kernels["first_request"]
        lines.append(
            f"  {'kernels':<16} {start['loaded']} loaded and {len(start['compiled'])} compiled in the engine's process;"
            f" {first['loaded']} and {len(first['compiled'])} by the first request"
        )
    return "\n".join([*lines, *footer(record)])


# In the process that starts an engine


def _measure(begin: float, argv: Sequence[str]) -> dict[str, Any]:
    """Start an engine, ask it twice, and say how long everything took since `begin`."""
    options = read_engine_options(args := _parser().parse(argv))
    config = options.engine.make()
    import torch

    import kvik.llm_engine  # noqa: F401 - imported here to be timed

    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    counters = _count_kernels() if on_gpu else None
    imports = time.time() - begin
    with open_engine(options, args.log_level) as engine:
        ready = time.time() - begin
        start = counters() if counters else None
        first = _first_token(engine, 0)
        kernels = {"start": start, "first_request": counters()} if counters else None
        following = _first_token(engine, 1)
        plan, model = engine.resolved, config.model
        if Path(model).is_dir():
            model = Path(model).resolve().name  # a result says what was measured, not where it lay
        return {
            "model": model,
            "architecture": engine.spec.architecture,
            "parameters": engine.spec.num_parameters,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "options": {**{name: setting.value for name, setting in options.engine.given.items()}, "model": model},
            "device": plan.memory.device_name,
            "result": {
                "ready_s": ready,
                "phases": {"imports": imports, **engine.ledger.phases},
                "first_token_s": first,
                "next_first_token_s": following,
            },
            "files": None if config.load_format == "dummy" else _read_files(config),
            "kernels": kernels,
        }


def _count_kernels() -> Callable[[], dict[str, Any]]:
    """Returns what says which kernels this process compiled since the last call, and how many it found in the cache."""
    from triton import knobs

    compiled: list[str] = []
    loaded: list[str] = []

    def note(*, src: Any, cache_hit: bool, **_: object) -> None:
        (loaded if cache_hit else compiled).append(src.fn.__name__)

    def take() -> dict[str, Any]:
        found = {"compiled": list(compiled), "loaded": len(loaded)}
        compiled.clear()
        loaded.clear()
        return found

    knobs.compilation.listener = note
    return take


def _first_token(engine: LLMEngine, index: int) -> float:
    """Seconds from a request of new token ids to its first token."""
    length = min(_PROMPT_TOKENS, engine.resolved.scheduler.max_model_len - 1)
    prompt = [(7 * i + index) % (engine.spec.vocab_size - 3) + 3 for i in range(length)]
    begin = time.perf_counter()
    engine.add_request(prompt, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
    engine.run_until_complete()
    return time.perf_counter() - begin


def _read_files(config: EngineConfig) -> dict[str, float]:
    """The bytes of a model's weight files, and how long one thread takes to read them from the system's cache."""
    from kvik.models.checkpoint import find_checkpoint
    from kvik.models.hub import resolve_model

    buffer, total, begin = bytearray(_READ_BYTES), 0, time.perf_counter()
    folder = resolve_model(config.model, config.revision, load_format=config.load_format)
    for path in find_checkpoint(folder, config.load_format):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return {"bytes": total, "read_s": time.perf_counter() - begin}


def main() -> None:
    """What the child process does."""
    try:
        found = _measure(float(sys.argv[1]), sys.argv[2:])
    except KvikError as error:
        found = {"error": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
