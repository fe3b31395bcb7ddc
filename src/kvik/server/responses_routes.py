"""/v1/responses: the stateless core. Input items become a conversation; the answer is one message of typed events.

What needs state or tools of the server's own (previous_response_id, background, conversations, built-in tools) is
refused by name.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.requests import Request

from kvik.errors import RequestError
from kvik.outputs import FinishReason, RequestOutput
from kvik.server.body import Body, read_json
from kvik.server.engine_client import Generation
from kvik.server.errors import ApiError, failure_of
from kvik.server.openapi import BODIES, operation
from kvik.server.replies import json_reply
from kvik.server.service import Service, gather
from kvik.server.streaming import PING, PING_INTERVAL, EventStream, event

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
        "text": "only plain text can be generated",
        "tool_choice": "tools are not part of this endpoint yet",
        "tools": "tools are not part of this endpoint yet",
        "top_logprobs": "use /v1/chat/completions for log-probabilities",
        "truncation": "prompts are never cut; shorten the input",
    }
)
_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "background": (False,),
        "include": ([],),
        "text": ({"format": {"type": "text"}}, {}),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "truncation": ("disabled",),
    }
)
_IGNORED = (
    "metadata", "parallel_tool_calls", "prompt_cache_key", "reasoning", "safety_identifier", "service_tier", "store",
    "stream_options", "user",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """What the events and the body of one response have in common."""

    response_id: str
    item_id: str
    fields: dict[str, Any]

    def response(
        self, status: str, output: RequestOutput | None = None, error: ApiError | None = None
    ) -> dict[str, Any]:
        """The response object."""
        cut = output is not None and output.finish_reason is FinishReason.LENGTH
        return {
            "id": self.response_id,
            "object": "response",
            "status": "incomplete" if cut else status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "error": None if error is None else {"code": "server_error", "message": str(error)},
            "output": [] if output is None else [self.item(output.text, "incomplete" if cut else "completed")],
            "usage": None if output is None else _usage(output),
            "previous_response_id": None,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
            "text": {"format": {"type": "text"}},
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            **self.fields,
        }

    def item(self, text: str | None, status: str) -> dict[str, Any]:
        """The one output item, a message; without text before there is any."""
        content = [] if text is None else [_part(text)]
        return {"type": "message", "id": self.item_id, "status": status, "role": "assistant", "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


@router.post("/v1/responses", **operation("responses"))
async def responses(request: Request) -> Response:
    """Answer an input."""
    service: Service = request.app.state.service
    body = Body(await read_json(request))
    for name, values in _NEUTRAL.items():
        if name in body.fields and body.fields[name] in values:
            del body.fields[name]
    body.refuse(_REFUSED)
    metadata = body.fields.get("metadata", {})
    body.ignore(_IGNORED)
    model = service.check_model(body.take("model", str))
    instructions = body.take("instructions", str)
    messages = _messages(body.fields.pop("input", None), instructions)
    stream = body.take("stream", bool, False)
    limit = body.take("max_output_tokens", int)
    sampling = body.take_all(("temperature", "top_p"))
    chosen = {"max_tokens": None, **service.overrides, **sampling, **({} if limit is None else {"max_tokens": limit})}
    params = dataclasses.replace(service.defaults, **{**chosen, "n": 1})
    warnings = body.finish((*BODIES["responses"]["properties"], *_REFUSED), strict=service.config.strict)
    fields = {
        "created_at": int(time.time()),
        "model": model,
        "instructions": instructions,
        "metadata": metadata,
        "max_output_tokens": limit,
        "temperature": params.temperature,
        "top_p": params.top_p,
        **({"warnings": warnings} if warnings else {}),
    }
    call = _Call(f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}", fields)
    frontend = service.frontend
    prompt = await service.run(lambda: frontend.render_chat(messages), len(await request.body()))
    generation = await service.generate(request, [prompt], params, call_id=call.response_id, stream=stream)
    if not stream:
        outputs = await gather(generation, request)
        return json_reply(call.response("completed", outputs[0]))
    events = _Events(call)
    return EventStream(
        events.of(generation),
        generation.close,
        patience=service.config.slow_client_timeout,
        on_error=lambda error: events.make("response.failed", response=call.response("failed", error=error)),
    )


def _messages(given: Any, instructions: str | None) -> list[dict[str, Any]]:
    """Input items as chat messages. Raises RequestError for items that are not messages of text."""
    if given is None:
        raise RequestError("input is required", "input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list):
        raise RequestError("input must be a text or a list of messages", "input")
    head = [] if instructions is None else [{"role": "system", "content": instructions}]
    return head + [_message(item, place) for place, item in enumerate(items)]


def _message(item: Any, place: int) -> dict[str, Any]:
    if not isinstance(item, dict) or item.get("type", "message") != "message":
        raise RequestError(f"input[{place}] is not a message; other items are not supported", "input")
    content = item.get("content")
    if isinstance(content, list):
        content = [_text_part(part, place) for part in content]
    role = item.get("role")
    return {"role": role, "content": content}


def _text_part(part: Any, place: int) -> dict[str, Any]:
    kinds = ("input_text", "output_text", "text")
    if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
        raise RequestError(f"input[{place}].content may hold parts of text only", "input")
    return {"type": "text", "text": part["text"]}


def _usage(output: RequestOutput) -> dict[str, Any]:
    usage = output.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }


class _Events:
    """The typed events of one response, numbered."""

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._number = -1

    def make(self, kind: str, **fields: Any) -> bytes:
        """The next event."""
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **fields}, kind)

    async def of(self, generation: Generation) -> AsyncIterator[bytes]:
        """The events of a stream. Raises ApiError where the engine ends the request early."""
        call = self._call
        where = {"item_id": call.item_id, "output_index": 0, "content_index": 0}
        yield self.make("response.created", response=call.response("in_progress"))
        yield self.make("response.in_progress", response=call.response("in_progress"))
        yield self.make("response.output_item.added", output_index=0, item=call.item(None, "in_progress"))
        yield self.make("response.content_part.added", **where, part=_part(""))
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
                if output.delta:
                    yield self.make("response.output_text.delta", **where, delta=output.delta, logprobs=[])
        text, done = output.text, call.response("completed", output)
        yield self.make("response.output_text.done", **where, text=text, logprobs=[])
        yield self.make("response.content_part.done", **where, part=_part(text))
        yield self.make("response.output_item.done", output_index=0, item=done["output"][0])
        yield self.make(f"response.{done['status']}", response=done)
