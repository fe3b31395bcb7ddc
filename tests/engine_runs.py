"""Runs of the whole engine that several tests share: the places where it runs, the requests, what must be equal.

A test of a `place` runs on this processor; on an NVIDIA GPU; or, where speed does not matter, on the GPU's runtime with
its kernels interpreted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TINY_VOCAB_SIZE

from kvik import LLM, RequestOutput, SamplingParams, resolve
from triton_mode import HAS_GPU, HAS_TRITON, INTERPRETED

__all__ = ["BASE", "CPU", "GPU", "INTERPRETER", "gpu_obstacle", "options_for", "params", "prompts", "run", "same"]

CPU = "cpu"
GPU = pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)
INTERPRETER = pytest.param("interpreter", id="interpreter")

BASE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "num_kvcache_blocks": 64,
    "kvcache_block_size": 16,
    "max_model_len": 160,
}


def gpu_obstacle() -> str | None:
    """Why nothing can run on a GPU in this process."""
    if not HAS_GPU:
        return "torch finds no NVIDIA GPU"
    if not HAS_TRITON:
        return "triton is not installed"
    return "TRITON_INTERPRET=1 keeps kernels off the GPU" if INTERPRETED else None


@contextmanager
def options_for(place: str) -> Iterator[dict[str, Any]]:
    """The options of an engine that runs at `place`, while the context lasts; skips the test where it cannot."""
    if place == "cuda" and (obstacle := gpu_obstacle()):
        pytest.skip(f"needs an NVIDIA GPU: {obstacle}")
    if place != "interpreter":
        yield {"device": place}
        return
    if not (HAS_TRITON and INTERPRETED):
        pytest.skip("needs Triton's interpreter: triton is not installed, or compiles for a GPU in this process")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve, "_kernels", lambda *_: "triton")
        yield {"device": "cpu", "enforce_eager": True}


def prompts(count: int, seed: int = 1, longest: int = 90) -> list[list[int]]:
    """Ragged prompts, of which many share a prefix and some are whole blocks."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, TINY_VOCAB_SIZE) for _ in range(longest)]
    lengths = [16, 32, 48, 15, 17, 1] + [rng.randint(1, longest) for _ in range(count)]
    made = []
    for length in lengths[:count]:
        cut = rng.randint(0, length)
        made.append(shared[:cut] + [rng.randrange(3, TINY_VOCAB_SIZE) for _ in range(length - cut)])
    return made


def params(count: int) -> list[SamplingParams]:
    """One request of every kind of sampling, each with its own seed."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "logprobs": 1},
        {"temperature": 1.3, "min_p": 0.05, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 0.0, "repetition_penalty": 1.3, "prompt_logprobs": 2},
        {"temperature": 0.7, "logit_bias": {5: 4.0, 9: -100.0}, "min_tokens": 8},
        {"temperature": 0.9, "n": 2},
    ]
    stops = tuple(range(3, 40))
    return [
        SamplingParams(
            max_tokens=10 + 7 * (i % 5), seed=100 + i, stop_token_ids=stops if i % 2 else (), **kinds[i % len(kinds)]
        )
        for i in range(count)
    ]


def run(
    folder: Path, count: int = 14, *, before: Callable[[LLM], None] | None = None, **options: Any
) -> list[RequestOutput]:
    with LLM(str(folder), **{**BASE, **options}) as llm:
        if before is not None:
            before(llm)
        outputs = llm.generate(prompts(count), params(count))
        assert llm.llm_engine.engine.scheduler.kv.num_used == 0
        return outputs


def same(one: list[RequestOutput], other: list[RequestOutput], tolerance: float = 1e-4) -> None:
    for a, b in zip(one, other, strict=True):
        assert [o.token_ids for o in a.outputs] == [o.token_ids for o in b.outputs]
        assert [o.text for o in a.outputs] == [o.text for o in b.outputs]
        assert [o.finish_reason for o in a.outputs] == [o.finish_reason for o in b.outputs]
        for x, y in zip(
            [*(a.logprobs or ()), *(a.prompt_logprobs or ())],
            [*(b.logprobs or ()), *(b.prompt_logprobs or ())],
            strict=True,
        ):
            assert (x is None) == (y is None)
            if x is not None and y is not None:
                assert x.token_id == y.token_id and x.logprob == pytest.approx(y.logprob, abs=tolerance)
