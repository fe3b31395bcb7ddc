"""The only thing that the two halves of the engine share: the plan of a step and its result.

The scheduler writes a `StepPlan`, an executor turns it into a `StepResult`. Both are frozen and hold plain values only,
logits processors apart, which are a user's code: so a plan can be recorded and replayed.

Executors keep one table row per live sequence: its token ids, block table and sampling state. A plan is a diff of that
table (`joined`, `new_blocks`) and says which positions to compute. Token ids that were sampled in an earlier step are
not in the plan: the executor appended them to the row itself, so that step n+1 can be planned before the result of step
n is known.

What a step says per row is made for what changes. Rows that go on decoding are a tuple of integers, the same object for
as long as they stay the same, and their results are a list of integers.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    `prompt_logprobs` asks for what positions of the prompt give: the log-probabilities of the tokens that they predict,
    or their part of a mean embedding.
    """

    row: int
    start: int
    num_tokens: int
    sample: bool
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
    """One forward pass: rows that join, blocks that rows gain, and what to compute.

    `new_blocks` are appended to the rows' block tables before the step. Each row of `decodes` has been sampled since it
    joined: compute its last token and sample the next. `chunks` are everything else, prompts that is. A row is in one
    of the two, once.
    """

    step_id: int
    joined: tuple[RowInit, ...]
    new_blocks: tuple[tuple[int, tuple[int, ...]], ...]  # (row, block ids)
    decodes: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum([chunk.num_tokens for chunk in self.chunks])

    @property
    def num_decodes(self) -> int:
        """Rows with one token in, one out."""
        return len(self.decodes) + sum([chunk.is_decode for chunk in self.chunks])


@dataclass(frozen=True, slots=True)
class RowResult:
    """What one row gave: the sampled token ids (none if it did not sample) and the logprobs asked for.

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
    """Results of a plan: a `RowResult` for each of its chunks, a token for each of its decodes, in the plan's order.

    A decode that failed, or gave more than a token, is -1 in `decoded` and has a `RowResult` among `extras`.
    """

    step_id: int
    rows: tuple[RowResult, ...]
    decoded: tuple[int, ...] = ()
    extras: tuple[RowResult, ...] = ()

    @classmethod
    def of(cls, plan: StepPlan, results: Sequence[RowResult]) -> StepResult:
        """From a result for each decode, then for each chunk."""
        decodes = results[: len(plan.decodes)]
        plain = [result == RowResult(result.row, result.token_ids) and len(result.token_ids) == 1 for result in decodes]
        return cls(
            plan.step_id,
            rows=tuple(results[len(decodes) :]),
            decoded=tuple([r.token_ids[0] if is_plain else -1 for r, is_plain in zip(decodes, plain, strict=True)]),
            extras=tuple([result for result, is_plain in zip(decodes, plain, strict=True) if not is_plain]),
        )
