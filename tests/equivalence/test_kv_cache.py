"""Keys and values in 8 bits: under every schedule the same tokens, and nearly those of the wider cache.

A schedule changes the order of some sums, and so now and then the rounding of an element that lies between two steps:
log-probabilities agree less closely than with a float cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny

from engine_runs import BASE, prompts, run, same
from kvik import LLM, RequestOutput, SamplingParams
from kvik.kernels.cpu.native import available

KERNELS = ("torch", "native") if available() else ("torch",)
TOLERANCE = 1e-2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), arch="qwen3", num_attention_heads=8, num_key_value_heads=2)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[RequestOutput]:
    return run(folder, kernels="torch", kv_cache_dtype="int8", max_num_seqs=1, enable_prefix_caching=False)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1, "enable_prefix_caching": False},
        {"max_num_seqs": 16},
        {"max_num_batched_tokens": 7, "max_num_seqs": 4},
        {"kvcache_block_size": 48, "num_kvcache_blocks": 32},
        {"run_ahead": 2},
    ],
    ids=str,
)
def test_schedules(folder: Path, expected: list[RequestOutput], kernels: str, options: dict[str, Any]) -> None:
    same(run(folder, kernels=kernels, kv_cache_dtype="int8", **options), expected, TOLERANCE)


@pytest.mark.parametrize("kernels", KERNELS)
def test_preemption_and_prefix_cache(folder: Path, expected: list[RequestOutput], kernels: str) -> None:
    options: dict[str, Any] = {"kernels": kernels, "kv_cache_dtype": "int8"}
    preempted = run(folder, num_kvcache_blocks=10, max_num_seqs=8, enable_prefix_caching=False, **options)
    same(preempted, expected, TOLERANCE)
    assert sum(output.metrics.num_preemptions for output in preempted) > 0
    warm = run(folder, before=lambda llm: llm.generate(prompts(14), SamplingParams(max_tokens=1)) and None, **options)
    same(warm, expected, TOLERANCE)
    assert sum(output.usage.cached_tokens for output in warm) > 100


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kv_cache_dtype", ["int8", "bfloat16"])
def test_narrow_caches_change_little(folder: Path, kernels: str, kv_cache_dtype: str) -> None:
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    outputs = []
    for kind in ("auto", kv_cache_dtype):
        with LLM(str(folder), **BASE, kernels=kernels, kv_cache_dtype=kind) as llm:
            outputs.append(llm.generate([prompts(8, longest=120)[7]], params)[0].prompt_logprobs)
            resolved = llm.llm_engine.resolved
    assert resolved.kv_dtype is {"int8": torch.int8, "bfloat16": torch.bfloat16}[kv_cache_dtype]
    differences = [abs(x.logprob - y.logprob) for x, y in zip(*outputs, strict=True) if x is not None and y is not None]
    assert differences and 0 < max(differences) < 0.1


def test_a_pool_keeps_more_than_runs(folder: Path) -> None:
    """Of a chat at a time, the prefixes of four; and as much as was asked for."""
    plain = {**BASE, "num_kvcache_blocks": None, "max_num_seqs": 1, "max_model_len": 128}
    counts = []
    for options in ({}, {"enable_prefix_caching": False}, {"kv_cache_memory": 16 << 20}):
        with LLM(str(folder), **{**plain, **options}) as llm:
            counts.append(llm.llm_engine.resolved.scheduler.num_blocks)
            block_bytes = llm.llm_engine.resolved.memory.kv_bytes_per_token * BASE["kvcache_block_size"]
    running = -(-128 // BASE["kvcache_block_size"])
    assert counts == [4 * running, running, (16 << 20) // block_bytes]


def test_an_int8_cache_holds_more_tokens(folder: Path) -> None:
    blocks = []
    for kind in ("auto", "int8"):  # fp32 and head_dim 16: 64 bytes a head, or 16 and a scale of 4
        options = {**BASE, "num_kvcache_blocks": None, "kv_cache_memory": 200_000}
        with LLM(str(folder), **options, max_num_seqs=200, kv_cache_dtype=kind) as llm:
            blocks.append(llm.llm_engine.resolved.scheduler.num_blocks)
            plan, layers = llm.llm_engine.resolved.memory, llm.llm_engine.spec.num_layers
            head = llm.llm_engine.spec.head_dim
            per_head = head + 4 if kind == "int8" else 4 * head
            assert plan.kv_bytes_per_token == 2 * layers * llm.llm_engine.spec.num_kv_heads * per_head
    assert blocks[1] > 3 * blocks[0]
