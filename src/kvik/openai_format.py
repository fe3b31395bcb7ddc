"""The OpenAI format: request bodies to prompts and SamplingParams, outputs to response bodies.

The fields are those of /v1/completions and /v1/chat/completions that say what the engine is asked, and every
SamplingParams field of text form; null is the same as absent. `kvik.server.protocol` deals with all others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvik.errors import ConfigError, KvikError, RequestError, did_you_mean
from kvik.fields import show
from kvik.outputs import CompletionOutput, RequestOutput, TokenLogprobs, Usage
from kvik.sampling_params import SamplingParams, StructuredOutputsParams
from kvik.settings import SAMPLING, Pair

if TYPE_CHECKING:
    from kvik.text.frontend import Frontend, Prompt
    from kvik.text.tokenizer import Tokenizer

__all__ = [
    "KNOWN_FIELDS", "LegacyLogprobs", "OpenAIRequest", "blaming", "chat_logprob", "check_defaults", "error_body",
    "parse_body", "response_body", "response_structure", "usage_body",
]  # fmt: skip

COMPLETION_MAX_TOKENS = 16
MAX_TOP_LOGPROBS = 20
LOWEST_LOGPROB = -9999.0  # OpenAI's, since JSON has no minus infinity
_SAMPLING = frozenset(SAMPLING.options) - {"echo", "logprobs", "prompt_logprobs"}
_GUIDED = MappingProxyType(
    {
        "grammar": "grammar", "guided_choice": "choice", "guided_grammar": "grammar", "guided_json": "json",
        "guided_regex": "regex", "json_schema": "json",
    }
)  # fmt: skip
"""Names that other servers have for members of structured_outputs."""

_STRUCTURED = frozenset({"response_format", "structured_outputs", *_GUIDED})
_TEMPLATE = ("add_generation_prompt", "chat_template_kwargs", "continue_final_message")
_BOOLEANS = ("add_generation_prompt", "continue_final_message", "echo", "stream")
_OTHERS = MappingProxyType(
    {
        True: frozenset({"messages", "logprobs", "top_logprobs", "max_completion_tokens", *_TEMPLATE}) | _STRUCTURED,
        False: frozenset({"prompt", "logprobs", "echo"}) | _STRUCTURED,
    }
)
KNOWN_FIELDS: Mapping[bool, frozenset[str]] = MappingProxyType(
    {chat: _SAMPLING | others | {"model", "stream"} for chat, others in _OTHERS.items()}
)
"""Names that `parse_body` understands, for chats (True) and completions (False)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIRequest:
    """A checked body. `inputs` are prompts (strings or lists of token ids), or the one list of messages of a chat.

    `names` are the fields that the engine has other names for, by these: the one that asks for structured outputs, too.
    """

    chat: bool
    model: str | None
    inputs: tuple[Any, ...]
    template_options: Mapping[str, Any]
    params: SamplingParams
    stream: bool
    names: Mapping[str, str]

    def prompts(self, frontend: Frontend) -> list[Prompt]:
        """What the engine is given, one item per input. Raises RequestError where the chat template refuses."""
        if not self.chat:
            return list(self.inputs)
        return [frontend.render_chat(messages, **self.template_options) for messages in self.inputs]


def parse_body(
    body: Mapping[str, Any], *, chat: bool, base: SamplingParams, overrides: Mapping[str, Any]
) -> OpenAIRequest:
    """Check a body of known fields. What it leaves out comes from `overrides`, then OpenAI's max_tokens, then `base`.

    Raises RequestError, with the field in `.param`, for whatever is malformed.
    """
    fields = {name: value for name, value in body.items() if value is not None}
    for name, value in fields.items():
        _check_field(name, value, chat)
    values = {"max_tokens": None if chat else COMPLETION_MAX_TOKENS, **overrides}
    values.update((name, value) for name, value in fields.items() if name in _SAMPLING)
    values.update(_chat_values(fields) if chat else _completion_values(fields, overrides))
    structure_param, values["structured_outputs"] = _structure(fields)
    names = {"prompt": "messages"} if chat else {}
    if "max_completion_tokens" in fields:
        names["max_tokens"] = "max_completion_tokens"
    if structure_param is not None:
        names["structured_outputs"] = structure_param
    with blaming(names):
        params = dataclasses.replace(base, **values)
    return OpenAIRequest(
        chat=chat,
        model=fields.get("model"),
        inputs=_inputs(fields, chat),
        template_options={name: fields[name] for name in _TEMPLATE if name in fields},
        params=params,
        stream=fields.get("stream", False),
        names=names,
    )


def check_defaults(values: Mapping[str, Any]) -> None:
    """Raise ConfigError for sampling options that cannot be defaults of bodies."""
    for name in ("echo", "prompt_logprobs"):
        if values.get(name) not in (None, False):
            raise ConfigError(f"{name} is no default for requests; the body of a completion has echo and logprobs")


