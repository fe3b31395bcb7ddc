"""Projections for Hopper: what `skinny` computes, with a warp that copies and groups of warps that multiply.

Written in Gluon, Triton's language without hidden layouts. A program has 64 rows of the weight for each of one to three
groups of four warps, and up to 256 tokens; so 192 rows take all multiprocessors of an H200 where a power of two would
leave a third of them idle, and a weight leaves memory once. One more warp copies by TMA: weights from before the
predecessor has ended, as far as shared memory reaches, then tokens beside them. Results leave by TMA, too.

Gates and ups lie in turns of 8 rows, which is how a tensor core's result has both of a pair in one thread.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kvik.kernels.api import LinearWeight
from kvik.kernels.triton.barriers import barriers, meet
from kvik.kernels.triton.dispatch import CUTS, Plan
from kvik.kernels.triton.pdl import start_dependents, wait_for_inputs
from kvik.kernels.triton.tiles import silu

__all__ = ["launch_options", "linear_hopper"]

ROWS = gl.constexpr(64)  # of a group of warps
STEP = gl.constexpr(64)  # columns that are copied at a time: 128 bytes, as wgmma wants them
TOGETHER = gl.constexpr(16)  # blocks of tokens, all of whose rows are computed before the next ones begin
TURN = gl.constexpr(8)  # rows of gates, then of ups
_HALF = 112 << 10  # bytes of shared memory with which a second program has room on a multiprocessor


@gluon.jit
def _copy_weights(weight: gl.tensor, row: gl.tensor, column: gl.tensor, full: gl.tensor, weights: gl.tensor,
                  slot: gl.tensor, GROUPS: gl.constexpr, SWIGLU: gl.constexpr) -> None:  # fmt: skip
    for part in gl.static_range(GROUPS):
        place = weights.index(slot * GROUPS + part)
        if SWIGLU:
            tma.async_copy_global_to_shared(weight, [row // TURN + 4 * part, 0, 0, column], full, place)
        else:
            tma.async_copy_global_to_shared(weight, [row + ROWS * part, column], full, place)


@gluon.jit
def _copy_tokens(x: gl.tensor, rest: gl.tensor, token: gl.tensor, column: gl.tensor, full: gl.tensor,
                 tokens: gl.tensor, rest_tokens: gl.tensor, slot: gl.tensor) -> None:  # fmt: skip
    tma.async_copy_global_to_shared(x, [token, column], full, tokens.index(slot))
    if rest is not None:
        tma.async_copy_global_to_shared(rest, [token + tokens.shape[1], column], full, rest_tokens.index(slot))


@gluon.jit
def _copy(x: gl.tensor, rest: gl.tensor, weight: gl.tensor, ring: gl.tensor, place: gl.tensor, STEPS: gl.constexpr,
          BLOCK_T: gl.constexpr, SWIGLU: gl.constexpr, PDL: gl.constexpr) -> None:  # fmt: skip
    """The part of the warp that copies."""
    weights, tokens, rest_tokens, full, empty = ring
    token, row, split = place
    first = split * (STEPS * STEP)
    STAGES: gl.constexpr = full.shape[0]
    GROUPS: gl.constexpr = weights.shape[0] // STAGES
    BYTES: gl.constexpr = (GROUPS * ROWS + BLOCK_T) * STEP * 2
    AHEAD: gl.constexpr = STAGES if STAGES < STEPS else STEPS
    for step in gl.static_range(AHEAD):
        mbarrier.expect(full.index(step), BYTES)
        _copy_weights(weight, row, first + STEP * step, full.index(step), weights, step, GROUPS, SWIGLU)
    wait_for_inputs(PDL)
    for step in gl.static_range(AHEAD):
        _copy_tokens(x, rest, token, first + STEP * step, full.index(step), tokens, rest_tokens, step)
    for step in range(STAGES, STEPS):
        slot, column = step % STAGES, first + STEP * step
        mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(slot), BYTES)
        _copy_weights(weight, row, column, full.index(slot), weights, slot, GROUPS, SWIGLU)
        _copy_tokens(x, rest, token, column, full.index(slot), tokens, rest_tokens, slot)


@gluon.jit
def _finish(acc: gl.tensor, bias: gl.tensor, residual: gl.tensor, rows: gl.tensor, tokens: gl.tensor, n: gl.tensor,
            m: gl.tensor, dtype: gl.constexpr) -> gl.tensor:  # fmt: skip
    """acc [rows, tokens] after bias and residual, rounded after each."""
    if bias is not None:
        acc += gl.load(bias + rows, mask=rows < n, other=0.0).to(gl.float32)[:, None]
    result = acc.to(dtype)
    if residual is not None:
        places = tokens.to(gl.int64)[None, :] * n + rows[:, None]
        more = gl.load(residual + places, mask=(rows < n)[:, None] & (tokens < m)[None, :], other=0.0)
        result = (result.to(gl.float32) + more.to(gl.float32)).to(dtype)
    return result


@gluon.jit
def _store(acc: gl.tensor, bias: gl.tensor, residual: gl.tensor, out: gl.tensor, buffer: gl.tensor, token: gl.tensor,
           row: gl.tensor, split: gl.tensor, m: gl.tensor, n: gl.tensor, SPLIT_K: gl.constexpr,
           SWIGLU: gl.constexpr) -> None:  # fmt: skip
    """Write acc, tokens from `token` on and rows from `row` on, as they are or, through `buffer`, finished."""
    LAYOUT: gl.constexpr = acc.type.layout
    WIDTH: gl.constexpr = acc.shape[1]
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    tokens = token + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    if SPLIT_K > 1:
        places = (split * m + tokens).to(gl.int64)[None, :] * n + rows[:, None]
        gl.store(out + places, acc, mask=(rows < n)[:, None] & (tokens < m)[None, :])
    else:
        if SWIGLU:
            gate, up = gl.split(acc.reshape([ROWS // (2 * TURN), 2, TURN, WIDTH]).permute((0, 2, 3, 1)))
            gate, up = gate.reshape([ROWS // 2, WIDTH]), up.reshape([ROWS // 2, WIDTH])
            PAIR: gl.constexpr = gate.type.layout
            rows = row + gl.arange(0, ROWS // 2, gl.SliceLayout(1, PAIR))
            tokens = token + gl.arange(0, WIDTH, gl.SliceLayout(0, PAIR))
            gate = _finish(gate, bias, None, rows, tokens, n, m, buffer.dtype)
            up = _finish(up, None if bias is None else bias + n, None, rows, tokens, n, m, buffer.dtype)
            result = (silu(gate).to(gl.float32) * up.to(gl.float32)).to(buffer.dtype)
        else:
            result = _finish(acc, bias, residual, rows, tokens, n, m, buffer.dtype)
        buffer.permute((1, 0)).store(result)
        fence_async_shared()
        meet()
        tma.async_copy_shared_to_global(out, [token, row], buffer)


@gluon.jit
def _zeros(tokens: gl.tensor) -> gl.tensor:
    WIDTH: gl.constexpr = tokens.shape[1]
    return gl.zeros([ROWS, WIDTH], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16]))


@gluon.jit
def _multiply(PART: gl.constexpr, given: gl.tensor, ring: gl.tensor, results: gl.tensor, place: gl.tensor,
              STEPS: gl.constexpr, REST: gl.constexpr, SPLIT_K: gl.constexpr, SWIGLU: gl.constexpr,
              PDL: gl.constexpr) -> None:  # fmt: skip
    """The part of a group of warps: 64 rows of the weight."""
    weights, tokens, rest_tokens, full, empty = ring
    bias, residual, m, n = given
    out, rest_out, buffers, rest_buffers, done = results
    STAGES: gl.constexpr = full.shape[0]
    GROUPS: gl.constexpr = weights.shape[0] // STAGES
    token, row, split = place
    wait_for_inputs(PDL)
    acc = _zeros(tokens)
    rest = acc
    if REST > 0:
        rest = _zeros(rest_tokens)
    for step in range(STEPS):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        rows = weights.index(slot * GROUPS + PART)
        acc = warpgroup_mma(rows, tokens.index(slot).permute((1, 0)), acc, is_async=True)
        if REST > 0:
            rest = warpgroup_mma(rows, rest_tokens.index(slot).permute((1, 0)), rest, is_async=True)
            acc, rest = warpgroup_mma_wait(2, deps=(acc, rest))
        else:
            acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
    if REST > 0:
        acc, rest = warpgroup_mma_wait(0, deps=(acc, rest))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    if SPLIT_K == 1:
        # Results take the place of tokens, which other groups may still be reading.
        mbarrier.arrive(done, count=1)
        mbarrier.wait(done, 0)
    row += PART * (ROWS // 2 if SWIGLU else ROWS)
    _store(acc, bias, residual, out, buffers.index(PART), token, row, split, m, n, SPLIT_K, SWIGLU)
    if REST > 0:
        _store(rest, bias, residual, rest_out, rest_buffers.index(PART), token + tokens.shape[1], row, split, m, n,
               SPLIT_K, SWIGLU)  # fmt: skip
    if SPLIT_K == 1:
        tma.store_wait(0)


@gluon.jit
def _buffers(tokens: gl.tensor, out: gl.tensor) -> gl.tensor:
    """The memory of tokens, for results of a gate and up that share 64 rows of the weight."""
    shape: gl.constexpr = [2 * tokens.shape[0], tokens.shape[1], ROWS // 2]
    return tokens._reinterpret(tokens.dtype, shape, out.layout)


@gluon.jit(do_not_specialize=["m"])
def _linear_hopper(x: gl.tensor, rest: gl.tensor, weight: gl.tensor, bias: gl.tensor, residual: gl.tensor,
                   out: gl.tensor, rest_out: gl.tensor, m: gl.tensor, n: gl.tensor, K: gl.constexpr,
                   GROUPS: gl.constexpr, WIDTH: gl.constexpr, REST: gl.constexpr, STAGES: gl.constexpr,
                   SPLIT_K: gl.constexpr, SWIGLU: gl.constexpr, PDL: gl.constexpr) -> None:  # fmt: skip
    """GROUPS * 64 rows of the weight (half gates, half ups with SWIGLU) times WIDTH + REST tokens, over a part of K.

    Programs: TOGETHER blocks of tokens and all rows, of which those of the same rows are neighbours; parts of K."""
    STEPS: gl.constexpr = (K + SPLIT_K * STEP - 1) // (SPLIT_K * STEP)  # of each part; past K there is nothing to add
    OUTPUTS: gl.constexpr = ROWS // 2 if SWIGLU else ROWS
    BLOCK_T: gl.constexpr = WIDTH + REST
    start_dependents(PDL)
    blocks, rows = gl.cdiv(m, BLOCK_T), gl.cdiv(n, GROUPS * OUTPUTS)
    before = gl.program_id(0) // (TOGETHER * rows) * TOGETHER
    together = gl.minimum(blocks - before, TOGETHER)
    index = gl.program_id(0) - before * rows
    place = ((before + index % together) * BLOCK_T, index // together * (GROUPS * OUTPUTS), gl.program_id(1))
    dtype: gl.constexpr = x.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, STEP], dtype)
    weights = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, ROWS, STEP], tile)
    tokens = gl.allocate_shared_memory(dtype, [STAGES, WIDTH, STEP], x.layout)
    rest_tokens = tokens
    if REST > 0:
        rest_tokens = gl.allocate_shared_memory(dtype, [STAGES, REST, STEP], rest.layout)
    full, empty, done = barriers(STAGES, 1), barriers(STAGES, GROUPS), barriers(1, GROUPS).index(0)
    meet()
    boxes, buffers, rest_buffers = weights, tokens, rest_tokens
    if SWIGLU:  # and K is in one part
        boxes = weights._reinterpret(dtype, [STAGES * GROUPS, 4, 2, TURN, STEP], weight.layout)
        buffers, rest_buffers = _buffers(tokens, out), _buffers(rest_tokens, out if REST == 0 else rest_out)
    ring, boxes = (weights, tokens, rest_tokens, full, empty), (boxes, tokens, rest_tokens, full, empty)
    given, results = (bias, residual, m, n), (out, rest_out, buffers, rest_buffers, done)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_multiply, (0, given, ring, results, place, STEPS, REST, SPLIT_K, SWIGLU, PDL)),
                (_copy, (x, rest, weight, boxes, place, STEPS, BLOCK_T, SWIGLU, PDL)),
            ],
            [1], [32],
        )  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (0, given, ring, results, place, STEPS, REST, SPLIT_K, SWIGLU, PDL)),
                (_multiply, (1, given, ring, results, place, STEPS, REST, SPLIT_K, SWIGLU, PDL)),
                (_copy, (x, rest, weight, boxes, place, STEPS, BLOCK_T, SWIGLU, PDL)),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (0, given, ring, results, place, STEPS, REST, SPLIT_K, SWIGLU, PDL)),
                (_multiply, (1, given, ring, results, place, STEPS, REST, SPLIT_K, SWIGLU, PDL)),
                (_multiply, (2, given, ring, results, place, STEPS, REST, SPLIT_K, SWIGLU, PDL)),
                (_copy, (x, rest, weight, boxes, place, STEPS, BLOCK_T, SWIGLU, PDL)),
            ],
            [4, 4, 1], [160, 160, 24],
        )  # fmt: skip


def token_widths(plan: Plan, num_tokens: int) -> tuple[int, int]:
    """The tokens of a program, as widths of two products or of one and 0: of `plan.block_t`, CUTS or 8 eighths, as few
    as leave the number of programs what it is."""
    block_t = plan.block_t
    needed = cdiv(num_tokens, cdiv(num_tokens, block_t))
    for cut in CUTS:
        if block_t >= 64 and needed <= cut * block_t // 8:
            return block_t // 2, (cut - 4) * block_t // 8
    # 512 threads leave each too few registers for a product of 256 tokens in one instruction.
    return (128, 128) if plan.block_n > 128 and block_t == 256 else (block_t, 0)


def launch_options(plan: Plan) -> dict[str, int]:
    """What Triton has to know of a program beside the kernel's arguments: its warps, and registers of a thread.

    A program of one group leaves as many registers as it can to its neighbours, its like or the kernel that follows.
    """
    if plan.block_n > ROWS.value:
        return {"num_warps": 4}
    two_fit = plan.num_stages * (plan.block_n + plan.block_t) * STEP.value * 2 <= _HALF
    return {"num_warps": 4, "maxnreg": 128 if two_fit or plan.block_t < 128 else plan.block_t // 2 + 80}


def linear_hopper(
    x: Tensor, w: LinearWeight, plan: Plan, *, residual: Tensor | None = None, swiglu: bool = False, pdl: bool = False
) -> Tensor:
    """residual + act(x @ weight.T + bias) of x [num_tokens, K] -> [num_tokens, N], as `skinny` has it.

    Tensors are contiguous, of 16 bits, and K and N multiples of 8.
    """
    (m, k), n = x.shape, w.weight.shape[0] // (1 + swiglu)
    split_k = 1 if swiglu else plan.split_k
    groups, (width, rest) = plan.block_n // ROWS.value, token_widths(plan, m)
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    out = x.new_empty((m, n)) if split_k == 1 else x.new_empty((split_k, m, n), dtype=torch.float32)

    def tiles(tensor: Tensor, shape: list[int], strides: list[int], box: list[int]) -> TensorDescriptor:
        return TensorDescriptor(tensor, shape, strides, box, gl.NVMMASharedLayout.get_default_for(box, dtype))

    turn, outputs = TURN.value, ROWS.value // (1 + swiglu)
    weight = tiles(w.weight, [n, k], [k, 1], [ROWS.value, STEP.value])
    if swiglu:
        weight = tiles(w.weight, [n // turn, 2, turn, k], [turn * k, n * k, k, 1], [4, 2, turn, STEP.value])
    inputs = [tiles(x, [m, k], [k, 1], [tokens, STEP.value]) if tokens else None for tokens in (width, rest)]
    results: list[Tensor | TensorDescriptor | None] = [out, out]  # parts are stored without TMA
    if split_k == 1:
        results = [tiles(out, [m, n], [n, 1], [tokens, outputs]) if tokens else None for tokens in (width, rest)]
    _linear_hopper[cdiv(m, width + rest) * cdiv(n, groups * outputs), split_k](
        *inputs, weight, w.bias, residual, *results, m, n,
        K=k, GROUPS=groups, WIDTH=width, REST=rest, STAGES=plan.num_stages, SPLIT_K=split_k, SWIGLU=swiglu, PDL=pdl,
        **launch_options(plan),
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out
