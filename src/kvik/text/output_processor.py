"""Token ids of the engine to the outputs that users see: the one code path for streaming and not.

`OutputProcessor` owns the text state of every open request. It folds `SequenceOutput`s into cumulative
`RequestOutput`s, finds stop strings, and tells the caller which sequences the engine must finish for that reason.
A request that does not stream gives one output, at its end, out of the same fold. A caller whose readers come later
than the outputs takes the `OpenRequest`s instead, which hold what is new until it is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from kvik.core.request import Request
from kvik.errors import RequestError
from kvik.outputs import FinishReason, RequestMetrics, RequestOutput, SequenceOutput, TokenLogprobs, Usage
from kvik.text.completion import Completion
from kvik.text.frontend import ChatPrompt, Prompt
from kvik.text.stop import StopStrings
from kvik.text.tokenizer import Tokenizer

__all__ = ["Folded", "OpenRequest", "OutputProcessor", "Processed"]

_NO_METRICS = RequestMetrics()


class Folded(NamedTuple):
    """Requests with something to read, and the sequences that must end, as in `Processed`."""

    changed: list[OpenRequest]
    to_finish: list[tuple[str, int]]


class Processed(NamedTuple):
    """What became of some engine outputs; (request_id, index) in `to_finish` must end with FinishReason.STOP."""

    outputs: list[RequestOutput]
    to_finish: list[tuple[str, int]]


class OutputProcessor:
    """Folds engine outputs into user outputs. Not thread-safe: one caller at a time.

    A request is forgotten once all its completions are done; whatever still comes for it, or for a completion of it
    that is done, is ignored.
    """

    def __init__(self, tokenizer: Tokenizer, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokenizer = tokenizer
        self._clock = clock
        self._open: dict[str, OpenRequest] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, request: Request, prompt: Prompt = (), *, stream: bool = True) -> None:
        """Open a request that was made of `prompt`. With `stream` off it gives a single output, when all is done."""
        if request.request_id in self._open:
            raise RequestError(f"request_id {request.request_id!r} is in use by an open request", "request_id")
        self._open[request.request_id] = OpenRequest(request, prompt, self._tokenizer, self._clock, stream=stream)

    def forget(self, request_id: str) -> None:
        """Drop a request: nobody will read what still comes for it."""
        self._open.pop(request_id, None)

    def process(self, outputs: Iterable[SequenceOutput]) -> Processed:
        """Fold one step's outputs; one RequestOutput for each streaming or finished request among them."""
        changed, to_finish = self.fold(outputs)
        return Processed([request.output() for request in changed], to_finish)

    def fold(self, outputs: Iterable[SequenceOutput]) -> Folded:
        """The same, but what is new is left in the requests until `OpenRequest.output` is called."""
        changed: dict[str, OpenRequest] = {}
        to_finish: list[tuple[str, int]] = []
        for output in outputs:
            state = self._open.get(output.request_id)
            if state is None or state.completions[output.index].finish_reason is not None:
                continue
            if state.take(output):
                to_finish.append((output.request_id, output.index))
            if state.finished:
                del self._open[output.request_id]
            elif not state.stream:
                continue
            changed[output.request_id] = state
        return Folded(list(changed.values()), to_finish)

    def end_all(self, reason: FinishReason, error: str | None = None) -> list[RequestOutput]:
        """End every open request without the engine: terminal outputs for a failure or a shutdown."""
        return self.process(
            SequenceOutput(request_id=request_id, index=index, finish_reason=reason, error=error)
            for request_id, state in list(self._open.items())
            for index in range(len(state.completions))
        ).outputs


