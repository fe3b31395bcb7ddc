"""A small job for the processes that compile kernels; run as a program, has two of them compile it, three times over;
before the last time this process has loaded the kernels itself, as that of an earlier engine has.

Prints what they claimed and said, and when each kernel was written. In a process of its own, because tests interpret.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvik.config import SchedulerConfig
from kvik.kernels.triton.compile_only import StandInDriver, compile_only, keep_out_dynamo
from kvik.models.registry import build_spec
from kvik.runtime.kernel_compiler import CompileJob, KernelCompiler
from kvik.runtime.warm_up import warm_up

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 128, "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip
JOB = CompileJob(
    spec=build_spec(CONFIG), dtype=torch.bfloat16, gpu="NVIDIA H200", capability=(9, 0), deterministic=False,
    settings=SchedulerConfig(block_size=16, num_blocks=1, max_num_seqs=2, max_num_batched_tokens=4, max_model_len=64),
)  # fmt: skip


def compile_job(cache: Path) -> dict[str, Any]:
    """What one pair of processes did: their claims, their log, and the kernels in the cache."""
    with KernelCompiler(JOB, 2) as compiler:
        assert compiler._folder is not None
        folder = Path(compiler._folder.name)
        compiler.wait()
        claims, log = len(list((folder / "claims").iterdir())), (folder / "log").read_text()
    written = {str(file.relative_to(cache)): file.stat().st_mtime_ns for file in cache.rglob("*.cubin")}
    return {"claims": claims, "log": log, "written": written, "left": folder.exists()}


class OneDevice(StandInDriver):
    """A device whose kernels can be launched by the process that loaded them only."""

    def get_current_device(self) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        owner = os.getpid()

        def launch(*args: Any) -> None:
            assert os.getpid() == owner, "a kernel of another process"

        return launch


def load_kernels() -> None:
    keep_out_dynamo()
    compile_only(OneDevice(JOB.capability))
    warm_up(JOB.meta_runner(), JOB.settings)


if __name__ == "__main__":
    found = [compile_job(Path(sys.argv[1])) for _ in range(2)]
    load_kernels()
    print(json.dumps([*found, compile_job(Path(sys.argv[1]))]))
