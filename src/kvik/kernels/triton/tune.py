"""Measure which plan is fastest for a projection on the GPU at hand, and keep it in the user's cache for `load_table`.

`compile_candidates` has processes fill Triton's cache, because compiling takes a hundred times as long as timing. Then
`tune` times each candidate as it will run in an engine: from a CUDA graph, one launch behind the other, over enough
copies of the weight that none is found in the L2 cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources, PTXASError

from kvik.kernels.api import LinearWeight
from kvik.kernels.triton import gemv
from kvik.kernels.triton.compile_only import compile_shared, compute_capability
from kvik.kernels.triton.dispatch import Case, Plan, Rule, Table, load_table, save_measured
from kvik.kernels.triton.ops import TritonOps, supports_pdl
from kvik.log import logger

__all__ = [
    "BLAS", "MAX_TOKENS", "GraphTimer", "Limits", "Timer", "Timing", "candidates", "compile_candidates",
    "decoder_cases", "tune",
]  # fmt: skip

Timer = Callable[[Callable[[int], object], int], float]
"""Microseconds of one call of the function, which gets the number of the weight's copy to use, below the second."""

BLAS = Plan(path="blas")
"""The vendor's library, which is a candidate of every case."""

MAX_TOKENS = 256
"""Above, no candidate but the library is worth timing."""

_PREFETCHED = 1024  # columns of a program, up to which all of them may be asked for before the predecessor has ended
_SWEPT_BYTES = 256 << 20  # several times the L2 cache of any GPU
_CANNOT_RUN = (OutOfResources, PTXASError)  # a plan on this GPU: more registers or shared memory than it has
_MAX_COPIES = 128  # of weights so small that a whole model of them stays in that cache


@dataclass(frozen=True, slots=True)
class Limits:
    """What a GPU has for the programs of a kernel; by default what an H200 has."""

    multiprocessors: int = 132
    shared_bytes: int = 227 << 10  # of one program

    @classmethod
    def of(cls, device: torch.device) -> Limits:
        """Those of a GPU; the default for anything else."""
        if device.type != "cuda":
            return cls()
        index = torch.cuda.current_device() if device.index is None else device.index
        properties: dict[str, int] = driver.active.utils.get_device_properties(index)
        return cls(properties["multiprocessor_count"], properties["max_shared_mem"])


@dataclass(frozen=True, slots=True)
class Timing:
    """What `tune` found for one case: microseconds of each plan that runs, and the plan that it had until then."""

    case: Case
    times: Mapping[Plan, float]
    before: Plan  # not among `times` if it cannot run on this GPU

    @property
    def weight_bytes(self) -> int:
        rows, size = _rows_and_bytes(self.case)
        return rows * self.case.n * self.case.k * size

    @property
    def best(self) -> Plan:
        return min(self.times, key=self.times.__getitem__)


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


def candidates(case: Case, limits: Limits | None = None) -> list[Plan]:
    """The plans worth timing for `case`, the vendor's library first; tens of them."""
    plans = [BLAS]
    if case.num_tokens <= gemv.MAX_TOKENS:
        plans += _gemv_plans(case)
    if case.num_tokens <= MAX_TOKENS:
        plans += _skinny_plans(case, limits or Limits())
    return plans


def _rows_and_bytes(case: Case) -> tuple[int, int]:
    """(weight rows for each output, bytes of an element)"""
    return 2 if case.op == "norm_linear_swiglu" else 1, getattr(torch, case.dtype).itemsize


def _gemv_plans(case: Case) -> Iterator[Plan]:
    rows, size = _rows_and_bytes(case)
    for block_n, block_k, num_warps in itertools.product((1, 2, 4, 8), (128, 256, 512, 1024, 2048, 4096), (1, 2, 4, 8)):
        held = rows * block_n * block_k * size / (32 * num_warps)  # bytes of the weight in a thread's registers
        if 64 <= held <= 256 and block_k < 2 * case.k and (block_k >= 1024 or block_k >= case.k):
            yield Plan(path="gemv", block_n=block_n, block_k=block_k, num_warps=num_warps)


