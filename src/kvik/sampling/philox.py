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

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["GROUP", "NOISE_RANGE", "Words", "gumbel_noise", "gumbel_row", "philox4x32", "split_seed", "uniform"]

Words: TypeAlias = NDArray[np.uint64]
"""32-bit words, in integers that hold their products."""

ROUNDS = 10
MULTIPLIERS: Words = np.array([[0xCD9E8D57], [0xD2511F53]], dtype=np.uint64)  # of the words 2 and 0
KEY_STEPS: Words = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
MASK = 0xFFFFFFFF
LOW, WIDTH = np.uint64(MASK), np.uint64(32)

GROUP = 8
"""Neighbours of the vocabulary of which the first level of a draw picks one group: an eighth of the noise, which costs
more than all else, and as many as one load of a GPU has."""

NOISE_RANGE = 19.5
"""Gumbel noise from uniforms in [2^-24, 1 - 2^-24] lies in [-2.82, 16.64]: what is further below another cannot win."""


def split_seed(seed: int) -> tuple[int, int]:
    """The low and high 32-bit words of a seed (taken modulo 2^64): the key of its draws."""
    return seed & MASK, (seed >> 32) & MASK


def philox4x32(counter: Words, key: Words) -> Words:
    """Ten rounds of Philox4x32: counter [4, n], key [2, n] or [2, 1] -> [4, n].

    The words 0 and 2 (`even`) go through the same steps, as do 1 and 3 (`odd`), so each pair is one array. In numpy,
    because a draw has few of them, and torch takes several times as long to call. Source: Salmon, Moraes, Dror, Shaw,
    "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    even, odd = counter[0::2], counter[1::2]  # [2, n]
    for _ in range(ROUNDS):
        product = even[::-1] * MULTIPLIERS
        even, odd = (product >> WIDTH) ^ odd ^ key, product & LOW
        key = (key + KEY_STEPS) & LOW
    return np.stack((even, odd), axis=1).reshape(4, -1)


def uniform(words: Words) -> NDArray[np.float32]:
    """Float32 in (0, 1), never 0 or 1, from 32-bit words: the centre of one of 2^23 equal cells, exact in float32."""
    return ((words >> 9).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)


def _gumbel(words: Words) -> NDArray[np.float32]:
    noise: NDArray[np.float32] = -np.log(-np.log(uniform(words)))
    return noise


def gumbel_noise(key: Words, positions: Words, ids: Words, level: int) -> NDArray[np.float32]:
    """Gumbel(0, 1) noise of single candidates, [n]: key [2, n] or [2, 1], positions [n], ids [n]."""
    counters = np.zeros((4, len(ids)), dtype=np.uint64)
    counters[0], counters[1], counters[2] = ids >> 2, positions, level
    words = philox4x32(counters, key)  # [4, n]
    return _gumbel(np.take_along_axis(words, (ids & 3).astype(np.int64)[None], axis=0)[0])


def gumbel_row(seed: int, position: int, size: int, level: int) -> NDArray[np.float32]:
    """Gumbel(0, 1) noise of the candidates [0, size): `gumbel_noise` at a quarter of the work."""
    counters = np.zeros((4, -(-size // 4)), dtype=np.uint64)
    counters[0] = np.arange(counters.shape[1])
    counters[1], counters[2] = position, level
    key = np.array(split_seed(seed), dtype=np.uint64)[:, None]
    return _gumbel(philox4x32(counters, key).T.reshape(-1)[:size])
