"""The whole engine against transformers: ragged batches, chunked prompts, the paged cache, the sampler in between."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, TINY_VOCAB_SIZE, make_tiny

from engine_runs import CPU, GPU, options_for
from kvik import LLM, SamplingParams

transformers = pytest.importorskip("transformers", reason="transformers is the reference")

OVERRIDES: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 112, "tie_word_embeddings": True},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "qwen3": {"head_dim": 80, "num_attention_heads": 4, "num_key_value_heads": 2},
    "mistral": {"sliding_window": 12},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}


@pytest.fixture(params=[CPU, GPU])
def place(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The options of an engine on each device."""
    with options_for(request.param) as options:
        yield options


def load(folder: Path, dtype: torch.dtype, place: dict[str, Any]) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(place["device"])


def ragged_prompts(count: int = 6) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(3, TINY_VOCAB_SIZE) for _ in range(rng.choice([1, 5, 16, 33, 70]))] for _ in range(count)]


def greedy_by_transformers(model: Any, prompt: list[int], steps: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            ids, max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
    return list(output[0, len(prompt) :].tolist())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_tokens_and_logprobs(tmp_path: Path, arch: str, place: dict[str, Any]) -> None:
    folder = make_tiny(tmp_path, arch=arch, **OVERRIDES[arch])
    model = load(folder, torch.float32, place)
    prompts = ragged_prompts()
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, logprobs=4, prompt_logprobs=1)
    options = {"max_num_batched_tokens": 50, "max_num_seqs": 4, "num_kvcache_blocks": 40}
    with LLM(str(folder), dtype="float32", **options, **place) as llm:
        outputs = llm.generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert list(output.token_ids) == greedy_by_transformers(model, prompt, 64)
        with torch.inference_mode():
            ids = torch.tensor([prompt + list(output.token_ids)], device=model.device)
            expected = model(ids).logits[0].log_softmax(-1).cpu()  # [num_tokens, vocab_size]
        assert output.logprobs is not None and output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        found = [*output.prompt_logprobs[1:], *output.logprobs]
        assert len(found) == len(ids[0]) - 1
        for position, entry in enumerate(found):
            assert entry is not None and entry.token_id == int(ids[0, position + 1])
            assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-3)
            assert [token for token, _ in entry.top][:1] == [int(expected[position].argmax())]
            assert entry.rank == 1 + int((expected[position] > expected[position, entry.token_id]).sum())


def test_scaled_rope_past_the_original_context_with_preemption(tmp_path: Path, place: dict[str, Any]) -> None:
    folder = make_tiny(tmp_path, arch="llama", max_position_embeddings=128, rope_parameters=YARN)
    model = load(folder, torch.float32, place)
    prompts = [prompt[:60] for prompt in ragged_prompts(8)]
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    options = {"max_num_seqs": 8, "num_kvcache_blocks": 12, "kvcache_block_size": 16, "max_model_len": 128}
    with LLM(str(folder), dtype="float32", **options, **place) as llm:
        outputs = llm.generate(prompts, params)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert list(output.token_ids) == greedy_by_transformers(model, prompt, 60)


@pytest.mark.parametrize("chunk", [16, 2048])
def test_dynamic_rope_does_not_depend_on_the_schedule(tmp_path: Path, chunk: int, place: dict[str, Any]) -> None:
    """transformers rotates by the longest length that the model object has met: a fresh one per prompt is exact."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    folder = make_tiny(tmp_path, arch="llama", max_position_embeddings=32, rope_parameters=rope)
    model = load(folder, torch.float32, place)
    shared = ragged_prompts(4)[0] * 70
    prompts = [shared[:40], shared[:70], shared[:20], shared[:40]]
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    options = {"max_num_batched_tokens": chunk, "kvcache_block_size": 16, "max_model_len": 128}
    with LLM(str(folder), dtype="float32", **options, **place) as llm:
        outputs = llm.generate(prompts, params) + llm.generate(prompts, params)
    assert outputs[4].usage.cached_tokens == 32, "the same length may share its prefix"
    for prompt, output in zip(prompts * 2, outputs, strict=True):
        assert list(output.token_ids) == greedy_by_transformers(copy.deepcopy(model), prompt, 40)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "tie"), [("bfloat16", 0.02), ("float16", 0.003)])
def test_narrow_types_pick_tokens_that_transformers_finds_as_likely(
    tmp_path: Path, arch: str, dtype: str, tie: float, place: dict[str, Any]
) -> None:
    """Narrow types round differently per schedule, so near ties may fall either way: the loss per token is tiny."""
    folder = make_tiny(tmp_path, arch=arch, dtype=getattr(torch, dtype))
    model, prompts = load(folder, getattr(torch, dtype), place), ragged_prompts()
    with LLM(str(folder), dtype=dtype, **place) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([prompt + list(output.token_ids)], device=model.device)
            logits = model(ids).logits[0, len(prompt) - 1 : -1].float().cpu()
        chosen = logits.gather(-1, torch.tensor(output.token_ids).unsqueeze(-1)).squeeze(-1)
        assert (logits.amax(-1) - chosen).max() <= tie * logits.abs().amax()
