"""Prints which kernels warming up launches, and which more the steps of all kinds of batches do, compiling none.

python launched_kernels.py qwen3|qwen2 ATTENTION_BACKEND
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from kvik.config import SchedulerConfig
from kvik.core.plan import Chunk, RowInit, StepPlan
from kvik.kernels.triton.compile_only import StandInDriver, compile_only
from kvik.models.registry import build_spec
from kvik.runtime.kernel_compiler import CompileJob
from kvik.runtime.warm_up import warm_up
from kvik.sampling_params import SamplingParams

SETTINGS = SchedulerConfig(block_size=64, num_blocks=1, max_num_seqs=70, max_num_batched_tokens=2300, max_model_len=200)
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 5000, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 512, "rope_theta": 1e6, "tie_word_embeddings": True,
}  # fmt: skip
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 3001, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 2, "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1,
}  # fmt: skip
ASKED: list[dict[str, Any]] = [
    {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 3, "top_p": 0.5}, {"temperature": 0.0},
    {"presence_penalty": 0.5}, {"temperature": 0.0, "allowed_token_ids": [1, 2]}, {"logit_bias": {4: 1.0}},
]  # fmt: skip


def step(lengths: list[int], params: SamplingParams, *, sample: bool = True) -> StepPlan:
    """A step in which rows of these lengths join."""
    joined = (RowInit(row, (0,) * n, n, params, 0, (), ()) for row, n in enumerate(lengths))
    blocks = tuple((row, (0,) * -(-n // 64)) for row, n in enumerate(lengths))
    decodes = tuple(row for row, n in enumerate(lengths) if n == 1 and sample)
    chunks = tuple(Chunk(row, 0, n, sample) for row, n in enumerate(lengths) if row not in decodes)
    return StepPlan(0, tuple(joined), blocks, decodes, chunks)


def steps() -> Iterator[StepPlan]:
    """Decodes, prompts, both, prompts that go on, and everything that the sampler on the device can be asked for."""
    plain = SamplingParams()
    for n in (*range(1, 20), 31, 32, 33, 63, 64, 65, 127, 128, 129, 199):
        yield step([1, n], plain)
        yield step([n], plain, sample=False)
        yield step([n, 100], plain)
        yield step([1] * min(n, 70), plain)
        yield step([2] * min(n, 70), plain)
    for n in (12, 16, 17, 20, 40, 48, 49, 70):  # without graphs, also on a GPU
        yield step([2100 // n] * n, plain)
        yield step([1] * (n // 2) + [2100 // n] * (n - n // 2), plain)
    for asked, rows in itertools.product(ASKED, (1, 2, 5)):
        yield step([1] * rows, SamplingParams(**asked))


def main(config: dict[str, Any], attention_backend: str) -> None:
    launched: set[str] = set()

    def refuse(kernel: str) -> bool:
        launched.add(kernel)
        return False

    compile_only(StandInDriver((9, 0)), refuse)
    job = CompileJob(
        spec=build_spec(config),
        settings=SETTINGS,
        dtype=torch.bfloat16,
        gpu="NVIDIA H200",
        capability=(9, 0),
        deterministic=False,
        attention_backend=attention_backend,
    )
    runner = job.meta_runner()
    warm_up(runner, SETTINGS)
    warm = set(launched)
    for plan in steps():
        runner.start(plan)
    print(json.dumps({"warm": sorted(warm), "more": sorted(launched - warm)}))


if __name__ == "__main__":
    main({"qwen3": QWEN3, "qwen2": QWEN2}[sys.argv[1]], sys.argv[2])