def _check_field(name: str, value: Any, chat: bool) -> None:
    """Raise RequestError unless the field's JSON type is right."""
    assert name in KNOWN_FIELDS[chat], name
    if name in _SAMPLING:
        _check_type(name, value)
    elif name == "model":
        _expect(name, isinstance(value, str), "a string", value)
    elif name == "stream" or (name in _BOOLEANS and name in _OTHERS[chat]) or (chat and name == "logprobs"):
        _expect(name, isinstance(value, bool), "true or false", value)


def _check_type(name: str, value: Any) -> None:
    option = SAMPLING.options[name]
    if option.kind is bool:
        _expect(name, isinstance(value, bool), "true or false", value)
    elif option.kind is Pair:
        _expect(name, isinstance(value, dict), "an object of token ids and biases", value)
    elif option.many:
        is_text = option.kind is str and isinstance(value, str)
        _expect(name, is_text or isinstance(value, list), "a list", value)


def _expect(name: str, fine: bool, what: str, value: Any) -> None:
    if not fine:
        raise RequestError(f"{name} must be {what}, got {value!r}", name)


def _completion_values(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    num_top, echo = fields.get("logprobs", overrides.get("logprobs")), fields.get("echo", False)
    return {"echo": echo, "logprobs": num_top, "prompt_logprobs": num_top if echo else None}


def _chat_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    num_top = fields.get("top_logprobs", 0)
    good = isinstance(num_top, int) and not isinstance(num_top, bool) and 0 <= num_top <= MAX_TOP_LOGPROBS
    _expect("top_logprobs", good, f"an integer in [0, {MAX_TOP_LOGPROBS}]", num_top)
    if fields.get("logprobs"):
        values["logprobs"] = num_top
    elif "top_logprobs" in fields:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    if "max_completion_tokens" in fields:
        limit = fields["max_completion_tokens"]
        if fields.get("max_tokens", limit) != limit:
            raise RequestError("max_tokens and max_completion_tokens differ; give one", "max_completion_tokens")
        values["max_tokens"] = limit
    return values


def _structure(fields: Mapping[str, Any]) -> tuple[str | None, StructuredOutputsParams | None]:
    """The field that says what the text has to be, and what that is."""
    given = [name for name in fields if name in _STRUCTURED]
    if len(given) > 1:
        raise RequestError(f"{' and '.join(sorted(given))} each say what the text has to be; give one", given[1])
    if not given:
        return None, None
    name, value = given[0], fields[given[0]]
    try:
        if name == "response_format":
            return name, response_structure(value)
        if name == "structured_outputs":
            _expect(name, isinstance(value, dict), "an object", value)
            return name, StructuredOutputsParams(**value)
        return name, StructuredOutputsParams(**{_GUIDED[name]: value})
    except RequestError as error:
        raise RequestError(f"{name}: {error}", name) from None


def response_structure(value: Any) -> StructuredOutputsParams | None:
    """What a `response_format` asks for, or a `text.format` of the Responses API, whose schema is not wrapped.

    A schema is always followed: `strict` has nothing to add. Raises RequestError.
    """
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("text", "json_object"):
        _members(value, "type")
        return None if kind == "text" else StructuredOutputsParams(json_object=True)
    if kind != "json_schema":
        raise RequestError(f"type must be text, json_object or json_schema, got {show(kind or value)}")
    if "json_schema" in value:
        _members(value, "type", "json_schema")
        value = value["json_schema"]
        if not isinstance(value, dict):
            raise RequestError(f"json_schema must be an object, got {show(value)}")
    _members(value, "type", "name", "schema", "strict", "description")
    name, schema, strict = value.get("name"), value.get("schema"), value.get("strict")
    if not isinstance(name, str) or not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name):
        raise RequestError(f"name must be 1 to 64 letters, digits, _ or -, got {show(name)}")
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(f"strict must be true or false, got {show(strict)}")
    if not isinstance(schema, dict):
        raise RequestError(f"schema must be a JSON schema, got {show(schema)}")
    members: dict[str, Any] = {"json": schema}  # which takes a schema as it comes
    return StructuredOutputsParams(**members)


def _members(value: Mapping[str, Any], *known: str) -> None:
    for name in value:
        if name not in known:
            raise RequestError(f"there is no member {show(name)} here{did_you_mean(name, known)}")


def _inputs(fields: Mapping[str, Any], chat: bool) -> tuple[Any, ...]:
    """The prompts of a completion (one or a list of texts or of token id lists), or the one conversation of a chat."""
    name = "messages" if chat else "prompt"
    if name not in fields:
        raise RequestError(f"{name} is required", name)
    value = fields[name]
    if chat or isinstance(value, str):
        return (value,)
    _expect(name, isinstance(value, list) and bool(value), "a text, a list of token ids, or a list of either", value)
    prompts = value if isinstance(value[0], (str, list)) else [value]
    for prompt in prompts:
        _expect(name, isinstance(prompt, (str, list)), "a text, a list of token ids, or a list of either", prompt)
    return tuple(prompts)


