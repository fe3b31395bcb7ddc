"""How one request is sampled. Frozen and validated on construction; the sampler and the text layer read it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kvik.errors import RequestError
from kvik.fields import check_fields, option, show, strict

__all__ = ["MAX_STOP_LENGTH", "MAX_STOP_STRINGS", "LogitsProcessor", "SamplingParams", "StructuredOutputsParams"]

LogitsProcessor = Callable[[list[int], Any], Any]
"""`processor(token_ids, logits) -> logits`: prompt and output ids so far, and float32 logits of shape [vocab_size]."""

MAX_INT = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_LOGPROBS = 128
MAX_STRUCTURE = 65536
"""Characters of a schema, grammar or list of choices."""
MAX_REGEX = 4096
MAX_DEPTH = 64
MAX_CHOICES = 1024


def _items(value: Any, name: str, what: str) -> tuple[Any, ...]:
    if isinstance(value, (bytes, str)) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a list of {what}, got {show(value)}", name)
    return tuple(value)


def _texts(name: str) -> Callable[[Any], tuple[str, ...]]:
    def parse(value: Any) -> tuple[str, ...]:
        items = (value,) if isinstance(value, str) else () if value is None else _items(value, name, "strings")
        if not all(isinstance(item, str) and item for item in items):
            raise RequestError(f"{name} must be non-empty strings, got {show(value)}", name)
        if name == "stop" and len(items) > MAX_STOP_STRINGS:
            raise RequestError(f"stop has {len(items)} strings; at most {MAX_STOP_STRINGS} are allowed", name)
        for item in items:
            _check_utf8(name, item)
        longest = max(map(len, items), default=0)
        if longest > MAX_STOP_LENGTH:
            raise RequestError(
                f"{name} has a string of {longest} characters; at most {MAX_STOP_LENGTH} are allowed", name
            )
        return items

    return parse


def _ids(name: str) -> Callable[[Any], tuple[int, ...]]:
    def parse(value: Any) -> tuple[int, ...]:
        items = () if value is None else _items(value, name, "token ids")
        if not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= MAX_INT for item in items):
            raise RequestError(f"{name} must be token ids (integers >= 0), got {show(items)}", name)
        return items

    return parse


def _token_id(value: Any) -> int | None:
    """A token id given as an integer or, as JSON must, as a string of digits."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INT else None


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    name, found = "logit_bias", dict[int, float]()
    pairs = value.items() if isinstance(value, Mapping) else () if value is None else _items(value, name, "pairs")
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise RequestError(f"logit_bias must map token ids to numbers, got {show(pair)}", name)
        token, bias = _token_id(pair[0]), pair[1]
        number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
        if token is None or not number or not -100 <= bias <= 100:
            raise RequestError(
                f"logit_bias maps {show(pair[0])} to {show(bias)}; token ids are integers >= 0, biases in [-100, 100]",
                name,
            )
        if token in found:
            raise RequestError(f"logit_bias has two biases for token {token}", name)
        found[token] = float(bias)
    return tuple(sorted(found.items()))


def _processors(value: Any) -> tuple[LogitsProcessor, ...]:
    items = (value,) if callable(value) else () if value is None else _items(value, "logits_processors", "callables")
    for item in items:
        if not callable(item):
            raise RequestError(f"logits_processors holds {show(item)}, which is not callable", "logits_processors")
    return items


def _top_k(value: Any) -> Any:
    return 0 if isinstance(value, int) and value == -1 else value


def _schema(value: Any) -> str:
    """A JSON schema as JSON text. Refuses what is none, and one that is nested too deep."""
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"json must be a JSON schema, as an object or as JSON text: {error}", "json") from None
    if not isinstance(schema, Mapping):
        raise RequestError(f"json must be a JSON schema, which is an object, got {show(schema)}", "json")
    depth, level = 0, list[Any]([schema])
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise RequestError(f"json has a schema nested more than {MAX_DEPTH} levels deep", "json")
        inner = [item for node in level for item in (node.values() if isinstance(node, Mapping) else node)]
        level = [item for item in inner if isinstance(item, (Mapping, list, tuple))]
    return _short("json", MAX_STRUCTURE)(text)


