"""Temperature, top-k, top-p and min-p: which vocabulary entries stay in the draw, and with which log-weight.

Each filter is a floor: an entry stays if its log-weight reaches it, so entries that tie with the last one kept stay.
Order and meaning are those of Hugging Face `generate`: temperature, top_k, top_p, min_p. The work shrinks early:

    logits ──max──► gaps (<= 0) ──cheap window──► few candidates ──exact floors──► survivors
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kvik.sampling.philox import GROUP, NOISE_RANGE
from kvik.sampling_params import SamplingParams

__all__ = ["survivors", "top_k_bound", "top_k_floor", "top_p_floor"]

MIN_TEMPERATURE = 2.0**-100  # keeps gap / temperature away from 0 / 0 in float32
HOPELESS = 2 * NOISE_RANGE + math.log(GROUP)
MARGIN = 0.01  # widens the window beyond any rounding; the exact floors come after it
CHUNK = 64
LOWEST = torch.finfo(torch.float32).min


def top_k_bound(values: Tensor, k: int) -> float:
    """A lower bound of the k-th largest of `values` [n] in one pass: the k-th largest maximum of disjoint groups.

    k groups hold an entry that reaches the bound, so at least k entries do; few others are expected to.
    """
    num_groups = values.numel() // CHUNK
    if k > num_groups:
        return LOWEST
    maxima = values[: num_groups * CHUNK].view(CHUNK, num_groups).amax(0)  # [num_groups]
    return max(maxima.topk(k).values[-1].item(), LOWEST)


def top_k_floor(scores: Tensor, k: int) -> float:
    """The k-th largest of `scores` [n]; -inf where there are no more than k."""
    return scores.topk(k).values[-1].item() if k < scores.numel() else -math.inf


def top_p_floor(scores: Tensor, top_p: float, total: float) -> float:
    """The lowest of the largest `scores` that together first reach `top_p` of the weight `total` (crossing one kept).

    `scores` [n] are log-weights that hold at least this nucleus; `total` is the weight of all entries, given or not.
    Source: Holtzman et al., "The curious case of neural text degeneration", arXiv 1904.09751.
    """
    ordered = np.sort(-scores.cpu().numpy())  # [n], best first; vectorised, 30 times as fast as torch.sort on a CPU
    reached = np.exp(-ordered[:-1]).astype(np.float64).cumsum()
    return -float(ordered[int((reached < top_p * total).sum())])


def _keep(ids: Tensor, scores: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """The entries whose score reaches `floor`, in the order given: ids [n] and scores [n]."""
    kept = (scores >= floor).nonzero().squeeze(-1)
    return ids.index_select(0, kept), scores.index_select(0, kept)


def _window(gaps: Tensor, top_k: int, temperature: float, params: SamplingParams) -> float:
    """A floor for `gaps` [vocab] that no entry of the final set, and no entry that could win the draw, misses.

    Of an entry more than HOPELESS below the best, either its group is more than NOISE_RANGE below that of the best, or
    itself below the best of its group, to whose weight it adds less than float32 holds. Entries lighter than
    (1 - top_p) / vocab of the best weigh less than 1 - top_p together, so none is in the nucleus. min_p is a floor
    already.
    """
    if top_k:
        return top_k_bound(gaps, top_k)
    floor = -HOPELESS
    if params.min_p:
        floor = max(floor, math.log(params.min_p))
    if params.top_p < 1.0:
        floor = max(floor, math.log((1.0 - params.top_p) / gaps.numel()))
    return (floor - MARGIN) * temperature


def survivors(logits: Tensor, peak: float, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Ids (ascending, int64 [n]) and log-weights (float32 [n], best 0) of the entries that stay in the draw.

    `logits` [vocab] are float32 with finite maximum `peak`; `params.temperature` is positive. Entries that no noise can
    lift above the best are left out: the draw is the same without them.
    """
    temperature = max(params.temperature, MIN_TEMPERATURE)
    top_k = params.top_k if params.top_k < logits.numel() else 0
    gaps = logits - peak  # [vocab]
    ids = (gaps >= _window(gaps, top_k, temperature, params)).nonzero().squeeze(-1)  # [n], ascending
    scores = gaps.index_select(0, ids) / temperature
    if top_k:
        ids, scores = _keep(ids, scores, top_k_floor(scores, top_k))
    if params.top_p < 1.0:
        weights = (scores if top_k else gaps / temperature).exp()
        ids, scores = _keep(ids, scores, top_p_floor(scores, params.top_p, weights.sum(dtype=torch.float64).item()))
    if params.min_p:
        ids, scores = _keep(ids, scores, math.log(params.min_p))
    return ids, scores
