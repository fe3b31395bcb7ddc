"""A request as the user sent it (frozen) and the sequences that the scheduler makes of it (mutable).

`Request` may be read by everyone. `Sequence` belongs to the scheduler alone: nobody else writes to it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from kvik.outputs import FinishReason, TokenLogprobs
from kvik.sampling_params import SamplingParams

__all__ = ["Request", "Sequence", "SequenceStatus"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One generation request in token ids: everything the engine needs, nothing of text.

    `eos_token_ids` is the union of the model's end-of-sequence ids; `bad_words_ids` are the token sequences of
    `params.bad_words`; `seed` is the seed of completion 0 (completion i uses seed + i); times are `time.monotonic()`.
    `pooling` ("mean" or "last") asks for an embedding of the prompt as well, which comes with the first token. Where
    the tokens are not wanted as they come (`stream` off), and no stop string has to be looked for in them, each
    completion gives a single output, at its end.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    cache_salt: str = ""
    arrival_time: float = 0.0
    pooling: str | None = None
    stream: bool = True

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Every token id that ends a sequence of this request."""
        eos = () if self.params.ignore_eos else self.eos_token_ids
        return frozenset(eos) | frozenset(self.params.stop_token_ids)


class SequenceStatus(enum.Enum):
    """Where a sequence is: WAITING (also after preemption), RUNNING (owns a row and blocks), FINISHED."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion of a request, owned by the scheduler.

    token_ids       prompt + confirmed output
    num_tokens      their number once everything in flight has come back
    num_computed    tokens whose KV has been planned (steps in flight included)
    num_delivered   tokens of the prompt and of outputs that were delivered
    next_check      num_tokens with which it cannot just decode on: its blocks are full, or it has reached its limit
    last_step_id    last step that touches the row or blocks; they are freed once it has completed
    prefix_ids      for each full block that is committed, the cache's id of the prefix that ends with it
    num_cached      prompt tokens whose KV came from the prefix cache when the sequence first ran
    """

    request: Request
    index: int
    order: int
    seed: int
    max_total_tokens: int
    stop_token_ids: frozenset[int]
    token_ids: list[int]
    status: SequenceStatus = SequenceStatus.WAITING
    row: int = -1
    block_ids: list[int] = field(default_factory=list)
    prefix_ids: list[int] = field(default_factory=list)
    num_tokens: int = field(init=False)
    num_computed: int = 0
    num_delivered: int = field(init=False)
    next_check: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    last_step_id: int = -1
    scheduled_time: float | None = None
    first_token_time: float | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    embedding: tuple[float, ...] = ()
    streams: bool = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens = self.num_delivered = len(self.token_ids)
        self.streams = self.request.stream or bool(self.request.params.stop)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_in_flight(self) -> int:
        """Sampled tokens that were planned but whose values have not come back."""
        return self.num_tokens - len(self.token_ids)

    @property
    def num_remaining(self) -> int:
        """Tokens that must be computed before the next one can be sampled."""
        return self.num_tokens - self.num_computed

    @property
    def stop_reason(self) -> FinishReason | None:
        """Whether the last token ends the sequence."""
        if self.token_ids[-1] in self.stop_token_ids and self.num_output_tokens > self.request.params.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.token_ids) >= self.max_total_tokens else None

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the prompt must be computed in full, without cached blocks, for what its positions give.

        That is log-probabilities, or their part of a mean.
        """
        wanted = self.request.params.prompt_logprobs is not None or self.request.pooling == "mean"
        return wanted and self.index == 0 and self.num_output_tokens == 0

    def start(self, row: int, num_cached: int, now: float) -> None:
        """Run in `row`, with the KV of the first `num_cached` tokens already there."""
        self.status = SequenceStatus.RUNNING
        self.row = row
        self.num_computed = num_cached
        if self.scheduled_time is None:
            self.scheduled_time = now
            self.num_cached = num_cached

    def preempt(self) -> None:
        """Wait again; what was computed or is in flight is forgotten, what was confirmed is kept."""
        self.status = SequenceStatus.WAITING
        self.num_preemptions += 1
        self.num_computed = 0
        self.num_tokens = len(self.token_ids)
        self.prefix_ids = []
        if not self.num_output_tokens:
            self.prompt_logprobs = []  # the prompt will be computed again in full for them

    def take_new(self) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...], tuple[TokenLogprobs, ...]]:
        """Token ids, their log-probabilities, and those of the prompt, that have not been delivered yet."""
        taken = tuple(self.token_ids[self.num_delivered :]), tuple(self.logprobs), tuple(self.prompt_logprobs)
        self.num_delivered = len(self.token_ids)
        self.logprobs, self.prompt_logprobs = [], []
        return taken
