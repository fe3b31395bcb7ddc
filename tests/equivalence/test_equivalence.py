"""The engine's real specification: how a step was scheduled never shows in the tokens.

Every test runs the same requests under two regimes and compares token ids (and log-probabilities where they exist).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny

from engine_runs import BASE, CPU, GPU, options_for, params, prompts, run, same
from kvik import LLM, RequestOutput, SamplingParams


@pytest.fixture(scope="module", autouse=True, params=[CPU, GPU])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test of this file runs at each place, by the options that all of its engines start from."""
    with options_for(request.param) as options, pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            patch.setitem(BASE, name, value)
        yield request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), arch="qwen3", num_attention_heads=8, num_key_value_heads=2)


@pytest.fixture(scope="module")
def expected(folder: Path, place: str) -> list[RequestOutput]:
    """One request after the other, whole prompts, nothing cached: the plainest schedule there is."""
    return run(folder, max_num_seqs=1, enable_prefix_caching=False)


def test_the_plain_schedule_is_not_trivial(expected: list[RequestOutput]) -> None:
    assert len({output.token_ids for output in expected}) == len(expected)
    assert any(output.finish_reason == "stop" for output in expected)
    assert any(output.finish_reason == "length" for output in expected)


@pytest.mark.parametrize("max_num_seqs", [2, 5, 16])
def test_batch_size(folder: Path, expected: list[RequestOutput], max_num_seqs: int) -> None:
    same(run(folder, max_num_seqs=max_num_seqs), expected)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1024])
def test_chunk_size(folder: Path, expected: list[RequestOutput], chunk: int) -> None:
    same(run(folder, max_num_batched_tokens=chunk, max_num_seqs=min(chunk, 4)), expected)


def test_prefix_cache_cold_and_warm(folder: Path, expected: list[RequestOutput]) -> None:
    same(run(folder, enable_prefix_caching=True), expected)
    warm = run(folder, before=lambda llm: llm.generate(prompts(14), params(14)) and None)
    same(warm, expected)
    assert sum(output.usage.cached_tokens for output in warm) > 100


def test_prefix_cache_with_churn_that_evicts(folder: Path, expected: list[RequestOutput]) -> None:
    def churn(llm: LLM) -> None:
        for seed in range(3):
            llm.generate(prompts(14), params(14))
            llm.generate(prompts(12, seed=50 + seed), SamplingParams(max_tokens=5))

    same(run(folder, before=churn, num_kvcache_blocks=14, max_num_seqs=4), expected)


def test_preemption_by_lack_of_blocks(folder: Path, expected: list[RequestOutput]) -> None:
    outputs = run(folder, num_kvcache_blocks=10, max_num_seqs=8, enable_prefix_caching=False)
    same(outputs, expected)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0


@pytest.mark.parametrize(("run_ahead", "every"), [(0, 1), (1, 3), (2, 4)])
def test_forced_preemption(folder: Path, expected: list[RequestOutput], run_ahead: int, every: int) -> None:
    """Everything is preempted after every step. With run-ahead, which discards what is in flight, now and then."""

    def preempt_often(llm: LLM) -> None:
        engine = llm.llm_engine.engine
        plain_step = engine.step

        def step() -> Any:
            outputs = plain_step()
            for seq in engine.scheduler.running if engine.stats.num_steps % every == 0 else ():
                engine.scheduler.preempt(seq)
            engine.scheduler.check_invariants()
            return outputs

        engine.step = step  # type: ignore[method-assign]

    same(run(folder, before=preempt_often, run_ahead=run_ahead), expected)


@pytest.mark.parametrize("run_ahead", [1, 2])
@pytest.mark.parametrize("blocks", [10, 64])
def test_run_ahead(folder: Path, expected: list[RequestOutput], run_ahead: int, blocks: int) -> None:
    same(run(folder, run_ahead=run_ahead, num_kvcache_blocks=blocks), expected)


