"""`deterministic=True`: bit for bit the same tokens and logprobs under every schedule, or a refusal.

Without the option the same schedules do show in the bits: these tests can fail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny

from kvik import LLM, ConfigError
from kvik.cli.schedules import difference, draw_requests, make_schedules, run_schedule
from kvik.kernels.cpu.native import available
from kvik.llm_engine import LLMEngine

NATIVE = pytest.mark.skipif(not available(), reason="Kvik was built without its native kernels")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICES = [pytest.param("cpu", marks=NATIVE), pytest.param("cuda", marks=[pytest.mark.gpu, GPU])]
DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 128}


def differences(folder: Path, *, deterministic: bool, **options: Any) -> list[str]:
    options |= {"max_num_seqs": 8, "kvcache_block_size": 16, "num_kvcache_blocks": 160}
    with LLMEngine(str(folder), deterministic=deterministic, **options) as engine:
        assert engine.config.deterministic is deterministic
        context = engine.resolved.scheduler.max_model_len
        requests = draw_requests(12, context // 2, 20, 16, engine.spec.vocab_size, seed=1)
        schedules = make_schedules(engine.resolved.scheduler, requests, 11, seed=1)
        own = engine.engine
        want, *others = [run_schedule(engine, schedule, requests, seed=1) for schedule in schedules]
        assert engine.engine is own  # whatever is measured next has the settings of the engine
        assert sum(output.metrics.num_preemptions for outputs in others for output in outputs) > 0
        found = [difference(a, b) for outputs in others for a, b in zip(outputs, want, strict=True)]
        return [text for text in found if text is not None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("arch", "overrides"),
    [("qwen3", {"num_attention_heads": 8}), ("mistral", {"sliding_window": 40}), ("llama", DYNAMIC)],
    ids=["qwen3", "sliding window", "dynamic rope"],
)
def test_no_schedule_shows(tmp_path: Path, arch: str, overrides: dict[str, Any], device: str) -> None:
    folder = make_tiny(tmp_path, arch=arch, **overrides)
    for dtype in ("float32", "bfloat16"):
        assert differences(folder, deterministic=True, device=device, dtype=dtype) == []


@pytest.mark.parametrize("device", DEVICES)
def test_without_it_schedules_show(tmp_path: Path, device: str) -> None:
    assert differences(make_tiny(tmp_path), deterministic=False, device=device) != []


@NATIVE
@pytest.mark.parametrize(
    "options", [{"quantization": "int8"}, {"quantization": "int4"}, {"kv_cache_dtype": "int8"}, {"threads": 3}], ids=str
)
def test_options_of_a_processor(tmp_path: Path, options: dict[str, Any]) -> None:
    assert differences(make_tiny(tmp_path), deterministic=True, device="cpu", **options) == []


@NATIVE
def test_torch_on_a_processor_is_refused(tmp_path: Path) -> None:
    folder = str(make_tiny(tmp_path))
    for options in ({"kernels": "torch"}, {"attention_backend": "reference"}, {"dtype": "float16"}):
        with pytest.raises(ConfigError, match="deterministic=True on a CPU needs the native kernels"):
            LLM(folder, device="cpu", deterministic=True, **options)


@NATIVE
def test_what_it_takes_is_planned(tmp_path: Path) -> None:
    folder = str(make_tiny(tmp_path, max_position_embeddings=512))
    plans = []
    for deterministic in (False, True):
        with LLMEngine(folder, device="cpu", deterministic=deterministic, max_num_batched_tokens=100) as engine:
            plans.append((engine.resolved.memory.activations, engine.spec))
    spec = plans[0][1]
    assert plans[1][0] - plans[0][0] == 100 * 2 * spec.num_heads * (spec.head_dim + 2) * 4
