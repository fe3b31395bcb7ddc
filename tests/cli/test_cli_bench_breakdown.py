"""`kvik bench breakdown`: kernels of a trace find their phases, and the phases add up to the step."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_harness import Result

from engine_runs import gpu_obstacle
from kvik import LLMEngine
from kvik.cli import bench_breakdown
from kvik.cli.bench_breakdown import _STEPS, _WARM_STEPS, _Batch
from kvik.cli.bench_phases import IDLE, PHASE_OF, PHASES, Kernel, break_down, phase_bytes
from kvik.errors import ConfigError, KvikError
from kvik.models.decoder import allocate_layer
from kvik.models.registry import build_spec

Kvik = Callable[..., Result]
GATHER = "void at::native::(anonymous namespace)::indexSelectSmallIndex<float, long>(at::TensorInfo<float>)"
LAST = "_append"
PREPARE = ["_inputs", "_plan", GATHER, GATHER]
ONE_TOKEN = [
    *PREPARE, "_embedding_kernel",
    "_gemv_kernel", "_rope_kernel", "_decode", "_gemv_kernel", "_gemv_kernel", "_gemv_kernel",
    GATHER, "_rms_norm_kernel", "_gemv_kernel", "_draw", "_pick", LAST,
]  # fmt: skip
MANY_TOKENS = [
    "Memcpy HtoD (Pinned -> Device)", "void at::native::index_copy_kernel<int>(int)", *PREPARE, "_embedding_kernel",
    "_rms_norm_kernel", "nvjet_tst_64x8", "_rope_kernel", "_decode", "Memset (Device)", "nvjet_tst_64x8",
    "void cublasLt::splitKreduce_kernel<32, 16>(int)", "_rms_norm_kernel", "_skinny_kernel", "_silu_mul_kernel",
    "nvjet_tst_64x8", GATHER, "_rms_norm_kernel", "nvjet_tst_128x8", "_draw", "_pick", LAST,
]  # fmt: skip


def in_a_row(*steps: Sequence[str], apart: float = 0.0) -> list[Kernel]:
    """Kernels of 10 us each, every one started 2 us before its predecessor ends; `apart` us between steps."""
    found, now = [], 0.0
    for names in steps:
        now += apart
        for i, name in enumerate(names):
            found.append(Kernel(now + 10, now - (2 if i else 0), name))
            now += 10
    return found


def launches(names: Sequence[str]) -> dict[str, int]:
    return {phase: cost.launches for phase, cost in break_down(in_a_row([LAST], names), 1).items() if cost.launches}


def test_kernels_find_their_phases() -> None:
    assert launches(ONE_TOKEN) == {
        "prepare": 4, "embedding": 1, "projections": 4, "row operations": 2, "attention": 1, "head": 2, "sampling": 2,
        "update": 1,
    }  # fmt: skip
    assert launches(MANY_TOKENS) == {
        "prepare": 6, "embedding": 1, "projections": 6, "row operations": 5, "attention": 1, "head": 2, "sampling": 2,
        "update": 1,
    }  # fmt: skip


def test_every_kernel_of_a_step_has_a_phase() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    script = Path(__file__).parents[1] / "kernels_triton" / "launched_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), "qwen3", "triton"]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    launched = {kernel.split(" ")[0].rpartition(".")[2] for kernel in json.loads(found)["warm"]}
    assert launched == PHASE_OF.keys()
    assert set(PHASE_OF.values()) < set(PHASES)


def test_phases_add_up_to_the_time_between_the_ends_of_steps() -> None:
    trace = in_a_row(ONE_TOKEN, MANY_TOKENS, ONE_TOKEN, apart=3.0)
    costs = break_down(reversed(trace), 2)
    assert sum(cost.time for cost in costs.values()) == pytest.approx(trace[-1].end - trace[len(ONE_TOKEN) - 1].end)
    assert costs[IDLE].time == costs[IDLE].gaps == 6.0 and costs[IDLE].launches == 0
    assert costs["attention"].time == 20.0 and costs["attention"].gaps == 0.0
    for cost in costs.values():
        inner = cost.kernels.values()
        assert cost.launches == sum(kernel.launches for kernel in inner)
        assert cost.time == pytest.approx(sum(kernel.time for kernel in inner)) or cost is costs[IDLE]
    assert costs["prepare"].kernels.keys() == {
        "Memcpy HtoD",
        "index_copy_kernel",
        "_inputs",
        "_plan",
        "indexSelectSmallIndex",
    }


def test_time_before_a_late_kernel_is_its_own_and_a_gap() -> None:
    trace = in_a_row([LAST], ONE_TOKEN)
    late = [kernel if kernel.name != "_pick" else kernel._replace(start=kernel.end - 1) for kernel in trace]
    sampling = break_down(late, 1)["sampling"]
    assert (sampling.time, sampling.gaps) == (20.0, 9.0)
    assert sampling.per_step(2)["kernels"]["_pick"] == {"launches": 0.5, "us": 5.0, "gaps_us": 4.5}


def test_only_the_last_steps_count() -> None:
    slow = [Kernel(3 * end, 3 * start, name) for end, start, name in in_a_row(ONE_TOKEN, ONE_TOKEN)]
    begin = slow[-1].end
    fast = [Kernel(begin + end, begin + start, name) for end, start, name in in_a_row(ONE_TOKEN, ONE_TOKEN)]
    assert sum(cost.time for cost in break_down(slow + fast, 2).values()) == fast[-1].end - begin
    with pytest.raises(KvikError, match="saw 4 of at least 5 steps"):
        break_down(slow + fast, 4)


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_those_of_the_tensors(tied: bool) -> None:
    config = {
        "architectures": ["Qwen2ForCausalLM"], "vocab_size": 3001, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 4, "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "tie_word_embeddings": tied,
    }  # fmt: skip
    spec = build_spec(config)
    plan: Any = SimpleNamespace(dtype=torch.bfloat16, kv_dtype=torch.bfloat16)
    found = phase_bytes(spec, plan, 8, 100.0)
    layer = allocate_layer(spec, torch.bfloat16, torch.device("meta"))
    linears = [layer.qkv, layer.o, layer.gate_up, layer.down]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    tensors = [layer.attention_norm, layer.mlp_norm, *(linear.weight for linear in linears), *biases]
    final_norm = 2 * spec.hidden_size
    assert found["projections"] == 4 * sum(tensor.nbytes for tensor in tensors) + final_norm
    assert found["head"] == 3001 * 896 * 2
    assert found["attention"] == 8 * (100 + 3 * 64) * 2 * 2 * 64 * 2  # keys and values of 2 heads of 64 in bf16


def test_a_batch_decodes_together_at_its_context(model: str) -> None:
    with LLMEngine(model, device="cpu", max_num_seqs=5, max_num_batched_tokens=64) as engine:
        batch = _Batch.of(engine.resolved.scheduler, 5, 120, 0.7)
        for number in range(2):
            decoded = engine.stats.num_decode_tokens
            with batch.decoding(engine, number):
                for _ in range(_WARM_STEPS + _STEPS // 2):
                    engine.step()
                    assert engine.stats.last is not None and engine.stats.last.num_decode_tokens == 5
                grown = (engine.stats.num_decode_tokens - decoded) / 5
            assert batch.prompt_len + grown == pytest.approx(120, abs=3)
            assert not engine.has_unfinished() and engine.engine.scheduler.kv.num_used == 0


def test_what_does_not_fit_is_refused_with_numbers(model: str) -> None:
    with LLMEngine(model, device="cpu", num_kvcache_blocks=8, kvcache_block_size=64) as engine:
        for size, context, text in (
            (1, 10, "--context must be at least 22"),
            (1, 510, "sequences grow to 5.. tokens and the context of this engine is 512"),
            (4, 200, "4 sequences of 2.. tokens need 16 KV blocks and there are 8"),
        ):
            with pytest.raises(ConfigError, match=text):
                _Batch.of(engine.resolved.scheduler, size, context, 0.0)


def test_what_cannot_be_measured_is_refused(kvik: Kvik, model: str) -> None:
    for argv, text in (
        (("--batch", 0, "--context", 64), "--batch must be at least 1"),
        (("--batch", 4, "--context", 64, "--max-num-seqs", 3), "more than --max-num-seqs 3"),
        (("--batch", 4, "--context", 64, "--device", "cpu"), "use kvik generate MODEL PROMPT --profile FILE"),
        (("--batch", 4), "--context"),
        (("--batch", 4, "--context", 64, "--temperature", -1), "temperature"),
    ):
        result = kvik("bench", "breakdown", model, *argv)
        assert result.code == 2 and text in result.err


def test_the_table_and_its_record(kvik: Kvik, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the measurement, which needs a GPU."""
    trace = in_a_row(*itertools.repeat(ONE_TOKEN, _STEPS + 1), apart=4.0)
    whole = 10.0 * len(ONE_TOKEN) + 5.0
    host = {"schedule": 20.0, "launch": 30.0, "collect": 90.0, "whole": 150.0}
    monkeypatch.setattr(bench_breakdown, "_check", lambda args, options: None)
    monkeypatch.setattr(bench_breakdown, "_time_steps", lambda *_: (whole, host, 64.5))
    monkeypatch.setattr(bench_breakdown, "_trace_steps", lambda *_: trace)
    file = tmp_path / "r.jsonl"
    argv = ("--batch", 2, "--context", 64, "--device", "cpu", "--json", file)
    result = kvik("bench", "breakdown", model, *argv)
    assert result.code == 0
    for text in (
        "2 sequences of 64 tokens",
        "_rope_kernel",
        "of limit",
        "the sum is 99.4 % of it",
        "host",
        "read limit",
    ):
        assert text in result.out
    assert all(f"\n{phase}" in result.out for phase in (*PHASES, "sum"))
    record = json.loads(file.read_text())
    found = record["result"]
    assert record["mode"] == "breakdown" and str(tmp_path) not in file.read_text()
    assert found["sum_us"] == pytest.approx(whole - 1.0) and found["share"] == pytest.approx((whole - 1) / whole)
    assert found["host"] == {
        "us": 60.0, "schedule": 20.0, "prepare": 0.0, "launch": 30.0, "update": 0.0, "detokenize": 0.0, "other": 10.0,
        "waits_us": 90.0,
    }  # fmt: skip
    attention = found["phases"]["attention"]
    assert attention["bytes_per_s"] == pytest.approx(1e6 * attention["bytes"] / 10.0)


