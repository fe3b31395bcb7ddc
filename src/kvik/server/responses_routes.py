"""/v1/responses: the stateless core. Input items become a conversation; the answer is output items or typed events.

What needs state or tools of the server's own (previous_response_id, background, conversations, built-in tools) is
refused by name.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.requests import Request

from kvik.errors import RequestError
from kvik.fields import show
from kvik.openai_format import blaming, response_structure
from kvik.outputs import FinishReason, RequestOutput
from kvik.sampling_params import StructuredOutputsParams
from kvik.server.body import Body, read_json
from kvik.server.engine_client import Generation
from kvik.server.errors import ApiError, failure_of, not_found
from kvik.server.openapi import BODIES, operation
from kvik.server.protocol import IGNORED, effort_variables, refuse, refuse_both, take_syntax, take_tools
from kvik.server.replies import json_reply
from kvik.server.reply_syntax import ReplySyntax, count_reasoning
from kvik.server.responses_items import Event, OutputItems, chat_tools, messages_of
from kvik.server.service import Service, gather
from kvik.server.streaming import PING, PING_INTERVAL, EventStream, event
from kvik.text.tokenizer import Tokenizer

__all__ = ["router"]

router = APIRouter()

_STATE = "this server keeps no responses; send the whole conversation as input"
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "background": _STATE,
        "conversation": _STATE,
        "include": "there is nothing more to include",
        "max_tool_calls": "the server runs no tools",
        "previous_response_id": _STATE,
        "prompt": "prompt templates are not stored here; send input",
        "top_logprobs": "use /v1/chat/completions for log-probabilities",
        "truncation": "prompts are never cut; shorten the input",
    }
)
_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {"background": (False,), "include": ([],), "top_logprobs": (0,), "truncation": ("disabled",)}
)


class _Answer:
    """One response while it is made: its parser, its items, and what its body says of the request."""

    def __init__(self, response_id: str, fields: dict[str, Any], syntax: ReplySyntax, tokenizer: Tokenizer) -> None:
        self._items = OutputItems()
        self._response_id = response_id
        self._fields = fields
        self._parser = syntax.parser()
        self._tokenizer = tokenizer

    def take(self, output: RequestOutput) -> Iterator[Event]:
        """The events of what is new in an output."""
        for piece in self._parser.feed(output.delta, ended=output.finished):
            yield from self._items.add(piece)
        if output.finished:
            yield from self._items.finish("incomplete" if _is_cut(output) else "completed")

    def response(
        self, status: str, output: RequestOutput | None = None, error: ApiError | None = None
    ) -> dict[str, Any]:
        """The response object."""
        cut = output is not None and _is_cut(output)
        return {
            "id": self._response_id,
            "object": "response",
            "status": "incomplete" if cut else status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "error": None if error is None else {"code": "server_error", "message": str(error)},
            "output": [] if output is None else self._items.items,
            "usage": None if output is None else self._usage(output),
            "previous_response_id": None,
            "truncation": "disabled",
            "store": False,
            **self._fields,
        }

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        usage = output.usage
        reasoning = count_reasoning(output.outputs[0].token_ids, self._tokenizer) if self._parser.has_reasoned else 0
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": usage.total_tokens,
        }


def _is_cut(output: RequestOutput) -> bool:
    return output.finish_reason is FinishReason.LENGTH


@router.post("/v1/responses", **operation("responses"))
async def responses(request: Request) -> Response:
    """Answer an input."""
    service: Service = request.app.state.service
    body = Body(await read_json(request))
    _refuse(body)
    metadata = body.fields.get("metadata", {})
    body.ignore((*IGNORED, "stream_options"))
    model = service.check_model(body.take("model", str))
    instructions = body.take("instructions", str)
    messages = messages_of(body.fields.pop("input", None), instructions)
    defaults = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
    given = {name: body.fields.get(name, default) for name, default in defaults.items()}
    body.fields["tools"] = chat_tools(body.take("tools", list, []))
    tools = take_tools(body)
    syntax = take_syntax(body, tools, service.syntax) or ReplySyntax()
    stream = body.take("stream", bool, False)
    limit = body.take("max_output_tokens", int)
    sampling = body.take_all(("temperature", "top_p"))
    chosen = {"max_tokens": None, **service.overrides, **sampling, **({} if limit is None else {"max_tokens": limit})}
    text_format, structure = _text(body)
    effort, variables = _reasoning(body)
    refuse_both(syntax, None if structure is None else "text")
    names = {"prompt": "input", "max_tokens": "max_output_tokens"}
    with blaming(names):
        params = dataclasses.replace(service.defaults, **{**chosen, "n": 1, "structured_outputs": structure})
    warnings = body.finish((*BODIES["responses"]["properties"], *_REFUSED), strict=service.config.strict)
    fields = {
        "created_at": int(time.time()),
        "model": model,
        "instructions": instructions,
        "metadata": metadata,
        "max_output_tokens": limit,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "text": {"format": text_format},
        "reasoning": {"effort": effort, "summary": None},
        **given,
        **({"warnings": warnings} if warnings else {}),
    }
    response_id, frontend = f"resp_{uuid.uuid4().hex}", service.frontend
    options = {"tools": tools.shown, "chat_template_kwargs": variables}
    with blaming({"messages": "input"}):
        prompt = await service.run(lambda: frontend.render_chat(messages, **options), len(await request.body()))
    syntax = syntax.after(prompt.text, params)
    params = syntax.params_of(params, frontend.tokenizer)
    names["structured_outputs"] = syntax.cause or "text"
    generation = await service.generate(request, [prompt], params, call_id=response_id, stream=stream, names=names)
    answer = _Answer(response_id, fields, syntax, frontend.tokenizer)
    if not stream:
        (output,) = await gather(generation, request)
        for _ in answer.take(output):
            pass
        return json_reply(answer.response("completed", output))
    events = _Events(answer)
    return EventStream(
        events.of(generation),
        generation.close,
        patience=service.config.slow_client_timeout,
        on_error=lambda error: events.make("response.failed", response=answer.response("failed", error=error)),
    )


@router.get("/v1/responses/{response_id:path}", response_model=None, include_in_schema=False)
@router.delete("/v1/responses/{response_id:path}", response_model=None, include_in_schema=False)
@router.post("/v1/responses/{response_id}/cancel", response_model=None, include_in_schema=False)
async def stored(response_id: str) -> Response:
    """A response of earlier."""
    raise not_found(f"there is no response {show(response_id)} here: {_STATE}", "response_not_found")


def _refuse(body: Body) -> None:
    """Raise RequestError for a field that asks for what this server does not do, and for another thing than it does."""
    for name, values in _NEUTRAL.items():
        if name in body.fields and body.fields[name] in values:
            del body.fields[name]
    body.refuse(_REFUSED)
    refuse(body, chat=True)


def _text(body: Body) -> tuple[dict[str, Any], StructuredOutputsParams | None]:
    """The format of the text, and what it asks of the engine."""
    text = Body(body.take("text", dict, {}))
    if text.fields.pop("verbosity", None) is not None:
        body.warnings.append("text.verbosity has no effect on this server")
    chosen = text.take("format", dict, {"type": "text"})
    if text.fields:
        raise RequestError(f"text has no member {show(next(iter(text.fields)))}", "text")
    try:
        return chosen, response_structure(chosen)
    except RequestError as error:
        raise RequestError(f"text.format: {error}", "text") from None


def _reasoning(body: Body) -> tuple[str | None, dict[str, Any]]:
    """The effort of reasoning, and the variables of the chat template that say it, or the request's own."""
    given = Body(body.take("reasoning", dict, {}))
    for name in ("generate_summary", "summary"):
        if given.fields.pop(name, None) is not None:
            body.warnings.append(f"reasoning.{name} has no effect on this server: reasoning is given as it is")
    effort = given.fields.pop("effort", None)
    if given.fields:
        raise RequestError(f"reasoning has no member {show(next(iter(given.fields)))}", "reasoning")
    variables = effort_variables(effort, body, "reasoning.effort")
    return effort, {**variables, **body.take("chat_template_kwargs", dict, {})}


class _Events:
    """The typed events of one response, numbered."""

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer
        self._number = -1

    def make(self, kind: str, **fields: Any) -> bytes:
        """The next event."""
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **fields}, kind)

    async def of(self, generation: Generation) -> AsyncIterator[bytes]:
        """The events of a stream. Raises ApiError where the engine ends the request early."""
        answer = self._answer
        for kind in ("response.created", "response.in_progress"):
            yield self.make(kind, response=answer.response("in_progress"))
        output: RequestOutput | None = None
        while output is None or not output.finished:
            changes = await generation.changes(PING_INTERVAL)
            if not changes:
                yield PING
            for _, request in changes:
                error = failure_of(request)
                if error is not None:
                    raise error
                output = request.output()
                for kind, fields in answer.take(output):
                    yield self.make(kind, **fields)
        done = answer.response("completed", output)
        yield self.make(f"response.{done['status']}", response=done)
