"""The sampler of a whole batch on the device: logits in, a token id per row out, the ones of `sampling/sampler`.

    plain rows       draw ──► pick                                       one pass over the logits
    some filtered    peaks ──► top-k, top-p ──► draw ──► pick            `token_filters`
    some edited      edits ──► one of the above                          `logit_edits`

A draw is that of `sampling/draw`, with the noise of `sampling/philox` word for word: `draw` finds the best group of
neighbours of each slice of a row, by the sum of their weights plus noise, and `pick` an entry of the best of all.
Temperature 0 is the argmax of the logits. The lowest id wins ties. A row gives the same token in every batch: which of
the paths the batch takes decides only what is computed for its neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvik.kernels.triton.logit_edits import edit_logits
from kvik.kernels.triton.sampling_table import SamplingTable, SamplingWorkspace
from kvik.kernels.triton.token_filters import find_limits, gap_keys, is_filtered, load_logits, row_peak

__all__ = ["BROKEN", "MASKED", "sample"]

MASKED = -1
"""In place of a token: every entry is masked (or the row is padding)."""
BROKEN = -2
"""In place of a token: the logits hold NaN or +inf."""

_MASKED, _BROKEN = tl.constexpr(MASKED), tl.constexpr(BROKEN)
NO_ID = tl.constexpr(0x7FFFFFFF)
MIN_TEMPERATURE = tl.constexpr(2.0**-100)
GROUP = tl.constexpr(8)  # that of `sampling/philox`


@triton.jit
def _exponential(seed: tl.tensor, position: tl.tensor, first: tl.tensor, LEVEL: tl.constexpr,
                 COUNT: tl.constexpr) -> tl.tensor:  # fmt: skip
    """e of the Gumbel noise -ln e of the candidates [first, first + COUNT), multiples of 4: four to a Philox call."""
    counters = first // 4 + tl.arange(0, COUNT // 4)
    zeros = counters * 0
    a, b, c, d = tl.philox(seed, counters, position + zeros, LEVEL + zeros, zeros)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [COUNT])  # a b c d a b c d ...
    uniform = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -tl.log(uniform)


@triton.jit
def _scores(logits: tl.tensor, edited: tl.tensor, edits: tl.tensor, index: tl.tensor, row: tl.tensor, ids: tl.tensor,
            heat: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, log_min_p: tl.tensor, peaks: tl.tensor,
            limits: tl.tensor, vocab: tl.tensor, stride: tl.tensor, slices: tl.tensor, FILTERS: tl.constexpr,
            SLICES: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Log-weights of entries, or logits of a greedy row; -inf where filtered or masked, NaN or +inf where broken."""
    x = load_logits(logits, edited, index, tl.load(edits + row), ids, vocab, stride)
    scores = x * tl.where(heat > 0, 1.0 / tl.maximum(heat, MIN_TEMPERATURE), 1.0)
    if FILTERS:  # noqa: SIM102 - one is known when the kernel is compiled, the other is not
        if (heat > 0) & is_filtered(row, top_k, top_p, log_min_p, vocab):
            gaps, keys = gap_keys(x, row_peak(peaks, index, slices, SLICES), heat)
            kept = (keys <= tl.load(limits + index)) & (-gaps >= tl.load(log_min_p + row))
            dropped = (x < float("inf")) & ~kept  # NaN is not below infinity
            scores = tl.where(dropped, float("-inf"), tl.where(kept, -gaps, x))
    return scores


@triton.jit
def _draw(logits: tl.tensor, edited: tl.tensor, rows: tl.tensor, edits: tl.tensor, num_tokens: tl.tensor,
          seed: tl.tensor, temperature: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, log_min_p: tl.tensor,
          peaks: tl.tensor, limits: tl.tensor, best: tl.tensor, best_groups: tl.tensor, vocab: tl.tensor,
          stride: tl.tensor, slices: tl.tensor, FILTERS: tl.constexpr, BLOCK: tl.constexpr,
          SLICES: tl.constexpr) -> None:  # fmt: skip
    """The best group of one slice of one row, by score: its best logit in a greedy row, else log-weight plus noise."""
    index, row = tl.program_id(0), tl.load(rows + tl.program_id(0))
    if row >= 0:
        COUNT: tl.constexpr = BLOCK // GROUP
        first, heat = tl.program_id(1) * COUNT, tl.load(temperature + row)
        ids = first * GROUP + tl.arange(0, BLOCK)
        scores = _scores(logits, edited, edits, index, row, ids, heat, top_k, top_p, log_min_p, peaks, limits, vocab,
                         stride, slices, FILTERS, SLICES)  # fmt: skip
        scores = tl.reshape(scores, [COUNT, GROUP])
        peak = tl.max(scores, 1)
        base = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
        weights = tl.sum(tl.exp(scores - base[:, None]), 1)  # 1 at least where an entry is left
        found = peak
        if heat > 0:
            e = _exponential(tl.load(seed + row), tl.load(num_tokens + row), first, 0, COUNT)
            found = tl.where(weights > 0, base + tl.log(tl.maximum(weights, 1.0) / e), float("-inf"))
        found = tl.where(weights < float("inf"), found, float("inf"))  # logits up to 2^28 score less
        top = tl.max(found, 0)
        winner = tl.min(tl.where(found == top, first + tl.arange(0, COUNT), NO_ID), 0)
        place = index * slices + tl.program_id(1)
        tl.store(best + place, top)
        tl.store(best_groups + place, winner)


