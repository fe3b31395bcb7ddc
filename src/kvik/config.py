"""Engine options as the user gives them (`EngineConfig`) and as the scheduler gets them (`SchedulerConfig`).

Validation only, without torch: whatever "auto" means is decided once in `kvik.resolve`. Command line flags, environment
variables and config files are all made from the fields below; there is no second list.
"""

from __future__ import annotations

import dataclasses
import re

from kvik.errors import ConfigError
from kvik.fields import option, strict

__all__ = ["EngineConfig", "SchedulerConfig", "parse_bytes"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(value: int | str) -> int:
    """Bytes from 4096, "512MiB", "1.5GiB" or "2G". Raises ConfigError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?)?b?\s*", str(value), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{value!r} is not a size; write bytes, or a number with MiB or GiB such as 512MiB or 1.5GiB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


_ALIASES = {
    "model_path": "model",
    "max_seq_len": "max_model_len",
    "max_batch_size": "max_num_seqs",
    "block_size": "kvcache_block_size",
}
_HINTS = {
    "trust_remote_code": "it does not exist; Kvik never runs code from a checkpoint",
    "gpu_ids": "use device='cuda:1' to choose one GPU",
    "cuda_id": "use device='cuda:1' to choose one GPU",
}


@strict(ConfigError, aliases=_ALIASES, hints=_HINTS)
@dataclasses.dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of an engine. None means "auto": decided at start, from the model and the machine, and logged."""

    model: str = option(dataclasses.MISSING, "local folder, Hugging Face id, modelscope:ORG/NAME, or demo")
    tokenizer: str | None = option(None, "folder or id of the tokenizer when it is not the model's own")
    revision: str | None = option(None, "branch, tag or commit of a downloaded model")
    chat_template: str | None = option(None, "file with a jinja chat template to use instead of the model's own")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = option("auto", "type of weights and activations", choices=("auto", "bfloat16", "float16", "float32"))
    load_format: str = option(
        "auto", "checkpoint files to read; dummy makes random weights", choices=("auto", "safetensors", "pt", "dummy")
    )
    max_model_len: int | None = option(None, "longest prompt + output in tokens (alias max_seq_len)")
    max_num_seqs: int | None = option(None, "sequences that run together (alias max_batch_size)")
    max_num_batched_tokens: int | None = option(
        None, "tokens computed in one step; longer prompts are split into chunks"
    )
    gpu_memory_utilization: float = option(0.9, "share of the GPU's memory that Kvik may use, in (0, 1]")
    kv_cache_memory: int | None = option(
        None, "bytes for the KV cache, such as 4GiB; wins over the share above", parse=parse_bytes
    )
    kvcache_block_size: int | None = option(None, "tokens in a KV block, a multiple of 16 (alias block_size)")
    num_kvcache_blocks: int | None = option(None, "KV blocks; -1 is auto; a number that does not fit is refused")
    enable_prefix_caching: bool = option(True, "reuse the KV of prompt prefixes that were computed before")
    enforce_eager: bool = option(False, "launch every kernel from Python instead of replaying CUDA graphs")
    tensor_parallel_size: int = option(1, "GPUs that share one model")
    attention_backend: str = option("auto", "attention implementation", choices=("auto", "reference", "cpu"))
    scheduling_policy: str = option("fcfs", "order of waiting requests", choices=("fcfs", "priority", "sjf"))
    run_ahead: int | None = option(None, "steps that may be planned before the result of the previous one is known")
    seed: int = option(0, "seed of the seeds that requests without one get, and of dummy weights")
    threads: int | None = option(None, "CPU threads; auto is one per physical core")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, parse, choices = getattr(self, f.name), f.metadata["parse"], f.metadata["choices"]
            if parse is not None and value is not None:
                object.__setattr__(self, f.name, parse(value))
            if choices and value not in choices:
                raise ConfigError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"model must be a folder or an id, got {self.model!r}")
        if self.num_kvcache_blocks == -1:
            object.__setattr__(self, "num_kvcache_blocks", None)
        self._check_counts()
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization!r}")
        if self.kvcache_block_size is not None and self.kvcache_block_size % 16:
            raise ConfigError(f"kvcache_block_size must be a multiple of 16, got {self.kvcache_block_size}")
        if self.tensor_parallel_size != 1:
            raise ConfigError(
                f"tensor_parallel_size={self.tensor_parallel_size}: this version runs a model on one device; use 1"
            )

    def _check_counts(self) -> None:
        lows = {
            "max_model_len": 2, "max_num_seqs": 1, "max_num_batched_tokens": 1, "kv_cache_memory": 1,
            "kvcache_block_size": 16, "num_kvcache_blocks": 1, "tensor_parallel_size": 1, "run_ahead": 0, "seed": 0,
            "threads": 1,
        }  # fmt: skip
        for name, low in lows.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise ConfigError(f"{name} must be an integer >= {low}, got {value!r}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What the scheduler needs to know: complete numbers, nothing automatic."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enable_prefix_caching: bool = True
    policy: str = "fcfs"
    run_ahead: int = 0

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}:"
                " each running sequence needs one token of every step; raise the one or lower the other"
            )
