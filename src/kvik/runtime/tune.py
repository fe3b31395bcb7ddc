"""Measure which plan is fastest for each projection of a model, and keep it in the user's cache for `load_table`.

A plan is timed within a decode step, not alone: what a projection waits for, and what waits for it, decides as much as
its own speed. Some layers of the model with random weights are captured as a CUDA graph once for each plan, and one
projection after the other gets its fastest, with those chosen before it in place:

    step of 8    qkv [plan ?]  o [now]     gate, up [now]  down [now]  head [now]
    step of 8    qkv [best]    o [plan ?]  gate, up [now]  down [now]  head [now]    ...

`Compilers` has processes fill Triton's cache ahead, because compiling takes a hundred times as long as timing.
"""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources, PTXASError

from kvik.attention.base import ForwardBatch
from kvik.attention.triton import TritonAttention
from kvik.kernels.triton.candidates import (
    BLAS,
    MAX_TOKENS,
    Limits,
    candidates,
    decoder_cases,
    refinements,
    weight_bytes,
)  # fmt: skip
from kvik.kernels.triton.compile_only import StandInDriver, compile_only, compute_capability, has_nvidia_driver
from kvik.kernels.triton.dispatch import Case, Plan, Rule, Table, load_table, save_measured
from kvik.kernels.triton.features import Features
from kvik.kernels.triton.ops import TritonOps
from kvik.layers.rope import RopeTable
from kvik.log import logger
from kvik.models.decoder import Decoder
from kvik.models.loader import build_weights, load_weights
from kvik.models.spec import DecoderSpec
from kvik.runtime.gpu import gpu_attention
from kvik.runtime.graphs import GraphTimer, Timer
from kvik.runtime.kv_pool import KVPool

__all__ = ["Compilers", "Shape", "Timing", "tune"]

_CANNOT_RUN = (OutOfResources, PTXASError)  # a plan on this GPU: more registers or shared memory than it has
_SWEPT_BYTES = 512 << 20  # of weights and of keys and values, several times the L2 cache of any GPU
_FEWEST_LAYERS = 8
_CONTEXT = (64, 1024)  # tokens of a sequence, from shortest to longest
_BLOCK_SIZE = 64
_REFINED, _FINALISTS, _FINALS = 3, 6, 3  # plans whose neighbours are timed, plans timed again, and how often
_NOISE = 0.002  # by which a plan has to be faster than the one that it replaces


