"""Random requests with aborts and priorities under pressure: nothing is lost, tokens are those of a calm run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny

from engine_runs import CPU, options_for, prompts
from kvik import LLM, RequestOutput, SamplingParams
from kvik.llm_engine import LLMEngine

OPTIONS: dict[str, Any] = {"dtype": "float32", "kvcache_block_size": 16, "max_model_len": 160}
PRESSURE: dict[str, Any] = {
    "num_kvcache_blocks": 32, "max_num_seqs": 24, "max_num_batched_tokens": 128, "scheduling_policy": "priority",
}  # fmt: skip
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.0, "presence_penalty": 0.7, "repetition_penalty": 1.2},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.0, "stop_token_ids": tuple(range(3, 40))},
    {"temperature": 1.2, "min_p": 0.05, "n": 3},
    {"temperature": 0.6, "logit_bias": {5: 4.0}, "min_tokens": 3},
    {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1},
]
WAVE = 100
"""Every other wave of requests asks for no log-probabilities, so that all of a batch can be replayed."""


def cases(count: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(3)
    texts = prompts(count, seed=8, longest=80)
    return [
        (text, SamplingParams(max_tokens=rng.randint(3, 40), seed=1000 + 7 * i, **KINDS[i % len(KINDS)]))
        for i, text in enumerate(texts)
    ]


@pytest.fixture(params=[(CPU, 300, 60), pytest.param(("cuda", 10_000, 300), id="gpu", marks=pytest.mark.gpu)])
def soak(request: pytest.FixtureRequest) -> Iterator[tuple[dict[str, Any], int, int]]:
    """The options of the device, the number of requests, and of how many different ones."""
    place, count, kinds = request.param
    with options_for(place) as options:
        yield options, count, kinds


def check(output: RequestOutput, expected: RequestOutput) -> None:
    for got, want in zip(output.outputs, expected.outputs, strict=True):
        if got.finish_reason == "abort":
            assert got.token_ids == want.token_ids[: len(got.token_ids)]
        else:
            assert (got.finish_reason, got.token_ids) == (want.finish_reason, want.token_ids)


def run_all(engine: LLMEngine, asked: list[Any], expected: list[RequestOutput], chosen: list[int]) -> dict[str, int]:
    """Run the chosen requests, aborting some; counts of what happened."""
    rng, running, waiting = random.Random(4), dict[str, int](), chosen[::-1]
    seen = {"finished": 0, "aborted": 0, "preempted": 0, "cached": 0, "steps": 0}
    while waiting or engine.has_unfinished():
        for _ in range(min(rng.randrange(9), len(waiting), 100 - len(running))):
            case = waiting.pop()
            running[engine.add_request(*asked[case], priority=rng.randrange(3), stream=False)] = case
        if running and rng.random() < 0.15:
            engine.abort(rng.choice(list(running)))
        for output in engine.step():
            check(output, expected[running.pop(output.request_id)])
            seen["finished"] += 1
            seen["aborted"] += any(one.finish_reason == "abort" for one in output.outputs)
            seen["preempted"] += output.metrics.num_preemptions
            seen["cached"] += output.usage.cached_tokens
        seen["steps"] += 1
        if seen["steps"] % 50 == 0:
            engine.engine.scheduler.check_invariants()
    assert not running
    return seen


@pytest.mark.timeout(600)
def test_soak(tmp_path: Path, soak: tuple[dict[str, Any], int, int]) -> None:
    options, count, kinds = soak
    folder, asked = str(make_tiny(tmp_path)), cases(kinds)
    with LLM(folder, **OPTIONS, device="cpu", max_num_seqs=1, enable_prefix_caching=False) as llm:
        expected = llm.generate([prompt for prompt, _ in asked], [params for _, params in asked])
    plain = [i for i, (_, params) in enumerate(asked) if params.logprobs is None]
    rng = random.Random(5)
    chosen = [rng.choice(plain) if i // WAVE % 2 else rng.randrange(kinds) for i in range(count)]
    with LLMEngine(folder, **OPTIONS, **PRESSURE, **options) as engine:
        seen = run_all(engine, asked, expected, chosen)
        scheduler = engine.engine.scheduler
        scheduler.check_invariants()
        assert (scheduler.kv.num_used, scheduler.num_running, scheduler.num_waiting) == (0, 0, 0)
        assert len(scheduler._free_rows) == PRESSURE["max_num_seqs"]
    assert seen["finished"] == count
    assert all(seen[what] > 0 for what in ("aborted", "preempted", "cached")), seen
