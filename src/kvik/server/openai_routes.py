"""/v1/chat/completions and /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.requests import Request

from kvik.openai_format import response_body, usage_body
from kvik.outputs import CompletionOutput, RequestOutput
from kvik.server.body import read_json
from kvik.server.chunks import Chunks
from kvik.server.engine_client import Generation
from kvik.server.errors import failure_of
from kvik.server.openapi import operation
from kvik.server.protocol import ServedRequest, parse
from kvik.server.replies import json_reply
from kvik.server.reply_syntax import ReplySyntax, count_reasoning, finish_reason, message_of
from kvik.server.service import Service, gather
from kvik.server.streaming import PING, PING_INTERVAL, WRITER, EventStream, Writer
from kvik.text.output_processor import OpenRequest
from kvik.text.tokenizer import Tokenizer

__all__ = ["router"]

router = APIRouter()


@router.post("/v1/chat/completions", **operation("chat"))
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    return await _complete(request, chat=True)


@router.post("/v1/completions", **operation("completions"))
async def completions(request: Request) -> Response:
    """Continue one or several prompts."""
    return await _complete(request, chat=False)


async def _complete(http: Request, *, chat: bool) -> Response:
    service: Service = http.app.state.service
    fields = await read_json(http)
    served = parse(
        fields,
        chat=chat,
        base=service.defaults,
        overrides=service.overrides,
        config=service.config,
        model=service.syntax,
    )
    model = service.check_model(served.request.model)
    frontend = service.frontend
    prompts = await service.run(lambda: served.request.prompts(frontend), len(await http.body()))
    served = served.behind(prompts, frontend.tokenizer)
    reply_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex[:24]}"
    generation = await service.generate(
        http,
        prompts,
        served.request.params,
        call_id=reply_id,
        stream=served.request.stream,
        priority=served.priority,
        cache_salt=served.cache_salt,
        structure_param=served.request.structure_param or "structured_outputs",
    )
    if served.request.stream:
        chunks = Chunks(served, reply_id, int(time.time()), model, service.ready.fingerprint, frontend.tokenizer)
        interval = service.config.stream_interval
        writer = http.scope.get("extensions", {}).get(WRITER)
        if writer is not None and not interval and len(prompts) == served.request.params.n == 1:
            generation.push_to(lambda request: _push(chunks, request, writer))
        events = _events(generation, chunks, interval)
        return EventStream(events, generation.close, patience=service.config.slow_client_timeout)
    outputs = await gather(generation, http)
    body = response_body(served.request, outputs, frontend.tokenizer, model, service.ready.fingerprint)
    body["id"] = reply_id
    completions = [completion for output in outputs for completion in output.outputs]
    if served.syntax is not None:
        body.update(_read(body["choices"], served.syntax, outputs, frontend.tokenizer))
    _extend(body, served, completions)
    return json_reply(body)


def _read(
    choices: list[dict[str, Any]], syntax: ReplySyntax, outputs: list[RequestOutput], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Choices and usage with reasoning and calls told apart from the content."""
    read, num_reasoning = [], 0
    completions = [completion for output in outputs for completion in output.outputs]
    for choice, completion in zip(choices, completions, strict=True):
        parser = syntax.parser()
        message = message_of([*parser.feed(completion.text), *parser.finish()], syntax.field)
        reason = finish_reason(completion.finish_reason, has_called=parser.has_called)
        read.append({**choice, "message": message, "finish_reason": reason})
        num_reasoning += count_reasoning(completion.token_ids, tokenizer) if parser.has_reasoned else 0
    usages = [output.usage for output in outputs]
    return {"choices": read, "usage": usage_body(usages, None if syntax.field is None else num_reasoning)}


def _extend(body: dict[str, Any], served: ServedRequest, completions: list[CompletionOutput]) -> None:
    """Add the members that only Kvik has, where they were asked for."""
    if served.warnings:
        body["warnings"] = list(served.warnings)
    if served.return_token_ids:
        for choice, completion in zip(body["choices"], completions, strict=True):
            choice["token_ids"] = completion.token_ids


def _push(chunks: Chunks, request: OpenRequest, writer: Writer) -> bool:
    """Write what is new of the only request of a stream; whether that could be done."""
    if not writer.ready:
        return False
    data = chunks.of(0, request)
    if data:
        writer.write(data)
    return True


async def _events(generation: Generation, chunks: Chunks, interval: float) -> AsyncIterator[bytes]:
    """The events of a stream, at least `interval` seconds apart. Raises ApiError where the engine ends it early."""
    for data in chunks.first():
        yield data
    done = False
    while not done:
        changes = await generation.changes(PING_INTERVAL)
        done = bool(changes) and generation.done
        if not changes:
            yield PING
        for place, request in changes:
            error = failure_of(request)
            if error is not None:
                raise error
            data = chunks.of(place, request)
            if data:
                yield data
        if interval and not done:
            await generation.pause(interval)
    for data in chunks.last():
        yield data