class OpenRequest:
    """Text state of one request: its completions and what they share."""

    def __init__(
        self,
        request: Request,
        prompt: Prompt,
        tokenizer: Tokenizer,
        clock: Callable[[], float],
        *,
        stream: bool,
    ) -> None:
        params = request.params
        self.request = request
        self.stream = stream
        self.finished = False
        self._num_left = params.n
        self._clock = clock
        text = prompt.text if isinstance(prompt, ChatPrompt) else prompt
        self.prompt = text if isinstance(text, str) else None
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._num_cached_tokens = 0
        self._metrics: RequestMetrics | None = None
        self._num_preemptions = 0
        self.embedding: tuple[float, ...] = ()
        self._first_token_time: float | None = None
        echo = ""
        if params.echo:
            ids = request.prompt_token_ids
            echo = tokenizer.decode(ids, params.skip_special_tokens) if self.prompt is None else self.prompt
        # A message of its own begins without the space that sentencepiece puts before a word, unless it has to match.
        begins = isinstance(prompt, ChatPrompt) and not prompt.goes_on and params.structured_outputs is None
        context = () if begins else request.prompt_token_ids
        stops = StopStrings(params.stop) if params.stop else None
        self.completions = [
            Completion(i, request, tokenizer.vocabulary.detokenizer(params.skip_special_tokens, context), stops, echo)
            for i in range(params.n)
        ]

    @property
    def num_tokens(self) -> int:
        """Generated tokens, over all completions."""
        return sum([completion.num_tokens for completion in self.completions])

    @property
    def usage(self) -> Usage:
        return self.usage_of(self.num_tokens)

    def usage_of(self, num_tokens: int) -> Usage:
        """The usage when there were `num_tokens` generated tokens."""
        num_prompt = len(self.request.prompt_token_ids)
        return Usage(prompt_tokens=num_prompt, completion_tokens=num_tokens, cached_tokens=self._num_cached_tokens)

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.request.prompt_token_ids

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        return None if self.request.params.prompt_logprobs is None else (None, *self._prompt_logprobs)

    @property
    def metrics(self) -> RequestMetrics:
        return self._metrics or _NO_METRICS

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first completion ended."""
        return self.completions[0].finish_reason

    def take(self, output: SequenceOutput) -> bool:
        """Fold one engine output. True if a stop string ended the sequence and the engine does not know it yet."""
        completion = self.completions[output.index]
        if output.index == 0:
            if output.num_cached_tokens > self._num_cached_tokens:
                self._num_cached_tokens = output.num_cached_tokens
            if output.prompt_logprobs:
                self._prompt_logprobs.extend(output.prompt_logprobs)
            if output.embedding:
                self.embedding = output.embedding
        if self._first_token_time is None and output.new_token_ids:
            self._first_token_time = self._clock()
        if output.metrics is not None:
            self._metrics = self._joined_metrics(output, output.metrics)
        completion.take(output)
        if completion.finish_reason is None:
            return False
        self._num_left -= 1
        self.finished = not self._num_left
        stopped_here = output.finish_reason is None
        if stopped_here or (self.finished and self._metrics is None):
            self._metrics = self._own_metrics()
        return stopped_here

    def output(self) -> RequestOutput:
        """The request as it is now; its deltas start over."""
        if not self.finished:
            return _LiveRequestOutput.of(self)
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            deltas=tuple([completion.take_delta() for completion in self.completions]),
            outputs=tuple([completion.snapshot() for completion in self.completions]),
            usage=self.usage,
            prompt_logprobs=self.prompt_logprobs,
            embedding=self.embedding,
            metrics=self.metrics,
        )

    def _joined_metrics(self, output: SequenceOutput, new: RequestMetrics) -> RequestMetrics:
        """What is known of the request: where there are several completions, the first of them to begin counts."""
        if len(self.completions) == 1:
            return new
        if output.finish_reason is not None:
            self._num_preemptions += new.num_preemptions
        queued = [time for time in (self.metrics.queue_time, new.queue_time) if time is not None]
        first = [time for time in (self.metrics.time_to_first_token, new.time_to_first_token) if time is not None]
        return replace(
            new,
            queue_time=min(queued, default=None),
            time_to_first_token=min(first, default=None),
            num_preemptions=self._num_preemptions,
        )

    def _own_metrics(self) -> RequestMetrics:
        """What the engine told with the first token, if it did, and the times of an end that it does not know of."""
        now, arrival, first = self._clock(), self.request.arrival_time, self._first_token_time
        known = replace(self.metrics, total_time=now - arrival)
        if first is None:
            return known
        per_completion = self.num_tokens / len(self.completions)
        return replace(
            known,
            time_to_first_token=first - arrival if known.time_to_first_token is None else known.time_to_first_token,
            time_per_output_token=(now - first) / (per_completion - 1) if per_completion > 1 else None,
        )


class _LiveRequestOutput(RequestOutput):
    """A `RequestOutput` of an unfinished request, of which most is made when it is first read.

    There is one for every token of a stream; how it works is said where `kvik.text.completion` does the same.
    """

    __slots__ = ("_num_tokens", "_state")

    _num_tokens: int
    _state: OpenRequest

    @classmethod
    def of(cls, state: OpenRequest) -> _LiveRequestOutput:
        self, completions = cls.__new__(cls), state.completions
        _put_state(self, state)
        _put_request_id(self, state.request.request_id)
        _put_metrics(self, state.metrics)
        if len(completions) == 1:  # the common case, which needs no lists
            (only,) = completions
            _put_num_tokens(self, only.num_tokens)
            _put_deltas(self, (only.take_delta(),))
            _put_outputs(self, (only.snapshot(),))
        else:
            _put_num_tokens(self, state.num_tokens)
            _put_deltas(self, tuple([completion.take_delta() for completion in completions]))
            _put_outputs(self, tuple([completion.snapshot() for completion in completions]))
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "usage":
            value: object = self._state.usage_of(self._num_tokens)
        elif name == "index":
            value = 0
        elif name in ("prompt", "prompt_token_ids", "prompt_logprobs", "embedding"):
            value = getattr(self._state, name)
        else:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)
        return value


_put_state = _LiveRequestOutput.__dict__["_state"].__set__
_put_num_tokens = _LiveRequestOutput.__dict__["_num_tokens"].__set__
_put_request_id = RequestOutput.__dict__["request_id"].__set__
_put_deltas = RequestOutput.__dict__["deltas"].__set__
_put_outputs = RequestOutput.__dict__["outputs"].__set__
_put_metrics = RequestOutput.__dict__["metrics"].__set__
