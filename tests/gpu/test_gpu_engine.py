"""The whole engine on an NVIDIA GPU: graphs against eager steps, memory at the worst case, errors that help."""

from __future__ import annotations

import gc
import itertools
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny

from engine_runs import BASE, options_for, prompts, run, same
from kvik import LLM, CapacityError, ConfigError, SamplingParams
from kvik.runtime.graphs import GraphPool

pytestmark = pytest.mark.gpu
LARGE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 1024,
    "intermediate_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "eos_token_id": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with options_for("cuda"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), num_attention_heads=8, num_key_value_heads=2)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[torch.cuda.CUDAGraph]:
    """The graphs that were replayed, in order."""
    found: list[torch.cuda.CUDAGraph] = []
    replay = torch.cuda.CUDAGraph.replay

    def count(graph: torch.cuda.CUDAGraph) -> None:
        found.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", count)
    return found


def test_graphs_give_the_tokens_of_eager_steps(folder: Path, replays: list[Any]) -> None:
    eager = run(folder, device="cuda", enforce_eager=True)
    assert not replays
    same(run(folder, device="cuda", enforce_eager=False), eager)
    assert replays


def test_every_kind_of_sampling_in_graphs(folder: Path, replays: list[Any]) -> None:
    kinds = [
        SamplingParams(
            max_tokens=12, ignore_eos=True, seed=i, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            presence_penalty=penalty, repetition_penalty=1.0 + penalty / 2,
        )
        for i, (temperature, top_k, top_p, min_p, penalty) in enumerate(
            itertools.product((0.0, 0.9), (0, 20), (1.0, 0.8), (0.0, 0.05), (0.0, 0.6))
        )
    ]  # fmt: skip
    found = []
    for eager in (True, False):
        with LLM(str(folder), **{**BASE, "device": "cuda"}, enforce_eager=eager) as llm:
            found.append([llm.generate(prompts(3), [kind] * 3) for kind in kinds])
    assert len(set(map(id, replays))) > 8, "each combination of passes is a graph of its own"
    for graphs, plain in zip(*found, strict=True):
        same(graphs, plain)


def test_graphs_that_are_missing_are_captured_while_idle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [
        [SamplingParams(max_tokens=6, ignore_eos=True, seed=i, temperature=0.9, top_p=top_p) for i in range(5)]
        for top_p in (1.0, 0.8)
    ]
    options = {**BASE, "device": "cuda", "max_num_batched_tokens": 512}
    with LLM(str(folder), **options, enforce_eager=True) as llm:
        assert not llm.llm_engine.engine.get_ready()
        expected = [llm.generate(prompts(5), kind) for kind in kinds]
    with LLM(str(folder), **options, enforce_eager=False) as llm:
        for kind in kinds:
            llm.generate(prompts(1), kind[:1])
        count = 0
        while llm.llm_engine.engine.get_ready():
            count += 1
        assert count >= 1 + 2  # 384 tokens, and decode steps with top-p of 2 and of 4 rows at least
        monkeypatch.setattr(GraphPool, "capture", lambda *_: pytest.fail("a graph was captured in a step"))
        for kind, plain in zip(kinds, expected, strict=True):
            same(llm.generate(prompts(5), kind), plain)


def test_without_memory_for_more_graphs_steps_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, replays: list[Any]
) -> None:
    eager = run(folder, device="cuda", enforce_eager=True)
    capture, captured = GraphPool.capture, []

    def fail_later(pool: GraphPool, compute: Callable[[], object]) -> torch.cuda.CUDAGraph:
        if len(captured) < 3:
            captured.append(capture(pool, compute))
            return captured[-1]

        def allocate() -> None:
            compute()
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

        return capture(pool, allocate)

    monkeypatch.setattr(GraphPool, "capture", fail_later)
    same(run(folder, device="cuda", enforce_eager=False), eager)
    assert len(captured) == 3 and set(map(id, replays)) <= set(map(id, captured))
    assert sum("no more CUDA graphs" in line for line in caplog.messages) == 1


def test_the_worst_case_stays_within_the_plan(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    params = SamplingParams(
        max_tokens=6, ignore_eos=True, seed=1, top_p=0.9, top_k=50, min_p=0.01, logprobs=20, prompt_logprobs=20,
        presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.1,
    )  # fmt: skip
    asked = [[3 + (7 * i + 11 * p) % 9000 for p in range(128)] for i in range(256)]
    with LLM(str(tmp_path), load_format="dummy", device="cuda", gpu_memory_utilization=0.05) as llm:
        plan, scheduler = llm.llm_engine.resolved.memory, llm.llm_engine.resolved.scheduler
        assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (256, 8192)
        assert plan.budget - plan.used < plan.block_size * plan.kv_bytes_per_token, "the pool fills the budget"
        torch.cuda.set_per_process_memory_fraction(plan.budget / plan.total)
        torch.cuda.reset_peak_memory_stats()
        try:
            llm.generate(asked, params)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        peak = torch.cuda.max_memory_allocated() - before
    assert peak <= plan.used, f"a peak of {peak:,} bytes and a plan of {plan.used:,}:\n{plan.render()}"


def test_a_budget_that_holds_nothing_names_one_that_does(folder: Path) -> None:
    with pytest.raises(CapacityError, match=r"use gpu_memory_utilization=") as error:
        LLM(str(folder), device="cuda", gpu_memory_utilization=0.001)
    found = re.search(r"gpu_memory_utilization=([0-9.]+)", str(error.value))
    assert found is not None
    LLM(str(folder), device="cuda", gpu_memory_utilization=float(found[1])).close()


def test_any_thread_may_call() -> None:
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    with LLM("demo", device="cuda") as llm, ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(llm.generate, ["Once upon", "a time"][: 1 + i % 2], params) for i in range(8)]
        texts = [call.result()[0].text for call in calls]
        assert texts == [llm.generate("Once upon", params)[0].text] * 8


def test_a_closed_engine_leaves_its_memory_to_others(folder: Path) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before, tokens = torch.cuda.memory_reserved(), []
    for _ in range(2):
        with LLM(str(folder), device="cuda", num_kvcache_blocks=40_000) as llm:
            tokens.append(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=9, temperature=0))[0].token_ids)
            assert torch.cuda.memory_reserved() > before + llm.llm_engine.resolved.memory.kv_cache
        assert torch.cuda.memory_reserved() < before + (256 << 20)  # workspaces of the library stay
    assert tokens[0] == tokens[1]


def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"device='cuda:99': there are \d+ GPUs"):
        LLM("demo", device="cuda:99")
