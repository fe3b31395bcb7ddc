"""`kvik bench ops`: every operator of `kvik.ops` on its own, against the limits of the machine and against torch.

The limits are measured on the spot: bytes per second of a large copy or read, whichever moves more, and FLOP/s of
a large matrix product. An operator is bound by the one that allows it less.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.cli.environment import commit, machine, versions
from kvik.cli.options import Parser, results_file
from kvik.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

    from kvik.cli.bench_op_cases import OpCase, Sizes
    from kvik.runtime.graphs import Timer

__all__ = ["run"]

_DTYPES = ("bfloat16", "float16", "float32")
_TOKENS = {"cpu": (1, 8, 256), "gpu": (1, 32, 256, 4096)}
_MOVED_BYTES = {"cpu": 256 << 20, "gpu": 1 << 30}
_MATRIX_SIZE = {"cpu": 2048, "gpu": 8192}  # rows and columns of the large product
_CPU_SECONDS = 0.3  # of each measurement
_LEAST_REPEATS = 5


@dataclass(frozen=True, slots=True)
class _Limits:
    """What the machine reaches: bytes and floating-point operations per second."""

    bytes_per_s: float
    flops_per_s: float

    def share(self, case: OpCase, seconds: float) -> tuple[str, float]:
        """What bounds the case, and how near to that it came."""
        memory, matrix = case.num_bytes / self.bytes_per_s, case.num_flops / self.flops_per_s
        return ("bytes", memory / seconds) if memory >= matrix else ("flops", matrix / seconds)


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    import torch

    from kvik.cli import bench_op_cases
    from kvik.cli.bench import append
    from kvik.runtime.platform import select_platform

    args = _parser().parse(argv)
    names = _names(args.operators, tuple(bench_op_cases.OPERATORS))
    platform = select_platform(args.device)
    device, dtype = platform.device, getattr(torch, args.dtype)
    kind = "cpu" if device.type == "cpu" else "gpu"
    if kind == "gpu":
        platform.start(None)
    elif args.threads:
        torch.set_num_threads(args.threads)  # and no more of what an engine does to its process
    tokens = args.tokens or _TOKENS[kind]
    if min(tokens) < 1:
        raise ConfigError(f"--tokens counts tokens of a step, at least 1; got {min(tokens)}")
    timer, best = (_cpu_median, _cpu_best) if kind == "cpu" else (_gpu_timer(),) * 2
    torch.manual_seed(0)
    limits = _Limits(
        _moved_per_second(device, best, _MOVED_BYTES[kind]),
        _computed_per_second(device, dtype, best, _MATRIX_SIZE[kind]),
    )
    print(f"{args.model}, {args.dtype}, on {platform.name}, {_limit_text(limits)}\n{_HEAD}")
    bench = bench_op_cases.Bench(device, dtype, _sizes(args.model))
    results = []
    for case in bench_op_cases.cases(bench, names, tokens):
        results.append(_result(case, timer, limits))
        print(_row(results[-1]), flush=True)
    if args.json:
        append(Path(args.json), _record(args, platform.name, limits, results))
    return 0


def _parser() -> Parser:
    parser = Parser("kvik bench ops", "Time every operator of kvik.ops, and the same in torch, at a model's sizes.")
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help="default: all")
    parser.add_argument("--model", default="Qwen3-0.6B", metavar="MODEL", help="whose sizes; only its config is read")
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu or cuda[:N] (default: auto)")
    parser.add_argument("--dtype", default="bfloat16", choices=_DTYPES, help="default: bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="of a step: few decode, many prefill")
    parser.add_argument("--threads", type=int, metavar="N", help="on the CPU; default: what torch takes")
    parser.add_argument("--json", type=results_file, metavar="FILE", help="append the results to a file, as one line")
    return parser


def _names(asked: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    for name in asked:
        if name not in known:
            raise ConfigError(f"there is no operator {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
    return asked or known


def _sizes(model: str) -> Sizes:
    from kvik.cli.bench_op_cases import QWEN3_06B, Sizes
    from kvik.models.hub import load_config, resolve_model
    from kvik.models.registry import build_spec

    if model == "Qwen3-0.6B":
        return QWEN3_06B
    return Sizes.of(build_spec(load_config(resolve_model(model, load_format="dummy"))))


def _cpu_median(call: Callable[[int], object], copies: int) -> float:
    return 1e6 * statistics.median(_cpu_seconds(call, copies))


def _cpu_best(call: Callable[[int], object], copies: int) -> float:
    return 1e6 * min(_cpu_seconds(call, copies))


def _cpu_seconds(call: Callable[[int], object], copies: int) -> list[float]:
    """Of each of several calls."""
    for copy in range(min(copies, 2)):
        call(copy)
    times: list[float] = []
    end = time.perf_counter() + _CPU_SECONDS
    while time.perf_counter() < end or len(times) < _LEAST_REPEATS:
        copy = len(times) % copies
        begin = time.perf_counter()
        call(copy)
        times.append(time.perf_counter() - begin)
    return times


def _gpu_timer() -> Timer:
    from kvik.runtime.graphs import GraphTimer

    return GraphTimer()


def _moved_per_second(device: torch.device, timer: Timer, size: int) -> float:
    """Bytes, by whichever moves most of a copy, a sum, and on a CPU the compiled kernels' probe."""
    import torch

    from kvik.kernels.cpu.native import OP_CODES, OpStruct
    from kvik.ops.devices import CpuOperators, operators

    source = torch.ones(size // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    times = [timer(lambda copy: target.copy_(source), 1) / 2, timer(lambda copy: source.sum(), 1)]
    ops = operators(device)
    if isinstance(ops, CpuOperators) and ops.native is not None:
        pool = ops.native.pool
        probe = OpStruct(code=OP_CODES["read"], x=source.data_ptr(), width=source.nbytes)
        times.append(timer(lambda copy: pool.run_one(probe), 1))
    return 1e6 * source.nbytes / min(times)


def _computed_per_second(device: torch.device, dtype: torch.dtype, timer: Timer, size: int) -> float:
    """FLOPs of a product of two square matrices, both with rows of what is summed, as tokens and weights have them.

    A CPU without instructions for a 16-bit type computes faster in float32, and its kernels do so.
    """
    import torch

    def rate(kind: torch.dtype) -> float:
        a, b = (torch.randn(size, size, device=device).to(kind) for _ in "ab")
        product = torch.empty_like(a)
        return 1e6 * 2 * size**3 / timer(lambda copy: torch.mm(a, b.T, out=product), 1)

    return max(rate(kind) for kind in ({dtype, torch.float32} if device.type == "cpu" else {dtype}))


def _result(case: OpCase, timer: Timer, limits: _Limits) -> dict[str, Any]:
    seconds, in_torch = (1e-6 * timer(call, case.copies) for call in (case.kvik, case.torch))
    bound, share = limits.share(case, seconds)
    return {
        "operator": case.op,
        "tokens": case.tokens,
        "shape": case.shape,
        "copies": case.copies,
        "seconds": seconds,
        "bytes": case.num_bytes,
        "flops": case.num_flops,
        "bytes_per_s": case.num_bytes / seconds,
        "flops_per_s": case.num_flops / seconds,
        "bound": bound,
        "share": share,
        "torch_seconds": in_torch,
        "torch_ratio": in_torch / seconds,
    }


_HEAD = f"{'operator':<19} {'shape':<36} {'time us':>9} {'rate':>13} {'of limit':>8} {'torch us':>9} {'x torch':>7}"


def _row(result: dict[str, Any]) -> str:
    """`x torch` is how many times as fast as torch the operator is."""
    if result["bound"] == "bytes":
        rate = f"{result['bytes_per_s'] / 1e9:,.1f} GB/s"
    else:
        rate = f"{result['flops_per_s'] / 1e12:,.2f} TFLOP/s"
    return (
        f"{result['operator']:<19} {result['shape']:<36} {1e6 * result['seconds']:>9,.1f} {rate:>13}"
        f" {100 * result['share']:>6.1f} % {1e6 * result['torch_seconds']:>9,.1f} {result['torch_ratio']:>7.2f}"
    )


def _limit_text(limits: _Limits) -> str:
    return f"which moves {limits.bytes_per_s / 1e9:,.0f} GB/s and computes {limits.flops_per_s / 1e12:,.2f} TFLOP/s"


def _record(args: argparse.Namespace, name: str, limits: _Limits, results: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "mode": "ops",
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "limits": {"bytes_per_s": limits.bytes_per_s, "flops_per_s": limits.flops_per_s},
        "results": results,
        "machine": {**machine(), "device": name},
        "versions": versions(),
        "commit": commit(),
    }
