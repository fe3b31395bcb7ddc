"""The HTTP process's half and the engine's loop over a real socket, with a pretend model: aborts, limits, order."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
import zmq
from server_harness import EngineThread, engine_thread, wait_until

from kvik.core.plan import StepPlan, StepResult
from kvik.core.request import Request
from kvik.distributed.mock import MockExecutor
from kvik.errors import RequestError
from kvik.outputs import FinishReason
from kvik.sampling_params import SamplingParams
from kvik.server.engine_client import EngineClient, Generation
from kvik.server.errors import ApiError
from kvik.text.output_processor import OutputProcessor
from kvik.text.tokenizer import Tokenizer

Body = Callable[[EngineClient, EngineThread], Awaitable[None]]


def run(model: str, folder: Path, body: Body, *, limits: tuple[int, int] = (10**6, 10**9), **scheduler: Any) -> None:
    """Run `body` with a client that is connected to an engine thread; nothing may be left afterwards."""

    async def main(engine: EngineThread) -> None:
        client = EngineClient(engine.endpoint, max_queued_requests=limits[0], max_queued_tokens=limits[1])
        try:  # a socket that is left open blocks whoever collects it
            await asyncio.wait_for(client.wait_ready(), 10)
            client.attach(OutputProcessor(Tokenizer.from_folder(Path(model))))
            await asyncio.wait_for(body(client, engine), 100)
            assert client.num_open == 0 and client._num_queued == [0, 0] and client._processor is not None
            assert len(client._processor) == 0
            await asyncio.to_thread(wait_until, lambda: not engine.engine.has_unfinished())
        finally:
            await client.close()

    with engine_thread(folder, **scheduler) as engine:
        asyncio.run(main(engine))
        assert engine.server._open == {} and engine.engine.scheduler.kv.num_used == 0
        engine.engine.scheduler.check_invariants()


def request(name: str, num_prompt: int = 5, **params: Any) -> Request:
    made = SamplingParams(**{"max_tokens": 20, "ignore_eos": True, **params})
    return Request(request_id=name, prompt_token_ids=tuple(range(3, 3 + num_prompt)), params=made, seed=1)


async def finish(generation: Generation) -> list[Any]:
    last: dict[int, Any] = {}
    while not generation.done:
        last.update(await generation.changes(10))
    generation.close()
    return [last[place] for place in sorted(last)]


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_abort_storm(model: str, tmp_path: Path, run_ahead: int) -> None:
    """Aborts at every stage: before the message is sent on, queued, in prefill, decoding, unread, finished."""
    rng = random.Random(3)

    async def one(client: EngineClient, number: int) -> None:
        await asyncio.sleep(rng.random() * 2)
        requests = [
            request(f"{number}-{i}", rng.randint(1, 150), n=rng.choice((1, 1, 3)), stop=rng.choice(((), ("e", "a"))))
            for i in range(rng.choice((1, 1, 2)))
        ]
        generation = client.open(requests, [None] * len(requests), stream=rng.random() < 0.7)
        stage = rng.random()
        if stage < 0.3:
            await asyncio.sleep(rng.random() * 0.1)
        elif stage < 0.6:
            await generation.changes(rng.random())
        elif stage < 0.8:
            for _ in range(rng.randint(1, 10)):
                await generation.changes(0.2)
        elif stage < 0.9:
            await finish(generation)
        generation.close()

    async def body(client: EngineClient, engine: EngineThread) -> None:
        await asyncio.gather(*(one(client, number) for number in range(1500)))

    run(model, tmp_path, body, run_ahead=run_ahead)


def test_a_process_that_was_given_up_is_told_when_it_comes_back(model: str, tmp_path: Path) -> None:
    async def body(client: EngineClient, engine: EngineThread) -> None:
        generation, records = client.open([request("a", max_tokens=480)], [None], stream=True), client.watch()
        await generation.changes(10)
        socket = engine.server._socket
        engine.server._socket = cast(Any, FullSocket(socket))
        await asyncio.to_thread(wait_until, lambda: not engine.server._open)
        engine.server._socket = socket
        with pytest.raises(ApiError, match="fell so far behind"):
            await finish(generation)
        while await asyncio.wait_for(records.get(), 10):
            pass
        client.unwatch(records)
        assert await finish(client.open([request("b")], [None], stream=True))

    run(model, tmp_path, body)


class FullSocket:
    """A socket whose peers read nothing."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def send_multipart(self, *args: Any) -> None:
        raise zmq.Again

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_unread_outputs_are_merged(model: str, tmp_path: Path) -> None:
    async def body(client: EngineClient, engine: EngineThread) -> None:
        generation = client.open([request("a", max_tokens=300)], [None], stream=True)
        while not generation.done:
            await asyncio.sleep(0.01)
        changes = await generation.changes()
        output = changes[0][1].output()
        assert len(changes) == 1 and output.delta == output.text and output.finished
        generation.close()

    run(model, tmp_path, body)


