"""Token ids of the engine to the outputs that users see: the one code path for streaming and not.

`OutputProcessor` owns the text state of every open request. It folds `SequenceOutput`s into cumulative
`RequestOutput`s, finds stop strings, and tells the caller which sequences the engine must finish for that reason.
A request that does not stream gives one output, at its end, out of the same fold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from kvik.core.request import Request
from kvik.errors import RequestError
from kvik.outputs import FinishReason, RequestMetrics, RequestOutput, SequenceOutput, TokenLogprobs, Usage
from kvik.text.completion import Completion
from kvik.text.stop import StopStrings
from kvik.text.tokenizer import Tokenizer

__all__ = ["OutputProcessor", "Processed"]

_NO_METRICS = RequestMetrics()


class Processed(NamedTuple):
    """What became of some engine outputs; (request_id, index) in `to_finish` must end with FinishReason.STOP."""

    outputs: list[RequestOutput]
    to_finish: list[tuple[str, int]]


class OutputProcessor:
    """Folds engine outputs into user outputs. Not thread-safe: one caller at a time.

    A request is forgotten once all its completions are done; whatever still comes for it is ignored.
    """

    def __init__(self, tokenizer: Tokenizer, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokenizer = tokenizer
        self._clock = clock
        self._open: dict[str, _OpenRequest] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._open

    def add(self, request: Request, prompt_text: str | None = None, *, stream: bool = True) -> None:
        """Open a request. With `stream` off it gives a single output, when all its completions are done."""
        if request.request_id in self._open:
            raise RequestError(f"request_id {request.request_id!r} is in use by an open request", "request_id")
        self._open[request.request_id] = _OpenRequest(request, prompt_text, self._tokenizer, stream=stream)

    def process(self, outputs: Iterable[SequenceOutput]) -> Processed:
        """Fold one step's outputs; one RequestOutput for each streaming or finished request among them."""
        changed: dict[str, _OpenRequest] = {}
        to_finish: list[tuple[str, int]] = []
        for output in outputs:
            state = self._open.get(output.request_id)
            if state is None:
                continue
            if state.take(output, self._clock):
                to_finish.append((output.request_id, output.index))
            changed[output.request_id] = state
        made = []
        for request_id, state in changed.items():
            done = state.finished
            if done:
                del self._open[request_id]
            if done or state.stream:
                made.append(state.snapshot(self._clock))
        return Processed(made, to_finish)

    def end_all(self, reason: FinishReason, error: str | None = None) -> list[RequestOutput]:
        """End every open request without the engine: terminal outputs for a failure or a shutdown."""
        return self.process(
            SequenceOutput(request_id=request_id, index=index, finish_reason=reason, error=error)
            for request_id, state in list(self._open.items())
            for index in range(len(state.completions))
        ).outputs


class _OpenRequest:
    """Text state of one request: its completions and what they share."""

    def __init__(self, request: Request, prompt_text: str | None, tokenizer: Tokenizer, *, stream: bool) -> None:
        params = request.params
        self.request = request
        self.stream = stream
        self._prompt_text = prompt_text
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._num_cached_tokens = 0
        self._metrics: RequestMetrics | None = None
        self._embedding: tuple[float, ...] = ()
        self._first_token_time: float | None = None
        echo = ""
        if params.echo:
            ids = request.prompt_token_ids
            echo = tokenizer.decode(ids, params.skip_special_tokens) if prompt_text is None else prompt_text
        context = request.prompt_token_ids if params.echo else ()
        stops = StopStrings(params.stop) if params.stop else None
        self.completions = [
            Completion(i, request, tokenizer.vocabulary.detokenizer(params.skip_special_tokens, context), stops, echo)
            for i in range(params.n)
        ]

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason is not None for completion in self.completions)

    def take(self, output: SequenceOutput, clock: Callable[[], float]) -> bool:
        """Fold one engine output. True if a stop string ended the sequence and the engine does not know it yet."""
        completion = self.completions[output.index]
        if completion.finish_reason is not None:
            return False
        if output.index == 0:
            self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens)
            self._prompt_logprobs.extend(output.prompt_logprobs)
            self._embedding = output.embedding or self._embedding
        if output.new_token_ids and self._first_token_time is None:
            self._first_token_time = clock()
        self._metrics = output.metrics or self._metrics
        completion.take(output)
        stopped_here = completion.finish_reason is not None and output.finish_reason is None
        if stopped_here and self._metrics is not None:
            self._metrics = replace(self._metrics, total_time=clock() - self.request.arrival_time)
        return stopped_here

    def snapshot(self, clock: Callable[[], float]) -> RequestOutput:
        """The request as it is now; its deltas start over."""
        request, num_tokens = self.request, sum([completion.num_tokens for completion in self.completions])
        with_prompt_logprobs = request.params.prompt_logprobs is not None
        return RequestOutput(
            request_id=request.request_id,
            prompt=self._prompt_text,
            prompt_token_ids=request.prompt_token_ids,
            deltas=tuple([completion.take_delta() for completion in self.completions]),
            outputs=tuple([completion.snapshot() for completion in self.completions]),
            usage=Usage(
                prompt_tokens=len(request.prompt_token_ids),
                completion_tokens=num_tokens,
                cached_tokens=self._num_cached_tokens,
            ),
            prompt_logprobs=(None, *self._prompt_logprobs) if with_prompt_logprobs else None,
            embedding=self._embedding,
            metrics=self._metrics or (self._own_metrics(clock(), num_tokens) if self.finished else _NO_METRICS),
        )

    def _own_metrics(self, now: float, num_tokens: int) -> RequestMetrics:
        """Timings as seen here, for a request that a stop string ended: the engine's come with a terminal output."""
        arrival, first = self.request.arrival_time, self._first_token_time
        if first is None:
            return RequestMetrics(total_time=now - arrival)
        per_completion = num_tokens / len(self.completions)
        return RequestMetrics(
            time_to_first_token=first - arrival,
            time_per_output_token=(now - first) / (per_completion - 1) if per_completion > 1 else None,
            total_time=now - arrival,
        )
