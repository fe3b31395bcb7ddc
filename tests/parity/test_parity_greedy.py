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

from engine_runs import CPU, GPU, options_for

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


@pytest.fixture(params=[CPU, GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with options_for(request.param):
        yield request.param


def prompts() -> dict[str, list[int]]:
    rng = random.Random(7)
    return {str(n): [rng.randrange(TINY_VOCAB_SIZE) for _ in range(n)] for n in (1, 23, 70)}


def hf_greedy(path: Path, ids: list[int], device: str) -> list[int]:
    model = load_hf(path, device=device)  # a fresh one: dynamic RoPE leaves state behind in the model
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([ids], device=model.device)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NUM_TOKENS)
    return list(map(int, out[0, len(ids) :]))


@pytest.mark.parametrize("name", CASES)
def test_the_same_tokens(tmp_path: Path, name: str, device: str) -> None:
    arch, overrides = CASES[name]
    path = make_tiny(tmp_path, arch, **overrides)
    got = PagedDriver(load_decoder(path, device)).greedy(prompts(), NUM_TOKENS)
    assert got == {seq: hf_greedy(path, ids, device) for seq, ids in prompts().items()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "tie"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)], ids=str)
def test_narrow_types_choose_a_best_token(
    tmp_path: Path, arch: str, dtype: torch.dtype, tie: float, device: str
) -> None:
    """Rounding decides between tokens that are nearly as likely: by less than `tie` times the largest logit."""
    path = make_tiny(tmp_path, arch, dtype=dtype)
    hf, driver = load_hf(path, dtype, device), PagedDriver(load_decoder(path, device, dtype=dtype))
    for seq, ids in prompts().items():
        output = driver.greedy({seq: ids}, NUM_TOKENS)[seq]
        with torch.inference_mode():
            logits = hf(torch.tensor([ids + output], device=hf.device)).logits[0, len(ids) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(output, device=hf.device)[:, None])[:, 0]
        assert (logits.max(dim=1).values - chosen).max() < tie * logits.abs().max()
