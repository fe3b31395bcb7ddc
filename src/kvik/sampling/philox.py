"""Counter-based random numbers: Philox4x32-10, and the Gumbel noise of a draw.

Every number is a pure function of a key and a counter; there is no generator state. A draw has two levels: of groups of
`GROUP` neighbours of the vocabulary one is drawn, then an entry of it. The noise of candidate `v` of a `level` (0: the
group v, 1: the vocabulary entry v), when the token at `position` (0 is the first prompt token) is drawn with `seed`, is
keyed

    key     = (seed & 0xffffffff, seed >> 32)          counter = (v // 4, position, level, 0)      output word = v % 4

so a draw cannot depend on the batch, the schedule, the cache, or on which other candidates get noise at all. The words
equal Random123's `philox4x32_R(10, ...)` and Triton's `tl.philox(seed, v // 4, position, level, 0)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GROUP", "NOISE_RANGE", "gumbel_noise", "gumbel_row", "philox4x32", "split_seed", "uniform"]

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF

GROUP = 8
"""Neighbours of the vocabulary of which the first level of a draw picks one group: an eighth of the noise, which costs
more than all else, and as many as one load of a GPU has."""

NOISE_RANGE = 19.5
"""Gumbel noise from uniforms in [2^-24, 1 - 2^-24] lies in [-2.82, 16.64]: what is further below another cannot win."""


def split_seed(seed: int) -> tuple[int, int]:
    """The low and high 32-bit words of a seed (taken modulo 2^64): the key of its draws."""
    return seed & MASK, (seed >> 32) & MASK


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox4x32 on 32-bit words held in int64: counter [4, n], key [2, n] or [2, 1] -> [4, n].

    The words 0 and 2 (`even`) go through the same steps, as do 1 and 3 (`odd`), so each pair is one tensor. Products
    wrap around in int64, which leaves their 64 bits right; whatever lies above the low 32 bits of `odd` and `key`, or
    comes from the sign in the shift, is cleared by the mask. Source: Salmon, Moraes, Dror, Shaw, "Parallel random
    numbers: as easy as 1, 2, 3", SC 2011.
    """
    multipliers = torch.tensor(MULTIPLIERS[::-1], device=counter.device).unsqueeze(-1)  # [2, 1]
    steps = torch.tensor(KEY_STEPS, device=counter.device).unsqueeze(-1)  # [2, 1]
    even, odd = counter[0::2], counter[1::2]  # [2, n]
    for _ in range(ROUNDS):
        product = even.flip(0).mul_(multipliers)
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(MASK)
        odd = product
        key = key + steps
    return torch.stack((even, odd & MASK), dim=1).flatten(0, 1)


def uniform(words: Tensor) -> Tensor:
    """Float32 in (0, 1), never 0 or 1, from 32-bit words: the centre of one of 2^23 equal cells, exact in float32."""
    return (words >> 9).to(torch.float32).add_(0.5).mul_(2.0**-23)


def _gumbel(words: Tensor) -> Tensor:
    return uniform(words).log_().neg_().log_().neg_()


def gumbel_noise(key: Tensor, positions: Tensor, ids: Tensor, level: int) -> Tensor:
    """Gumbel(0, 1) noise of single candidates, [n]: key words [2, n], positions [n], candidates [n], int64."""
    levels = torch.full_like(ids, level)
    words = philox4x32(torch.stack((ids >> 2, positions, levels, torch.zeros_like(ids))), key)  # [4, n]
    return _gumbel(words.gather(0, (ids & 3).unsqueeze(0)).squeeze(0))


def gumbel_row(seed: int, position: int, size: int, level: int, device: torch.device | str = "cpu") -> Tensor:
    """Gumbel(0, 1) noise of the candidates [0, size): `gumbel_noise` at a quarter of the work."""
    counters = torch.zeros(4, (size + 3) // 4, dtype=torch.int64, device=device)  # [4, size / 4]
    counters[0] = torch.arange(counters.shape[1], device=device)
    counters[1], counters[2] = position, level
    key = torch.tensor(split_seed(seed), device=device).unsqueeze(-1)  # [2, 1]
    lanes = torch.stack(philox4x32(counters, key).unbind(), dim=-1)  # [size / 4, 4]; transposing is six times slower
    return _gumbel(lanes.flatten()[:size])
