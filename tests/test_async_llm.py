"""The asyncio face: many callers, cancellation, errors, shutdown. Each test runs its own event loop."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny

from engine_runs import CPU, GPU, options_for
from kvik import AsyncLLM, RequestError, SamplingParams, WorkerError
from kvik.outputs import RequestOutput

LONG = SamplingParams(max_tokens=200, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=[CPU, GPU])
def llm(folder: Path, request: pytest.FixtureRequest) -> Iterator[AsyncLLM]:
    with options_for(request.param) as options:
        made = AsyncLLM(str(folder), **options)
        yield made
        made.close()


async def collect(llm: AsyncLLM, prompt: Any, params: SamplingParams, **options: Any) -> tuple[str, RequestOutput]:
    text = ""
    async for output in llm.generate(prompt, params, **options):
        text += output.delta
    return text, output


async def until_idle(llm: AsyncLLM) -> None:
    """Wait for the engine's thread to be done with everything; blocks must be back then."""
    engine = llm.llm_engine
    deadline = time.monotonic() + 10
    while engine.has_unfinished() or llm._loop.streams:
        assert time.monotonic() < deadline, "the engine never became idle"
        await asyncio.sleep(0.005)
    assert engine.engine.scheduler.kv.num_used == 0
    assert len(engine._processor) == 0


@pytest.mark.parametrize("slack", [0.0, 0.002])
def test_many_callers_get_their_own_text(llm: AsyncLLM, slack: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.llm_engine.engine, "slack", lambda: slack)

    async def main() -> None:
        prompts = [[3 + i, 9, 12] for i in range(24)]
        params = [SamplingParams(max_tokens=5 + i % 7, seed=i, ignore_eos=True) for i in range(24)]
        results = await asyncio.gather(*(collect(llm, p, s) for p, s in zip(prompts, params, strict=True)))
        for (text, output), prompt, param in zip(results, prompts, params, strict=True):
            assert output.prompt_token_ids == tuple(prompt)
            assert text == output.text and len(output.token_ids) == param.max_tokens
        again = await collect(llm, prompts[5], params[5])
        assert again[0] == results[5][0]
        await until_idle(llm)

    asyncio.run(main())


def test_cancellation_frees_the_blocks(llm: AsyncLLM) -> None:
    async def main() -> None:
        tasks = [asyncio.create_task(collect(llm, [5, 6, 7, i], LONG)) for i in range(20)]
        await asyncio.sleep(0.05)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(result, asyncio.CancelledError) for result in results) == 10
        assert all(len(result[1].token_ids) == 200 for result in results[1::2])  # type: ignore[index]
        await until_idle(llm)

    asyncio.run(main())


def test_leaving_the_loop_ends_the_request(llm: AsyncLLM) -> None:
    async def main() -> None:
        async with aclosing(llm.generate("leave early", LONG)) as outputs:
            async for _ in outputs:
                break
        await until_idle(llm)

    asyncio.run(main())


def test_abort_from_outside_gives_a_terminal_output(llm: AsyncLLM) -> None:
    async def main() -> None:
        last = None
        async for output in llm.generate("abort me", LONG, request_id="mine"):
            last = output
            llm.abort("mine")
        assert last is not None and last.finish_reason == "abort"
        await until_idle(llm)

    asyncio.run(main())


def test_a_slow_reader_gets_merged_outputs(llm: AsyncLLM) -> None:
    async def main() -> None:
        fast = await collect(llm, "slow reader", LONG)
        count, text = 0, ""
        async for output in llm.generate("slow reader", LONG):
            count, text = count + 1, text + output.delta
            await asyncio.sleep(0.02)
        assert text == fast[0] and count < 200

    asyncio.run(main())


def test_a_wrong_request_harms_nobody(llm: AsyncLLM) -> None:
    async def main() -> None:
        good = asyncio.create_task(collect(llm, "good", LONG, request_id="good"))
        await asyncio.sleep(0.02)
        wrong: list[tuple[Any, dict[str, Any]]] = [([10**9], {}), ([], {}), ([1] * 10_000, {}), (None, {})]
        wrong += [("x", options) for options in ({"request_id": "good"}, {"request_id": ["x"]}, {"cache_salt": 1})]
        for prompt, options in wrong:
            with pytest.raises(RequestError):
                await collect(llm, prompt, LONG, **options)
        assert len((await good)[1].token_ids) == 200
        await until_idle(llm)

    asyncio.run(main())


def test_it_gets_ready_while_nobody_asks(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, busy = llm.llm_engine.engine, list[bool]()

    def get_ready() -> bool:
        busy.append(engine.has_unfinished())
        return len(busy) < 4

    monkeypatch.setattr(engine.executor, "get_ready", get_ready)

    async def main() -> None:
        await collect(llm, [3, 4, 5], LONG)
        await until_idle(llm)
        await asyncio.sleep(0.05)
        await collect(llm, [3, 4, 5], LONG)

    asyncio.run(main())
    assert len(busy) >= 4 and not any(busy)


def test_an_engine_failure_reaches_every_caller(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(plan: Any) -> None:
        raise MemoryError("out of memory")

    async def main() -> None:
        tasks = [asyncio.create_task(collect(llm, [1, 2, i], LONG)) for i in range(4)]
        await asyncio.sleep(0.02)
        monkeypatch.setattr(llm.llm_engine.engine.executor, "submit", broken)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, WorkerError) and "out of memory" in str(result)
        with pytest.raises(WorkerError):
            await collect(llm, "later", LONG)

    asyncio.run(main())


def test_close_ends_what_is_running(folder: Path) -> None:
    async def main() -> None:
        async with AsyncLLM(str(folder)) as llm:
            task = asyncio.create_task(collect(llm, "until the end", SamplingParams(max_tokens=500, ignore_eos=True)))
            await asyncio.sleep(0.03)
        with pytest.raises(WorkerError, match="closed"):
            await task
        llm.close()

    asyncio.run(main())


def test_one_that_is_forgotten_frees_its_engine_and_its_thread(folder: Path) -> None:
    made = AsyncLLM(str(folder))
    thread, engine = made._thread, weakref.ref(made.llm_engine.engine)
    asyncio.run(collect(made, "hello", SamplingParams(max_tokens=5)))
    del made
    gc.collect()
    thread.join(10)
    assert not thread.is_alive() and engine() is None


def test_chat(llm: AsyncLLM) -> None:
    async def main() -> None:
        outputs = [
            output async for output in llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=5))
        ]
        assert outputs[-1].finished and outputs[-1].prompt is not None and "hi" in outputs[-1].prompt

    asyncio.run(main())
