"""Top-k and top-p without sorting: the exact floor of each, by a radix search over the bits of the log-weights.

With gap = (peak - logit) / temperature >= 0, the bits of a gap are an integer key that orders like it. Each filter asks
for the smallest key whose entries at or below it number k, or weigh top_p of the total; a pass over the vocabulary
measures 16 candidate keys and settles 4 bits, so 8 passes find it to the last bit, ties included:

    pass 0    0 |....|....|....|....| 2^31         sums at the ends of 16 cells; the first that reaches the target
    pass 1           0 |..|..|..|..|               is cut again

A row of the vocabulary is cut into slices, one program each, and the slices' sums are added in one order: nothing here
depends on the batch or on timing. Sums are float64, as in `sampling/filters`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvik.kernels.triton.sampling_table import FILTER_PASSES, SamplingTable, SamplingWorkspace

__all__ = ["find_limits", "gap_keys", "is_filtered", "load_logits", "row_peak"]

MIN_TEMPERATURE = tl.constexpr(2.0**-100)  # that of `sampling/filters`
INFINITY_KEY = tl.constexpr(0x7F800000)
LARGEST_KEY = tl.constexpr(0x7FFFFFFF)
CELLS = tl.constexpr(16)
PASSES = tl.constexpr(FILTER_PASSES)


@triton.jit
def load_logits(logits: tl.tensor, edited: tl.tensor, index: tl.tensor, edits: tl.tensor, ids: tl.tensor,
                vocab: tl.tensor, stride: tl.tensor) -> tl.tensor:  # fmt: skip
    """Logits of one row in fp32, the edited ones where the row has edits; -inf beyond the vocabulary."""
    held = ids < vocab
    # Nearly all rows have none: their logits are on their way before it is known.
    x = tl.load(logits + index.to(tl.int64) * stride + ids, mask=held, other=float("-inf")).to(tl.float32)
    if edits != 0:
        x = tl.load(edited + index.to(tl.int64) * vocab + ids, mask=held, other=float("-inf"))
    return x


@triton.jit
def is_filtered(row: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, log_min_p: tl.tensor,
                vocab: tl.tensor) -> tl.tensor:  # fmt: skip
    k = tl.load(top_k + row)
    return ((k > 0) & (k < vocab)) | (tl.load(top_p + row) < 1.0) | (tl.load(log_min_p + row) > float("-inf"))


@triton.jit
def row_peak(peaks: tl.tensor, index: tl.tensor, slices: tl.tensor, SLICES: tl.constexpr) -> tl.tensor:
    part = tl.arange(0, SLICES)
    return tl.max(tl.load(peaks + index * slices + part, mask=part < slices, other=float("-inf")), 0)


@triton.jit
def gap_keys(x: tl.tensor, peak: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """How far below the peak logits are, over the temperature, and the same as integers; masked entries are at inf."""
    divisor = tl.maximum(temperature, MIN_TEMPERATURE) + tl.zeros_like(x)
    gaps = tl.where(x == float("-inf"), float("inf"), tl.abs(tl.div_rn(x - peak, divisor)))
    return gaps, gaps.to(tl.int32, bitcast=True)


@triton.jit
def _peaks(logits: tl.tensor, edited: tl.tensor, rows: tl.tensor, edits: tl.tensor, peaks: tl.tensor,
           vocab: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr) -> None:  # fmt: skip
    index, row = tl.program_id(0), tl.load(rows + tl.program_id(0))
    if row >= 0:
        ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = load_logits(logits, edited, index, tl.load(edits + row), ids, vocab, stride)
        tl.store(peaks + index * tl.num_programs(1) + tl.program_id(1), tl.max(x, 0))


@triton.jit
def _totals(sums: tl.tensor, index: tl.tensor, step: tl.tensor, slices: tl.tensor, SLICES: tl.constexpr) -> tl.tensor:
    """What lies at or below each candidate key of a pass: [CELLS] float64."""
    part, cell = tl.arange(0, SLICES)[:, None], tl.arange(0, CELLS)[None, :]
    place = (index * PASSES + step).to(tl.int64) * slices + part
    return tl.sum(tl.load(sums + place * CELLS + cell, mask=part < slices, other=0.0), 0)


@triton.jit
def _low(sums: tl.tensor, lows: tl.tensor, index: tl.tensor, row: tl.tensor, step: tl.tensor, top_k: tl.tensor,
         top_p: tl.tensor, slices: tl.tensor, TOP_P: tl.constexpr, SLICES: tl.constexpr) -> tl.tensor:  # fmt: skip
    """The lowest key that pass `step` has left, from the sums and the low of that pass."""
    cell = tl.arange(0, CELLS)
    if TOP_P:
        everything = _totals(sums, index, 0, slices, SLICES)
        target = tl.load(top_p + row) * tl.sum(tl.where(cell == CELLS - 1, everything, 0.0), 0)
    else:
        target = tl.load(top_k + row).to(tl.float64)
    missed = tl.sum((_totals(sums, index, step, slices, SLICES) < target).to(tl.int32), 0)
    return tl.load(lows + index * PASSES + step) + (missed << (28 - 4 * step))


@triton.jit(do_not_specialize=["step"])
def _measure(logits: tl.tensor, edited: tl.tensor, rows: tl.tensor, edits: tl.tensor, temperature: tl.tensor,
             top_k: tl.tensor, top_p: tl.tensor, peaks: tl.tensor, limits: tl.tensor, sums: tl.tensor,
             lows: tl.tensor, step: tl.tensor, vocab: tl.tensor, stride: tl.tensor, slices: tl.tensor,
             TOP_P: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, SLICES: tl.constexpr) -> None:  # fmt: skip
    """One pass: settle the bits of the last one, and sum this slice up to each of the next candidate keys."""
    index, row = tl.program_id(0), tl.load(rows + tl.program_id(0))
    k = tl.load(top_k + row, mask=row >= 0, other=0)
    active = (k > 0) & (k < vocab)
    if TOP_P:
        active = tl.load(top_p + row, mask=row >= 0, other=1.0) < 1.0
    if active:
        low = 0
        if step > 0:
            low = _low(sums, lows, index, row, step - 1, top_k, top_p, slices, TOP_P, SLICES)
        if tl.program_id(1) == 0:
            tl.store(lows + index * PASSES + step, low)
        cell = tl.arange(0, CELLS).to(tl.int64)
        pivots = tl.minimum(low + ((cell + 1) << (28 - 4 * step)) - 1, LARGEST_KEY).to(tl.int32)
        peak, heat = row_peak(peaks, index, slices, SLICES), tl.load(temperature + row)
        limit, flags = tl.load(limits + index), tl.load(edits + row)
        found = tl.zeros([PART, CELLS], tl.float64)
        start = tl.program_id(1) * BLOCK
        for first in range(start, tl.minimum(start + BLOCK, vocab), PART):
            ids = first + tl.arange(0, PART)
            x = load_logits(logits, edited, index, flags, ids, vocab, stride)
            gaps, keys = gap_keys(x, peak, heat)
            if TOP_P:
                weights = tl.where(keys <= limit, tl.exp(-gaps), 0.0).to(tl.float64)
            else:
                weights = (ids < vocab).to(tl.float64)
            found += tl.where(keys[:, None] <= pivots[None, :], weights[:, None], 0.0)
        place = (index * PASSES + step).to(tl.int64) * slices + tl.program_id(1)
        tl.store(sums + place * CELLS + cell, tl.sum(found, 0))


@triton.jit
def _settle(rows: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, limits: tl.tensor, sums: tl.tensor, lows: tl.tensor,
            vocab: tl.tensor, slices: tl.tensor, TOP_P: tl.constexpr, SLICES: tl.constexpr) -> None:  # fmt: skip
    """limits[index] = min(limits[index], the key that the passes have found)"""
    index, row = tl.program_id(0), tl.load(rows + tl.program_id(0))
    k = tl.load(top_k + row, mask=row >= 0, other=0)
    active = (k > 0) & (k < vocab)
    if TOP_P:
        active = tl.load(top_p + row, mask=row >= 0, other=1.0) < 1.0
    if active:
        low = _low(sums, lows, index, row, PASSES - 1, top_k, top_p, slices, TOP_P, SLICES)
        tl.store(limits + index, tl.minimum(tl.load(limits + index), low))


def find_limits(
    logits: Tensor, rows: Tensor, table: SamplingTable, work: SamplingWorkspace, *, top_k: bool, top_p: bool
) -> None:
    """Leave each row's peaks per slice in `work.peaks` and the largest key that top-k and top-p keep in `work.limits`.

    `top_k` and `top_p` say whether any row uses the filter; top_p counts what top_k has left.
    """
    (num_rows, vocab), tiles = logits.shape, work.tiles
    both = {"SLICES": triton.next_power_of_2(work.slices), "num_warps": tiles.warps, "enable_fp_fusion": False}
    _peaks[(num_rows, work.slices)](
        logits,
        work.edited,
        rows,
        table.edits,
        work.peaks,
        vocab,
        logits.stride(0),
        BLOCK=tiles.slice,
        num_warps=tiles.warps,
    )
    work.limits.fill_(INFINITY_KEY.value)
    for nucleus in [False] * top_k + [True] * top_p:
        for step in range(FILTER_PASSES):
            _measure[(num_rows, work.slices)](
                logits, work.edited, rows, table.edits, table.temperature, table.top_k, table.top_p, work.peaks,
                work.limits, work.sums, work.lows, step, vocab, logits.stride(0), work.slices, TOP_P=nucleus,
                BLOCK=tiles.slice, PART=tiles.part, **both,
            )  # fmt: skip
        _settle[(num_rows,)](
            rows, table.top_k, table.top_p, work.limits, work.sums, work.lows, vocab, work.slices, TOP_P=nucleus, **both
        )
