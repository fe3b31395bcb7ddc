"""The fields of /v1/chat/completions and /v1/completions: which work, which have no effect, which are refused and why.

The tables below are the whole truth: the OpenAPI document and docs/serving.md are made from them, and a test holds
every documented field against the server's behaviour. What a field means is decided in `kvik.openai_format`, which
`kvik batch` shares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from kvik.errors import RequestError
from kvik.openai_format import KNOWN_FIELDS, OpenAIRequest, parse_body
from kvik.sampling_params import SamplingParams
from kvik.server.body import Body
from kvik.server.reply_syntax import ModelSyntax, ReplySyntax
from kvik.server_config import ServerConfig
from kvik.text.frontend import ChatPrompt, Prompt
from kvik.text.tokenizer import Tokenizer

__all__ = [
    "IGNORED", "OWN_FIELDS", "REFUSED", "ServedRequest", "check_limits", "known_fields", "parse", "take_syntax",
    "take_tools",
]  # fmt: skip

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "audio": "this server generates text only",
        "best_of": "use n and choose yourself",
        "chat_template": "templates come from the operator (--chat-template), not from requests",
        "function_call": "use tools, which the chat template shows to the model",
        "functions": "use tools, which the chat template shows to the model",
        "length_penalty": "beam search is not part of this server",
        "logits_processors": "they are code, and work offline only",
        "lora": "adapters are not part of this version",
        "modalities": "this server generates text only",
        "prediction": "predicted outputs are not part of this version",
        "prompt_embeds": "send text or token ids",
        "prompt_logprobs": "use echo with logprobs on /v1/completions",
        "suffix": "filling in the middle is not part of this version",
        "truncate_prompt_tokens": "prompts are never cut; shorten the prompt",
        "use_beam_search": "use n for several samples",
        "web_search_options": "this server makes no requests of its own",
    }
)
IGNORED = (
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
    "verbosity",
)  # fmt: skip
"""Accepted for the sake of clients that always send them, and reported in `warnings`."""

_STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")
_BOTH = ("cache_salt", "priority", "return_token_ids", "stream_options")
OWN_FIELDS: Mapping[bool, tuple[str, ...]] = MappingProxyType(
    {True: (*_BOTH, "tools", "tool_choice", "parallel_tool_calls", "reasoning_effort"), False: _BOTH}
)
_CHAT_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAX_PRIORITY = 1000
MAX_TOOLS = 128


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServedRequest:
    """A checked body: what the engine is asked, and how the answer is to be given.

    `syntax` says how reasoning and calls are found in it; None: everything is content.
    """

    request: OpenAIRequest
    syntax: ReplySyntax | None = None
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    priority: int = 0
    cache_salt: str = ""
    warnings: tuple[str, ...] = ()

    def behind(self, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> ServedRequest:
        """The same once prompts are made: the template may have opened the reasoning, and marks of calls must show."""
        if self.syntax is None:
            return self
        (prompt,) = prompts
        assert isinstance(prompt, ChatPrompt)
        syntax = self.syntax.after(prompt.text, self.request.params)
        params = syntax.show_marks(self.request.params, tokenizer)
        return dataclasses.replace(self, syntax=syntax, request=dataclasses.replace(self.request, params=params))


def known_fields(chat: bool) -> frozenset[str]:
    """Every field that does something."""
    return (KNOWN_FIELDS[chat] | frozenset(OWN_FIELDS[chat])) - frozenset(REFUSED) - frozenset(IGNORED)


def parse(
    fields: Mapping[str, Any],
    *,
    chat: bool,
    base: SamplingParams,
    overrides: Mapping[str, Any],
    config: ServerConfig,
    model: ModelSyntax,
) -> ServedRequest:
    """Check a body. Raises RequestError, with the field in `.param`."""
    body = Body(fields)
    known = known_fields(chat)
    _drop_neutral(body)
    body.refuse(REFUSED)
    body.ignore(IGNORED)
    template = _template_options(body) if chat else {}
    syntax = take_syntax(body, template.get("tools", []), model) if chat else None
    stream_options = _stream_options(body)
    options: dict[str, Any] = {
        "priority": body.take("priority", int, 0),
        "cache_salt": body.take("cache_salt", str, ""),
        "return_token_ids": body.take("return_token_ids", bool, False),
    }
    if abs(options["priority"]) > MAX_PRIORITY:
        raise RequestError(f"priority must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]", "priority")
    request = parse_body(body.take_all(KNOWN_FIELDS[chat]), chat=chat, base=base, overrides=overrides)
    if template:
        request = dataclasses.replace(request, template_options=_merge(request.template_options, template))
    if stream_options and not request.stream:
        raise RequestError("stream_options needs stream: true", "stream_options")
    check_limits(request.params, len(request.inputs), config)
    warnings = body.finish(known, strict=config.strict)
    return ServedRequest(
        request=request,
        syntax=syntax,
        include_usage=stream_options.get("include_usage", False),
        continuous_usage=stream_options.get("continuous_usage_stats", False),
        warnings=tuple(warnings),
        **options,
    )


def check_limits(params: SamplingParams, num_prompts: int, config: ServerConfig) -> None:
    """Raise RequestError for more than the server's operator allows."""
    if params.n > config.max_n:
        raise RequestError(f"n is {params.n}; this server allows at most {config.max_n}", "n")
    if num_prompts > config.max_n:
        raise RequestError(f"there are {num_prompts} prompts; this server allows at most {config.max_n}", "prompt")
    if len(params.logit_bias) > config.max_logit_bias:
        raise RequestError(
            f"logit_bias has {len(params.logit_bias)} entries; this server allows at most {config.max_logit_bias}",
            "logit_bias",
        )


