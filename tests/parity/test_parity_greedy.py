"""64 greedy tokens against transformers' generate: one prompt at a time there, all prompts in one paged batch here."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_driver import PagedDriver, load_decoder, load_hf
from tiny_models import ARCHITECTURES, TINY_VOCAB_SIZE, make_tiny

NUM_TOKENS = 64
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{arch: (arch, {}) for arch in ARCHITECTURES},
    "mistral-windowed": ("mistral", {"sliding_window": 24}),
    "llama-dynamic": (
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts() -> dict[str, list[int]]:
    rng = random.Random(7)
    return {str(n): [rng.randrange(TINY_VOCAB_SIZE) for _ in range(n)] for n in (1, 23, 70)}


def hf_greedy(path: Path, ids: list[int], dtype: torch.dtype = torch.float32) -> list[int]:
    model = load_hf(path, dtype)  # a fresh one: dynamic RoPE leaves state behind in the model
    model.generation_config.eos_token_id = None
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=NUM_TOKENS
    )
    return list(map(int, out[0, len(ids) :]))


@pytest.mark.parametrize("name", CASES)
def test_the_same_tokens(tmp_path: Path, name: str) -> None:
    arch, overrides = CASES[name]
    path = make_tiny(tmp_path, arch, **overrides)
    got = PagedDriver(load_decoder(path)).greedy(prompts(), NUM_TOKENS)
    assert got == {seq: hf_greedy(path, ids) for seq, ids in prompts().items()}


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_bfloat16_chooses_a_best_token(tmp_path: Path, arch: str) -> None:
    path = make_tiny(tmp_path, arch, dtype=torch.bfloat16)
    hf, driver = load_hf(path, torch.bfloat16), PagedDriver(load_decoder(path, dtype=torch.bfloat16))
    for seq, ids in prompts().items():
        output = driver.greedy({seq: ids}, NUM_TOKENS)[seq]
        with torch.inference_mode():
            logits = hf(torch.tensor([ids + output])).logits[0, len(ids) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        assert (logits.max(dim=1).values - chosen).max() < 0.02 * logits.abs().max()