@pytest.mark.parametrize("run_ahead", [1, 2])
def test_a_surplus_step_at_the_end_frees_its_blocks(
    folder: Path, expected: list[RequestOutput], run_ahead: int
) -> None:
    """The last of these requests stops by a token, which is found out when one more step is on its way."""
    same(run(folder, run_ahead=run_ahead, max_num_seqs=1), expected)


@pytest.mark.parametrize("policy", ["priority", "sjf"])
def test_policy(folder: Path, expected: list[RequestOutput], policy: str) -> None:
    same(run(folder, scheduling_policy=policy, max_num_seqs=3), expected)


@pytest.mark.parametrize("block_size", [32, 48, 160])
def test_block_size(folder: Path, expected: list[RequestOutput], block_size: int) -> None:
    same(run(folder, kvcache_block_size=block_size, num_kvcache_blocks=32), expected)


def test_attention_backend(folder: Path, expected: list[RequestOutput], place: str) -> None:
    if place == "cuda":
        pytest.skip("a GPU has one attention backend")
    same(run(folder, attention_backend="reference"), expected)


def test_stream_is_the_unfolded_generate(folder: Path, expected: list[RequestOutput]) -> None:
    with LLM(str(folder), **BASE) as llm:
        texts: dict[tuple[int, int], str] = {}
        last: dict[int, RequestOutput] = {}
        for output in llm.stream(prompts(14), params(14)):
            for completion, delta in zip(output.outputs, output.deltas, strict=True):
                key = (output.index, completion.index)
                texts[key] = texts.get(key, "") + delta
                assert completion.text == texts[key]
            last[output.index] = output
        same([last[i] for i in range(14)], expected)


def test_n_completions_are_that_many_requests(folder: Path) -> None:
    prompt = prompts(1)[0] * 3
    with LLM(str(folder), **BASE) as llm:
        together = llm.generate([prompt], SamplingParams(n=4, seed=40, max_tokens=20))[0]
        alone = llm.generate([prompt] * 4, [SamplingParams(seed=40 + i, max_tokens=20) for i in range(4)])
        assert [o.token_ids for o in together.outputs] == [o.token_ids for o in alone]
        assert together.usage.completion_tokens == sum(len(o.token_ids) for o in alone)
    with LLM(str(folder), **BASE, enable_prefix_caching=False) as llm:
        plain = llm.generate([prompt], SamplingParams(n=4, seed=40, max_tokens=20))[0]
        assert [o.token_ids for o in plain.outputs] == [o.token_ids for o in together.outputs]


def test_completions_of_one_request_share_the_prompts_blocks(folder: Path) -> None:
    with LLM(str(folder), **BASE) as llm:
        engine = llm.llm_engine
        engine.add_request((prompts(1)[0] * 5)[:65], SamplingParams(n=4, seed=1, max_tokens=30, ignore_eos=True))
        most = 0
        while engine.has_unfinished():
            engine.step()
            most = max(most, engine.engine.scheduler.kv.num_used)
        assert most == 4 + 4 * 2, "four full blocks of the prompt are held once; the rest needs two blocks each"


def test_seeds_do_not_depend_on_neighbours(folder: Path) -> None:
    prompt = prompts(3)[2]
    mine = SamplingParams(seed=7, max_tokens=25, temperature=1.2)
    with LLM(str(folder), **BASE) as llm:
        alone = llm.generate([prompt], mine)[0]
        for count in (3, 9):
            crowd = llm.generate([*prompts(count), prompt], [*params(count), mine])
            assert crowd[-1].token_ids == alone.token_ids


def test_requests_without_a_seed_repeat_from_run_to_run(folder: Path) -> None:
    def draw(seed: int) -> list[tuple[int, ...]]:
        with LLM(str(folder), **BASE, seed=seed) as llm:
            return [output.token_ids for output in llm.generate(prompts(3), SamplingParams(max_tokens=12))]

    assert draw(1) == draw(1) != draw(2)
