"""Top-k, top-p and min-p against the warpers of transformers, and the shortcuts against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_rows import hf_warped
from torch import Tensor

from kvik.sampling.filters import survivors, top_k_bound, top_k_floor, top_p_floor
from kvik.sampling.philox import NOISE_RANGE
from kvik.sampling_params import SamplingParams


def random_logits(vocab_size: int, seed: int, tied: bool = False) -> Tensor:
    values = torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 2
    return (values * 4).round() / 4 if tied else values


def kept_ids(logits: Tensor, **params: float) -> set[int]:
    ids, scores = survivors(logits, logits.amax().item(), SamplingParams(**params))
    assert ids.tolist() == sorted(ids.tolist())
    torch.testing.assert_close(scores, (logits[ids] - logits.amax()) / params.get("temperature", 1.0))
    return set(ids.tolist())


def hf_ids(logits: Tensor, **params: float) -> set[int]:
    return set(torch.isfinite(hf_warped(logits, SamplingParams(**params))).nonzero().flatten().tolist())


def without_hopeless(ids: set[int], logits: Tensor, temperature: float) -> set[int]:
    """`ids` less those that no noise can lift above the best: `survivors` may leave them out."""
    scores = (logits - logits.amax()) / temperature
    return {i for i in ids if scores[i] >= -NOISE_RANGE}


@pytest.mark.parametrize("vocab_size", [37, 5003])
@pytest.mark.parametrize("temperature", [0.7, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    list(itertools.product((0, 1, 20, 10_000), (1.0, 0.9, 1e-6), (0.0, 0.05, 1.0))),
)
def test_survivors_equal_hf(vocab_size: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = random_logits(vocab_size, seed=vocab_size)
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    expected = without_hopeless(hf_ids(logits, **params), logits, temperature)
    assert without_hopeless(kept_ids(logits, **params), logits, temperature) == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("params", [{"top_k": 7}, {"top_k": 50}, {"min_p": 0.1}, {"min_p": 1.0}])
def test_ties_equal_hf(seed: int, params: dict[str, float]) -> None:
    logits = random_logits(700, seed, tied=True)
    assert kept_ids(logits, **params) == hf_ids(logits, **params)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.97])
def test_top_p_keeps_what_hf_keeps_and_all_that_tie_with_its_last(seed: int, top_p: float) -> None:
    logits = random_logits(700, seed, tied=True)
    ours, theirs = kept_ids(logits, top_p=top_p), hf_ids(logits, top_p=top_p)
    lowest = min(logits[i].item() for i in theirs)
    assert ours == theirs | {i for i in range(700) if logits[i].item() == lowest}


def test_top_p_keeps_the_crossing_entry() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert kept_ids(logits, top_p=0.4) == {0}
    assert kept_ids(logits, top_p=0.51) == {0, 1}
    assert kept_ids(logits, top_p=0.79) == {0, 1}
    assert kept_ids(logits, top_p=0.81) == {0, 1, 2}
    assert kept_ids(logits, top_p=0.96) == {0, 1, 2, 3}


def test_tiny_top_p_keeps_the_best_alone() -> None:
    logits = random_logits(5000, seed=1)
    assert kept_ids(logits, top_p=1e-12) == {int(logits.argmax())}


def test_masked_entries_never_survive() -> None:
    logits = torch.full((300,), -torch.inf)
    logits[[7, 250]] = torch.tensor([1.0, 0.5])
    for params in ({}, {"top_k": 20}, {"top_k": 500}, {"top_p": 0.99}, {"min_p": 0.01}, {"temperature": 2.0}):
        assert kept_ids(logits, **params) == {7, 250}


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-6])
def test_vanishing_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([1.0, 1.5, -3.0, 1.5])
    ids, scores = survivors(logits, 1.5, SamplingParams(temperature=temperature))
    assert ids.tolist() == [1, 3]
    assert scores.tolist() == [0.0, 0.0]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 400), st.integers(1, 420), st.integers(0, 1000), st.booleans())
def test_top_k_bound_never_exceeds_the_kth_largest(size: int, k: int, seed: int, tied: bool) -> None:
    values = random_logits(size, seed, tied)
    bound = top_k_bound(values, k)
    assert (values >= bound).sum() >= min(k, size)
    if k < size:
        assert top_k_floor(values, k) == values.sort(descending=True).values[k - 1]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 300), st.floats(0.01, 0.99), st.integers(0, 1000))
def test_top_p_floor_is_the_smallest_nucleus(size: int, top_p: float, seed: int) -> None:
    logits = random_logits(size, seed)
    scores = logits - logits.amax()
    weights = scores.double().exp()
    floor = top_p_floor(scores, top_p, weights.sum().item())
    needed = top_p * weights.sum().item()
    assert weights[scores >= floor].sum().item() >= needed * (1 - 1e-6)
    assert weights[scores > floor].sum().item() < needed * (1 + 1e-6)
