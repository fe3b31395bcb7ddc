"""The one sampler: picks the next token of every row of a batch, and reports its log-probability where asked.

    all rows plain and greedy ──► one argmax
    otherwise, row by row     ──► processors ──► argmax (greedy) or survivors ──► one batch of noise ──► argmax

A draw is the Gumbel-max trick: argmax(log-weight + Gumbel noise) is distributed as the softmax of the log-weights
(Maddison, Tarlow, Minka, "A* sampling", arXiv 1411.0030). The same row gives the same token alone and in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvik.errors import RequestError
from kvik.outputs import TokenLogprobs
from kvik.sampling.filters import survivors, top_k_bound
from kvik.sampling.logprobs import prompt_logprobs
from kvik.sampling.philox import NOISE_MAX, gumbel_noise, gumbel_row, split_seed
from kvik.sampling.processors import process
from kvik.sampling.row import RowSampling

__all__ = ["RowSample", "Sampler"]

MANY = 1024  # candidates from which on it pays to draw the best HEAD first and to drop those that cannot win any more
HEAD = 64


@dataclass(frozen=True, slots=True)
class RowSample:
    """The next token of a row; `logprobs` where the row asked for them. `token_id` is -1 where `error` is set."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Draw:
    """A draw that awaits its noise: candidates of one row, ids ascending [n], log-weights [n]."""

    index: int
    seed: int
    position: int
    ids: Tensor
    scores: Tensor

    def winner(self, noise: Tensor) -> int:
        """The token with the highest score plus noise; the lowest id where several are equal."""
        return int(self.ids[(self.scores + noise).argmax()].item())

    def head(self) -> _Draw:
        """The same draw among a few of its best candidates."""
        best = (self.scores >= top_k_bound(self.scores, HEAD)).nonzero().squeeze(-1)[:MANY]
        return replace(self, ids=self.ids[best], scores=self.scores[best])

    def beyond(self, floor: float) -> _Draw:
        """The same draw among the candidates whose score reaches `floor`."""
        kept = self.scores >= floor
        return replace(self, ids=self.ids[kept], scores=self.scores[kept])


@dataclass(frozen=True, slots=True)
class Sampler:
    """Samples over a vocabulary of `vocab_size` entries; holds no state between calls."""

    vocab_size: int

    def sample(self, logits: Tensor, rows: Sequence[RowSampling], token_ids: Sequence[Tensor]) -> list[RowSample]:
        """The next token of each row from `logits` [rows, vocab_size] of any float dtype, which are left unchanged.

        `token_ids[i]` (int64, one-dimensional) are the tokens of row i so far, prompt and output: their number is the
        position of the token drawn. A row that cannot be sampled gets an error and leaves the others alone.
        """
        assert logits.shape == (len(rows), self.vocab_size) and len(token_ids) == len(rows)
        if all(row.params.greedy and not row.edits for row in rows):
            samples = _greedy(logits)
        else:
            samples = self._sample_rows(logits, rows, token_ids)
        return _with_logprobs(samples, logits, rows)

    def _sample_rows(self, logits: Tensor, rows: Sequence[RowSampling], token_ids: Sequence[Tensor]) -> list[RowSample]:
        samples: list[RowSample] = []
        draws: list[_Draw] = []
        for index, (row, tokens) in enumerate(zip(rows, token_ids, strict=True)):
            try:
                picked = self._prepare(index, logits[index].float(), row, tokens)
            except RequestError as error:
                samples.append(RowSample(-1, error=str(error)))
                continue
            samples.append(RowSample(picked if isinstance(picked, int) else -1))
            if isinstance(picked, _Draw):
                draws.append(picked)
        draws = _narrow(draws)
        for draw, noise in zip(draws, self._noise(draws), strict=True):
            samples[draw.index] = RowSample(draw.winner(noise))
        return samples

    def _prepare(self, index: int, logits: Tensor, row: RowSampling, tokens: Tensor) -> int | _Draw:
        """The token of one row, or its draw where noise decides."""
        if row.edits:
            logits = process(logits, row, tokens)
        peak = logits.amax().item()
        _check_peak(peak)
        if row.params.greedy:
            return int(logits.argmax().item())
        ids, scores = survivors(logits, peak, row.params)
        if ids.numel() == 1:
            return int(ids.item())
        return _Draw(index, row.seed, tokens.numel(), ids, scores)

    def _noise(self, draws: list[_Draw]) -> list[Tensor]:
        """Noise of every draw, [n] each: whole rows where many candidates are left, else one batch over all rows."""
        limit = self.vocab_size // 4  # a Philox call yields four neighbours, of which a lone candidate uses one
        sparse = [draw for draw in draws if draw.ids.numel() <= limit]
        found = dict(zip((draw.index for draw in sparse), _sparse_noise(sparse), strict=True))
        for draw in draws:
            if draw.index not in found:
                row_noise = gumbel_row(draw.seed, draw.position, self.vocab_size, draw.ids.device)
                found[draw.index] = row_noise if draw.ids.numel() == self.vocab_size else row_noise[draw.ids]
        return [found[draw.index] for draw in draws]


