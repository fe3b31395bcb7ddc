"""Philox against published vectors and a plain-integer reference; the noise against the Gumbel law."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="scipy has the laws that the draws are compared with")

from scipy import stats

from kvik.sampling.philox import (
    NOISE_RANGE,
    gumbel_noise,
    gumbel_row,
    philox4x32,
    split_seed,
    uniform,
)

WORD = st.integers(0, 2**32 - 1)

# kat_vectors of Random123 1.14: counter, key, answer
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def reference(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 with Python integers, as the paper writes it."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        even, odd = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (odd >> 32) ^ c1 ^ k0, odd % 2**32, (even >> 32) ^ c3 ^ k1, even % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
@pytest.mark.parametrize("width", [1, 7, 40_000])
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...], width: int) -> None:
    column = np.array(counter, dtype=np.uint64)[:, None]
    words = philox4x32(column.repeat(width, axis=1), np.array(key, dtype=np.uint64)[:, None])
    assert words.shape == (4, width) and (words == np.array(answer, dtype=np.uint64)[:, None]).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORD, WORD, WORD, WORD, WORD, WORD), min_size=1, max_size=9))
def test_equals_integer_reference(cases: list[tuple[int, ...]]) -> None:
    columns = np.array(cases, dtype=np.uint64).T  # [6, n]
    expected = [reference(case[:4], case[4:]) for case in cases]
    assert philox4x32(columns[:4], columns[4:]).T.tolist() == [list(words) for words in expected]


def test_seed_words_and_counter_layout() -> None:
    assert split_seed(2**40 + 5) == (5, 256)
    assert split_seed(2**64 + 1) == (1, 0)
    seed, position, token_id = 2**40 + 5, 77, 4 * 123 + 2
    for level in (0, 1):
        bits = reference((123, position, level, 0), (5, 256))[2]
        expected = -math.log(-math.log(((bits >> 9) + 0.5) / 2**23))
        noise = gumbel_row(seed, position, 1000, level)
        assert noise[token_id] == pytest.approx(expected, rel=1e-5)


def test_uniform_is_open_and_exact() -> None:
    ends = uniform(np.array([0, 511, 512, 2**32 - 1], dtype=np.uint64))
    assert ends.tolist() == [2.0**-24, 2.0**-24, 1.5 * 2.0**-23, 1 - 2.0**-24]


def test_noise_bounds() -> None:
    low, high = (-np.log(-np.log(uniform(np.array([0, 2**32 - 1], dtype=np.uint64))))).tolist()
    assert high - low < NOISE_RANGE


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 5, 1003, 40_001])
def test_single_entries_equal_the_row_bitwise(vocab_size: int) -> None:
    seed, position = 2**61 + 12_345, 999
    row = gumbel_row(seed, position, vocab_size, 1)
    ids = np.random.default_rng(0).permutation(vocab_size)[:997].astype(np.uint64)
    key = np.array(split_seed(seed), dtype=np.uint64)[:, None]
    for part in (ids, ids[:1], ids[:17]):
        found = gumbel_noise(key, np.full_like(part, position), part, 1)
        assert (found == row[part.astype(np.int64)]).all()


def test_every_uniform_keeps_its_logarithm_wherever_it_stands() -> None:
    """The noise of an entry must not depend on its neighbours: vector and scalar code paths have to agree."""
    values = uniform(np.arange(0, 2**32, 512 * 11, dtype=np.uint64))
    whole = np.log(values)
    for start, size in [(0, 1), (1, 3), (5, 17), (100, 1001), (7, 33_001)]:
        assert (np.log(values[start : start + size].copy()) == whole[start : start + size]).all()


def test_noise_is_gumbel_and_independent_over_entries_positions_seeds_and_levels() -> None:
    base = gumbel_row(seed=1, position=10, size=50_000, level=0)
    assert stats.kstest(base, "gumbel_r").pvalue > 1e-3
    for other in (
        gumbel_row(*place, 50_000, level) for *place, level in ((1, 11, 0), (2, 10, 0), (1 + 2**32, 10, 0), (1, 10, 1))
    ):
        assert abs(stats.pearsonr(base, other).statistic) < 0.02
    assert abs(stats.pearsonr(base[:-1], base[1:]).statistic) < 0.02
    over_positions = np.array([gumbel_row(3, position, 4, 0)[1] for position in range(2000)])
    assert stats.kstest(over_positions, "gumbel_r").pvalue > 1e-3
    assert abs(stats.pearsonr(over_positions[:-1], over_positions[1:]).statistic) < 0.08
