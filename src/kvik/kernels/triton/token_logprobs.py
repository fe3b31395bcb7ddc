"""Log-probabilities of drawn tokens under the raw logits, their ranks, and the best n tokens of each row.

One pass: a program finds a slice's maximum, sum of exponentials, entries above the drawn token, and best n; a second
kernel joins the slices of a row in a fixed order. The result of a row does not depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvik.kernels.triton.sampling_table import DEFAULT_TILES, SamplerTiles

__all__ = ["MAX_TOP", "LogprobBuffers", "token_logprobs"]

MAX_TOP = 20
NO_ID = tl.constexpr(0x7FFFFFFF)


class LogprobBuffers:
    """Results and scratch for up to `max_rows` rows and the `num_top` best tokens of each, allocated once."""

    def __init__(
        self, max_rows: int, vocab_size: int, num_top: int, device: torch.device, tiles: SamplerTiles = DEFAULT_TILES
    ) -> None:
        assert 0 <= num_top <= MAX_TOP
        self.num_top, self.tiles, self.slices = num_top, tiles, -(-vocab_size // tiles.slice)
        width = max(num_top, 1)

        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty((max_rows, *shape), dtype=dtype, device=device)

        self.stats = empty(torch.float32, self.slices, 3)  # maximum, sum of exp(x - maximum), number above the token
        self.slice_logits = empty(torch.float32, self.slices, width)
        self.slice_ids = empty(torch.int32, self.slices, width)
        self.logprobs = empty(torch.float32)
        self.ranks = empty(torch.int32)
        self.top_logprobs = empty(torch.float32, width)
        self.top_ids = empty(torch.int32, width)


@dataclass(frozen=True, slots=True, eq=False)
class _Result:
    """Views of the buffers, valid until the next call."""

    logprobs: Tensor  # [num_rows] float32
    ranks: Tensor  # [num_rows] int32, one more than the number of strictly more likely tokens
    top_logprobs: Tensor  # [num_rows, num_top] float32, best first, the lower id first among equals; -inf ones last
    top_ids: Tensor  # [num_rows, num_top] int32


@triton.jit
def _best(x: tl.tensor, ids: tl.tensor, free: tl.tensor) -> tl.tensor:
    """The largest of the entries that are still free: its value and its id, the lowest among equals."""
    top = tl.max(tl.where(free, x, float("-inf")), 0)
    return top, tl.min(tl.where(free & (x == top), ids, NO_ID), 0)


@triton.jit
def _slice(logits: tl.tensor, tokens: tl.tensor, stats: tl.tensor, slice_logits: tl.tensor, slice_ids: tl.tensor,
           vocab: tl.tensor, stride: tl.tensor, slices: tl.tensor, TOP: tl.constexpr, WIDTH: tl.constexpr,
           BLOCK: tl.constexpr) -> None:  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + index)
    if token >= 0:
        ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + index * stride + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        top = tl.max(x, 0)
        base = tl.where(top == float("-inf"), 0.0, top)
        chosen = tl.load(logits + index * stride + token).to(tl.float32)
        place = index * slices + tl.program_id(1)
        tl.store(stats + 3 * place, top)
        tl.store(stats + 3 * place + 1, tl.sum(tl.exp(x - base), 0))
        tl.store(stats + 3 * place + 2, tl.sum((x > chosen).to(tl.float32), 0))
        free = ids < vocab
        for i in range(TOP):
            value, best = _best(x, ids, free)
            tl.store(slice_logits + place * WIDTH + i, value)
            tl.store(slice_ids + place * WIDTH + i, best)
            free = free & (ids != best)


@triton.jit
def _join(logits: tl.tensor, tokens: tl.tensor, stats: tl.tensor, slice_logits: tl.tensor, slice_ids: tl.tensor,
          logprobs: tl.tensor, ranks: tl.tensor, top_logprobs: tl.tensor, top_ids: tl.tensor, stride: tl.tensor,
          slices: tl.tensor, TOP: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr,
          BLOCK: tl.constexpr) -> None:  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + index)
    if token >= 0:
        part = tl.arange(0, SLICES)
        place = 3 * (index * slices + part)
        tops = tl.load(stats + place, mask=part < slices, other=float("-inf"))
        top = tl.max(tops, 0)
        sums = tl.load(stats + place + 1, mask=part < slices, other=0.0)
        total = tl.log(tl.sum(sums * tl.exp(tops - top), 0))
        above = tl.sum(tl.load(stats + place + 2, mask=part < slices, other=0.0), 0)
        tl.store(logprobs + index, tl.load(logits + index * stride + token).to(tl.float32) - top - total)
        tl.store(ranks + index, above.to(tl.int32) + 1)
        if TOP > 0:
            entry = tl.arange(0, BLOCK)
            x = tl.load(slice_logits + index * slices * WIDTH + entry, mask=entry < slices * TOP, other=float("-inf"))
            ids = tl.load(slice_ids + index * slices * WIDTH + entry, mask=entry < slices * TOP, other=NO_ID)
            free = ids != NO_ID
            for i in range(TOP):
                value, best = _best(x, ids, free)
                tl.store(top_logprobs + index * WIDTH + i, value - top - total)
                tl.store(top_ids + index * WIDTH + i, best)
                free = free & (ids != best)


def token_logprobs(logits: Tensor, tokens: Tensor, buffers: LogprobBuffers) -> _Result:
    """Natural log-probabilities of `tokens` [num_rows] int32 under `logits` [num_rows, vocab], with rank and best n.

    Entries of rows whose token is negative keep what was there. NaN or +inf in the logits gives NaN.
    """
    num_rows, vocab = logits.shape
    width = buffers.slice_ids.shape[2]
    _slice[(num_rows, buffers.slices)](
        logits, tokens, buffers.stats, buffers.slice_logits, buffers.slice_ids, vocab, logits.stride(0),
        buffers.slices, TOP=buffers.num_top, WIDTH=width, BLOCK=buffers.tiles.slice,
        num_warps=buffers.tiles.warps,
    )  # fmt: skip
    _join[(num_rows,)](
        logits, tokens, buffers.stats, buffers.slice_logits, buffers.slice_ids, buffers.logprobs, buffers.ranks,
        buffers.top_logprobs, buffers.top_ids, logits.stride(0), buffers.slices, TOP=buffers.num_top, WIDTH=width,
        SLICES=triton.next_power_of_2(buffers.slices), BLOCK=triton.next_power_of_2(buffers.slices * width),
        num_warps=buffers.tiles.warps,
    )  # fmt: skip
    n, k = num_rows, buffers.num_top
    return _Result(buffers.logprobs[:n], buffers.ranks[:n], buffers.top_logprobs[:n, :k], buffers.top_ids[:n, :k])
