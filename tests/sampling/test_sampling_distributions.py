"""The law of the draws: chi-square against exact probabilities, and the sampler against full-vocabulary noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_rows import hf_warped, make_row
from torch import Tensor
from torch.nn.functional import pad

pytest.importorskip("scipy", reason="scipy has the laws that the draws are compared with")

from scipy import stats

from kvik.sampling import Sampler
from kvik.sampling.draw import Draw, draw_tokens, groups_of
from kvik.sampling.filters import survivors
from kvik.sampling.philox import GROUP, gumbel_row, split_seed
from kvik.sampling_params import SamplingParams

VOCAB = 24
NUM_DRAWS = 20_000
CONFIGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 10, "top_p": 0.95, "min_p": 0.1},
]


def small_logits(seed: int = 0) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 1.5


def exact_probabilities(logits: Tensor, params: dict[str, float]) -> np.ndarray:
    """The definition, in float64: sort, cut, renormalise."""
    weights = np.exp(logits.double().numpy() / params.get("temperature", 1.0))
    order = np.argsort(-weights)
    probabilities = weights[order]
    probabilities[int(params.get("top_k", VOCAB)) :] = 0
    probabilities /= probabilities.sum()
    probabilities[np.cumsum(probabilities) - probabilities >= params.get("top_p", 1.0)] = 0
    probabilities[probabilities < params.get("min_p", 0.0) * probabilities[0]] = 0
    found = np.zeros(VOCAB)
    found[order] = probabilities / probabilities.sum()
    return found


def assert_follows(drawn: Tensor, probabilities: np.ndarray) -> None:
    counts = np.bincount(drawn.numpy(), minlength=VOCAB)
    assert counts[probabilities == 0].sum() == 0
    kept = probabilities > 0
    assert stats.chisquare(counts[kept], probabilities[kept] * counts.sum()).pvalue > 1e-3


@pytest.mark.parametrize("vary", ["position", "seed"])
@pytest.mark.parametrize("params", CONFIGS, ids=str)
def test_draws_follow_the_exact_law(params: dict[str, float], vary: str) -> None:
    logits = small_logits()
    groups, scores = groups_of(*survivors(logits, logits.amax().item(), SamplingParams(**params)))
    draws = [Draw(i, *((7, i) if vary == "position" else (i, 7)), groups, scores) for i in range(NUM_DRAWS)]
    drawn = draw_tokens(draws, VOCAB)
    assert_follows(torch.tensor([drawn[i] for i in range(NUM_DRAWS)]), exact_probabilities(logits, params))


def test_sampler_follows_the_exact_law_end_to_end() -> None:
    logits, params = small_logits(1), {"temperature": 0.9, "top_k": 12, "top_p": 0.95}
    num_draws = 5000
    rows = [make_row(VOCAB, seed=seed, **params) for seed in range(num_draws)]
    samples = Sampler(VOCAB).sample(logits.expand(num_draws, -1), rows, [torch.zeros(3, dtype=torch.int64)] * num_draws)
    assert_follows(torch.tensor([sample.token_id for sample in samples]), exact_probabilities(logits, params))


def test_consecutive_draws_are_independent() -> None:
    drawn = np.array([gumbel_row(5, position, 3, 0).argmax() for position in range(2000)])
    pairs = np.bincount(drawn[:-1] * 3 + drawn[1:], minlength=9).reshape(3, 3)
    assert stats.chi2_contingency(pairs).pvalue > 1e-3


@pytest.mark.parametrize(("vocab_size", "scale"), [(9001, 0.1), (9001, 1.0), (9001, 4.0), (40_009, 4.0), (40_009, 6.0)])
@pytest.mark.parametrize("params", [*CONFIGS, {"top_k": 1}, {"top_p": 0.999}], ids=str)
def test_shortcuts_draw_what_full_noise_draws(params: dict[str, float], vocab_size: int, scale: float) -> None:
    """Windows, sparse and dense noise are only shortcuts: same token as noise on all groups of HF-filtered logits."""
    seed, num_rows = 3, 4
    generator = torch.Generator().manual_seed(int(scale * 10))
    logits = torch.randn(num_rows, vocab_size, generator=generator) * scale
    rows = [make_row(vocab_size, seed=seed + 2**33 * i, **params) for i in range(num_rows)]
    histories = [torch.zeros(5 + i, dtype=torch.int64) for i in range(num_rows)]
    samples = Sampler(vocab_size).sample(logits, rows, histories)
    for i, sample in enumerate(samples):
        place = rows[i].seed, 5 + i
        scores = pad(hf_warped(logits[i], rows[i].params), (0, -vocab_size % GROUP), value=-torch.inf).view(-1, GROUP)
        group = int((scores.logsumexp(1).numpy() + gumbel_row(*place, len(scores), 0)).argmax())
        noise = gumbel_row(*place, scores.numel(), 1).reshape(-1, GROUP)
        assert sample.token_id == group * GROUP + int((scores.numpy() + noise)[group].argmax())


def test_split_seed_reaches_both_words() -> None:
    rows = {tuple(gumbel_row(seed, 0, 8, 0).tolist()) for seed in (0, 1, 2**32, 2**32 + 1, 2**63 - 1)}
    assert len(rows) == 5
    assert split_seed(2**63 - 1) == (2**32 - 1, 2**31 - 1)
