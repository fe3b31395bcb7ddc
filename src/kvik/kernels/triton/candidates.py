"""Which plans are worth timing for a projection, and how to time them.

`candidates` is a grid over what matters most; `refinements` are the rest of the numbers, around a plan that did well.
`kvik.runtime.tune` times both within the step of a model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from triton.runtime.driver import driver

from kvik.kernels.triton import gemv
from kvik.kernels.triton.dispatch import Case, Plan
from kvik.kernels.triton.features import Features

__all__ = ["BLAS", "MAX_TOKENS", "Limits", "candidates", "decoder_cases", "refinements", "weight_bytes"]

BLAS = Plan(path="blas")
"""The vendor's library, which is a candidate of every case."""

MAX_TOKENS = 256
"""Above, no candidate but the library is worth timing."""

_PREFETCHED = 1024  # columns of a program, up to which all of them may be asked for before the predecessor has ended
_STEPS = ((64, (4, 6)), (128, (3, 4, 6, 8)), (256, (3, 4)))  # columns of a step, and depths of the pipeline


@dataclass(frozen=True, slots=True)
class Limits:
    """What a GPU has for the programs of a kernel; by default what an H200 has."""

    multiprocessors: int = 132
    shared_bytes: int = 227 << 10  # of one program
    hopper: bool = True  # see `Features`

    @classmethod
    def of(cls, device: torch.device) -> Limits:
        """Those of a GPU; the default for anything else."""
        if device.type != "cuda":
            return cls()
        index = torch.cuda.current_device() if device.index is None else device.index
        properties: dict[str, int] = driver.active.utils.get_device_properties(index)
        return cls(properties["multiprocessor_count"], properties["max_shared_mem"], Features.of(device).hopper)


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
    plans, limits = [BLAS], limits or Limits()
    if case.num_tokens <= gemv.MAX_TOKENS:
        plans += _gemv_plans(case)
    if case.num_tokens <= MAX_TOKENS:
        plans += _skinny_plans(case, limits)
    if limits.hopper and 4 < case.num_tokens <= MAX_TOKENS and getattr(torch, case.dtype).itemsize == 2:
        plans += _hopper_plans(case, limits)
    return plans


def refinements(case: Case, plan: Plan) -> list[Plan]:
    """Plans that differ from `plan` in how its tiles arrive: asked for ahead, by the tensor memory accelerator."""
    if plan.path != "skinny":
        return []
    span = -(-case.k // plan.split_k)
    ahead = {0, 1, 2, span // plan.block_k if span <= _PREFETCHED else 2}
    engines = (False, True) if _rows_and_bytes(case)[1] == 2 else (False,)
    plans = (replace(plan, prefetch=count, tma=tma) for count in sorted(ahead) for tma in engines)
    return [other for other in plans if other != plan]


def weight_bytes(case: Case) -> int:
    """Bytes of the weight of `case`."""
    rows, size = _rows_and_bytes(case)
    return rows * case.n * case.k * size


def _rows_and_bytes(case: Case) -> tuple[int, int]:
    """(weight rows for each output, bytes of an element)"""
    return 2 if case.op == "norm_linear_swiglu" else 1, getattr(torch, case.dtype).itemsize


def _gemv_plans(case: Case) -> Iterator[Plan]:
    rows, size = _rows_and_bytes(case)
    for block_n, block_k, num_warps in itertools.product((1, 2, 4, 8), (128, 256, 512, 1024, 2048, 4096), (1, 2, 4, 8)):
        held = rows * block_n * block_k * size / (32 * num_warps)  # bytes of the weight in a thread's registers
        if 64 <= held <= 256 and block_k < 2 * case.k and (block_k >= 1024 or block_k >= case.k):
            yield Plan(path="gemv", block_n=block_n, block_k=block_k, num_warps=num_warps)


def _hopper_plans(case: Case, limits: Limits) -> Iterator[Plan]:
    rows, _ = _rows_and_bytes(case)
    padded = max(8, 1 << (case.bucket - 1).bit_length())
    tokens = (padded,) if padded <= 64 else (padded // 2, padded)
    splits = (1, 2, 3, 4, 6, 8) if rows == 1 else (1,)
    for block_n, block_t, split_k in itertools.product((64, 128, 192), tokens, splits):
        programs = -(-rows * case.n // block_n) * -(-case.num_tokens // block_t) * split_k
        steps = -(-case.k // (64 * split_k))
        depth = min((limits.shared_bytes - 2048) // (128 * (block_n + block_t)), steps, 12)
        fills = 2 * programs >= limits.multiprocessors and (split_k == 1 or programs <= 2 * limits.multiprocessors)
        if not fills or depth < max(2, block_n // 64):
            continue
        plan = Plan(path="hopper", block_n=block_n, block_k=64, block_t=block_t, split_k=split_k, num_stages=depth)
        yield plan
        if block_n == 64 and block_t <= 128 and depth > 5:  # two programs at a time on a multiprocessor
            yield replace(plan, num_stages=depth // 2)


def _skinny_plans(case: Case, limits: Limits) -> Iterator[Plan]:
    rows, size = _rows_and_bytes(case)
    padded = max(16, 1 << (case.bucket - 1).bit_length())
    splits = (1, 2, 3, 4, 8) if rows == 1 else (1,)
    blocks = (64, 128) if rows == 1 else (32, 64)  # gates and ups make twice as many rows
    tokens = (padded,) if padded <= 32 else (padded // 2, padded)
    for block_n, block_t, split_k, (block_k, depths) in itertools.product(blocks, tokens, splits, _STEPS):
        programs = -(-case.n // block_n) * -(-case.num_tokens // block_t) * split_k
        fills = 3 * programs >= limits.multiprocessors and (split_k == 1 or programs <= 4 * limits.multiprocessors)
        held = block_k * (rows * block_n + block_t) * size  # bytes of a step
        warps = 8 if rows * block_n == 128 else 4
        if not fills or split_k * block_k > case.k or rows * block_n * block_t > 4096 * warps:
            continue
        engines = (False, True) if rows == 1 and block_t >= 64 and size == 2 else (False,)  # fewer tokens: refinements
        for num_stages, tma in itertools.product(depths, engines):
            if num_stages * held <= limits.shared_bytes:
                yield Plan(
                    path="skinny",
                    block_n=block_n,
                    block_k=block_k,
                    block_t=block_t,
                    split_k=split_k,
                    num_warps=warps,
                    num_stages=num_stages,
                    tma=tma,
                )
