"""Streamed answers of /v1/chat/completions and /v1/completions: outputs to chunks.

The chunks of a stream add up to the body of the same request without streaming, because both are made of the same
outputs: text from the deltas, through the parser that reads whole answers too, everything else from what is new since
the last chunk of the choice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from kvik.openai_format import LegacyLogprobs, chat_logprob, usage_body
from kvik.outputs import CompletionOutput, Usage
from kvik.server.call_readers import Arguments
from kvik.server.protocol import ServedRequest
from kvik.server.reply_parser import Content, ReplyParser, ToolCall
from kvik.server.reply_syntax import count_reasoning, delta_of, finish_reason
from kvik.server.streaming import DONE, PING, PING_INTERVAL, event, json_text
from kvik.text.completion import Completion
from kvik.text.output_processor import OpenRequest
from kvik.text.tokenizer import Tokenizer

__all__ = ["Chunks"]

_GAP = "\0"
"""Stands for the text where the rest of a chunk is encoded: no name contains it."""


class _Choice:
    """What was sent of one choice."""

    def __init__(self, parser: ReplyParser | None) -> None:
        self.num_tokens = 0
        self.ended = False
        self.legacy: LegacyLogprobs | None = None
        self.frames: dict[str, tuple[bytes, bytes]] = {}
        self.parser = parser
        self.num_calls = 0
        self.num_reasoning = 0
        self.has_answered = False


class Chunks:
    """Makes the events of one stream."""

    def __init__(
        self,
        served: ServedRequest,
        reply_id: str,
        created: int,
        model: str,
        fingerprint: str,
        tokenizer: Tokenizer,
        prompt_lengths: Sequence[int],
    ) -> None:
        self._served = served
        self._tokenizer = tokenizer
        self._chat = served.request.chat
        params = served.request.params
        self._n = params.n
        self._requests: dict[int, OpenRequest] = {}
        self._usages = [Usage(prompt_tokens=length, completion_tokens=0) for length in prompt_lengths]
        self._warnings: dict[str, Any] = {"warnings": list(served.warnings)} if served.warnings else {}
        # Whether chunks that say nothing of an end differ in their text only.
        self._same_frame = not (served.continuous_usage or served.return_token_ids or params.logprobs is not None)
        self._syntax = served.syntax
        self._choices = [
            _Choice(None if self._syntax is None else self._syntax.parser())
            for _ in range(self._n * len(served.request.inputs))
        ]
        self._told_at = time.monotonic()
        self._head: dict[str, Any] = {
            "id": reply_id,
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def first(self) -> Iterator[bytes]:
        """What comes before any token: the role of each message."""
        if self._chat:
            for index in range(len(self._choices)):
                delta = {"role": "assistant", "content": ""}
                yield self._event({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def of(self, place: int, request: OpenRequest) -> bytes:
        """What is new in the request of the prompt at `place`."""
        self._requests[place] = request
        data = b""
        for completion in request.completions:
            choice = self._choices[place * self._n + completion.index]
            if choice.ended:
                continue
            delta, ended = completion.take_delta(), completion.finish_reason is not None
            if choice.parser is not None:
                data += self._read(choice, choice.parser, place, completion, delta, ended=ended)
            elif delta:
                data += self._text(choice, place, completion, "content" if self._chat else "text", delta)
            if ended:
                choice.ended = True
                data += self._chunk(place, completion, {}, final=True)
        return data if data or self._syntax is None else self._sign_of_life()

    def last(self) -> Iterator[bytes]:
        """The usage if it was asked for, and the end mark."""
        if self._served.include_usage:
            yield event({**self._head, "choices": [], "usage": self._usage()})
        yield DONE

    def _read(
        self, choice: _Choice, parser: ReplyParser, place: int, completion: Completion, text: str, *, ended: bool
    ) -> bytes:
        """The chunks of what is known now of an answer with reasoning or calls."""
        assert self._syntax is not None
        pieces = parser.feed(text, ended=ended)
        if parser.is_reasoning:
            choice.num_reasoning = completion.num_tokens
        elif parser.has_reasoned and not choice.has_answered:
            choice.has_answered = True
            choice.num_reasoning = count_reasoning(completion.token_ids(completion.num_tokens), self._tokenizer)
        data = b""
        for piece in pieces:
            if isinstance(piece, ToolCall):
                choice.num_calls += 1
            if isinstance(piece, (ToolCall, Arguments)):
                data += self._chunk(place, completion, delta_of(piece, choice.num_calls - 1), final=False)
            else:
                name = "content" if isinstance(piece, Content) else str(self._syntax.field)
                data += self._text(choice, place, completion, name, piece.text)
        if data:
            self._told_at = time.monotonic()
        return data

    def _sign_of_life(self) -> bytes:
        """A comment, where nothing was told for long, as while the model writes a long list between marks."""
        now = time.monotonic()
        if now - self._told_at < PING_INTERVAL:
            return b""
        self._told_at = now
        return PING

    def _text(self, choice: _Choice, place: int, completion: Completion, name: str, text: str) -> bytes:
        """A chunk with a text of this name. All but the text is encoded once where it stays the same."""
        if self._warnings or not self._same_frame:
            return self._chunk(place, completion, {name: text}, final=False)
        frame = choice.frames.get(name)
        if frame is None:
            begin, _, end = self._chunk(place, completion, {name: _GAP}, final=False).partition(json_text(_GAP))
            frame = choice.frames[name] = begin, end
        return json_text(text).join(frame)

    def _chunk(self, place: int, completion: Completion, new: dict[str, Any], *, final: bool) -> bytes:
        index = place * self._n + completion.index
        choice, state = self._choices[index], completion.snapshot()
        start, choice.num_tokens = choice.num_tokens, completion.num_tokens
        fields: dict[str, Any] = {"index": index}
        if self._chat:
            fields["delta"] = new
        else:
            fields["text"] = new.get("text", "")
        fields["logprobs"] = self._logprobs(choice, self._requests[place], state, start)
        has_called = choice.parser is not None and choice.parser.has_called
        fields["finish_reason"] = finish_reason(state.finish_reason, has_called=has_called) if final else None
        if final:
            fields["stop_reason"] = state.stop_reason
        if self._served.return_token_ids:
            fields["token_ids"] = state.token_ids[start:]
        return self._event(fields)

    def _logprobs(
        self, choice: _Choice, request: OpenRequest, state: CompletionOutput, start: int
    ) -> dict[str, Any] | None:
        if state.logprobs is None:
            return None
        new = state.logprobs[start:]
        if self._chat:
            return {"content": [chat_logprob(item, self._tokenizer) for item in new], "refusal": None}
        items: list[Any] = [(item.token_id, item) for item in new]
        if choice.legacy is None:
            choice.legacy = LegacyLogprobs(self._tokenizer, self._served.request.params, request.prompt_token_ids)
            if (prompt := request.prompt_logprobs) is not None:
                items = [*zip(request.prompt_token_ids, prompt, strict=False), *items]
        return choice.legacy.add(items)

    def _event(self, choice: dict[str, Any]) -> bytes:
        """A chunk with one choice; the first one has the warnings."""
        more, self._warnings = self._warnings, {}
        if self._served.continuous_usage:
            more["usage"] = self._usage()
        elif self._served.include_usage:
            more["usage"] = None
        return event({**self._head, "choices": [choice], **more})

    def _usage(self) -> dict[str, Any]:
        reasons = self._syntax is not None and self._syntax.field is not None
        num_reasoning = sum(choice.num_reasoning for choice in self._choices) if reasons else None
        for place, request in self._requests.items():
            self._usages[place] = request.usage
        return usage_body(self._usages, num_reasoning)
