"""What users get back: completions, usage, log-probabilities and timings. Plain records without torch."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

__all__ = [
    "CompletionOutput", "FinishReason", "RequestMetrics", "RequestOutput", "SequenceOutput", "TokenLogprobs", "Usage",
]  # fmt: skip


class FinishReason(str, enum.Enum):
    """Why a sequence ended. Compares equal to its string."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    TIMEOUT = "timeout"
    SHUTDOWN = "shutdown"

    def __str__(self) -> str:
        return self.value


class TokenLogprobs(NamedTuple):
    """Natural-log probability of one token under the raw logits (before penalties, bias, temperature and filters).

    `rank` is 1 for the most likely token. `top` are the most likely (token id, logprob) pairs, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts: prompt, generated (over all completions), and prompt tokens whose KV came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """Timings in seconds: waiting in the queue, to the first token, per later token, and from arrival to the end.

    An output before the last one has what was known with the first token.
    """

    queue_time: float | None = None
    time_to_first_token: float | None = None
    time_per_output_token: float | None = None
    total_time: float = 0.0
    num_preemptions: int = 0


@dataclass(slots=True, kw_only=True)
class SequenceOutput:
    """What one sequence gained in one step, in token ids: the engine's output and the text layer's input.

    There is one for every token, and freezing it would make it four times as slow to build. Nobody writes to it.
    """

    request_id: str
    index: int
    new_token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the token that ended the sequence; it is the last of new_token_ids
    error: str | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    embedding: tuple[float, ...] = ()  # of the prompt, where the request asked for one


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One completion of a request: `text` and `token_ids` so far; `stop_reason` is the stop string or token id."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """The state of a request: its prompt and its completions so far.

    Attributes and mapping keys are the same: `output.text` and `output["text"]`. `text`, `token_ids` (also `tokens`),
    `finish_reason`, `stop_reason`, `logprobs` and `error` are those of the first completion; `outputs` holds all `n`.
    `delta` is the text of the first completion that is new since the previous output of the same request. `index` is
    the prompt's place in the call of `LLM.generate` or `LLM.stream`.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    usage: Usage
    deltas: tuple[str, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    index: int = 0
    embedding: tuple[float, ...] = ()

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def delta(self) -> str:
        return self.deltas[0] if self.deltas else ""

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[0].finish_reason

    @property
    def stop_reason(self) -> str | int | None:
        return self.outputs[0].stop_reason

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        return self.outputs[0].logprobs

    @property
    def error(self) -> str | None:
        return self.outputs[0].error

    @property
    def finished(self) -> bool:
        return all(output.finished for output in self.outputs)

    def keys(self) -> tuple[str, ...]:
        """Names that can be indexed: `output["text"]`, `dict(output)`."""
        first = (
            "text",
            "delta",
            "tokens",
            "token_ids",
            "finished",
            "finish_reason",
            "stop_reason",
            "logprobs",
            "error",
        )
        return (*(f.name for f in fields(self)), *first)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(f"{key!r}; there are {', '.join(self.keys())}")
        return getattr(self, key)
