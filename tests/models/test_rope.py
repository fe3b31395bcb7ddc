"""RoPE against transformers' own functions, the two forms of its config, and what must be refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny

from kvik import LLMEngine
from kvik.errors import ModelLoadError
from kvik.layers.rope import RopeTable, inverse_frequencies, rope_from_config

CPU = torch.device("cpu")
BASE: dict[str, Any] = {"hidden_size": 512, "num_attention_heads": 4, "max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-options": {**YARN, "beta_fast": 20.0, "beta_slow": 3.0, "truncate": False},
    "yarn-mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.3},
    "yarn-attention-factor": {**YARN, "attention_factor": 0.9},
    "yarn-original-length-from-config": {"rope_type": "yarn", "factor": 2.0},
}


def theirs(params: dict[str, Any], theta: float) -> tuple[torch.Tensor, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**BASE, rope_parameters={**params, "rope_theta": theta})
    if params["rope_type"] == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[params["rope_type"]](config)


@pytest.mark.parametrize("theta", [10000.0, 1000000.0])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_transformers(kind: str, theta: float) -> None:
    params = KINDS[kind]
    want, attention_factor = theirs(params, theta)
    new = rope_from_config({**BASE, "rope_parameters": {**params, "rope_theta": theta}}, 128)
    torch.testing.assert_close(inverse_frequencies(new), want, rtol=3e-7, atol=0)
    assert new.attention_factor == pytest.approx(attention_factor)
    old_params = {**params, "type": params["rope_type"]}
    del old_params["rope_type"]
    scaling = None if kind == "default" else old_params
    assert rope_from_config({**BASE, "rope_theta": theta, "rope_scaling": scaling}, 128) == new


def test_tables_hold_scaled_cosines_of_every_position() -> None:
    spec = rope_from_config({**BASE, "rope_scaling": {**YARN, "attention_factor": 1.5}, "rope_theta": 1e4}, 128)
    table = RopeTable(spec, 100, CPU)
    positions = torch.tensor([0, 99, 7])
    cos, sin = table.cos_sin(positions, None)
    angles = positions[:, None].double() * inverse_frequencies(spec).double()
    assert cos.shape == sin.shape == (3, 64)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos.double(), 1.5 * angles.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sin.double(), 1.5 * angles.sin(), rtol=0, atol=1e-5)
    assert spec.table_bytes(100) == cos.new_empty(100, 64).nbytes * 2


def test_tables_are_part_of_the_memory_plan(tmp_path: Path) -> None:
    folder, plans = str(make_tiny(tmp_path, max_position_embeddings=512)), []
    for length in (128, 512):
        with LLMEngine(folder, device="cpu", max_model_len=length) as engine:
            plans.append(engine.resolved.memory.activations - engine.spec.rope.table_bytes(length))
    assert plans[0] == plans[1]


@pytest.mark.parametrize("length", [1, 8192, 8193, 20000])
def test_dynamic_uses_the_base_of_the_length(length: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(**BASE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    want, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=torch.tensor(length))
    spec = rope_from_config({**BASE, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 128)
    assert spec.depends_on_length
    assert spec.table_bytes(1000) == 1001 * 64 * 4
    positions = torch.tensor([0, 3, 1000])
    cos, sin = RopeTable(spec, 20000, CPU).cos_sin(positions, torch.full((3,), length))
    torch.testing.assert_close(torch.atan2(sin, cos)[1], torch.atan2((3 * want).sin(), (3 * want).cos()))
    torch.testing.assert_close(cos[2], (1000 * want).cos(), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "yarm", "factor": 2.0}}, "did you mean 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "'factor' must be a positive number, got -1"),
        ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "positive number, got '2'"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "positive number, got nan"),
        ({"rope_scaling": {"factor": 4.0}}, "factor 4 but says no kind"),
        ({"rope_scaling": {**YARN, "attention_factor": "1"}}, "'attention_factor' must be a positive number, got '1'"),
        ({"rope_scaling": {**YARN, "mscale": 1, "mscale_all_dim": "1"}}, "'mscale_all_dim' must be a positive number"),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor > low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "different RoPE per layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_theta": 0.0}, "'rope_theta' must be a positive number"),
    ],
)
def test_refusals(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        rope_from_config({**BASE, **config}, 128)


def test_an_odd_head_dim_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="even head_dim, got 33"):
        rope_from_config(BASE, 33)
