"""The sampler: logits in, token ids and log-probabilities out.

`sampler` picks tokens; `row` holds what one sequence asked for; `processors` change logits, `filters` cut the set of
candidates; `philox` makes the noise of a draw from (seed, position, vocabulary index) alone; `logprobs` reports.
"""

from __future__ import annotations

from kvik.sampling.logprobs import prompt_logprobs
from kvik.sampling.row import RowSampling
from kvik.sampling.sampler import RowSample, Sampler

__all__ = ["RowSample", "RowSampling", "Sampler", "prompt_logprobs"]