def test_the_queue_is_bounded(model: str, tmp_path: Path) -> None:
    async def body(client: EngineClient, engine: EngineThread) -> None:
        first = client.open([request(f"a{i}", max_tokens=400) for i in range(3)], [None] * 3, stream=True)
        with pytest.raises(ApiError, match="queue is full") as error:
            client.open([request("b", n=2)], [None], stream=True)
        assert error.value.status == 429 and error.value.headers["retry-after"]
        with pytest.raises(ApiError, match="prompt tokens"):
            client.open([request("c", 90)], [None], stream=True)
        first.close()
        client.open([request("d", 400, max_tokens=5)], [None], stream=True).close()  # an empty queue takes anything

    run(model, tmp_path, body, limits=(4, 100))


def test_refusals_name_both_numbers(model: str, tmp_path: Path) -> None:
    async def body(client: EngineClient, engine: EngineThread) -> None:
        with pytest.raises(RequestError, match=r"530.*512") as error:
            client.open([request("a", 500, max_tokens=10), request("b", 510, max_tokens=20)], [None] * 2, stream=True)
        assert error.value.code == "context_length_exceeded" and client.num_open == 0
        with pytest.raises(RequestError, match="offline only"):
            client.open([request("c", logits_processors=(lambda ids, logits: logits,))], [None], stream=True)

    run(model, tmp_path, body)


def test_deadline_and_failure(model: str, tmp_path: Path) -> None:
    async def body(client: EngineClient, engine: EngineThread) -> None:
        late = client.open([request("a", max_tokens=480)], [None], stream=False, deadline=0.01)
        outputs = await finish(late)
        assert outputs[0].finish_reason is FinishReason.TIMEOUT
        generation = client.open([request("b", max_tokens=480)], [None], stream=True)
        await generation.changes()
        client.fail(ApiError(503, "dead", code="engine_dead"))
        with pytest.raises(ApiError, match="dead"):
            while True:
                await generation.changes(1)
        generation.close()
        with pytest.raises(ApiError, match="dead"):
            client.open([request("c")], [None], stream=True)

    run(model, tmp_path, body)


def test_events_tell_every_step(model: str, tmp_path: Path) -> None:
    """A watcher can follow block lists and sequences from the records alone; without one nothing is recorded."""

    async def body(client: EngineClient, engine: EngineThread) -> None:
        executor = engine.engine.executor
        await finish(client.open([request("before")], [None], stream=False))
        assert engine.engine.executor is executor
        records = client.watch()
        seen = [json.loads(await asyncio.wait_for(records.get(), 5))]
        requests = [request(f"r{i}", 40 + i, n=2, max_tokens=30) for i in range(6)]
        await finish(client.open(requests, [None] * 6, stream=False))
        while num_finished(seen) < 12 or seen[-1]["used"]:
            seen.append(json.loads(await asyncio.wait_for(records.get(), 5)))
        check(seen)
        client.unwatch(records)
        await finish(client.open([request("after")], [None], stream=False))
        assert engine.engine.executor is executor

    def num_finished(seen: list[dict[str, Any]]) -> int:
        return sum(why == "finished" for record in seen[1:] for _, why in record["left"])

    def check(seen: list[dict[str, Any]]) -> None:
        assert seen[0]["type"] == "snapshot" and seen[0]["num_blocks"] == 64 and seen[0]["sequences"] == []
        held: dict[int, list[int]] = {}
        computed: dict[int, int] = {}
        names: set[tuple[str, int]] = set()
        for record in seen[1:]:
            for row, why in record["left"]:
                assert why in ("finished", "preempted")
                del held[row]
            for row, name, index, num_prompt, num_cached in record.get("joined", ()):
                assert row not in held and 40 <= num_prompt < 46
                held[row], computed[row] = [], num_cached
                names.add((name, index))
            for row, blocks in record.get("blocks", ()):
                held[row].extend(blocks)
            chunks = [(row, computed[row], 1) for row in record.get("decode", ())]
            for row, start, count in chunks + [tuple(chunk) for chunk in record.get("prefill", ())]:
                assert computed[row] == start and len(held[row]) * 16 >= start + count
                computed[row] = start + count
            assert len({block for blocks in held.values() for block in blocks}) == record["used"]
        assert not held and len(names) == 12
        assert any(len(record.get("decode", ())) > 1 for record in seen)

    run(model, tmp_path, body)