@pytest.mark.gpu
@pytest.mark.skipif(gpu_obstacle() is not None, reason="needs an NVIDIA GPU")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="needs the GPU to itself, as in `make test-gpu`")
@pytest.mark.parametrize("more", [(), ("--temperature", 0.6), ("--deterministic",)], ids=["greedy", "drawn", "fixed"])
def test_on_a_gpu_the_phases_are_the_step(kvik: Kvik, tmp_path: Path, more: tuple[object, ...]) -> None:
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "eos_token_id": 0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "r.jsonl"
    sizes = ("--batch", 64, "--context", 1536, "--kv-cache-memory", "8GiB")  # long enough for the profiler not to show
    result = kvik("bench", "breakdown", tmp_path, "--load-format", "dummy", "--json", file, *sizes, *more)
    assert result.code == 0, result.err
    record = json.loads(file.read_text())
    phases = record["result"]["phases"]
    assert record["graphs"] and record["context"] == pytest.approx(1536, abs=3)
    assert record["result"]["share"] == pytest.approx(1.0, abs=0.03)
    assert all(phases[phase]["us"] > 0 for phase in PHASES if phase != IDLE)
    assert phases["attention"]["launches"] == 16 and phases["embedding"]["launches"] == 1
    assert 0 < phases["attention"]["bytes_per_s"] < 1e13