# Responses


def error_body(error: KvikError) -> dict[str, Any]:
    """The body of an error response."""
    kind = "invalid_request_error" if isinstance(error, RequestError) else "server_error"
    param = error.param if isinstance(error, RequestError) else None
    code = error.code if isinstance(error, RequestError) else None
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


@contextlib.contextmanager
def blaming(names: Mapping[str, str]) -> Iterator[None]:
    """Within it, an error about a field has the name that the field had in the request: `names` has those that differ.

    So has its message, of max_tokens, which is no word of its own.
    """
    try:
        yield
    except RequestError as error:
        given = names.get(error.param or "")
        if given is None:
            raise
        message = str(error).replace("max_tokens", given) if error.param == "max_tokens" else str(error)
        raise RequestError(message, given, error.code) from None


def response_body(
    request: OpenAIRequest, outputs: Sequence[RequestOutput], tokenizer: Tokenizer, model: str, fingerprint: str
) -> dict[str, Any]:
    """The body of a successful response: one finished output per input; choice index = input * n + completion."""
    choice = _chat_choice if request.chat else _completion_choice
    params = request.params
    choices = [choice(output, completion, tokenizer, params) for output in outputs for completion in output.outputs]
    return {
        "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion" if request.chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": index, **fields} for index, fields in enumerate(choices)],
        "usage": usage_body([output.usage for output in outputs]),
        "system_fingerprint": fingerprint,
    }


def usage_body(usages: Sequence[Usage], reasoning_tokens: int | None = None) -> dict[str, Any]:
    """The sum of the usages of a response's prompts, with how many tokens were reasoning where that is told apart."""
    prompt = sum(usage.prompt_tokens for usage in usages)
    generated = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
        **({} if reasoning_tokens is None else {"completion_tokens_details": {"reasoning_tokens": reasoning_tokens}}),
    }


def _chat_choice(
    output: RequestOutput, completion: CompletionOutput, tokenizer: Tokenizer, params: SamplingParams
) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        logprobs = {"content": [chat_logprob(item, tokenizer) for item in completion.logprobs], "refusal": None}
    message = {"role": "assistant", "content": completion.text, "refusal": None}
    return {"message": message, "logprobs": logprobs, **_ending(completion)}


def _completion_choice(
    output: RequestOutput, completion: CompletionOutput, tokenizer: Tokenizer, params: SamplingParams
) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        items: list[tuple[int, TokenLogprobs | None]] = [(item.token_id, item) for item in completion.logprobs]
        if output.prompt_logprobs is not None:
            items = [*zip(output.prompt_token_ids, output.prompt_logprobs, strict=True), *items]
        logprobs = LegacyLogprobs(tokenizer, params, output.prompt_token_ids).add(items)
    return {"text": completion.text, "logprobs": logprobs, **_ending(completion)}


def _ending(completion: CompletionOutput) -> dict[str, Any]:
    reason = None if completion.finish_reason is None else str(completion.finish_reason)
    return {"finish_reason": reason, "stop_reason": completion.stop_reason}


def chat_logprob(item: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    """An item of `logprobs.content` of a chat."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}

    top = [entry(token_id, logprob) for token_id, logprob in item.top]
    return {**entry(item.token_id, item.logprob), "top_logprobs": top}


class LegacyLogprobs:
    """The four parallel lists of /v1/completions, a piece at a time.

    Offsets count characters of the text that is returned, which begins with the prompt if it is echoed.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        context = () if params.echo else prompt_token_ids
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.vocabulary.detokenizer(params.skip_special_tokens, context)
        self._length = 0

    def add(self, items: Sequence[tuple[int, TokenLogprobs | None]]) -> dict[str, Any]:
        """The lists for the next tokens of the text."""
        return {
            "tokens": [_legacy_token(token_id, self._tokenizer) for token_id, _ in items],
            "token_logprobs": [None if item is None else _finite(item.logprob) for _, item in items],
            "top_logprobs": [None if item is None else self._top(item) for _, item in items],
            "text_offset": [self._offset(token_id) for token_id, _ in items],
        }

    def _top(self, item: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens, and the token itself where it is none of them, as OpenAI gives it."""
        items = dict((*item.top, (item.token_id, item.logprob)))
        return {_legacy_token(token_id, self._tokenizer): _finite(logprob) for token_id, logprob in items.items()}

    def _offset(self, token_id: int) -> int:
        offset = self._length
        self._length += len(self._detokenizer.add(token_id))
        return offset


def _legacy_token(token_id: int, tokenizer: Tokenizer) -> str:
    """A token's text; its bytes where it is part of a character, so that keys of top_logprobs differ."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
