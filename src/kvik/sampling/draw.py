"""The draw: one of the entries that are left, each with the probability that its log-weight gives it.

It is the Gumbel-max trick: argmax(log-weight + Gumbel noise) is distributed as the softmax of the log-weights
(Maddison, Tarlow, Minka, "A* sampling", arXiv 1411.0030). Done twice, it needs an eighth of the noise, which costs more
than all else: over groups of neighbours with the sums of their weights, then over the entries of the group that won.

    ids    0 .. 7 | 8 .. 15 | 16 .. 23 | ...  ──log of summed weights + noise──► group 1 ──log-weights + noise──► 11
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.sampling.filters import MARGIN, MIN_TEMPERATURE
from kvik.sampling.philox import GROUP, NOISE_RANGE, gumbel_noise, gumbel_row, split_seed

__all__ = ["Draw", "draw_tokens", "groups_of", "groups_of_all"]

Ids: TypeAlias = NDArray[np.int64]
Scores: TypeAlias = NDArray[np.float32]

BATCHED = 256  # candidates up to which a draw shares the batch of the others anyhow


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """A draw of one row that awaits its noise."""

    index: int
    seed: int
    position: int
    groups: Ids  # [n], ascending
    scores: Scores  # [n, GROUP], log-weights of their entries, best 0


def groups_of_all(logits: Tensor, peak: float, temperature: float) -> tuple[Ids, Scores]:
    """The groups of all entries, as `Draw` has them, but for those that no noise can lift above that of the best.

    logits: float32 [vocab] with the finite maximum `peak`.
    """
    temperature = max(temperature, MIN_TEMPERATURE)
    gaps = torch.nn.functional.pad(logits - peak, (0, -len(logits) % GROUP), value=-math.inf).view(-1, GROUP)
    floor = -(NOISE_RANGE + math.log(GROUP) + MARGIN) * temperature  # a group weighs up to GROUP times its best
    groups = (gaps.amax(1) >= floor).nonzero().squeeze(-1)
    return groups.cpu().numpy(), (gaps.index_select(0, groups) / temperature).cpu().numpy()


def groups_of(ids: Tensor, scores: Tensor) -> tuple[Ids, Scores]:
    """The groups of some entries, as `Draw` has them: ids [n], ascending, and log-weights [n]."""
    numbers, places = np.divmod(ids.cpu().numpy(), GROUP)
    is_first = np.diff(numbers, prepend=-1) > 0
    grouped = np.full((int(is_first.sum()), GROUP), -np.inf, dtype=np.float32)
    grouped[is_first.cumsum() - 1, places] = scores.cpu().numpy()
    return numbers[is_first], grouped


def draw_tokens(draws: list[Draw], vocab_size: int) -> dict[int, int]:
    """The vocabulary entry that each draw gives, by the draw's index."""
    num_groups = -(-vocab_size // GROUP)
    with np.errstate(divide="ignore"):  # a group may weigh nothing
        weights = [np.log(np.exp(draw.scores).sum(1)) for draw in draws]
    winners = _winners(draws, [draw.groups for draw in draws], weights, num_groups, 0)
    entries = [draw.groups[at] * GROUP + np.arange(GROUP) for draw, at in zip(draws, winners, strict=True)]
    scores = [draw.scores[at] for draw, at in zip(draws, winners, strict=True)]
    tokens = _winners(draws, entries, scores, num_groups * GROUP, 1)
    return {draw.index: int(ids[at]) for draw, ids, at in zip(draws, entries, tokens, strict=True)}


def _winners(draws: list[Draw], ids: list[Ids], scores: list[Scores], size: int, level: int) -> list[int]:
    """Where in `ids`, some of [0, size), the score plus noise is highest; the first where several are equal.

    Whole rows get noise where many candidates are left, the others in one batch: a Philox call yields that of four
    neighbours, of which a lone candidate uses one.
    """
    dense = [len(some) > max(size // 4, BATCHED) for some in ids]
    sparse = iter(_noise([(draw, some) for draw, some, all_ in zip(draws, ids, dense, strict=True) if not all_], level))
    winners = []
    for draw, some, score, all_ in zip(draws, ids, scores, dense, strict=True):
        noise = gumbel_row(draw.seed, draw.position, size, level)[some] if all_ else next(sparse)
        winners.append(int((score + noise).argmax()))
    return winners


def _noise(candidates: list[tuple[Draw, Ids]], level: int) -> list[Scores]:
    if not candidates:
        return []
    sizes = [len(ids) for _, ids in candidates]
    words = np.array([(*split_seed(draw.seed), draw.position) for draw, _ in candidates], dtype=np.uint64)
    words = words.repeat(sizes, axis=0).T  # [3, candidates]
    ids = np.concatenate([ids for _, ids in candidates]).astype(np.uint64)
    noise = gumbel_noise(words[:2], words[2], ids, level)
    return np.split(noise, np.cumsum(sizes)[:-1])
