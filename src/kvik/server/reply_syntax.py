"""How the served model writes reasoning and tool calls, and how both look in OpenAI's format.

`ModelSyntax` is found out from the chat template once, `ReplySyntax` is what of it matters for one request. Everything
else about answers is in `kvik.server.reply_parser`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvik.outputs import FinishReason
from kvik.sampling_params import SamplingParams
from kvik.server.call_readers import Arguments
from kvik.server.forced_calls import call_grammar
from kvik.server.reply_parser import Content, Piece, Reasoning, ReplyParser, ToolCall
from kvik.server.tool_formats import TOOL_FORMATS, ToolFormat
from kvik.server_config import ServerConfig
from kvik.structured.grammars import THINK
from kvik.text.tokenizer import Tokenizer

__all__ = ["ModelSyntax", "ReplySyntax", "count_reasoning", "delta_of", "finish_reason", "message_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class ReplySyntax:
    """How answers to one request are read. `schemas` are the parameters of the offered functions, `field` is where
    reasoning goes.

    Where there are `forced` functions, the answer has to be a call of one of them. `thoughts` says whether the prompt
    has opened the reasoning, as `reasoning` of StructuredOutputsParams does.
    """

    tools: ToolFormat | None = None
    schemas: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    field: str | None = None
    thoughts: str = "none"
    max_calls: int | None = None
    forced: tuple[Mapping[str, Any], ...] = ()

    def after(self, prompt: str, params: SamplingParams) -> ReplySyntax:
        """The same behind a rendered prompt, which may have opened the reasoning, or ended it."""
        structure, end = params.structured_outputs, prompt.rstrip()
        if self.field is None or end.endswith(THINK[1]) or (structure is not None and structure.reasoning == "none"):
            return self
        return dataclasses.replace(self, thoughts="opened" if end.endswith(THINK[0]) else "possible")

    def parser(self) -> ReplyParser:
        """A parser for one answer."""
        return ReplyParser(
            self.tools,
            self.schemas,
            reasoning=self.field is not None,
            opened=self.thoughts == "opened",
            max_calls=self.max_calls,
            forced=bool(self.forced),
        )

    @property
    def cause(self) -> str | None:
        """The field of a request to which this syntax owes its grammar."""
        return "tools" if self.forced else None

    def params_of(self, params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
        """The parameters with what this syntax asks of the engine: marks that are seen, calls that are forced.

        Raises RequestError.
        """
        structure = params.structured_outputs
        if self.forced:
            assert self.tools is not None
            structure = call_grammar(self.tools, self.forced, tokenizer, many=self.max_calls is None)
        elif self.tools is not None and structure is not None and structure.is_json:
            offered = [{"name": name, "parameters": schema} for name, schema in self.schemas.items()]
            calls = call_grammar(self.tools, offered, tokenizer, many=self.max_calls is None, answer=structure)
            structure = dataclasses.replace(calls, reasoning=structure.reasoning)
        if structure is not None and structure.reasoning is None:
            structure = dataclasses.replace(structure, reasoning=self.thoughts)
        hidden = any(tokenizer.backend.token_to_id(mark) in tokenizer.special_token_ids for mark in self._marks)
        skip = params.skip_special_tokens and not hidden
        return dataclasses.replace(params, structured_outputs=structure, skip_special_tokens=skip)

    @property
    def _marks(self) -> tuple[str, ...]:
        """What must not be left out of the text."""
        calls = () if self.tools is None or self.tools.bare else self.tools.marks
        return calls if self.field is None else (*THINK, *calls)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSyntax:
    """How the model writes calls, None if that is not known, and the name for its reasoning, None if it has none."""

    tools: ToolFormat | None = None
    field: str | None = None

    @classmethod
    def detect(cls, templates: Iterable[str], config: ServerConfig) -> ModelSyntax:
        """What the texts of the chat templates show, as far as the operator does not say otherwise."""
        text = "\n".join(templates)
        wanted = config.tool_format
        fitting = (form for form in TOOL_FORMATS if form.name == wanted or (wanted == "auto" and _fits(form, text)))
        reasons = config.reasoning_field != "none" and THINK[1] in text
        return cls(next(fitting, None), config.reasoning_field if reasons else None)

    def of_request(
        self, functions: Sequence[Mapping[str, Any]], forced: Sequence[Mapping[str, Any]] = (), *, parallel: bool
    ) -> ReplySyntax | None:
        """How answers to a request that offers these functions are read; None: there is nothing to find."""
        tools = self.tools if functions else None
        if tools is None and self.field is None:
            return None
        schemas = {function["name"]: function.get("parameters") for function in functions}
        schemas = {name: schema if isinstance(schema, Mapping) else {} for name, schema in schemas.items()}
        max_calls = None if parallel else 1
        return ReplySyntax(tools, schemas, self.field, max_calls=max_calls, forced=tuple(forced))


def _fits(form: ToolFormat, template: str) -> bool:
    return all(sign in template for sign in form.signs) and not any(sign in template for sign in form.foreign)


def message_of(pieces: Iterable[Piece], field: str | None) -> dict[str, Any]:
    """The message of a whole answer; its content is null where there are calls and nothing else was said."""
    texts: dict[type, str] = {Reasoning: "", Content: ""}
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, ToolCall):
            calls.append(_begin(piece))
        elif isinstance(piece, Arguments):
            calls[-1]["function"]["arguments"] += piece.text
        else:
            texts[type(piece)] += piece.text
    message: dict[str, Any] = {"role": "assistant", "content": texts[Content], "refusal": None}
    if field is not None:
        message[field] = texts[Reasoning] or None
    if calls:
        message["content"] = texts[Content] or None
        message["tool_calls"] = calls
    return message


def delta_of(piece: ToolCall | Arguments, index: int) -> dict[str, Any]:
    """A call in a stream: what it is, then its arguments."""
    if isinstance(piece, ToolCall):
        return {"tool_calls": [{"index": index, **_begin(piece)}]}
    return {"tool_calls": [{"index": index, "function": {"arguments": piece.text}}]}


def _begin(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}


def finish_reason(reason: FinishReason | None, *, has_called: bool) -> str | None:
    """OpenAI's word: a message with calls ends because of them, unless it was cut."""
    if reason is FinishReason.STOP and has_called:
        return "tool_calls"
    return None if reason is None else str(reason)


def count_reasoning(token_ids: Iterable[int], tokenizer: Tokenizer) -> int:
    """How many tokens of an answer that begins with reasoning belong to it, the end mark's included."""
    mark, seen = THINK[1].encode(), b""
    count = 0
    for token_id in token_ids:
        count += 1
        seen = seen[-len(mark) :] + tokenizer.token_bytes(token_id)
        if mark in seen:
            break
    return count
