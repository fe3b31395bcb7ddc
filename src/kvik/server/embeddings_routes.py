"""/v1/embeddings: hidden states of the served model, pooled over the tokens of a text and scaled to length 1.

Any decoder can be asked; how well its embeddings separate meanings is the model's business.
"""

from __future__ import annotations

import base64
import struct
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.requests import Request

from kvik.errors import RequestError
from kvik.fields import show
from kvik.outputs import RequestOutput
from kvik.sampling_params import SamplingParams
from kvik.server.body import Body, read_json
from kvik.server.openapi import BODIES, operation
from kvik.server.replies import json_reply
from kvik.server.service import Service, gather

__all__ = ["router"]

router = APIRouter()
MAX_INPUTS = 2048  # as OpenAI's
_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)


@router.post("/v1/embeddings", **operation("embeddings"))
async def embeddings(request: Request) -> Response:
    """Embed one or several texts."""
    service: Service = request.app.state.service
    body = Body(await read_json(request))
    model = service.check_model(body.take("model", str))
    inputs = _inputs(body.fields.pop("input", None))
    encoding = _choice(body, "encoding_format", ("float", "base64"))
    pooling = _choice(body, "pooling", ("mean", "last"))
    dimensions = body.take("dimensions", int)
    body.ignore(("user",))
    warnings = body.finish(BODIES["embeddings"]["properties"], strict=service.config.strict)
    if len(inputs) > MAX_INPUTS:
        raise RequestError(f"input has {len(inputs)} texts; a request may have at most {MAX_INPUTS}", "input")
    size = service.ready.hidden_size
    if dimensions not in (None, size):
        raise RequestError(f"dimensions: this model's embeddings have {size} numbers", "dimensions")
    outputs, most = list[RequestOutput](), service.config.max_n
    for first in range(0, len(inputs), most):  # no more at a time than others may ask for
        call_id, some = f"embd-{uuid.uuid4().hex[:24]}", inputs[first : first + most]
        generation = await service.generate(
            request, some, _ONE_TOKEN, call_id=call_id, stream=False, pooling=pooling, names={"prompt": "input"}
        )
        outputs += await gather(generation, request)
    vectors = [output.embedding for output in outputs]
    num_tokens = sum(output.usage.prompt_tokens for output in outputs)
    reply: dict[str, Any] = {
        "object": "list",
        "model": model,
        "data": [
            {"object": "embedding", "index": index, "embedding": _encode(vector, encoding)}
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return json_reply({**reply, **({"warnings": warnings} if warnings else {})})


def _inputs(value: Any) -> list[Any]:
    """Texts or lists of token ids. Raises RequestError for anything else."""
    if isinstance(value, str) and value:
        return [value]
    if not isinstance(value, list) or not value:
        raise RequestError(f"input must be a text, token ids, or a list of either, got {show(value)}", "input")
    inputs = value if isinstance(value[0], (str, list)) else [value]
    if not all(isinstance(item, (str, list)) and item for item in inputs):
        raise RequestError("input must hold texts or lists of token ids, none of them empty", "input")
    return inputs


def _choice(body: Body, name: str, choices: Sequence[str]) -> str:
    """A field that is one of `choices`, the first one where it is absent."""
    value: str = body.take(name, str, choices[0])
    if value not in choices:
        raise RequestError(f"{name} must be one of {', '.join(choices)}, got {show(value)}", name)
    return value


def _encode(vector: Sequence[float], encoding: str) -> list[float] | str:
    return list(vector) if encoding == "float" else base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