@triton.jit
def _pick(logits: tl.tensor, edited: tl.tensor, rows: tl.tensor, edits: tl.tensor, num_tokens: tl.tensor,
          seed: tl.tensor, temperature: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, log_min_p: tl.tensor,
          peaks: tl.tensor, limits: tl.tensor, best: tl.tensor, best_groups: tl.tensor, tokens: tl.tensor,
          vocab: tl.tensor, stride: tl.tensor, slices: tl.tensor, FILTERS: tl.constexpr,
          SLICES: tl.constexpr) -> None:  # fmt: skip
    """The best entry of the best group of a row's slices."""
    index, row, part = tl.program_id(0), tl.load(rows + tl.program_id(0)), tl.arange(0, SLICES)
    token = tl.full([], _MASKED, tl.int32)
    if row >= 0:
        found = tl.load(best + index * slices + part, mask=part < slices, other=float("-inf"))
        groups = tl.load(best_groups + index * slices + part, mask=part < slices, other=NO_ID)
        top = tl.max(found, 0)
        if top == float("inf"):
            token = tl.full([], _BROKEN, tl.int32)
        elif top > float("-inf"):
            first = tl.min(tl.where(found == top, groups, NO_ID), 0) * GROUP
            ids, heat = first + tl.arange(0, GROUP), tl.load(temperature + row)
            scores = _scores(logits, edited, edits, index, row, ids, heat, top_k, top_p, log_min_p, peaks, limits,
                             vocab, stride, slices, FILTERS, SLICES)  # fmt: skip
            if heat > 0:
                scores -= tl.log(_exponential(tl.load(seed + row), tl.load(num_tokens + row), first, 1, GROUP))
            token = tl.min(tl.where(scores == tl.max(scores, 0), ids, NO_ID), 0)
    tl.store(tokens + index, token)


def sample(
    logits: Tensor, rows: Tensor, table: SamplingTable, work: SamplingWorkspace, *,
    edits: bool, top_k: bool, top_p: bool, min_p: bool,
) -> Tensor:  # fmt: skip
    """The next token of each row, int32 [num_rows]: MASKED or BROKEN where there is none. A view of `work.tokens`.

    logits: [num_rows, vocab] bf16, fp16 or fp32, rows any stride apart; left unchanged. rows: [num_rows] int32 of
    `table`, -1 for padding. `edits`, `top_k`, `top_p` and `min_p` say whether any row needs that work: nothing is
    copied from the device to find out.
    """
    num_rows, vocab = logits.shape
    if edits:
        edit_logits(logits, rows, table, work)
    filters = top_k or top_p or min_p
    if filters:
        find_limits(logits, rows, table, work, top_k=top_k, top_p=top_p)
    row_state = (
        logits, work.edited, rows, table.edits, table.num_tokens, table.seed, table.temperature, table.top_k,
        table.top_p, table.log_min_p, work.peaks, work.limits, work.best, work.best_groups,
    )  # fmt: skip
    sizes = (vocab, logits.stride(0), work.slices)
    fixed = {"FILTERS": filters, "SLICES": triton.next_power_of_2(work.slices), "enable_fp_fusion": False}
    _draw[(num_rows, work.slices)](*row_state, *sizes, BLOCK=work.tiles.slice, num_warps=work.tiles.draw_warps, **fixed)
    _pick[(num_rows,)](*row_state, work.tokens, *sizes, num_warps=1, **fixed)
    return work.tokens[:num_rows]
