"""Streamed answers of /v1/chat/completions and /v1/completions: outputs to chunks.

The chunks of a stream add up to the body of the same request without streaming, because both are made of the same
outputs: text from the deltas, everything else from what is new since the last chunk of the choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvik import __version__
from kvik.cli.openai_format import LegacyLogprobs, chat_logprob, usage_body
from kvik.outputs import CompletionOutput, RequestOutput, Usage
from kvik.server.protocol import ServedRequest
from kvik.server.streaming import DONE, event
from kvik.text.tokenizer import Tokenizer

__all__ = ["Chunks"]


class _Choice:
    """What was sent of one choice."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.num_tokens = 0
        self.begun = False
        self.ended = False
        self.legacy = LegacyLogprobs(tokenizer)


class Chunks:
    """Makes the events of one stream."""

    def __init__(self, served: ServedRequest, reply_id: str, created: int, model: str, tokenizer: Tokenizer) -> None:
        self._served = served
        self._tokenizer = tokenizer
        self._chat = served.request.chat
        self._n = served.request.params.n
        self._usages: dict[int, Usage] = {}
        self._warnings: dict[str, Any] = {"warnings": list(served.warnings)} if served.warnings else {}
        self._choices = [_Choice(tokenizer) for _ in range(self._n * len(served.request.inputs))]
        self._head: dict[str, Any] = {
            "id": reply_id,
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": created,
            "model": model,
            "system_fingerprint": f"kvik-{__version__}",
        }

    def first(self) -> Iterator[bytes]:
        """What comes before any token: the role of each message."""
        if self._chat:
            for index in range(len(self._choices)):
                delta = {"role": "assistant", "content": ""}
                yield self._event({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def of(self, place: int, output: RequestOutput) -> Iterator[bytes]:
        """What is new in an output of the prompt at `place`."""
        self._usages[place] = output.usage
        for completion, delta in zip(output.outputs, output.deltas, strict=True):
            choice = self._choices[place * self._n + completion.index]
            if choice.ended:
                continue
            if delta:
                yield self._chunk(place, output, completion, delta, final=False)
            if completion.finished:
                choice.ended = True
                yield self._chunk(place, output, completion, "", final=True)

    def last(self) -> Iterator[bytes]:
        """The usage if it was asked for, and the end mark."""
        if self._served.include_usage:
            yield event({**self._head, "choices": [], "usage": usage_body(list(self._usages.values()))})
        yield DONE

    def _chunk(
        self, place: int, output: RequestOutput, completion: CompletionOutput, text: str, *, final: bool
    ) -> bytes:
        index = place * self._n + completion.index
        choice = self._choices[index]
        start, choice.num_tokens = choice.num_tokens, len(completion.token_ids)
        fields: dict[str, Any] = {"index": index}
        if self._chat:
            fields["delta"] = {} if final else {"content": text}
        else:
            fields["text"] = text
        fields["logprobs"] = self._logprobs(choice, output, completion, start)
        fields["finish_reason"] = str(completion.finish_reason) if final else None
        if final:
            fields["stop_reason"] = completion.stop_reason
        if self._served.return_token_ids:
            fields["token_ids"] = completion.token_ids[start:]
        return self._event(fields)

    def _logprobs(
        self, choice: _Choice, output: RequestOutput, completion: CompletionOutput, start: int
    ) -> dict[str, Any] | None:
        if completion.logprobs is None:
            return None
        new = completion.logprobs[start:]
        if self._chat:
            return {"content": [chat_logprob(item, self._tokenizer) for item in new], "refusal": None}
        items: list[Any] = [(item.token_id, item) for item in new]
        if not choice.begun and output.prompt_logprobs is not None:
            items = [*zip(output.prompt_token_ids, output.prompt_logprobs, strict=False), *items]
        choice.begun = True
        return choice.legacy.add(items)

    def _event(self, choice: dict[str, Any]) -> bytes:
        """A chunk with one choice; the first one has the warnings."""
        more, self._warnings = self._warnings, {}
        if self._served.continuous_usage:
            more["usage"] = usage_body(list(self._usages.values()))
        elif self._served.include_usage:
            more["usage"] = None
        return event({**self._head, "choices": [choice], **more})