def _short(name: str, limit: int) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise RequestError(f"{name} must be a non-empty string, got {show(value)}", name)
        if len(value) > limit:
            raise RequestError(f"{name} has {len(value)} characters; at most {limit} are allowed", name)
        _check_utf8(name, value)
        return value

    return parse


def _check_utf8(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name} holds half a surrogate pair, which no UTF-8 can hold", name) from None


def _choice(value: Any) -> tuple[str, ...]:
    items = _items(value, "choice", "strings")
    if not items or not all(isinstance(item, str) and item for item in items):
        raise RequestError(f"choice must be a list of non-empty strings, got {show(value)}", "choice")
    length = sum(map(len, items))
    if len(items) > MAX_CHOICES or length > MAX_STRUCTURE:
        raise RequestError(
            f"choice has {len(items)} strings of {length} characters together; at most {MAX_CHOICES} of"
            f" {MAX_STRUCTURE} are allowed",
            "choice",
        )
    _check_utf8("choice", "".join(items))
    return items


_LATER = "is not supported; describe the whole text with json, regex, choice or grammar"


@strict(RequestError, hints={"structural_tag": f"structural_tag {_LATER}"})
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What the generated text has to be: exactly one of the fields. Raises RequestError, with the field in `.param`.

    The text begins with the first generated token, and ends, with an end-of-sequence token, only where it is complete.
    JSON may have a space, or a line break and an indentation, between its tokens. `reasoning` comes beside the others:
    it says whether text in think tags, which may be anything, comes first.
    """

    json: str | None = option(None, "the text is JSON after this schema, a dict or JSON text", parse=_schema)
    regex: str | None = option(None, "the whole text matches this regular expression", parse=_short("regex", MAX_REGEX))
    choice: tuple[str, ...] | None = option(None, "the text is one of these strings", parse=_choice)
    grammar: str | None = option(
        None,
        "the text follows this grammar, in Lark's syntax or llama.cpp's GBNF",
        parse=_short("grammar", MAX_STRUCTURE),
    )
    json_object: bool | None = option(None, "the text is some JSON object")
    reasoning: str | None = option(
        None,
        "text up to </think> comes first: opened where the prompt has <think>, possible where the model may write it",
        choices=("none", "possible", "opened"),
    )

    def __post_init__(self) -> None:
        check_fields(self, RequestError)
        if len(self._given) != 1:
            names = ", ".join(f.name for f in dataclasses.fields(self) if f.name != "reasoning")
            given = f"got {' and '.join(self._given)}" if self._given else "got none"
            raise RequestError(f"give exactly one of {names}; {given}", "structured_outputs")

    @property
    def _given(self) -> list[str]:
        names = [f.name for f in dataclasses.fields(self) if f.name != "reasoning"]
        return [name for name in names if getattr(self, name) not in (None, False)]

    @property
    def kind(self) -> str:
        """The name of the field that was given."""
        return self._given[0]

    @property
    def is_json(self) -> bool:
        """Whether the text has to be JSON."""
        return self.kind in ("json", "json_object")


def _structured(value: Any) -> StructuredOutputsParams:
    name = "structured_outputs"
    if isinstance(value, StructuredOutputsParams):
        return value
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise RequestError(f"{name} must be StructuredOutputsParams or a dict of its fields, got {show(value)}", name)
    try:
        return StructuredOutputsParams(**value)
    except RequestError as error:
        raise RequestError(f"{name}: {error}", name) from None


_ALIASES = {"max_new_tokens": "max_tokens", "stop_strings": "stop", "guided_decoding": "structured_outputs"}
_HINTS = {
    "do_sample": "use temperature=0 for greedy decoding, temperature > 0 to sample",
    "max_length": "use max_tokens, which counts generated tokens only",
    "num_beams": "beam search is not supported; use n for several samples",
    "use_beam_search": "beam search is not supported; use n for several samples",
    "best_of": "best_of is not supported; use n and choose yourself",
    "guided_json": 'use structured_outputs={"json": ...}',
    "guided_regex": 'use structured_outputs={"regex": ...}',
    "guided_choice": 'use structured_outputs={"choice": ...}',
    "guided_grammar": 'use structured_outputs={"grammar": ...}',
    "lora_request": "LoRA is not supported; merge the adapter into the model",
    "truncate_prompt_tokens": "prompts are never cut; shorten them before",
    "typical_p": "typical_p is not supported; use min_p or top_p",
}


@strict(RequestError, aliases=_ALIASES, hints=_HINTS)
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one request. Raises RequestError, with the field in `.param`, for a value out of range."""

    max_tokens: int | None = option(
        64, "tokens to generate at most; None fills the context (alias max_new_tokens)", low=1, high=MAX_INT
    )
    temperature: float = option(1.0, "0 is greedy; up to 2, higher is more random", low=0, high=2)
    top_k: int = option(0, "keep the k most likely tokens; 0 or -1 keeps all", low=0, high=MAX_INT, parse=_top_k)
    top_p: float = option(1.0, "keep the smallest set of tokens whose probability reaches top_p", above=0, high=1)
    min_p: float = option(0.0, "keep tokens at least min_p times as likely as the most likely one", low=0, high=1)
    repetition_penalty: float = option(
        1.0, "divide (multiply) positive (negative) logits of tokens seen; 1 is off", above=0, high=100
    )
    presence_penalty: float = option(0.0, "subtract from the logits of tokens already generated", low=-2, high=2)
    frequency_penalty: float = option(
        0.0, "subtract, times their count, from the logits of tokens already generated", low=-2, high=2
    )
    seed: int | None = option(
        None, "makes the draws reproducible whatever else runs; None draws a fresh seed", low=0, high=MAX_SEED
    )
    n: int = option(1, "completions to generate; completion i uses seed + i", low=1, high=1024)
    stop: tuple[str, ...] = option((), "strings that end the text", parse=_texts("stop"))
    stop_token_ids: tuple[int, ...] = option(
        (), "token ids that end the text, besides the model's own", parse=_ids("stop_token_ids")
    )
    include_stop_str_in_output: bool = option(False, "keep the stop string or stop token in the output text")
    ignore_eos: bool = option(False, "go on after the model's end-of-sequence tokens")
    min_tokens: int = option(0, "generate at least this many tokens before any stop", low=0, high=MAX_INT)
    logit_bias: tuple[tuple[int, float], ...] = option(
        (), "add to the logits of token ids: {id: bias in [-100, 100]}", parse=_bias
    )
    allowed_token_ids: tuple[int, ...] | None = option(
        None, "only these token ids may be generated", parse=_ids("allowed_token_ids")
    )
    bad_words: tuple[str, ...] = option(
        (),
        "words whose tokens must not follow each other; not found inside other words, or cut into other tokens",
        parse=_texts("bad_words"),
    )
    logprobs: int | None = option(
        None, "return log-probabilities of the token drawn and of this many top tokens", low=0, high=MAX_LOGPROBS
    )
    prompt_logprobs: int | None = option(None, "the same for every prompt token", low=0, high=MAX_LOGPROBS)
    skip_special_tokens: bool = option(True, "leave special tokens out of the text")
    echo: bool = option(False, "put the prompt before the generated text")
    logits_processors: tuple[LogitsProcessor, ...] = option(
        (), "Python callables (token_ids, logits) -> logits, offline only", parse=_processors
    )
    structured_outputs: StructuredOutputsParams | None = option(  # noqa: RUF009  its type is frozen
        None, "what the text has to be: JSON after a schema, a regular expression, ...", parse=_structured
    )

    def __post_init__(self) -> None:
        check_fields(self, RequestError)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}", "min_tokens")
        if self.allowed_token_ids == ():
            raise RequestError("allowed_token_ids is empty: no token could be generated", "allowed_token_ids")
        for name in ("ignore_eos", "min_tokens"):
            if self.structured_outputs is not None and getattr(self, name):
                raise RequestError(f"{name} contradicts structured_outputs, which says where the text ends", name)

    @property
    def greedy(self) -> bool:
        """Whether each token is the argmax of the processed logits."""
        return self.temperature == 0.0
