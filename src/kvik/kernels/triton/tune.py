"""Measure which plan is fastest for a projection on the GPU at hand, and keep it in the user's cache for `load_table`.

Each candidate runs as it will in an engine: from a CUDA graph, one launch behind the other, over enough copies of the
weight that none is found in the L2 cache.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kvik.kernels.api import LinearWeight
from kvik.kernels.triton.dispatch import Case, Plan, Rule, load_table, save_measured
from kvik.kernels.triton.gemv import MAX_TOKENS
from kvik.kernels.triton.ops import TritonOps
from kvik.log import logger

__all__ = ["GraphTimer", "Timer", "candidates", "decoder_cases", "tune"]

Timer = Callable[[Callable[[int], object], int], float]
"""Microseconds of one call of the function, which gets the number of the weight's copy to use, below the second."""

_SWEPT_BYTES = 256 << 20  # several times the L2 cache of any GPU
_SHARED_BYTES = 227 << 10  # of one program on Hopper
_MULTIPROCESSORS = 132


def decoder_cases(
    hidden: int, q_size: int, kv_size: int, intermediate: int, vocab: int, dtype: str, tokens: Sequence[int]
) -> list[Case]:
    """The projections of a decoder at each number of tokens."""
    return [
        Case(op, m, n, k, dtype)
        for m in tokens
        for op, n, k in (
            ("norm_linear", q_size + 2 * kv_size, hidden),
            ("linear_add", hidden, q_size),
            ("norm_linear_swiglu", intermediate, hidden),
            ("linear_add", hidden, intermediate),
            ("linear", vocab, hidden),
        )
    ]


def candidates(case: Case) -> list[Plan]:
    """The plans worth timing for `case`, the vendor's library among them; tens of them."""
    plans = [Plan(path="blas")]
    if case.num_tokens <= MAX_TOKENS:
        plans += _gemv_plans(case)
    if case.num_tokens <= 256:
        plans += _skinny_plans(case)
    return plans


def _rows_and_bytes(case: Case) -> tuple[int, int]:
    """(weight rows for each output, bytes of an element)"""
    return 2 if case.op == "norm_linear_swiglu" else 1, getattr(torch, case.dtype).itemsize


def _gemv_plans(case: Case) -> Iterator[Plan]:
    rows, size = _rows_and_bytes(case)
    for block_n, block_k, num_warps in itertools.product((1, 2, 4, 8), (512, 1024, 2048, 4096), (1, 2, 4, 8)):
        held = rows * block_n * block_k * size / (32 * num_warps)  # bytes of the weight in a thread's registers
        if 64 <= held <= 256 and block_k < 2 * case.k and (block_k >= 1024 or block_k >= case.k):
            yield Plan(path="gemv", block_n=block_n, block_k=block_k, num_warps=num_warps)


def _skinny_plans(case: Case) -> Iterator[Plan]:
    rows, size = _rows_and_bytes(case)
    block_t = max(16, min(64, case.bucket))
    steps = ((64, 6), (128, 4), (256, 3))
    for block_n, split_k, (block_k, stages) in itertools.product((32, 64, 128), (1, 2, 4, 8), steps):
        programs = -(-case.n // block_n) * split_k
        shared = stages * block_k * (rows * block_n + block_t) * size
        fills = programs >= _MULTIPROCESSORS // 2 and (split_k == 1 or programs <= 4 * _MULTIPROCESSORS)
        if fills and shared <= _SHARED_BYTES and split_k * block_k <= case.k:
            for prefetch in {2, max(2, case.k // split_k // block_k)}:  # two steps, or all that a program reads
                yield Plan(
                    path="skinny",
                    block_n=block_n,
                    block_k=block_k,
                    block_t=block_t,
                    split_k=split_k,
                    num_warps=8 if block_n == 128 else 4,
                    num_stages=stages,
                    prefetch=prefetch,
                )


class _Problem:
    """Random inputs of a case, and the operation on them."""

    def __init__(self, case: Case, device: torch.device) -> None:
        rows, size = _rows_and_bytes(case)
        dtype = getattr(torch, case.dtype)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).mul_(shape[-1] ** -0.5).to(dtype)

        self.copies = max(1, _SWEPT_BYTES // (rows * case.n * case.k * size))
        self._weights = [LinearWeight(noise(rows * case.n, case.k)) for _ in range(self.copies)]
        self._x, self._gain = noise(case.num_tokens, case.k), noise(case.k)
        self._residual = noise(case.num_tokens, case.n)
        self._op = case.op

    def run(self, ops: TritonOps, copy: int) -> Tensor:
        w = self._weights[copy]
        if self._op == "linear":
            return ops.linear(self._x, w)
        if self._op == "linear_add":
            return ops.linear_add(self._x, w, self._residual)
        norm_linear = ops.norm_linear if self._op == "norm_linear" else ops.norm_linear_swiglu
        return norm_linear(self._x, self._gain, 1e-6, w)


class GraphTimer:
    """A `Timer` for CUDA: the fastest of `repeats` replays of a graph of at least `launches` calls."""

    def __init__(self, launches: int = 40, repeats: int = 5) -> None:
        self._launches = launches
        self._repeats = repeats

    def __call__(self, run: Callable[[int], object], copies: int) -> float:
        launches = max(self._launches, copies)
        run(0)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(launches):
                run(i % copies)
        graph.replay()
        times: list[float] = []
        for _ in range(self._repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / launches)
        return min(times)


def tune(
    cases: Sequence[Case], device: torch.device, *, timer: Timer | None = None, directory: Path | None = None
) -> dict[str, Plan]:
    """Time the candidates of each case, and write the fastest to the cache after each, over what was measured before.

    Returns all that is measured now, by `Case.key`. `directory` is where the cache lies, if not where users have it.
    """
    from triton.runtime.errors import OutOfResources

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    timer = timer or GraphTimer()
    table = load_table(gpu, directory)
    measured = dict(table.measured)
    for case in cases:
        problem = _Problem(case, device)
        times: list[tuple[float, Plan]] = []
        for plan in candidates(case):
            ops = TritonOps(device, table=dataclasses.replace(table, rules=(Rule(plan=plan),), measured={}))
            try:
                times.append((timer(partial(problem.run, ops), problem.copies), plan))
            except OutOfResources as error:
                logger.info("%s cannot run %s: %s", case.key, plan, error)
        best_time, measured[case.key] = min(times, key=lambda entry: entry[0])
        logger.info("%s: %.2f us with %s, of %d", case.key, best_time, measured[case.key], len(times))
        save_measured(gpu, measured, directory)
    return measured
