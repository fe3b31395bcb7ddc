"""How one request is sampled. Frozen and validated on construction; the sampler and the text layer read it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kvik.errors import RequestError
from kvik.fields import option, strict

__all__ = ["LogitsProcessor", "SamplingParams"]

LogitsProcessor = Callable[[list[int], Any], Any]
"""`processor(token_ids, logits) -> logits`: prompt and output ids so far, and float32 logits of shape [vocab_size]."""

MAX_SEED = 2**63 - 1
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_LOGPROBS = 128


def _texts(value: Any, name: str) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(item, str) and item for item in items):
        raise RequestError(f"{name} must be non-empty strings, got {value!r}", name)
    return items


def _ids(value: Iterable[Any], name: str) -> tuple[int, ...]:
    items = tuple(value)
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items):
        raise RequestError(f"{name} must be token ids (integers >= 0), got {list(items)[:10]!r}", name)
    return items


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        items = tuple(sorted((int(token), float(bias)) for token, bias in pairs))
    except (TypeError, ValueError) as error:
        raise RequestError(f"logit_bias must map token ids to numbers: {error}", "logit_bias") from error
    for token, bias in items:
        if token < 0 or not -100.0 <= bias <= 100.0:
            raise RequestError(
                f"logit_bias maps token {token} to {bias}; ids are >= 0, biases in [-100, 100]", "logit_bias"
            )
    return items


_HINTS = {
    "do_sample": "use temperature=0 for greedy decoding, temperature > 0 to sample",
    "max_length": "use max_tokens, which counts generated tokens only",
    "num_beams": "beam search is not supported; use n for several samples",
    "best_of": "best_of is not supported; use n and choose yourself",
    "typical_p": "typical_p is not supported; use min_p or top_p",
}


@strict(RequestError, aliases={"max_new_tokens": "max_tokens", "stop_strings": "stop"}, hints=_HINTS)
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one request. Raises RequestError, with the field in `.param`, for a value out of range."""

    max_tokens: int | None = option(64, "tokens to generate at most; None fills the context (alias max_new_tokens)")
    temperature: float = option(1.0, "0 is greedy; up to 2, higher is more random")
    top_k: int = option(0, "keep the k most likely tokens; 0 or -1 keeps all")
    top_p: float = option(1.0, "keep the smallest set of tokens whose probability reaches top_p")
    min_p: float = option(0.0, "keep tokens at least min_p times as likely as the most likely one")
    repetition_penalty: float = option(1.0, "divide (multiply) positive (negative) logits of tokens seen; 1 is off")
    presence_penalty: float = option(0.0, "subtract from the logits of tokens already generated, in [-2, 2]")
    frequency_penalty: float = option(0.0, "subtract, times their count, from logits of generated tokens, in [-2, 2]")
    seed: int | None = option(None, "makes the draws reproducible whatever else runs; None draws a fresh seed")
    n: int = option(1, "completions to generate; completion i uses seed + i")
    stop: tuple[str, ...] = option((), "strings that end the text")
    stop_token_ids: tuple[int, ...] = option((), "token ids that end the text, besides the model's own")
    include_stop_str_in_output: bool = option(False, "keep the stop string or stop token in the output text")
    ignore_eos: bool = option(False, "go on after the model's end-of-sequence tokens")
    min_tokens: int = option(0, "generate at least this many tokens before any stop")
    logit_bias: tuple[tuple[int, float], ...] = option((), "add to the logits of token ids: {id: bias in [-100, 100]}")
    allowed_token_ids: tuple[int, ...] | None = option(None, "only these token ids may be generated")
    bad_words: tuple[str, ...] = option((), "strings that must not be generated")
    logprobs: int | None = option(None, "return log-probabilities of the token drawn and of this many top tokens")
    prompt_logprobs: int | None = option(None, "the same for every prompt token")
    skip_special_tokens: bool = option(True, "leave special tokens out of the text")
    echo: bool = option(False, "put the prompt before the generated text")
    logits_processors: tuple[LogitsProcessor, ...] = option(
        (), "Python callables (token_ids, logits) -> logits, offline only"
    )

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("stop", _texts(self.stop, "stop"))
        put("bad_words", _texts(self.bad_words, "bad_words"))
        put("stop_token_ids", _ids(self.stop_token_ids or (), "stop_token_ids"))
        put("logit_bias", _bias(self.logit_bias or ()))
        put("logits_processors", tuple(self.logits_processors or ()))
        put("top_k", 0 if self.top_k == -1 else self.top_k)
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", _ids(self.allowed_token_ids, "allowed_token_ids"))
        self._check_integers()
        self._check_numbers()
        self._check_lists()

    def _check_integers(self) -> None:
        limits: dict[str, tuple[int, int]] = {
            "max_tokens": (1, 2**31 - 1), "top_k": (0, 2**31 - 1), "n": (1, 1024), "min_tokens": (0, 2**31 - 1),
            "seed": (0, MAX_SEED), "logprobs": (0, MAX_LOGPROBS), "prompt_logprobs": (0, MAX_LOGPROBS),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is None and name in ("max_tokens", "seed", "logprobs", "prompt_logprobs"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise RequestError(f"{name} must be an integer in [{low}, {high}], got {value!r}", name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}", "min_tokens")

    def _check_numbers(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            "temperature": (0.0, 2.0), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "repetition_penalty": (0.0, 100.0),
            "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not low <= value <= high or (value == 0 and name in ("top_p", "repetition_penalty")):
                bounds = f"({low:g}, {high:g}]" if name in ("top_p", "repetition_penalty") else f"[{low:g}, {high:g}]"
                raise RequestError(f"{name} must be a number in {bounds}, got {value!r}", name)

    def _check_lists(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed", "stop")
        longest = max(map(len, self.stop), default=0)
        if longest > MAX_STOP_LENGTH:
            raise RequestError(f"a stop string has {longest} characters; at most {MAX_STOP_LENGTH} are allowed", "stop")
        if self.allowed_token_ids == ():
            raise RequestError("allowed_token_ids is empty: no token could be generated", "allowed_token_ids")
        for processor in self.logits_processors:
            if not callable(processor):
                raise RequestError(f"logits_processors holds {processor!r}, which is not callable", "logits_processors")

    @property
    def greedy(self) -> bool:
        """Whether each token is the argmax of the processed logits."""
        return self.temperature == 0.0
