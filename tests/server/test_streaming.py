"""Chunks and waiting, without a server: the quick ways give what the plain ones give."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any, cast

import pytest
import zmq

from kvik.config import SchedulerConfig
from kvik.core.request import Request
from kvik.outputs import FinishReason, SequenceOutput
from kvik.sampling_params import SamplingParams
from kvik.server import messages as wire
from kvik.server.chunks import Chunks
from kvik.server.engine_client import EngineClient, Generation
from kvik.server.protocol import parse
from kvik.server.reply_syntax import ModelSyntax
from kvik.text.output_processor import OpenRequest, OutputProcessor
from kvik.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.of_bytes()
TEXT = 'a "quoted" \\ line\nand \0 and é and 語 and </data>'


def stream(text: str, *, chat: bool, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream of `text`, one byte a token and then some bytes at a time."""
    prompt = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    body = {**prompt, "stream": True, "n": 2, **fields}
    served = parse(body, chat=chat, base=SamplingParams(), overrides={}, model=ModelSyntax(), strict=False)
    chunks = Chunks(served, "id", 1, 'na"me', "print", TOKENIZER, [1])
    request = Request(request_id="r", prompt_token_ids=(5,), params=served.request.params, seed=1)
    processor = OutputProcessor(TOKENIZER)
    processor.add(request)
    ids = TOKENIZER.encode(text)
    data = b"".join(chunks.first())
    for start, end in [(i, i + 1) for i in range(10)] + [(10, len(ids))]:
        new = tuple(ids[start:end])
        reason = FinishReason.LENGTH if end == len(ids) else None
        outputs = [SequenceOutput(request_id="r", index=i, new_token_ids=new, finish_reason=reason) for i in (1, 0)]
        for changed in processor.fold(outputs).changed:
            data += chunks.of(0, changed)
    data += b"".join(chunks.last())
    *events, done, rest = data.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
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


def test_a_change_is_pushed_while_its_reader_waits_and_wakes_it_where_it_cannot_be_or_is_the_last() -> None:
    request = Request(request_id="r", prompt_token_ids=(5,), params=SamplingParams(), seed=1)
    state = OpenRequest(request, None, TOKENIZER, lambda: 0.0, stream=True)
    pushed, possible = [], True

    def push(changed: OpenRequest) -> bool:
        if possible:
            pushed.append(changed)
        return possible

    async def body() -> None:
        nonlocal possible
        generation = Generation(cast(EngineClient, None), [request])
        generation.push_to(push)
        generation.put(state)  # nobody waits yet: the reader may be in the middle of an older event
        assert await generation.changes() == [(0, state)] and not pushed
        reader = asyncio.create_task(generation.changes())
        await asyncio.sleep(0)
        generation.put(state)
        generation.put(state)
        await asyncio.sleep(0.01)
        assert len(pushed) == 2 and not reader.done()
        possible = False
        generation.put(state)
        assert await reader == [(0, state)]
        possible = True
        reader = asyncio.create_task(generation.changes())
        await asyncio.sleep(0)
        state.finished = True
        generation.put(state)
        assert await reader == [(0, state)] and len(pushed) == 2

    asyncio.run(body())


def test_a_wait_times_out_only_after_silence_of_what_is_pushed_as_well() -> None:
    request = Request(request_id="r", prompt_token_ids=(5,), params=SamplingParams(), seed=1)
    state = OpenRequest(request, None, TOKENIZER, lambda: 0.0, stream=True)

    async def body() -> None:
        generation = Generation(cast(EngineClient, None), [request])
        generation.push_to(lambda changed: True)
        loop = asyncio.get_running_loop()
        reader = asyncio.create_task(generation.changes(0.3))
        for _ in range(6):
            await asyncio.sleep(0.1)
            generation.put(state)
        last = loop.time()
        assert await asyncio.wait_for(reader, 20) == []
        assert loop.time() - last >= 0.29
        generation.stop_timers()

    asyncio.run(body())


def test_steps_that_a_late_process_finds_together_become_one_event(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    endpoint = f"ipc://{tmp_path / 'engine'}"
    router.bind(endpoint)
    config = SchedulerConfig(block_size=16, num_blocks=8, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64)
    request = Request(request_id="r", prompt_token_ids=(5,), params=SamplingParams(max_tokens=9), seed=1)
    events: list[str] = []

    async def body() -> None:
        client = EngineClient(endpoint, max_queued_requests=8, max_queued_tokens=100)
        peer, _ = await asyncio.to_thread(router.recv_multipart)
        router.send_multipart([peer, wire.encode(wire.Ready(scheduler=config, vocab_size=384, hidden_size=8))])
        await client.wait_ready()
        client.attach(OutputProcessor(TOKENIZER))
        generation = client.open([request], [None], stream=True)
        generation.push_to(lambda changed: events.append(changed.completions[0].take_delta()) is None)
        reader = asyncio.create_task(generation.changes())
        await asyncio.sleep(0)
        for token_id in TOKENIZER.encode("abcde"):
            output = SequenceOutput(request_id="r", index=0, new_token_ids=(token_id,))
            router.send_multipart([peer, wire.encode(wire.pack_outputs([output]))])
        time.sleep(0.2)  # the loop is late; zmq's own thread is not
        while not events:
            await asyncio.sleep(0.01)
        reader.cancel()
        await client.close()

    asyncio.run(asyncio.wait_for(body(), 20))
    context.destroy(linger=0)
    assert events == ["abcde"]
