"""The whole engine with FlashInfer's attention, beside Triton's. Needs an NVIDIA GPU, FlashInfer, and nvcc."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny

from engine_runs import BASE, options_for, prompts
from kvik import LLM, RequestOutput, SamplingParams

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=2)
OPTIONS = {**BASE, "device": "cuda", "dtype": "bfloat16", "max_num_seqs": 8, "max_num_batched_tokens": 64}
TOLERANCE = 0.1  # of a log-probability in bfloat16


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")
    with options_for("cuda"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), head_dim=128, num_attention_heads=4, num_key_value_heads=2)


def generate(folder: Path, backend: str, **options: Any) -> list[list[RequestOutput]]:
    """The same prompts twice, so that the second time finds their prefixes in the cache."""
    with LLM(str(folder), **{**OPTIONS, **options}, attention_backend=backend) as llm:
        return [llm.generate(prompts(14), GREEDY) for _ in range(2)]


def agree(one: RequestOutput, other: RequestOutput) -> int:
    """Check that the log-probabilities are alike up to where the texts part, and that they part at a tie.

    Returns the number of tokens that are the same.
    """
    pairs = [*zip(one.outputs[0].logprobs or (), other.outputs[0].logprobs or (), strict=True)]
    for i, (a, b) in enumerate(pairs):
        if a.token_id != b.token_id:
            assert dict(a.top)[b.token_id] == pytest.approx(a.logprob, abs=TOLERANCE)
            return i
        assert a.logprob == pytest.approx(b.logprob, abs=TOLERANCE)
    return len(pairs)


@pytest.mark.parametrize("options", [{}, {"run_ahead": 2, "num_kvcache_blocks": 20}], ids=["plain", "preempted"])
def test_greedy_texts_are_those_of_triton_and_no_graph_is_replayed(
    folder: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: pytest.fail("a graph was replayed"))
        mine = generate(folder, "flashinfer", **options)
    assert "no CUDA graphs" in caplog.text
    theirs = generate(folder, "triton")
    same = [agree(one, other) for a, b in zip(mine, theirs, strict=True) for one, other in zip(a, b, strict=True)]
    assert sum(same) > 0.7 * 24 * len(same)
    if not options:
        assert sum(output.usage.cached_tokens for output in mine[1]) > 200
