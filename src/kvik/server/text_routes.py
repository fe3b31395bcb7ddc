"""/tokenize, /detokenize, /tokenizer_info and /apply-template: the text code that generation uses, on its own."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.requests import Request

from kvik.errors import RequestError
from kvik.server.body import Body, read_json
from kvik.server.openapi import BODIES, operation
from kvik.server.protocol import check_tools
from kvik.server.replies import json_reply
from kvik.server.service import Service
from kvik.text.frontend import ChatPrompt

__all__ = ["router"]

router = APIRouter()


@router.post("/tokenize", **operation("tokenize"))
async def tokenize(request: Request) -> Response:
    """The token ids of a text, or of a conversation under the chat template."""
    service, body = await _open(request)
    text = body.take("prompt", str)
    frontend = service.frontend
    if (text is None) == ("messages" not in body.fields):
        raise RequestError("give a text as prompt, or a conversation as messages: one of the two", "prompt")
    if text is None:
        body.ignore(("add_special_tokens",), "beside messages")
        prompt = await _render(service, body, request)
        ids = list(prompt.token_ids)
    else:
        body.ignore(BODIES["apply_template"]["properties"], "beside a prompt")
        special = body.take("add_special_tokens", bool, True)
        ids = await service.run(lambda: frontend.tokenizer.encode(text, special), len(text))
    warnings = body.finish(BODIES["tokenize"]["properties"], strict=service.config.strict)
    return _reply({"tokens": ids, "count": len(ids), "max_model_len": service.ready.scheduler.max_model_len}, warnings)


@router.post("/detokenize", **operation("detokenize"))
async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens included unless `skip_special_tokens` is true."""
    service, body = await _open(request)
    ids = body.take("tokens", list, required=True)
    skip = body.take("skip_special_tokens", bool, False)
    warnings = body.finish(BODIES["detokenize"]["properties"], strict=service.config.strict)
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise RequestError("tokens must be a list of token ids (integers)", "tokens")
    service.frontend.check_ids(ids, "tokens")
    text = await service.run(lambda: service.frontend.tokenizer.decode(ids, skip), len(ids))
    return _reply({"prompt": text}, warnings)


@router.get("/tokenizer_info", response_model=None, responses={503: {"description": "The model is loading"}})
async def tokenizer_info(request: Request) -> Response:
    """Special tokens, chat template and sizes, for clients that make prompts of their own."""
    service: Service = request.app.state.service
    frontend = service.frontend
    tokenizer = frontend.tokenizer
    return json_reply(
        {
            **tokenizer.special_tokens,
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_ids": tokenizer.eos_token_ids,
            "chat_template": frontend.chat_template.source,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": service.ready.scheduler.max_model_len,
        }
    )


@router.post("/apply-template", **operation("apply_template"))
async def apply_template(request: Request) -> Response:
    """The prompt that a conversation becomes."""
    service, body = await _open(request)
    prompt = await _render(service, body, request)
    warnings = body.finish(BODIES["apply_template"]["properties"], strict=service.config.strict)
    return _reply({"prompt": prompt.text}, warnings)


async def _open(request: Request) -> tuple[Service, Body]:
    service: Service = request.app.state.service
    body = Body(await read_json(request))
    service.check_model(body.take("model", str))
    return service, body


async def _render(service: Service, body: Body, request: Request) -> ChatPrompt:
    messages, tools = body.take("messages", list, required=True), body.take("tools", list)
    check_tools(tools or [])
    options = {
        "add_generation_prompt": body.take("add_generation_prompt", bool),
        "continue_final_message": body.take("continue_final_message", bool, False),
        "chat_template_kwargs": body.take("chat_template_kwargs", dict),
        "tools": tools,
    }
    frontend = service.frontend
    return await service.run(lambda: frontend.render_chat(messages, **options), len(await request.body()))


def _reply(fields: dict[str, Any], warnings: list[str]) -> Response:
    return json_reply({**fields, **({"warnings": warnings} if warnings else {})})
