"""/generate, /generate_stream and /batch_generate: generation without a wrapper. Fields are those of SamplingParams."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.requests import Request

from kvik.errors import RequestError
from kvik.openai_format import blaming, usage_body
from kvik.outputs import RequestOutput
from kvik.sampling_params import SamplingParams
from kvik.server.body import Body, read_json
from kvik.server.engine_client import Generation
from kvik.server.errors import failure_of
from kvik.server.openapi import BODIES, PLAIN_FIELDS, operation
from kvik.server.protocol import check_limits, refuse
from kvik.server.replies import json_reply
from kvik.server.service import Service, gather
from kvik.server.streaming import DONE, PING, PING_INTERVAL, EventStream, event

__all__ = ["router"]

router = APIRouter()


@router.post("/generate", **operation("generate"))
async def generate(request: Request) -> Response:
    """Continue a prompt: {"text", "finish_reason", "usage"}; with `stream: true` as /generate_stream."""
    return await _generate(request, stream=False)


@router.post("/generate_stream", **operation("generate"))
async def generate_stream(request: Request) -> Response:
    """Continue a prompt, as server-sent events {"text": what is new}; the last one has finish_reason and usage."""
    return await _generate(request, stream=True)


@router.post("/batch_generate", **operation("batch_generate"))
async def batch_generate(request: Request) -> Response:
    """Continue several prompts together: {"results": [...]} in their order."""
    service: Service = request.app.state.service
    body = Body(await read_json(request))
    prompts = body.take("prompts", list, required=True)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise RequestError("prompts must be a list of texts; /v1/completions takes token ids, too", "prompts")
    names = {"prompt": "prompts"}
    with blaming(names):
        params = _params(body, service, len(prompts))
    warnings = body.finish(BODIES["batch_generate"]["properties"], strict=service.config.strict)
    call_id = f"gen-{uuid.uuid4().hex[:24]}"
    generation = await service.generate(request, prompts, params, call_id=call_id, stream=False, names=names)
    results = [_result(output) for output in await gather(generation, request)]
    return json_reply({"results": results, **({"warnings": warnings} if warnings else {})})


async def _generate(request: Request, *, stream: bool) -> Response:
    service: Service = request.app.state.service
    body = Body(await read_json(request))
    prompt = body.take("prompt", str, required=True)
    stream = body.take("stream", bool, stream)
    params = _params(body, service, 1)
    warnings = body.finish(BODIES["generate"]["properties"], strict=service.config.strict)
    more = {"warnings": warnings} if warnings else {}
    call_id = f"gen-{uuid.uuid4().hex[:24]}"
    generation = await service.generate(request, [prompt], params, call_id=call_id, stream=stream)
    if stream:
        patience = service.config.slow_client_timeout
        return EventStream(_events(generation, more), generation.close, patience=patience)
    outputs = await gather(generation, request)
    return json_reply({**_result(outputs[0]), **more})


def _params(body: Body, service: Service, num_prompts: int) -> SamplingParams:
    refuse(body, chat=False)
    values = {**service.overrides, **body.take_all(PLAIN_FIELDS)}
    params = dataclasses.replace(service.defaults, **values)
    check_limits(params, num_prompts, service.config)
    return params


def _result(output: RequestOutput) -> dict[str, Any]:
    first = output.outputs[0]
    result = {"text": first.text, "finish_reason": str(first.finish_reason), "usage": usage_body([output.usage])}
    if len(output.outputs) > 1:
        result["texts"] = [completion.text for completion in output.outputs]
    return result


async def _events(generation: Generation, more: dict[str, Any]) -> AsyncIterator[bytes]:
    while True:
        changes = await generation.changes(PING_INTERVAL)
        if not changes:
            yield PING
        for _, request in changes:
            error = failure_of(request)
            if error is not None:
                raise error
            output = request.output()
            for completion, delta in zip(output.outputs, output.deltas, strict=True):
                if delta:
                    yield event({"text": delta, **({"index": completion.index} if len(output.outputs) > 1 else {})})
            if output.finished:
                yield event({**_result(output), "text": "", **more})
                yield DONE
                return
