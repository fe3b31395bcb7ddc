"""The sampler of a whole batch on the device: logits in, a token id per row out, the ones of `sampling/sampler`.

    plain rows       draw ──► pick                                       one pass over the logits
    some filtered    peaks ──► top-k, top-p ──► draw ──► pick            `token_filters`
    some edited      edits ──► one of the above                          `logit_edits`

A draw is argmax(log-weight + Gumbel noise), with the noise of `sampling/philox` word for word. Temperature 0 is the
argmax of the logits. The lowest id wins ties. A row gives the same token in every batch: which of the paths the batch
takes decides only what is computed for its neighbours.
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


@triton.jit
def _gumbel(seed: tl.tensor, position: tl.tensor, first: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Noise of the entries [first, first + BLOCK), first a multiple of 4: a Philox call gives that of 4 neighbours."""
    counters = first // 4 + tl.arange(0, BLOCK // 4)
    zeros = counters * 0
    a, b, c, d = tl.philox(seed, counters, position + zeros, zeros, zeros)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])  # a b c d a b c d ...
    uniform = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -tl.log(-tl.log(uniform))


@triton.jit
def _draw(logits: tl.tensor, edited: tl.tensor, rows: tl.tensor, edits: tl.tensor, num_tokens: tl.tensor,
          seed: tl.tensor, temperature: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, log_min_p: tl.tensor,
          peaks: tl.tensor, limits: tl.tensor, best: tl.tensor, best_ids: tl.tensor, vocab: tl.tensor,
          stride: tl.tensor, slices: tl.tensor, FILTERS: tl.constexpr, BLOCK: tl.constexpr,
          SLICES: tl.constexpr) -> None:  # fmt: skip
    """The best entry of one slice of one row, by score: the logit of a greedy row, else log-weight plus noise."""
    index, row = tl.program_id(0), tl.load(rows + tl.program_id(0))
    if row >= 0:
        first = tl.program_id(1) * BLOCK
        ids = first + tl.arange(0, BLOCK)
        x = load_logits(logits, edited, index, tl.load(edits + row), ids, vocab, stride)
        heat = tl.load(temperature + row)
        scores = x
        if heat > 0:
            noise = _gumbel(tl.load(seed + row), tl.load(num_tokens + row), first, BLOCK)
            scores = tl.div_rn(x, tl.maximum(heat, MIN_TEMPERATURE) + tl.zeros_like(x)) + noise
            if FILTERS:  # noqa: SIM102 - one is known when the kernel is compiled, the other is not
                if is_filtered(row, top_k, top_p, log_min_p, vocab):
                    gaps, keys = gap_keys(x, row_peak(peaks, index, slices, SLICES), heat)
                    kept = (keys <= tl.load(limits + index)) & (-gaps >= tl.load(log_min_p + row))
                    scores = tl.where(kept, noise - gaps, float("-inf"))
            scores = tl.where(x == float("-inf"), float("-inf"), scores)
        scores = tl.where((x != x) | (x == float("inf")), float("inf"), scores)  # logits up to 2^28 score less
        top = tl.max(scores, 0)
        winner = tl.min(tl.where(scores == top, ids, NO_ID), 0)
        place = index * slices + tl.program_id(1)
        tl.store(best + place, top)
        tl.store(best_ids + place, tl.where(top == float("inf"), _BROKEN, winner))


@triton.jit
def _pick(rows: tl.tensor, best: tl.tensor, best_ids: tl.tensor, tokens: tl.tensor, slices: tl.tensor,
          SLICES: tl.constexpr) -> None:  # fmt: skip
    """The best of a row's slices."""
    index, part = tl.program_id(0), tl.arange(0, SLICES)
    held = (part < slices) & (tl.load(rows + index) >= 0)
    scores = tl.load(best + index * slices + part, mask=held, other=float("-inf"))
    ids = tl.load(best_ids + index * slices + part, mask=held, other=NO_ID)
    top = tl.max(scores, 0)
    winner = tl.min(tl.where(scores == top, ids, NO_ID), 0)
    tl.store(tokens + index, tl.where(top == float("-inf"), _MASKED, winner))


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
    slices = triton.next_power_of_2(work.slices)
    _draw[(num_rows, work.slices)](
        logits, work.edited, rows, table.edits, table.num_tokens, table.seed, table.temperature, table.top_k,
        table.top_p, table.log_min_p, work.peaks, work.limits, work.best, work.best_ids, vocab, logits.stride(0),
        work.slices, FILTERS=filters, BLOCK=work.tiles.slice, SLICES=slices,
        num_warps=work.tiles.warps, enable_fp_fusion=False,
    )  # fmt: skip
    _pick[(num_rows,)](rows, work.best, work.best_ids, work.tokens, work.slices, SLICES=slices, num_warps=1)
    return work.tokens[:num_rows]