def _narrow(draws: list[_Draw]) -> list[_Draw]:
    """Drop the candidates of large draws that even the largest noise could not lift above one that is drawn already."""
    heads = [draw.head() if draw.ids.numel() > MANY else None for draw in draws]
    noises = iter(_sparse_noise([head for head in heads if head is not None]))
    narrowed: list[_Draw] = []
    for draw, head in zip(draws, heads, strict=True):
        if head is None:
            narrowed.append(draw)
        else:
            reached = (head.scores + next(noises)).amax().item()
            narrowed.append(draw.beyond(reached - NOISE_MAX))
    return narrowed


def _sparse_noise(draws: list[_Draw]) -> list[Tensor]:
    if not draws:
        return []
    device = draws[0].ids.device
    sizes = [draw.ids.numel() for draw in draws]
    words = torch.tensor([(*split_seed(draw.seed), draw.position) for draw in draws], device=device)  # [draws, 3]
    owners = torch.repeat_interleave(torch.tensor(sizes, device=device))  # [candidates]
    words = words.t()[:, owners]  # [3, candidates]
    noise = gumbel_noise(words[:2], words[2], torch.cat([draw.ids for draw in draws]))
    return list(torch.split(noise, sizes))


def _greedy(logits: Tensor) -> list[RowSample]:
    """The lowest id among the largest logits of each row; torch documents that argmax returns the first maximum."""
    values = logits.float()  # argmax of bfloat16 is five times slower on a CPU
    token_ids = values.argmax(-1)  # [rows]
    peaks = values.gather(1, token_ids.unsqueeze(-1)).squeeze(-1).tolist()
    samples: list[RowSample] = []
    for token_id, peak in zip(token_ids.tolist(), peaks, strict=True):
        try:
            _check_peak(peak)
            samples.append(RowSample(token_id))
        except RequestError as error:
            samples.append(RowSample(-1, error=str(error)))
    return samples


def _check_peak(peak: float) -> None:
    """Refuse logits without a finite maximum (a NaN anywhere makes the maximum NaN)."""
    if math.isfinite(peak):
        return
    if peak == -math.inf:
        raise RequestError("every token is masked: allowed_token_ids, bad_words, min_tokens and processors leave none")
    raise RequestError(f"the logits hold {'NaN' if math.isnan(peak) else '+inf'}: no token can be drawn from them")


def _with_logprobs(samples: list[RowSample], logits: Tensor, rows: Sequence[RowSampling]) -> list[RowSample]:
    """Add what rows asked for: computed for all of them at once with the largest k, then cut to each row's own."""
    wanted = {i: k for i, row in enumerate(rows) if (k := row.params.logprobs) is not None and not samples[i].error}
    if not wanted:
        return samples
    indices = torch.tensor(list(wanted), device=logits.device)
    token_ids = torch.tensor([samples[i].token_id for i in wanted], device=logits.device)
    found = prompt_logprobs(logits[indices], token_ids, max(wanted.values()))
    for (index, k), logprobs in zip(wanted.items(), found, strict=True):
        if math.isnan(logprobs.logprob):
            samples[index] = RowSample(-1, error="the raw logits hold NaN or +inf: they have no log-probabilities")
        else:
            samples[index] = replace(samples[index], logprobs=logprobs._replace(top=logprobs.top[:k]))
    return samples
