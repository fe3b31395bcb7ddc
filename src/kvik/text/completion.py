"""One completion of a request while it grows: token ids in, text out, ended by the engine or by a stop string.

`Completion` is owned by the OutputProcessor. Its snapshots share append-only lists with it and join them when they are
first read, so that a stream of n outputs costs O(n), not O(n^2).
"""

from __future__ import annotations

from typing import Any

from kvik.core.request import Request
from kvik.outputs import CompletionOutput, FinishReason, SequenceOutput, TokenLogprobs
from kvik.text.detokenizer import Detokenizer
from kvik.text.stop import StopMatcher, StopStrings

__all__ = ["Completion"]


class Completion:
    """Text state of one sequence; `finish_reason` is set once it has ended, and nothing is taken after that."""

    def __init__(
        self, index: int, request: Request, detokenizer: Detokenizer, stops: StopStrings | None, echo: str = ""
    ) -> None:
        params = request.params
        self.index = index
        self.finish_reason: FinishReason | None = None
        self._params = params
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops, include=params.include_stop_str_in_output) if stops else None
        self._pieces = [echo] if echo else []
        self._joined = (0, "")
        self._delta = echo
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._stop_reason: str | int | None = None
        self.error: str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    def take(self, output: SequenceOutput) -> None:
        """Add the tokens of one engine output, up to a stop string if one appears."""
        assert self.finish_reason is None
        new = output.new_token_ids
        silent = output.stop_token_id is not None and not self._params.include_stop_str_in_output
        if self._matcher is None:
            self._token_ids += new
            self._logprobs += output.logprobs
            self._emit(self._detokenizer.extend(new[:-1] if silent else new))
        else:
            for i, token_id in enumerate(new):
                self._token_ids.append(token_id)
                self._logprobs += output.logprobs[i : i + 1]
                if not silent or i < len(new) - 1:
                    self._write(self._detokenizer.extend((token_id,)), self._matcher)
                if self.finish_reason is not None:
                    return
        if output.finish_reason is not None:
            self._finish(output)

    def _write(self, text: str, matcher: StopMatcher) -> None:
        """Pass text through the stop matcher, which finds what ends with a token that may stop the sequence."""
        text = matcher.feed(text, armed=len(self._token_ids) > self._params.min_tokens)
        if matcher.matched is not None:
            self.finish_reason, self._stop_reason = FinishReason.STOP, matcher.matched
        self._emit(text)

    def _emit(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._delta += text

    def _finish(self, output: SequenceOutput) -> None:
        """End as the engine says, unless the rest of the text turns out to end in a stop string."""
        rest = self._detokenizer.finish()
        if self._matcher is None:
            self._emit(rest)
        else:
            self._write(rest, self._matcher)
            if self.finish_reason is not None:
                return
            self._emit(self._matcher.flush())
        self.finish_reason, self.error = output.finish_reason, output.error
        if output.stop_token_id in self._params.stop_token_ids:
            self._stop_reason = output.stop_token_id

    def take_delta(self) -> str:
        """The text since the last call."""
        delta, self._delta = self._delta, ""
        return delta

    def snapshot(self) -> CompletionOutput:
        """This completion as it is now."""
        if self.finish_reason is None:
            return _LiveOutput.of(self, len(self._pieces), len(self._token_ids))
        return CompletionOutput(
            index=self.index,
            text=self.text(len(self._pieces)),
            token_ids=tuple(self._token_ids),
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            logprobs=self.logprobs(len(self._token_ids)),
            error=self.error,
        )

    def text(self, num_pieces: int) -> str:
        """The first pieces joined; the longest text made so far is kept, so that it only grows by what is new."""
        joined, text = self._joined
        if num_pieces < joined:
            return "".join(self._pieces[:num_pieces])
        text += "".join(self._pieces[joined:num_pieces])
        self._joined = (num_pieces, text)
        return text

    def token_ids(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(self._token_ids[:num_tokens])

    def logprobs(self, num_tokens: int) -> tuple[TokenLogprobs, ...] | None:
        return None if self._params.logprobs is None else tuple(self._logprobs[:num_tokens])


class _LiveOutput(CompletionOutput):
    """A `CompletionOutput` of an unfinished completion whose fields are made when they are first read.

    Their slots stay empty until then; Python calls `__getattr__` for an empty slot only. There is one of these for
    every token of a stream, so what is filled at once is filled through the slots' own setters.
    """

    __slots__ = ("_completion", "_num_pieces", "_num_tokens")

    _completion: Completion
    _num_pieces: int
    _num_tokens: int

    @classmethod
    def of(cls, completion: Completion, num_pieces: int, num_tokens: int) -> _LiveOutput:
        self = cls.__new__(cls)
        _put_completion(self, completion)
        _put_num_pieces(self, num_pieces)
        _put_num_tokens(self, num_tokens)
        _put_finish_reason(self, None)
        return self

    def __getattr__(self, name: str) -> Any:
        value: object
        if name == "text":
            value = self._completion.text(self._num_pieces)
        elif name == "token_ids":
            value = self._completion.token_ids(self._num_tokens)
        elif name == "logprobs":
            value = self._completion.logprobs(self._num_tokens)
        elif name == "index":
            value = self._completion.index
        elif name in ("stop_reason", "error"):
            value = None
        else:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)
        return value


_put_completion = _LiveOutput.__dict__["_completion"].__set__
_put_num_pieces = _LiveOutput.__dict__["_num_pieces"].__set__
_put_num_tokens = _LiveOutput.__dict__["_num_tokens"].__set__
_put_finish_reason = CompletionOutput.__dict__["finish_reason"].__set__