def _skinny_plans(case: Case, limits: Limits) -> Iterator[Plan]:
    rows, size = _rows_and_bytes(case)
    block_t = max(16, min(128, 1 << (case.bucket - 1).bit_length()))
    splits = (1, 2, 4, 8) if rows == 1 else (1,)
    blocks = (64, 128) if rows == 1 else (32, 64)  # gates and ups make twice as many rows
    steps = ((64, 6), (128, 4), (256, 3))  # with the most stages that ever pay
    for block_n, split_k, (block_k, most_stages) in itertools.product(blocks, splits, steps):
        programs, span = -(-case.n // block_n) * split_k, -(-case.k // split_k)
        stages = min(most_stages, limits.shared_bytes // (block_k * (rows * block_n + block_t) * size))
        fills = 3 * programs >= limits.multiprocessors and (split_k == 1 or programs <= 4 * limits.multiprocessors)
        if fills and stages >= 2 and block_k <= span:
            fetched = {0, span // block_k if span <= _PREFETCHED else 2}
            for tma, prefetch in itertools.product((False, True) if size == 2 else (False,), sorted(fetched)):
                yield Plan(
                    path="skinny",
                    block_n=block_n,
                    block_k=block_k,
                    block_t=block_t,
                    split_k=split_k,
                    num_warps=8 if block_n == 128 else 4,
                    num_stages=stages,
                    prefetch=prefetch,
                    tma=tma,
                )


class _Problem:
    """Random inputs of a case, and the operation on them."""

    def __init__(self, case: Case, device: torch.device) -> None:
        rows, size = _rows_and_bytes(case)
        dtype = getattr(torch, case.dtype)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).mul_(shape[-1] ** -0.5).to(dtype)

        self.copies = max(1, min(_MAX_COPIES, _SWEPT_BYTES // (rows * case.n * case.k * size)))
        self._weights = [LinearWeight(noise(rows * case.n, case.k)) for _ in range(self.copies)]
        self._x, self._gain = noise(case.num_tokens, case.k), noise(case.k)
        self._residual = noise(case.num_tokens, case.n)
        self._op = case.op

    def run(self, ops: TritonOps, copy: int) -> object:
        """The operation, and for `linear_add` the norm that follows it in a block, which may add up its parts."""
        w = self._weights[copy]
        if self._op == "linear":
            return ops.linear(self._x, w)
        if self._op == "linear_add":
            return ops.rms_norm(ops.linear_add(self._x, w, self._residual), self._residual[0], 1e-6)
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


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _plans(case: Case, table: Table, limits: Limits) -> list[Plan]:
    """The candidates, and what the table says now."""
    return list(dict.fromkeys([*candidates(case, limits), table.plan(case)]))


def _ops(plan: Plan, table: Table, device: torch.device, pdl: bool) -> TritonOps:
    return TritonOps(
        device, table=dataclasses.replace(table, rules=(Rule(plan=plan),), measured={}), defer=True, pdl=pdl
    )


def compile_candidates(
    cases: Sequence[Case], device: torch.device, num_processes: int, *, directory: Path | None = None
) -> None:
    """Have `num_processes` new processes compile what `tune` will launch into Triton's cache.

    They never touch the GPU. What they leave out, because they fail or there are none, is compiled by `tune`.
    """
    table, limits = load_table(_gpu_name(device), directory), Limits.of(device)
    jobs = [(case, _plans(case, table, limits)) for case in cases]
    spawn = multiprocessing.get_context("spawn")  # a process that has used CUDA must not be forked
    with tempfile.TemporaryDirectory(prefix="kvik-tune-") as claims:
        arguments = jobs, table, compute_capability(device), supports_pdl(device), Path(claims)
        processes = [spawn.Process(target=_compile, args=arguments, daemon=True) for _ in range(num_processes)]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
    if failed := sum(process.exitcode != 0 for process in processes):
        logger.warning("%d of %d processes that compile kernels failed", failed, num_processes)


def _compile(
    jobs: Sequence[tuple[Case, Sequence[Plan]]], table: Table, capability: tuple[int, int], pdl: bool, claims: Path
) -> None:
    """What one process does: launch everything, in the order of `tune`, and compile what no other has claimed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one is told, and ends it
    torch.set_num_threads(1)
    compile_shared(capability, claims)
    meta = torch.device("meta")
    for case, plans in jobs:
        problem = _Problem(case, meta)
        for plan in plans:
            with contextlib.suppress(*_CANNOT_RUN):
                problem.run(_ops(plan, table, meta, pdl), 0)


def tune(
    cases: Sequence[Case], device: torch.device, *, timer: Timer | None = None, directory: Path | None = None
) -> Iterator[Timing]:
    """Time the candidates of one case after the other. Before a case is yielded, its fastest is in the cache.

    `directory` is where the cache lies, if not where users have it; what was measured before stays in it.
    """
    table, limits = load_table(_gpu_name(device), directory), Limits.of(device)
    timer = timer or GraphTimer()
    measured = dict(table.measured)
    for case in cases:
        problem = _Problem(case, device)
        times: dict[Plan, float] = {}
        for plan in _plans(case, table, limits):
            run = partial(problem.run, _ops(plan, table, device, supports_pdl(device)))
            try:
                times[plan] = timer(run, problem.copies)
            except _CANNOT_RUN as error:
                logger.info("%s cannot run %s: %s", case.key, plan, error)
        timing = Timing(case, times, table.plan(case))
        measured[case.key] = timing.best
        save_measured(_gpu_name(device), measured, directory)
        yield timing
