"""Logits against transformers on tiny random checkpoints: architectures, RoPE kinds, ways of splitting a prompt."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_driver import PagedDriver, load_decoder, load_hf, relative_error
from tiny_models import TINY_VOCAB_SIZE, make_tiny

from engine_runs import CPU, GPU, options_for

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-old-style": ("llama", {"old_style": True, "num_hidden_layers": 3}),
    "llama-gqa7": ("llama", {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 112, "head_dim": 16}),
    "llama-mha-biases-tied": (
        "llama",
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-mqa-head-dim-80": ("llama", {"num_key_value_heads": 1, "head_dim": 80}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-old-style": ("qwen2", {"tie_word_embeddings": True, "old_style": True}),
    "qwen2-upper-layers-windowed": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen2-windowed-old-style": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "old_style": True},
    ),
    "qwen3": ("qwen3", {"head_dim": 80, "num_attention_heads": 6}),
    "qwen3-biases-old-style": ("qwen3", {"attention_bias": True, "old_style": True}),
    "qwen3-tied-layer-types": (
        "qwen3",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 17,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mistral": ("mistral", {"head_dim": 32}),
    "mistral-windowed": ("mistral", {"sliding_window": 24}),
    "mistral-windowed-old-style": ("mistral", {"sliding_window": 24, "old_style": True}),
}

_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": _YARN,
    "yarn-mscale": {**_YARN, "mscale": 0.8, "mscale_all_dim": 0.5},
    "yarn-attention-factor": {**_YARN, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-no-truncate": {**_YARN, "truncate": False, "rope_theta": 1000000.0},
}
ROPE_CASES = {
    f"rope-{name}": ("llama", {"max_position_embeddings": 64, "rope_parameters": r}) for name, r in ROPES.items()
}
ROPE_CASES |= {f"{name}-old-style": (arch, {**case, "old_style": True}) for name, (arch, case) in ROPE_CASES.items()}
CASES = {**MODELS, **ROPE_CASES}
PROMPT_LEN = 90  # past the windows of 24 and the original contexts of 32 and 64


@pytest.fixture(params=[CPU, GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with options_for(request.param):
        yield request.param


def tokens(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(TINY_VOCAB_SIZE) for _ in range(count)]


@torch.inference_mode()
def hf_logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids], device=model.device)).logits[0]


@pytest.mark.parametrize("name", CASES)
def test_prefill_chunks_and_decode_match(tmp_path: Path, name: str, device: str) -> None:
    arch, overrides = CASES[name]
    path = make_tiny(tmp_path, arch, **overrides)
    ids = tokens(PROMPT_LEN)
    want = hf_logits(load_hf(path, device=device), ids)
    decoder = load_decoder(path, device)
    assert relative_error(PagedDriver(decoder).step({"a": ids})["a"], want) < 1e-4
    chunked = PagedDriver(decoder)
    edges = [0, 1, 17, 33, 34, 64, PROMPT_LEN]
    parts = [chunked.step({"a": ids[i:j]}, {"a": PROMPT_LEN})["a"] for i, j in itertools.pairwise(edges)]
    assert relative_error(torch.cat(parts), want) < 1e-4
    single = PagedDriver(decoder)
    rows = [single.step({"a": [token]}, {"a": PROMPT_LEN})["a"] for token in ids]
    assert relative_error(torch.cat(rows), want) < 1e-4


@pytest.mark.parametrize(
    "name", ["llama-gqa7", "qwen2-upper-layers-windowed", "qwen3", "mistral-windowed", "rope-dynamic"]
)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_ragged_batch_matches_each_alone(tmp_path: Path, name: str, backend: str, device: str) -> None:
    if device == "cuda" and backend == "reference":
        pytest.skip("a GPU has one attention backend")
    arch, overrides = CASES[name]
    path = make_tiny(tmp_path, arch, **overrides)
    hf = load_hf(path, device=device)
    prompts = {"a": tokens(5, 1), "b": tokens(77, 2), "c": tokens(33, 3), "d": tokens(34, 4)}
    driver = PagedDriver(load_decoder(path, device, backend=backend))
    driver.step({"b": prompts["b"][:60], "a": prompts["a"][:1]}, {"a": 5, "b": 77})
    mixed = driver.step(
        {"a": prompts["a"][1:2], "d": prompts["d"], "b": prompts["b"][60:], "c": prompts["c"]}, {"a": 5}
    )
    for seq in "dc":
        assert relative_error(mixed[seq], hf_logits(hf, prompts[seq])) < 1e-4
    assert relative_error(mixed["b"], hf_logits(hf, prompts["b"])[60:]) < 1e-4
    last = driver.step({"a": prompts["a"][2:]})["a"]
    assert relative_error(last, hf_logits(hf, prompts["a"])[2:]) < 1e-4


@pytest.mark.parametrize("name", ["llama-gqa7", "qwen2", "qwen3", "mistral-windowed", "rope-yarn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_are_as_close_as_their_precision_allows(
    tmp_path: Path, name: str, dtype: torch.dtype, device: str
) -> None:
    arch, overrides = CASES[name]
    path = make_tiny(tmp_path, arch, dtype=dtype, **overrides)
    ids = tokens(PROMPT_LEN)
    got = PagedDriver(load_decoder(path, device, dtype=dtype)).step({"a": ids})["a"]
    want = hf_logits(load_hf(path, dtype, device), ids)
    exact = hf_logits(load_hf(path, torch.float32, device), ids)
    tolerance = {torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]
    assert relative_error(got, want) < tolerance
    assert relative_error(got, exact) < 1.5 * relative_error(want, exact) + tolerance / 15


def test_logit_rows_are_those_asked_for(tmp_path: Path) -> None:
    decoder = load_decoder(make_tiny(tmp_path, "qwen3"))
    assert decoder.logits(torch.zeros(0, decoder.spec.hidden_size)).shape == (0, TINY_VOCAB_SIZE)
    assert decoder.logits(torch.zeros(3, decoder.spec.hidden_size)).dtype == torch.float32