def test_whoever_comes_later_sees_the_same_and_disturbs_nobody(model: str, tmp_path: Path) -> None:
    """Block lists of three listeners, of which two come while steps are in flight, are the same at every step."""

    async def body(client: EngineClient, engine: EngineThread) -> None:
        feeds = [client.watch()]
        requests = [request(f"r{i}", 40 + i, n=2, max_tokens=60) for i in range(6)]
        running = client.open(requests, [None] * 6, stream=False)
        for _ in range(2):
            await asyncio.sleep(0.02)
            feeds.append(client.watch())
        await finish(running)
        await asyncio.sleep(0.2)
        seen = [[json.loads(feed.get_nowait()) for _ in range(feed.qsize())] for feed in feeds]
        for records in seen:
            assert [record["type"] for record in records].count("snapshot") == 1 and records[0]["type"] == "snapshot"
        first, *others = map(block_lists, seen)
        for later in others:
            assert later and all(first[step] == lists for step, lists in later.items())

    def block_lists(records: list[dict[str, Any]]) -> dict[int, dict[int, list[int]]]:
        held = {row: blocks for row, *_, blocks in records[0]["sequences"]}
        found = {}
        for record in records[1:]:
            if record.get("step", records[0]["step"] + 1) <= records[0]["step"]:
                continue
            for row, _ in record["left"]:
                held.pop(row, None)
            held.update({row: [] for row, *_ in record.get("joined", ())})
            for row, blocks in record.get("blocks", ()):
                held[row] = held[row] + blocks
            if "step" in record:
                found[record["step"]] = dict(held)
        return found

    run(model, tmp_path, body, run_ahead=2)


class Device(MockExecutor):
    """Takes 0.2 s for each step, one after the other."""

    def __init__(self) -> None:
        super().__init__(16, 384)
        self.steps: list[tuple[float, StepPlan]] = []  # when each began, or will
        self._ends = deque([0.0])

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        begin = max(time.monotonic(), self._ends[-1])
        self.steps.append((begin, plan))
        self._ends.append(begin + 0.2)

    def collect(self) -> StepResult:
        self._ends.popleft()
        time.sleep(max(0.0, self._ends[0] - time.monotonic()))
        return super().collect()


def test_what_comes_while_the_device_works_is_part_of_the_next_step(model: str, tmp_path: Path) -> None:
    device = Device()

    async def body(client: EngineClient, engine: EngineThread) -> None:
        first = client.open([request("a", max_tokens=14)], [None], stream=True)
        await asyncio.to_thread(wait_until, lambda: len(device.steps) > 7)
        working = len(device.steps) - 1
        await asyncio.sleep(device.steps[working][0] + 0.03 - time.monotonic())
        second = client.open([request("b", max_tokens=1)], [None], stream=True)
        await asyncio.gather(finish(first), finish(second))
        joined = [number for number, (_, plan) in enumerate(device.steps) if plan.joined]
        assert joined == [0, working + 1]

    run(model, tmp_path, body, executor=device, run_ahead=1)
