"""/v1/chat/completions and /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.requests import Request

from kvik.server.answers import answer_body
from kvik.server.body import read_json
from kvik.server.chunks import Chunks
from kvik.server.engine_client import Generation
from kvik.server.errors import failure_of
from kvik.server.openapi import operation
from kvik.server.protocol import check_limits, parse
from kvik.server.replies import json_reply
from kvik.server.service import Service, gather
from kvik.server.streaming import PING, PING_INTERVAL, WRITER, EventStream, Writer
from kvik.text.output_processor import OpenRequest

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
        model=service.syntax,
        strict=service.config.strict,
    )
    check_limits(served.request.params, len(served.request.inputs), service.config)
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
        names=served.request.names,
    )
    if served.request.stream:
        head = (reply_id, int(time.time()), model, service.ready.fingerprint)
        chunks = Chunks(served, *head, frontend.tokenizer, generation.prompt_lengths)
        interval = service.config.stream_interval
        writer = http.scope.get("extensions", {}).get(WRITER)
        if writer is not None and not interval and len(prompts) == served.request.params.n == 1:
            generation.push_to(lambda request: _push(chunks, request, writer))
        events = _events(generation, chunks, interval)
        return EventStream(events, generation.close, patience=service.config.slow_client_timeout)
    outputs = await gather(generation, http)
    body = answer_body(served, outputs, frontend.tokenizer, model, service.ready.fingerprint)
    body["id"] = reply_id
    return json_reply(body)


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
