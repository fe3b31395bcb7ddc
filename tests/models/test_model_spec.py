"""config.json to spec: published models by their published numbers, and readable refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, make_tiny

from kvik.attention.registry import select_backend
from kvik.errors import ModelLoadError
from kvik.kernels.reference import ReferenceOps
from kvik.models.hub import load_config
from kvik.models.loader import checkpoint_dtype, load_model
from kvik.models.registry import build_spec


def config(architecture: str, **fields: Any) -> dict[str, Any]:
    names = {
        "vocab": "vocab_size",
        "hidden": "hidden_size",
        "mlp": "intermediate_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
    }
    return {"architectures": [architecture], **{names.get(key, key): value for key, value in fields.items()}}


QWEN3_0_6B = config(
    "Qwen3ForCausalLM", vocab=151936, hidden=1024, mlp=3072, layers=28, heads=16, kv_heads=8, head_dim=128,
    tie_word_embeddings=True, max_position_embeddings=40960, rope_theta=1000000, attention_bias=False,
    sliding_window=None, use_sliding_window=False, max_window_layers=28,
)  # fmt: skip
QWEN2_0_5B = config(
    "Qwen2ForCausalLM", vocab=151936, hidden=896, mlp=4864, layers=24, heads=14, kv_heads=2, tie_word_embeddings=True,
    max_position_embeddings=131072, rope_theta=1000000.0, sliding_window=131072, use_sliding_window=False,
    max_window_layers=24,
)  # fmt: skip
LLAMA3_8B = config(
    "LlamaForCausalLM", vocab=128256, hidden=4096, mlp=14336, layers=32, heads=32, kv_heads=8,
    max_position_embeddings=131072, rope_theta=500000.0,
    rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 8192},
)  # fmt: skip
LLAMA1_7B = config("LlamaForCausalLM", vocab=32000, hidden=4096, mlp=11008, layers=32, heads=32)
MISTRAL_7B = config(
    "MistralForCausalLM", vocab=32000, hidden=4096, mlp=14336, layers=32, heads=32, kv_heads=8, sliding_window=4096,
    max_position_embeddings=32768,
)  # fmt: skip
R1_DISTILL_QWEN_1_5B = config(
    "Qwen2ForCausalLM", vocab=151936, hidden=1536, mlp=8960, layers=28, heads=12, kv_heads=2, tie_word_embeddings=False,
    max_position_embeddings=131072, rope_theta=10000, sliding_window=4096, use_sliding_window=False,
    max_window_layers=21, use_mrope=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "parameters", "kv_bytes"),
    [
        (QWEN3_0_6B, 596_049_920, 28 * 2 * 1024 * 2),
        (QWEN2_0_5B, 494_032_768, 24 * 2 * 128 * 2),
        (LLAMA3_8B, 8_030_261_248, 32 * 2 * 1024 * 2),
        (LLAMA1_7B, 6_738_415_616, 32 * 2 * 4096 * 2),
        (MISTRAL_7B, 7_241_732_096, 32 * 2 * 1024 * 2),
        (R1_DISTILL_QWEN_1_5B, 1_777_088_000, 28 * 2 * 256 * 2),
    ],
    ids=["qwen3-0.6b", "qwen2-0.5b", "llama-3.1-8b", "llama-7b", "mistral-7b", "r1-distill-qwen-1.5b"],
)
def test_published_sizes(raw: dict[str, Any], parameters: int, kv_bytes: int) -> None:
    spec = build_spec(raw)
    assert spec.num_parameters == parameters
    assert spec.weight_bytes(torch.bfloat16) == 2 * parameters
    assert spec.kv_bytes_per_token(torch.bfloat16) == kv_bytes
    scales = 2 * spec.num_layers * spec.num_kv_heads
    assert spec.kv_bytes_per_token(torch.int8) == kv_bytes // 2 + 4 * scales


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_formula_counts_what_is_allocated(tmp_path: Path, arch: str, tied: bool) -> None:
    fields = {"attention_bias": True, "mlp_bias": True} if arch == "llama" else {}
    path = make_tiny(tmp_path, arch, tie_word_embeddings=tied, tokenizer=False, **fields)
    spec = build_spec(load_config(path))
    device = torch.device("cpu")
    decoder = load_model(
        path, spec, dtype=torch.bfloat16, device=device, ops=ReferenceOps(), attention=select_backend("auto", device),
        max_model_len=8, load_format="dummy",
    )  # fmt: skip
    assert sum(t.nbytes for t in decoder.weights.tensors()) == spec.weight_bytes(torch.bfloat16)


def test_windows() -> None:
    assert set(build_spec(MISTRAL_7B).windows) == {4096}
    assert set(build_spec({**MISTRAL_7B, "sliding_window": None}).windows) == {None}
    assert set(build_spec(R1_DISTILL_QWEN_1_5B).windows) == {None}
    upper = build_spec({**R1_DISTILL_QWEN_1_5B, "use_sliding_window": True}).windows
    assert upper == (None,) * 21 + (4096,) * 7
    default = {name: value for name, value in R1_DISTILL_QWEN_1_5B.items() if name != "sliding_window"}
    assert build_spec({**default, "use_sliding_window": True}).windows == upper, "transformers has 4096 then"
    kinds = ["full_attention", "sliding_attention"] * 16
    assert build_spec({**MISTRAL_7B, "layer_types": kinds}).windows == (None, 4096) * 16, "as transformers' Ministral"
    kinds = kinds[:28]
    explicit = build_spec({**R1_DISTILL_QWEN_1_5B, "use_sliding_window": True, "layer_types": kinds}).windows
    assert explicit == (None, 4096) * 14


def test_defaults_of_missing_fields() -> None:
    assert build_spec(LLAMA1_7B).num_kv_heads == 32
    assert build_spec(QWEN3_0_6B).head_dim == 128
    without = {key: value for key, value in QWEN3_0_6B.items() if key != "head_dim"}
    assert build_spec(without).head_dim == 128
    by_type = {key: value for key, value in LLAMA1_7B.items() if key != "architectures"}
    assert build_spec({**by_type, "model_type": "llama"}).num_parameters == build_spec(LLAMA1_7B).num_parameters


def test_context_len_follows_the_scaling() -> None:
    assert build_spec(LLAMA3_8B).context_len == 131072
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert build_spec({**QWEN3_0_6B, "rope_scaling": yarn}).context_len == 131072
    assert build_spec({**LLAMA1_7B, "rope_scaling": {"type": "linear", "factor": 2.0}}).context_len == 4096


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (config("LlamaForCasualLM"), r"LlamaForCasualLM .*did you mean 'LlamaForCausalLM'.*Qwen3ForCausalLM"),
        (config("GPT2LMHeadModel"), "architecture GPT2LMHeadModel is not supported; Kvik has LlamaForCausalLM, "),
        (config("BertForMaskedLM"), "BertForMaskedLM is not a decoder-only language model"),
        (config("LlamaModel"), "LlamaModel is not a decoder-only language model with an output head"),
        (config("T5ForConditionalGeneration", is_encoder_decoder=True), "encoder-decoder"),
        (config("WhisperForConditionalGeneration", is_encoder_decoder=True), "encoder-decoder"),
        (config("Qwen3MoeForCausalLM", num_experts=128), "mixture of experts"),
        (config("MixtralForCausalLM", num_local_experts=8), "mixture of experts"),
        (config("Qwen2VLForConditionalGeneration", vision_config={}), "images or sound"),
        ({**QWEN3_0_6B, "quantization_config": {"quant_method": "gptq"}}, r"quantised weights \(gptq\)"),
        ({}, "neither 'architectures' nor 'model_type'"),
        ({"model_type": "mamba"}, "mamba is not a decoder-only"),
        ({**QWEN3_0_6B, "hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({**QWEN3_0_6B, "num_key_value_heads": 3}, "16 query heads cannot share 3 key/value heads"),
        ({**QWEN3_0_6B, "vocab_size": "many"}, "'vocab_size' must be a positive integer, got 'many'"),
        ({**QWEN3_0_6B, "head_dim": "16"}, "'head_dim' must be a positive integer, got '16'"),
        ({**QWEN3_0_6B, "use_sliding_window": True, "sliding_window": -8}, "'sliding_window' must be a positive"),
        ({**MISTRAL_7B, "sliding_window": 0}, "'sliding_window' must be a positive integer, got 0"),
        ({**MISTRAL_7B, "sliding_window": "4096"}, "'sliding_window' must be a positive integer, got '4096'"),
        (
            {**LLAMA1_7B, "layer_types": ["sliding_attention"] * 32},
            "sliding attention, which LlamaForCausalLM does not",
        ),
        ({**QWEN3_0_6B, "layer_types": 5}, "'layer_types' must be a list, got 5"),
        ({**QWEN3_0_6B, "tie_word_embeddings": "false"}, "'tie_word_embeddings' must be true or false, got 'false'"),
        ({**LLAMA1_7B, "attention_bias": "no"}, "'attention_bias' must be true or false, got 'no'"),
        ({**QWEN3_0_6B, "max_window_layers": None}, "'max_window_layers' must be an integer"),
        ({**QWEN3_0_6B, "layer_types": [["full_attention"]] * 28}, "is not supported"),
        ({**QWEN3_0_6B, "rms_norm_eps": None}, "'rms_norm_eps' must be a number between 0 and 1, got None"),
        ({**QWEN3_0_6B, "rms_norm_eps": "1e-6"}, "'rms_norm_eps' must be a number"),
        ({**QWEN3_0_6B, "rope_scaling": 5}, "'rope_scaling' must be an object, got 5"),
        ({**QWEN3_0_6B, "num_hidden_layers": None}, "no 'num_hidden_layers'"),
        ({**QWEN3_0_6B, "layer_types": ["full_attention"]}, "layer_types has 1 entries but num_hidden_layers=28"),
        ({**QWEN3_0_6B, "layer_types": ["linear_attention"] * 28}, "layer type 'linear_attention' is not supported"),
    ],
)
def test_refusals_are_one_readable_sentence(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message) as caught:
        build_spec(raw)
    assert "\n" not in str(caught.value)


def test_checkpoint_dtype() -> None:
    assert checkpoint_dtype({"torch_dtype": "bfloat16"}) is torch.bfloat16
    assert checkpoint_dtype({"dtype": "float16"}) is torch.float16
    assert checkpoint_dtype({"torch_dtype": "torch.float32"}) is torch.float32
    assert checkpoint_dtype({}) is None
    with pytest.raises(ModelLoadError, match="float8_e4m3fn"):
        checkpoint_dtype({"dtype": "float8_e4m3fn"})
