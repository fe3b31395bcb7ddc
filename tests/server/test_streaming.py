"""Chunks and waiting, without a server: the quick ways give what the plain ones give."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import pytest

from kvik.core.request import Request
from kvik.outputs import FinishReason, SequenceOutput
from kvik.sampling_params import SamplingParams
from kvik.server.chunks import Chunks
from kvik.server.engine_client import EngineClient, Generation
from kvik.server.protocol import parse
from kvik.server_config import ServerConfig
from kvik.text.output_processor import OpenRequest, OutputProcessor
from kvik.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.of_bytes()
TEXT = 'a "quoted" \\ line\nand \0 and é and 語 and </data>'


def stream(text: str, *, chat: bool, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream of `text`, one byte a token and then some bytes at a time."""
    prompt = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    body = {**prompt, "stream": True, "n": 2, **fields}
    served = parse(body, chat=chat, base=SamplingParams(), overrides={}, config=ServerConfig())
    chunks = Chunks(served, "id", 1, 'na"me', TOKENIZER)
    request = Request(request_id="r", prompt_token_ids=(5,), params=served.request.params, seed=1)
    processor = OutputProcessor(TOKENIZER)
    processor.add(request)
    ids = TOKENIZER.encode(text)
    events = [*chunks.first()]
    for start, end in [(i, i + 1) for i in range(10)] + [(10, len(ids))]:
        new = tuple(ids[start:end])
        reason = FinishReason.LENGTH if end == len(ids) else None
        outputs = [SequenceOutput(request_id="r", index=i, new_token_ids=new, finish_reason=reason) for i in (1, 0)]
        for changed in processor.fold(outputs).changed:
            events += chunks.of(0, changed)
    events += chunks.last()
    assert events.pop() == b"data: [DONE]\n\n"
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("more", [{}, {"user": "a field that gives a warning"}])
@pytest.mark.parametrize("usage", [True, False])
def test_chunks_that_are_encoded_once_are_those_that_are_encoded_each_time(
    chat: bool, more: dict[str, Any], usage: bool
) -> None:
    more = {**more, "stream_options": {"include_usage": usage}}
    quick = stream(TEXT, chat=chat, **more)
    plain = stream(TEXT, chat=chat, return_token_ids=True, **more)
    for event in plain:
        for choice in event["choices"]:
            choice.pop("token_ids", None)
    assert quick == plain
    texts = ["", ""]
    for event in quick:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "") if chat else choice["text"]
    assert texts == [TEXT, TEXT]


def test_a_wait_ends_at_its_own_time_whatever_earlier_waits_were_set_to() -> None:
    request = Request(request_id="r", prompt_token_ids=(5,), params=SamplingParams(), seed=1)
    state = OpenRequest(request, None, TOKENIZER, lambda: 0.0, stream=True)

    async def body() -> None:
        generation = Generation(cast(EngineClient, None), [request])
        assert await generation.changes(0.01) == []
        reader = asyncio.create_task(generation.changes(1000))
        await asyncio.sleep(0)
        generation.put(state)
        assert await reader == [(0, state)]
        assert await asyncio.wait_for(generation.changes(0.01), 20) == []
        reader = asyncio.create_task(generation.changes(0.05))  # longer than the alarm that is set now
        await asyncio.sleep(0)
        generation.put(state)
        await reader
        assert await asyncio.wait_for(generation.changes(0.1), 20) == []
        reader = asyncio.create_task(generation.changes(0.01))
        await asyncio.sleep(0)
        generation.put(state)
        await reader
        endless = asyncio.create_task(generation.changes())  # the last alarm is none of its business
        await asyncio.sleep(0.05)
        assert not endless.done()
        generation.put(state)
        assert await endless == [(0, state)]
        generation.stop_timers()

    asyncio.run(body())