def _drop_neutral(body: Body) -> None:
    """Remove fields that ask for what happens anyway."""
    neutral: dict[str, Any] = {
        "best_of": 1, "suffix": "", "modalities": ["text"], "tools": [], "use_beam_search": False,
    }  # fmt: skip
    for name, value in neutral.items():
        if name in body.fields and body.fields[name] == value and type(body.fields[name]) is type(value):
            del body.fields[name]


def _template_options(body: Body) -> dict[str, Any]:
    """What the chat template gets beside the messages: tools, and the effort of reasoning."""
    options: dict[str, Any] = {}
    tools = take_tools(body)
    if tools:
        options["tools"] = tools
    effort = body.take("reasoning_effort", str)
    if effort is not None:
        if effort not in _CHAT_EFFORTS:
            raise RequestError(f"reasoning_effort must be one of {', '.join(_CHAT_EFFORTS)}", "reasoning_effort")
        options["chat_template_kwargs"] = {"reasoning_effort": effort}
        body.warnings.append("reasoning_effort is handed to the chat template, which may ignore it")
    return options


def take_tools(body: Body) -> list[dict[str, Any]]:
    """The tools that the model is shown. Raises RequestError for a choice that the model would have to be forced to."""
    choice = body.fields.pop("tool_choice", None)
    if choice not in (None, "none", "auto"):
        raise RequestError("tool_choice is not supported but for none and auto: no call is forced yet", "tool_choice")
    tools: list[Any] = body.take("tools", list, [])
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"there are {len(tools)} tools; a request may have at most {MAX_TOOLS}", "tools")
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError(f'tools[{place}] must be {{"type": "function", "function": {{"name": ...}}}}', "tools")
    strict = [tool["function"].pop("strict", False) for tool in tools]  # which models have not learnt to read
    if any(strict):
        body.warnings.append("strict of a function has no effect: arguments are JSON, but not held to the schema")
    return [] if choice == "none" else tools


def take_syntax(body: Body, tools: Sequence[Mapping[str, Any]], model: ModelSyntax) -> ReplySyntax | None:
    """How the answers are read."""
    parallel = body.take("parallel_tool_calls", bool, True)
    if tools and model.tools is None:
        body.warnings.append(
            "tools are shown to the model; how it writes calls is not known (--tool-format), they stay in the content"
        )
    return model.of_request([tool["function"]["name"] for tool in tools], parallel=parallel)


def _merge(given: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = {**more.get("chat_template_kwargs", {}), **(given.get("chat_template_kwargs") or {})}
    merged = {**given, **more}
    return {**merged, "chat_template_kwargs": kwargs} if kwargs else merged


def _stream_options(body: Body) -> dict[str, bool]:
    options = Body(body.take("stream_options", dict, {}))
    found = {name: options.take(name, bool, False) for name in _STREAM_OPTIONS if name in options.fields}
    if options.fields:
        raise RequestError(f"stream_options has no member {next(iter(options.fields))!r}", "stream_options")
    return found
