"""The draw: one of the entries that are left, each with the probability that its log-weight gives it.

It is the Gumbel-max trick: argmax(log-weight + Gumbel noise) is distributed as the softmax of the log-weights
(Maddison, Tarlow, Minka, "A* sampling", arXiv 1411.0030). Done twice, it needs an eighth of the noise, which costs more
than all else: over groups of neighbours with the sums of their weights, then over the entries of the group that won.

    ids    0 .. 7 | 8 .. 15 | 16 .. 23 | ...  ──log of summed weights + noise──► group 1 ──log-weights + noise──► 11
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvik.sampling.filters import MARGIN, MIN_TEMPERATURE
from kvik.sampling.philox import GROUP, NOISE_RANGE, gumbel_noise, gumbel_row, split_seed

__all__ = ["Draw", "draw_tokens", "groups_of", "groups_of_all"]


BATCHED = 256  # candidates up to which a draw shares the batch of the others anyhow


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """A draw of one row that awaits its noise."""

    index: int
    seed: int
    position: int
    groups: Tensor  # [n] int64, ascending
    scores: Tensor  # [n, GROUP] float32, log-weights of their entries, best 0


def groups_of_all(logits: Tensor, peak: float, temperature: float) -> tuple[Tensor, Tensor]:
    """The groups of all entries, as `Draw` has them, but for those that no noise can lift above that of the best.

    logits: float32 [vocab] with the finite maximum `peak`.
    """
    temperature = max(temperature, MIN_TEMPERATURE)
    gaps = torch.nn.functional.pad(logits - peak, (0, -len(logits) % GROUP), value=-math.inf).view(-1, GROUP)
    floor = -(NOISE_RANGE + math.log(GROUP) + MARGIN) * temperature  # a group weighs up to GROUP times its best
    groups = (gaps.amax(1) >= floor).nonzero().squeeze(-1)
    return groups, gaps.index_select(0, groups) / temperature


def groups_of(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The groups of some entries, as `Draw` has them: ids [n], ascending, and log-weights [n]."""
    groups, places = torch.unique_consecutive(ids // GROUP, return_inverse=True)
    grouped = scores.new_full((len(groups), GROUP), -math.inf)
    grouped[places, ids % GROUP] = scores
    return groups, grouped


def draw_tokens(draws: list[Draw], vocab_size: int) -> dict[int, int]:
    """The vocabulary entry that each draw gives, by the draw's index."""
    weights = [draw.scores.exp().sum(1).log_() for draw in draws]
    num_groups = -(-vocab_size // GROUP)
    winners = _winners(draws, [draw.groups for draw in draws], weights, num_groups, 0)
    entries, scores = list[Tensor](), list[Tensor]()
    for draw, winner in zip(draws, winners, strict=True):
        first = int(draw.groups[winner]) * GROUP
        entries.append(torch.arange(first, first + GROUP, device=draw.groups.device))
        scores.append(draw.scores[winner])
    tokens = _winners(draws, entries, scores, num_groups * GROUP, 1)
    return {draw.index: int(ids[at]) for draw, ids, at in zip(draws, entries, tokens, strict=True)}


def _winners(draws: list[Draw], ids: list[Tensor], scores: list[Tensor], size: int, level: int) -> list[int]:
    """Where in `ids`, some of [0, size), the score plus noise is highest; the first where several are equal.

    Whole rows get noise where many candidates are left, the others in one batch: a Philox call yields that of four
    neighbours, of which a lone candidate uses one.
    """
    dense = [len(some) > max(size // 4, BATCHED) for some in ids]
    sparse = iter(_noise([(draw, some) for draw, some, all_ in zip(draws, ids, dense, strict=True) if not all_], level))
    winners = []
    for draw, some, score, all_ in zip(draws, ids, scores, dense, strict=True):
        noise = gumbel_row(draw.seed, draw.position, size, level, some.device)[some] if all_ else next(sparse)
        winners.append(int((score + noise).argmax()))
    return winners


def _noise(candidates: list[tuple[Draw, Tensor]], level: int) -> list[Tensor]:
    if not candidates:
        return []
    device = candidates[0][1].device
    sizes = [len(ids) for _, ids in candidates]
    words = torch.tensor(
        [(*split_seed(draw.seed), draw.position) for draw, _ in candidates], device=device
    )  # [draws, 3]
    owners = torch.repeat_interleave(torch.tensor(sizes, device=device))  # [candidates]
    words = words.t()[:, owners]  # [3, candidates]
    return list(torch.split(gumbel_noise(words[:2], words[2], torch.cat([ids for _, ids in candidates]), level), sizes))