@dataclass(frozen=True, slots=True)
class Shape:
    """A model, as far as the speed of its kernels depends on it."""

    spec: DecoderSpec
    dtype: torch.dtype

    def cases(self, num_tokens: int) -> list[Case]:
        """The projections of a decode step, each once."""
        spec, dtype = self.spec, str(self.dtype).removeprefix("torch.")
        return decoder_cases(
            spec.hidden_size, spec.q_size, spec.kv_size, spec.intermediate_size, spec.vocab_size, dtype, (num_tokens,)
        )

    @property
    def part(self) -> DecoderSpec:
        """The layers that are timed: enough that no weight is found in the L2 cache."""
        *block, _ = self.cases(1)
        layer = sum(map(weight_bytes, block))
        count = min(self.spec.num_layers, max(_FEWEST_LAYERS, -(-_SWEPT_BYTES // layer)))
        return replace(self.spec, num_layers=count, windows=self.spec.windows[:count])


@dataclass(frozen=True, slots=True)
class Timing:
    """What `tune` found for one case: microseconds of the step with each plan that runs, and the plan until then."""

    case: Case
    times: Mapping[Plan, float]
    before: Plan  # not among `times` if it cannot run on this GPU

    @property
    def best(self) -> Plan:
        """The fastest, but the plan until then where nothing is faster by more than noise."""
        fastest = min(self.times, key=self.times.__getitem__)
        held = self.times.get(self.before, float("inf")) <= self.times[fastest] * (1 + _NOISE)
        return self.before if held else fastest


class _Step:
    """A decode step of `num_tokens` sequences of mixed lengths through `model`, with a KV cache of its own."""

    def __init__(self, model: Decoder, num_tokens: int) -> None:
        shortest, longest = _CONTEXT
        lengths = [shortest + (longest - shortest) * (2 * i + 1) // (2 * num_tokens) for i in range(num_tokens)]
        random.Random(0).shuffle(lengths)
        counts = [-(-length // _BLOCK_SIZE) for length in lengths]
        spec, dtype, device = model.spec, model.weights.embedding.dtype, model.weights.embedding.device
        layer = 2 * sum(counts) * _BLOCK_SIZE * spec.kv_size * dtype.itemsize
        held = min(spec.num_layers, -(-_SWEPT_BYTES // layer))
        part = replace(spec, num_layers=held, windows=spec.windows[:held])
        pool = KVPool(part, sum(counts), _BLOCK_SIZE, dtype, device)
        self._kv = [pool.layers[i % held] for i in range(spec.num_layers)]
        self._model = model
        tables = torch.zeros(num_tokens, max(counts), dtype=torch.int32)
        for row, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
            tables[row, :count] = torch.arange(end - count, end)
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        positions = (seq_lens - 1).long()
        blocks = tables.gather(1, positions[:, None] // _BLOCK_SIZE)[:, 0]
        slots = blocks.long() * _BLOCK_SIZE + positions % _BLOCK_SIZE
        starts = torch.arange(num_tokens + 1, dtype=torch.int32)
        tensors: list[Tensor] = [torch.arange(num_tokens), positions, slots, starts, seq_lens, tables]
        input_ids, positions, slots, query_starts, seq_lens, tables = (tensor.to(device) for tensor in tensors)
        self._batch = ForwardBatch(
            input_ids, positions, slots, query_starts, seq_lens, tables, None, tuple(range(num_tokens + 1)),
            tuple(lengths), rope_lens=positions + 1 if spec.rope.depends_on_length else None,
        )  # fmt: skip

    def run(self, table: Table, features: Features) -> Tensor:
        """Its logits, by the plans of `table`."""
        model = self._model
        assert isinstance(model.attention, TritonAttention)
        model.ops = TritonOps(model.weights.embedding.device, table=table, defer=True, features=features)
        with torch.inference_mode():
            model.attention.prepare(self._batch)
            return model.ops.linear(model.forward(self._batch, self._kv), model.weights.lm_head)


def _model(shape: Shape, device: torch.device, features: Features) -> Decoder:
    """The layers that are timed, with random weights; on the meta device, where tensors have no memory, with none."""
    spec, longest = shape.part, _CONTEXT[1]
    if device.type == "meta":
        weights = build_weights(spec, shape.dtype, device, fill=lambda views: None)
    else:
        weights = load_weights(Path(), spec, dtype=shape.dtype, device=device, load_format="dummy")
    attention = gpu_attention(
        spec, MAX_TOKENS, MAX_TOKENS, longest, device, dtype=shape.dtype, deterministic=False, features=features
    )
    ops = TritonOps(device, table=load_table("any"), defer=True, features=features)
    return Decoder(spec, weights, RopeTable(spec.rope, longest, device), ops, attention)


def _with(table: Table, case: Case, plan: Plan) -> Table:
    return replace(table, measured={**table.measured, case.key: plan})


class Compilers:
    """Processes that launch steps on torch's meta device, which compiles their kernels. They never touch the GPU.

    What they leave out, because they fail or there are none, is compiled by `tune`. To be closed.
    """

    def __init__(self, shape: Shape, device: torch.device, num_processes: int) -> None:
        capability = compute_capability(device)
        features, stand_in = Features.of_capability(capability), StandInDriver(capability)
        self._jobs: dict[tuple[Case, Plan], Future[None]] = {}
        compile_only(stand_in, lambda kernel: False)
        try:
            # Triton's hash of a function depends on which others were hashed before it: all of them here, once.
            model, table = _model(shape, torch.device("meta"), features), load_table("any")
            plans = [BLAS, Plan(path="gemv", block_n=1), Plan(path="skinny", split_k=2)]
            for plan in plans + [Plan(path="hopper")] * features.hopper:
                _Step(model, 1).run(replace(table, rules=(Rule(plan=plan),), measured={}), features)
            self._pool = ProcessPoolExecutor(
                num_processes,
                get_context("fork"),
                initializer=_start_compiling,
                initargs=(model, stand_in, table, features),
            )
            self._pool.submit(int).result()  # forks
        finally:
            driver.reset_active()
            knobs.runtime.jit_cache_hook = None

    def start(self, case: Case, plans: Sequence[Plan]) -> None:
        """Have what these plans launch compiled, soon."""
        with contextlib.suppress(BrokenProcessPool):
            for plan in plans:
                if (case, plan) not in self._jobs:
                    self._jobs[case, plan] = self._pool.submit(_compile, case, plan)

    def finish(self, case: Case, plans: Sequence[Plan]) -> None:
        """Return when all of it is compiled, or failed."""
        self.start(case, plans)
        for plan in plans:
            if (case, plan) in self._jobs and (error := self._jobs[case, plan].exception()) is not None:
                logger.warning("a process that compiles kernels failed with %s: %s", type(error).__name__, error)

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


_compiled: tuple[Decoder, Table, Features]  # of a process of `Compilers`: model, plans, what the GPU has
_steps: dict[int, _Step] = {}


def _start_compiling(model: Decoder, stand_in: StandInDriver, table: Table, features: Features) -> None:
    global _compiled
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one is told, and ends it
    torch.set_num_threads(1)
    stand_in.build_launchers = has_nvidia_driver()
    compile_only(stand_in)
    _compiled = model, table, features


def _compile(case: Case, plan: Plan) -> None:
    model, table, features = _compiled
    if case.num_tokens not in _steps:
        _steps[case.num_tokens] = _Step(model, case.num_tokens)
    with contextlib.suppress(*_CANNOT_RUN):
        _steps[case.num_tokens].run(_with(table, case, plan), features)


class _Search:
    """The search for the plan of one case after the other, in the step that all of them are part of."""

    def __init__(
        self, step: _Step, features: Features, timer: Timer, limits: Limits, compilers: Compilers | None
    ) -> None:
        self._step, self._features, self._timer = step, features, timer
        self._limits, self._compilers = limits, compilers

    def first(self, case: Case, table: Table) -> list[Plan]:
        """The candidates, and what the table says now."""
        return list(dict.fromkeys([*candidates(case, self._limits), table.plan(case)]))

    def prepare(self, case: Case, table: Table) -> None:
        """Have the first plans of a case compiled while others are timed."""
        if self._compilers is not None:
            self._compilers.start(case, self.first(case, table))

    def timing(self, case: Case, table: Table) -> Timing:
        times: dict[Plan, float] = {}
        before = table.plan(case)
        self._time(case, table, self.first(case, table), times)
        near = [other for plan in _fastest(times, _REFINED) for other in refinements(case, plan)]
        self._time(case, table, [plan for plan in dict.fromkeys(near) if plan not in times], times)
        finalists = list(dict.fromkeys([*_fastest(times, _FINALISTS), *([before] if before in times else [])]))
        for _ in range(_FINALS):
            self._time(case, table, finalists, times)
        return Timing(case, times, before)

    def _run(self, table: Table, copy: int) -> Tensor:
        return self._step.run(table, self._features)

    def _time(self, case: Case, table: Table, plans: Sequence[Plan], times: dict[Plan, float]) -> None:
        if self._compilers is not None:
            self._compilers.finish(case, plans)
        for plan in plans:
            try:
                us = self._timer(partial(self._run, _with(table, case, plan)), 1)
                times[plan] = min(us, times.get(plan, us))
            except _CANNOT_RUN as error:
                logger.info("%s cannot run %s: %s", case.key, plan, error)


def _fastest(times: Mapping[Plan, float], count: int) -> list[Plan]:
    return sorted(times, key=times.__getitem__)[:count]


def tune(
    shape: Shape, tokens: Sequence[int], device: torch.device, *, gpu: str,
    timer: Timer | None = None, compilers: Compilers | None = None, directory: Path | None = None,
) -> Iterator[Timing]:  # fmt: skip
    """Find the plans of decode steps of each of these numbers of tokens, up to `MAX_TOKENS`, projection by projection.

    Before a case is yielded, its plan is in the cache, under the name `gpu`; what was measured before stays there.
    `directory` is where the cache lies, if not where users have it.
    """
    features = Features.of(device)
    table, limits, timer = load_table(gpu, directory), Limits.of(device), timer or GraphTimer(launches=1)
    model = _model(shape, device, features)
    todo = [(size, case) for size in tokens for case in shape.cases(size)]
    search, size = None, 0
    for index, (num_tokens, case) in enumerate(todo):
        if search is None or num_tokens != size:
            size, search = num_tokens, None  # frees the cache of the last step first
            search = _Search(_Step(model, num_tokens), features, timer, limits, compilers)
            search.prepare(case, table)
        if index + 1 < len(todo):
            search.prepare(todo[index + 1][1], table)
        timing = search.timing(case, table)
        table = _with(table, case, timing.best)
        save_measured(gpu, table.measured, directory)
        yield timing
