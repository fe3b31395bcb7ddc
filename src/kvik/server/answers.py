"""Whole answers to chats and completions, for `kvik serve` and `kvik batch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvik.openai_format import response_body, usage_body
from kvik.outputs import RequestOutput
from kvik.server.protocol import ServedRequest
from kvik.server.reply_syntax import ReplySyntax, count_reasoning, finish_reason, message_of
from kvik.text.tokenizer import Tokenizer

__all__ = ["answer_body"]


def answer_body(
    served: ServedRequest, outputs: Sequence[RequestOutput], tokenizer: Tokenizer, model: str, fingerprint: str
) -> dict[str, Any]:
    """The body of the answer to a request, from one finished output for each of its prompts."""
    body = response_body(served.request, outputs, tokenizer, model, fingerprint)
    completions = [completion for output in outputs for completion in output.outputs]
    if served.syntax is not None:
        body.update(_read(body["choices"], served.syntax, outputs, tokenizer))
    if served.warnings:
        body["warnings"] = list(served.warnings)
    if served.return_token_ids:
        for choice, completion in zip(body["choices"], completions, strict=True):
            choice["token_ids"] = completion.token_ids
    return body


def _read(
    choices: list[dict[str, Any]], syntax: ReplySyntax, outputs: Sequence[RequestOutput], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Choices and usage with reasoning and calls told apart from the content."""
    read, num_reasoning = [], 0
    completions = [completion for output in outputs for completion in output.outputs]
    for choice, completion in zip(choices, completions, strict=True):
        parser = syntax.parser()
        message = message_of(parser.feed(completion.text, ended=True), syntax.field)
        reason = finish_reason(completion.finish_reason, has_called=parser.has_called)
        read.append({**choice, "message": message, "finish_reason": reason})
        num_reasoning += count_reasoning(completion.token_ids, tokenizer) if parser.has_reasoned else 0
    usages = [output.usage for output in outputs]
    return {"choices": read, "usage": usage_body(usages, None if syntax.field is None else num_reasoning)}
