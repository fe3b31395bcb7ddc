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
from kvik.fields import show
from kvik.openai_format import KNOWN_FIELDS, OpenAIRequest, parse_body
from kvik.sampling_params import SamplingParams
from kvik.server.body import Body
from kvik.server.forced_calls import chosen_functions
from kvik.server.reply_syntax import ModelSyntax, ReplySyntax
from kvik.server_config import ServerConfig
from kvik.text.frontend import ChatPrompt, Prompt
from kvik.text.tokenizer import Tokenizer

__all__ = [
    "IGNORED", "OWN_FIELDS", "REFUSED", "ServedRequest", "Tools", "check_limits", "check_tools", "effort_variables",
    "known_fields", "parse", "refuse", "refuse_both", "take_syntax", "take_tools",
]  # fmt: skip

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "audio": "this server generates text only",
        "best_of": "all n completions are given; use n, and choose yourself",
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
_CHAT_ONLY: Mapping[str, str] = dict.fromkeys(
    ("tools", "tool_choice"), "a completion is plain text; use /v1/chat/completions"
)
IGNORED = (
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
    "verbosity",
)  # fmt: skip
"""Accepted for the sake of clients that always send them, and reported in `warnings`."""

MAX_BAD_WORDS = 1024
"""Every token of every sequence is compared with all of them, and a step is everybody's."""

_STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")
_BOTH = ("cache_salt", "priority", "return_token_ids", "stream_options")
OWN_FIELDS: Mapping[bool, tuple[str, ...]] = MappingProxyType(
    {True: (*_BOTH, "tools", "tool_choice", "parallel_tool_calls", "reasoning_effort"), False: _BOTH}
)
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
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
        params = syntax.params_of(self.request.params, tokenizer)
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
    model: ModelSyntax,
    strict: bool,
) -> ServedRequest:
    """Check a body; fields that nobody knows are wrong if `strict`. Raises RequestError, with the field in `.param`."""
    body = Body(fields)
    known = known_fields(chat)
    refuse(body, chat=chat)
    body.ignore(IGNORED)
    syntax, template = _chat_options(body, model) if chat else (None, {})
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
    if syntax is not None and syntax.cause:
        refuse_both(syntax, request.names.get("structured_outputs"))
        request = dataclasses.replace(request, names={**request.names, "structured_outputs": syntax.cause})
    structure = request.params.structured_outputs
    if syntax is not None and syntax.tools is not None and structure is not None and not structure.is_json:
        body.warnings.append(f"tools cannot be called: {structure.kind} says what the text has to be")
    if stream_options and not request.stream:
        raise RequestError("stream_options needs stream: true", "stream_options")
    warnings = body.finish(known, strict=strict)
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
    if len(params.bad_words) > MAX_BAD_WORDS:
        raise RequestError(
            f"bad_words has {len(params.bad_words)} strings; this server allows at most {MAX_BAD_WORDS}", "bad_words"
        )


def refuse(body: Body, *, chat: bool) -> None:
    """Raise RequestError for a field of REFUSED; drop one that asks for what happens anyway."""
    neutral: dict[str, Any] = {
        "best_of": body.fields.get("n", 1), "functions": [], "function_call": "none", "suffix": "",
        "modalities": ["text"], "tools": [], "use_beam_search": False,
    }  # fmt: skip
    if not chat:
        neutral["tool_choice"] = "none"
    for name, value in neutral.items():
        if name in body.fields and body.fields[name] == value and type(body.fields[name]) is type(value):
            del body.fields[name]
    if not chat:
        body.refuse(_CHAT_ONLY)
    body.refuse(REFUSED)


def _chat_options(body: Body, model: ModelSyntax) -> tuple[ReplySyntax | None, dict[str, Any]]:
    """How the answers are read, and what the chat template gets."""
    tools = take_tools(body)
    return take_syntax(body, tools, model), _template_options(body, tools.shown)


def _template_options(body: Body, tools: list[dict[str, Any]]) -> dict[str, Any]:
    """What the chat template gets beside the messages: tools, and the effort of reasoning."""
    options: dict[str, Any] = {"tools": tools} if tools else {}
    kwargs = effort_variables(body.fields.pop("reasoning_effort", None), body, "reasoning_effort")
    return {**options, "chat_template_kwargs": kwargs} if kwargs else options


