"""The only thing that the two halves of the engine share: the plan of a step and its result.

The scheduler writes a `StepPlan`, an executor turns it into a `StepResult`. Both are frozen, hold plain values only and
can be serialised, so a plan can cross a process border, be recorded, and be replayed.

Executors keep one table row per live sequence: its token ids, block table and sampling state. A plan is a diff of that
table (`joined`, `Chunk.new_block_ids`) and says which positions to compute. Token ids that were sampled in an earlier
step are not in the plan: the executor appended them to the row itself, so that step n+1 can be planned before the
result of step n is known.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvik.outputs import TokenLogprobs
from kvik.sampling_params import SamplingParams

__all__ = ["Chunk", "RowInit", "RowResult", "StepPlan", "StepResult"]


@dataclass(frozen=True, slots=True)
class RowInit:
    """A sequence that takes a row (new, or resuming after preemption): the row starts over from this."""

    row: int
    token_ids: tuple[int, ...]  # prompt and, after preemption, the confirmed output
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...]  # not to be sampled before params.min_tokens
    bad_words_ids: tuple[tuple[int, ...], ...]
    pooling: str | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute positions [start, start + num_tokens) of a row; `sample` the next token if the row's tokens end there.

    `new_block_ids` are appended to the row's block table before the step. `prompt_logprobs` asks for what positions of
    the prompt give: the log-probabilities of the tokens that they predict, or their part of a mean embedding.
    """

    row: int
    start: int
    num_tokens: int
    sample: bool
    new_block_ids: tuple[int, ...] = ()
    prompt_logprobs: bool = False

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_decode(self) -> bool:
        """One token in, one out. (The last token of a prompt looks the same when it is computed alone.)"""
        return self.sample and self.num_tokens == 1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass: rows that join, then the chunks to compute (decodes first, then prefills)."""

    step_id: int
    joined: tuple[RowInit, ...]
    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class RowResult:
    """What one chunk gave: the sampled token ids (none if it did not sample) and the logprobs asked for.

    `error` says why this row alone failed (a logits processor raised, say); its sequence ends with that error.
    `embedding` is that of the prompt, beside the first token of a row with `pooling`.
    """

    row: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None
    embedding: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """Results of a plan, one `RowResult` per chunk in the plan's order."""

    step_id: int
    rows: tuple[RowResult, ...]
