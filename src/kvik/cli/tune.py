"""`kvik tune MODEL`: the projections of a model's decode steps, measured on the GPU at hand.

For each projection and batch size all plans worth it are timed within the step: which kernel, which tiles. The fastest
goes to the user's cache, where the next engine finds it. No weight is read or downloaded: shapes follow from
config.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.cli.bench import append
from kvik.cli.engine import load_torch
from kvik.cli.environment import commit, machine, versions
from kvik.cli.options import Parser, add_flags, read_engine_options, results_file
from kvik.errors import ConfigError
from kvik.log import configure
from kvik.settings import ENGINE

if TYPE_CHECKING:
    from kvik.config import EngineConfig
    from kvik.runtime.tune import Shape, Timing
    from kvik.startup import ModelInfo

__all__ = ["run"]

_FLAGS = ("device", "dtype", "revision")
_BATCHES = (1, 2, 4, 8, 16, 32, 40, 64, 128, 256)
_PATH_FIELDS = {
    "gemv": ("block_n", "block_k", "num_warps"),
    "skinny": ("block_n", "block_k", "block_t", "split_k", "num_warps", "num_stages", "prefetch", "tma"),
    "hopper": ("block_n", "block_t", "split_k", "num_stages"),
    "blas": (),
}


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse(argv)
    configure(args.log_level)
    info = _inspect(read_engine_options(args).engine.make())
    from kvik.kernels.triton.dispatch import cache_path
    from kvik.runtime.kernel_compiler import MAX_PROCESSES
    from kvik.runtime.platform import usable_cores
    from kvik.runtime.tune import Compilers, Shape, tune

    shape, sizes = Shape(info.spec, info.resolved.dtype), _sizes(args.batch)
    count = sum(len(shape.cases(size)) for size in sizes)
    info.platform.start(None)
    device, path = info.platform.device, cache_path(info.platform.name)
    begin = time.perf_counter()
    layers = f"{shape.part.num_layers} of {info.spec.num_layers} layers"
    print(
        f"{info.spec.architecture} in {_dtype(info)} on {info.platform.name}: {count} projections, {layers}\n\n{_HEAD}"
    )
    timings: list[Timing] = []
    try:
        with Compilers(shape, device, min(usable_cores(), MAX_PROCESSES)) as compilers:
            for timing in tune(shape, sizes, device, gpu=info.platform.name, compilers=compilers):
                timings.append(timing)
                print(_row(_result(timing)), flush=True)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {len(timings)} of {count} projections are measured, and kept in {path}")
        raise
    steps = _steps(timings)
    print("\n" + "\n".join(_step_line(step) for step in steps))
    print(f"\nmeasured in {time.perf_counter() - begin:.0f} s; engines that start from now on take the plans of {path}")
    if args.json:
        append(Path(args.json), _record(args, info, shape, timings, steps))
    return 0


def _parser() -> Parser:
    parser = Parser("kvik tune", "Measure which kernels compute a model's projections fastest on this GPU.")
    parser.add_argument("engine.model", metavar="MODEL", help=ENGINE.options["model"].help)
    parser.add_argument(
        "--batch", type=int, nargs="+", default=_BATCHES, metavar="N",
        help=f"sequences of a decode step, rounded up to what has plans (default: {' '.join(map(str, _BATCHES))})",
    )  # fmt: skip
    parser.add_argument("--json", type=results_file, metavar="FILE", help="append the result to a file, as one line")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with options (or set KVIK_CONFIG)")
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="warning", help="lines to show on stderr"
    )
    add_flags(parser, ENGINE, skip=[name for name in ENGINE.options if name not in _FLAGS])
    return parser


def _inspect(config: EngineConfig) -> ModelInfo:
    """The model as an engine would run it. Raises ConfigError where it would not run on a GPU."""
    load_torch()
    from kvik.runtime.platform import select_platform
    from kvik.startup import inspect_model

    platform = select_platform(config.device)
    if platform.device.type == "cpu":
        raise ConfigError(
            f"kvik tune measures kernels of an NVIDIA GPU (Ampere or newer, and triton installed), and"
            f" device={config.device!r} is the CPU here; --device cuda says what is missing"
        )
    return inspect_model(dataclasses.replace(config, load_format="dummy"))


def _sizes(batch: Sequence[int]) -> list[int]:
    """The numbers of tokens to measure, each once: batch sizes rounded up to those that have plans of their own."""
    from kvik.kernels.triton.candidates import MAX_TOKENS
    from kvik.kernels.triton.dispatch import BUCKETS

    if wrong := [size for size in batch if not 1 <= size <= MAX_TOKENS]:
        raise ConfigError(f"--batch must be from 1 to {MAX_TOKENS}, above which the library computes; got {wrong[0]}")
    return sorted({next(bucket for bucket in BUCKETS if bucket >= size) for size in batch})


def _dtype(info: ModelInfo) -> str:
    return str(info.resolved.dtype).removeprefix("torch.")


def _result(timing: Timing) -> dict[str, Any]:
    """One projection: microseconds of the step with the plan that is kept, with the earlier one, with the library.

    None: that plan does not run.
    """
    from kvik.kernels.triton.candidates import BLAS

    return {
        "case": timing.case.key,
        "us": timing.times[timing.best],
        "before_us": timing.times.get(timing.before),
        "library_us": timing.times.get(BLAS),
        "plan": dataclasses.asdict(timing.best),
        "before": dataclasses.asdict(timing.before),
        "candidates": len(timing.times),
    }


_HEAD = f"{'case':<50} {'step us':>9} {'before':>9} {'gain':>7} {'library':>9}  plan"


def _row(result: Mapping[str, Any]) -> str:
    """Microseconds of the whole step; the gain is over `before`."""
    us, before, library = result["us"], result["before_us"], result["library_us"]
    earlier = f"{'-':>9} {'-':>7}" if before is None else f"{before:>9.1f} {100 * (before / us - 1):>5.1f} %"
    plan = result["plan"]
    numbers = " ".join(f"{name} {plan[name]}" for name in _PATH_FIELDS[plan["path"]])
    other = "-" if library is None else f"{library:.1f}"
    return f"{result['case']:<50} {us:>9.1f} {earlier} {other:>9}  {plan['path']} {numbers}".rstrip()


def _steps(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """By number of tokens, microseconds of the step with all plans of before and with all that are kept."""
    steps = []
    for size in sorted({timing.case.num_tokens for timing in timings}):
        results = [_result(timing) for timing in timings if timing.case.num_tokens == size]
        steps.append({"tokens": size, "us": results[-1]["us"], "before_us": results[0]["before_us"]})
    return steps


def _step_line(step: Mapping[str, Any]) -> str:
    us, before = step["us"], step["before_us"]
    earlier = "-" if before is None else f"{before:,.0f} us before ({100 * us / before - 100:+.1f} %)"
    return f"step of {step['tokens']:>3}: {us:,.0f} us; {earlier}"


def _record(
    args: argparse.Namespace, info: ModelInfo, shape: Shape, timings: Sequence[Timing], steps: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "mode": "tune",
        "model": Path(getattr(args, "engine.model")).name,
        "dtype": _dtype(info),
        "layers": shape.part.num_layers,
        "steps": steps,
        "results": [_result(timing) for timing in timings],
        "machine": {**machine(), "device": info.platform.name},
        "versions": versions(),
        "commit": commit(),
    }
