"""The deterministic GPU runtime: the same bits for a request under every schedule, tokens and logprobs."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from test_triton_attention import backend, make_batch, make_cache
from test_triton_decoder import model
from test_triton_runner import BLOCK, LENGTH, ROWS, settings

from kvik.config import SchedulerConfig
from kvik.core.engine import Engine
from kvik.core.request import Request
from kvik.core.scheduler import Scheduler
from kvik.distributed.uniproc import UniprocExecutor
from kvik.kernels.api import LinearWeight
from kvik.kernels.triton.attention_tile import attention_tiles
from kvik.kernels.triton.dispatch import Case, load_table
from kvik.kernels.triton.ops import TritonOps
from kvik.layers.rope import RopeTable
from kvik.models.decoder import Decoder
from kvik.outputs import TokenLogprobs
from kvik.runtime.gpu import build_gpu_runner, gpu_attention, partial_bytes, workspace_bytes
from kvik.runtime.kv_pool import KVPool
from kvik.sampling.logprobs import prompt_logprobs
from kvik.sampling_params import SamplingParams

ASKED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "max_tokens": 4, "logprobs": 2},
    {"temperature": 1.0, "max_tokens": 3},
    {"temperature": 0.0, "max_tokens": 2, "logprobs": 0, "prompt_logprobs": 0},
)
PROMPTS = [tuple((7 * p + 3 * (p > 16) * i) % 90 + 3 for p in range(n)) for i, n in enumerate((17, 3, 20))]
SETTINGS = settings(max_num_batched_tokens=64)
Found = dict[str, tuple[list[int], list[TokenLogprobs], list[TokenLogprobs]]]


def run(device: torch.device, config: SchedulerConfig, *, at_once: int = 3, preempt_every: int = 0) -> Found:
    spec, weights = model(device, torch.float32, qk_norm=True, bias=True)
    attention = gpu_attention(
        spec, ROWS, config.max_num_batched_tokens, LENGTH, device, dtype=torch.float32, deterministic=True
    )
    rope = RopeTable(spec.rope, LENGTH, device)
    decoder = Decoder(spec, weights, rope, TritonOps(device, deterministic=True), attention)
    pool = KVPool(spec, config.num_blocks, BLOCK, torch.float32, device)
    runner = build_gpu_runner(decoder, pool, ROWS, LENGTH, use_graphs=device.type == "cuda")
    engine = Engine(Scheduler(config), UniprocExecutor(runner))
    found: Found = {}
    waiting = [
        Request(request_id=str(i), prompt_token_ids=PROMPTS[i], params=SamplingParams(ignore_eos=True, **asked), seed=i)
        for i, asked in enumerate(ASKED)
    ]
    num_open = 0
    while waiting or engine.has_unfinished():
        while waiting and num_open < at_once:
            engine.add(waiting.pop(0))
            num_open += 1
        for output in engine.step():
            tokens, logprobs, prompt = found.setdefault(output.request_id, ([], [], []))
            tokens += output.new_token_ids
            logprobs += output.logprobs
            prompt += output.prompt_logprobs
            num_open -= output.finish_reason is not None
        if preempt_every and engine.stats.num_steps % preempt_every == 0 and engine.scheduler.running:
            engine.scheduler.preempt(engine.scheduler.running[0])
    return found


@functools.cache
def one_by_one(device: torch.device) -> Found:
    return run(device, replace(SETTINGS, enable_prefix_caching=False), at_once=1)


@pytest.mark.parametrize(
    ("changes", "preempt_every"),
    [
        ({"run_ahead": 1}, 3),
        ({"max_num_batched_tokens": 8, "enable_prefix_caching": False}, 0),
    ],
    ids=str,
)
def test_a_schedule_leaves_no_trace(
    changes: dict[str, Any], preempt_every: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":  # a BLAS may add up in an order that depends on where a row stands
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("ik,kj->ij", a, b, dtype=dtype))
    want = one_by_one(device)
    assert {len(tokens) for tokens, *_ in want.values()} == {asked["max_tokens"] for asked in ASKED}
    assert run(device, replace(SETTINGS, **changes), preempt_every=preempt_every) == want


def test_attention_is_that_of_chunking_is_invisible() -> None:
    spec, _ = model(torch.device("cpu"), torch.float32, qk_norm=True, bias=False)
    for deterministic in (False, True):
        attention = gpu_attention(
            spec, 4, 64, LENGTH, torch.device("meta"), dtype=torch.float32, deterministic=deterministic
        )
        assert attention._tiles == attention_tiles(spec.head_dim, 4, itemsize=4, deterministic=deterministic)


def test_memory_of_a_deterministic_engine_is_planned() -> None:
    spec, _ = model(torch.device("cpu"), torch.bfloat16, qk_norm=True, bias=False)
    assert workspace_bytes(spec, torch.float32, 4, 64, 64, BLOCK, deterministic=True) > 0
    case = Case("linear_add", 1, spec.hidden_size, spec.intermediate_size, "bfloat16")
    plan = load_table("any").plan(case, deterministic=True)
    assert plan.split_k > 1, "what this test is about"
    widest = max(2 * spec.intermediate_size, spec.q_size + 2 * spec.kv_size)
    assert partial_bytes(spec, torch.bfloat16, 1000, 4) == 4 * plan.split_k * 1000 * widest
    assert partial_bytes(spec, torch.float32, 1000, 4) == 0


ON_GPU = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


@ON_GPU
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("heads", [(16, 8, 128), (32, 8, 128), (14, 2, 64), (12, 4, 80), (8, 4, 256)], ids=str)
def test_attention_of_real_sizes_shows_no_cut(
    heads: tuple[int, int, int], window: int | None, device: torch.device
) -> None:
    length, scale = 1300, heads[2] ** -0.5
    kv, tables = make_cache([length], heads, torch.bfloat16, 64, device)
    q = torch.randn(length, heads[0], heads[2], device=device).bfloat16()
    tiles = attention_tiles(heads[2], deterministic=True)
    attention = backend(heads, device, tiles, max_num_tokens=length)
    whole = attention.forward(q, kv, make_batch([length], [length], tables), scale=scale, window=window)
    for start, end in pairwise((0, 1, 2, 100, 101, 511, 512, 513, 700, 1023, 1024, 1025, 1299, 1300)):
        batch = make_batch([end], [end - start], tables)
        part = attention.forward(q[start:end].contiguous(), kv, batch, scale=scale, window=window)
        assert torch.equal(part, whole[start:end]), f"queries [{start}, {end})"


@ON_GPU
@pytest.mark.parametrize(
    ("op", "n", "k"),
    [
        ("norm_linear", 4096, 1024),
        ("linear_add", 1024, 2048),
        ("norm_linear_swiglu", 3072, 1024),
        ("linear_add", 1024, 3072),
        ("norm_linear", 6144, 4096),
        ("linear_add", 4096, 12288),
        ("norm_linear_swiglu", 12288, 4096),
        ("linear", 151936, 1024),
    ],
)
def test_projections_of_real_sizes_do_not_count_tokens(op: str, n: int, k: int, device: torch.device) -> None:
    ops, dtype, m = TritonOps(device, deterministic=True), torch.bfloat16, 1100
    x, residual = torch.randn(m, k, device=device).to(dtype), torch.randn(m, n, device=device).to(dtype)
    weight = torch.randn(n * (1 + (op == "norm_linear_swiglu")), k, device=device).to(dtype) * k**-0.5
    w, gain = LinearWeight(weight), torch.randn(k, device=device).to(dtype)

    def compute(rows: slice) -> torch.Tensor:
        if op == "linear":
            return ops.linear(x[rows], w)
        if op == "linear_add":
            return ops.linear_add(x[rows], w, residual[rows])
        norm_linear = ops.norm_linear if op == "norm_linear" else ops.norm_linear_swiglu
        return norm_linear(x[rows], gain, 1e-6, w)

    whole = compute(slice(0, m))
    for rows in (slice(0, 1), slice(70, 71), slice(5, 9), slice(63, 80), slice(37, 101), slice(30, 300), slice(77, m)):
        assert torch.equal(compute(rows), whole[rows]), f"rows {rows.start} to {rows.stop}"


@ON_GPU
@pytest.mark.parametrize("vocab_size", [50257, 151936])
def test_logprobs_do_not_follow_the_address_of_a_row(vocab_size: int, device: torch.device) -> None:
    logits, ids = torch.randn(20, vocab_size, device=device) * 4, torch.arange(20, device=device)
    together = prompt_logprobs(logits, ids, 2)
    assert [prompt_logprobs(logits[i : i + 1].clone(), ids[i : i + 1], 2)[0] for i in range(20)] == together