def effort_variables(effort: Any, body: Body, param: str) -> dict[str, Any]:
    """The variables of chat templates that stand for an effort of reasoning; a warning says what they may do."""
    if effort is None:
        return {}
    if effort not in _EFFORTS:
        raise RequestError(f"{param} must be one of {', '.join(_EFFORTS)}, got {show(effort)}", param.split(".")[0])
    body.warnings.append(f"{param} is handed to the chat template, which may ignore it")
    return {"reasoning_effort": effort, **({"enable_thinking": False} if effort == "none" else {})}


@dataclasses.dataclass(frozen=True, slots=True)
class Tools:
    """The `shown` tools of a request, and the `forced` functions, of which the model has to call one.

    `single` is whether more than one call makes no sense.
    """

    shown: list[dict[str, Any]]
    forced: list[dict[str, Any]]
    single: bool = False


def take_tools(body: Body) -> Tools:
    """The tools, and what the request says of their use."""
    choice = body.fields.pop("tool_choice", None)
    tools: list[Any] = body.take("tools", list, [])
    check_tools(tools)
    strict = [tool["function"].pop("strict", False) for tool in tools]  # which models have not learnt to read
    forced = chosen_functions(choice, [tool["function"] for tool in tools])
    if any(strict) and not forced:
        body.warnings.append(
            "strict of a function has no effect unless tool_choice is required or names it: arguments are JSON, but not"
            " held to the schema"
        )
    return Tools([] if choice == "none" else tools, forced, single=isinstance(choice, dict))


def check_tools(tools: list[Any]) -> None:
    """Raise RequestError for too many tools, for one that is no function, and for two of the same name."""
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"there are {len(tools)} tools; a request may have at most {MAX_TOOLS}", "tools")
    places: dict[str, int] = {}
    for place, tool in enumerate(tools):
        is_function = isinstance(tool, dict) and tool.get("type", "function") == "function"
        function = tool.get("function") if is_function else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError(f'tools[{place}] must be {{"type": "function", "function": {{"name": ...}}}}', "tools")
        first = places.setdefault(function["name"], place)
        if first != place:
            raise RequestError(
                f"tools[{first}] and tools[{place}] are both named {show(function['name'])}; calls say by name which"
                " function they mean, so every function needs a name of its own",
                "tools",
            )


def take_syntax(body: Body, tools: Tools, model: ModelSyntax) -> ReplySyntax | None:
    """How the answers are read. Raises RequestError for a call that cannot be forced."""
    parallel = body.take("parallel_tool_calls", bool, True)
    if model.tools is None and tools.forced:
        raise RequestError(
            "tool_choice can force a call only where it is known how the model writes calls, which its chat template"
            " does not show; the server's operator can say it (--tool-format)",
            "tool_choice",
        )
    if tools.shown and model.tools is None:
        body.warnings.append(
            "tools are handed to the chat template, which may ignore them; how the model writes calls is not known"
            " (--tool-format), they stay in the content"
        )
    functions = [tool["function"] for tool in tools.shown]
    return model.of_request(functions, tools.forced, parallel=parallel and not tools.single)


def refuse_both(syntax: ReplySyntax, structure_param: str | None) -> None:
    """Raise RequestError if a request that forces calls has a field that says what else its text has to be."""
    if syntax.forced and structure_param is not None:
        raise RequestError(
            f"{structure_param} contradicts tool_choice, which asks for a call; leave one of them out", structure_param
        )


def _merge(given: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    wanted = given.get("chat_template_kwargs") or {}
    if not isinstance(wanted, Mapping):
        return {**more, **given}  # to be refused where all template options are checked
    kwargs = {**more.get("chat_template_kwargs", {}), **wanted}
    merged = {**given, **more}
    return {**merged, "chat_template_kwargs": kwargs} if kwargs else merged


def _stream_options(body: Body) -> dict[str, bool]:
    options = Body(body.take("stream_options", dict, {}))
    found = {name: options.take(name, bool, False) for name in _STREAM_OPTIONS if name in options.fields}
    if options.fields:
        raise RequestError(f"stream_options has no member {next(iter(options.fields))!r}", "stream_options")
    return found
