"""Engine options as the user gives them (`EngineConfig`) and as the scheduler gets them (`SchedulerConfig`).

Validation only, without torch: whatever "auto" means is decided once in `kvik.resolve`. Command line flags, environment
variables and config files are all made from the fields below; there is no second list.
"""

from __future__ import annotations

import dataclasses
import os
import re
from fractions import Fraction
from typing import Any

from kvik.errors import ConfigError
from kvik.fields import check_fields, option, show, strict

__all__ = ["SCHEDULING_POLICIES", "EngineConfig", "SchedulerConfig", "parse_bytes"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

SCHEDULING_POLICIES = ("fcfs", "priority", "sjf")


def parse_bytes(value: int | str) -> int:
    """Bytes from 4096, "512MiB", "1.5GiB" or "2G". Raises ConfigError for anything else, a part of a byte included."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = value if isinstance(value, str) and len(value) <= 40 else ""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    size = Fraction(match[1]) * _UNITS[(match[2] or "").lower()] if match else Fraction(1, 2)
    if match is None or (not match[2] and size.denominator != 1):
        raise ConfigError(f"{show(value)} is not a size; write bytes, or a number and a unit as in 512MiB or 1.5GiB")
    return int(size)


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


_MANY = 2**31 - 1


def _path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _minus_one_is_auto(value: Any) -> Any:
    return None if isinstance(value, int) and value == -1 else value


@strict(ConfigError, aliases=_ALIASES, hints=_HINTS)
@dataclasses.dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of an engine. None means "auto": decided at start, from the model and the machine, and logged."""

    model: str = option(dataclasses.MISSING, "local folder, Hugging Face id, modelscope:ORG/NAME, or demo", parse=_path)
    tokenizer: str | None = option(None, "folder or id of the tokenizer when it is not the model's own", parse=_path)
    revision: str | None = option(None, "branch, tag or commit of a downloaded model")
    chat_template: str | None = option(
        None, "file with a jinja chat template to use instead of the model's own", parse=_path
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = option("auto", "type of weights and activations", choices=("auto", "bfloat16", "float16", "float32"))
    load_format: str = option(
        "auto", "checkpoint files to read; dummy makes random weights", choices=("auto", "safetensors", "pt", "dummy")
    )
    max_model_len: int | None = option(None, "longest prompt + output in tokens (alias max_seq_len)", low=2, high=_MANY)
    max_num_seqs: int | None = option(None, "sequences that run together (alias max_batch_size)", low=1, high=_MANY)
    max_num_batched_tokens: int | None = option(
        None, "tokens computed in one step; longer prompts are split into chunks", low=1, high=_MANY
    )
    gpu_memory_utilization: float = option(0.9, "share of the device's memory that Kvik may use", above=0, high=1)
    kv_cache_dtype: str = option(
        "auto", "type of keys and values; auto is that of the activations", choices=("auto", "bfloat16", "int8")
    )
    kv_cache_memory: int | None = option(
        None, "bytes for the KV cache, such as 4GiB; wins over the share above", low=1, parse=parse_bytes
    )
    kvcache_block_size: int | None = option(
        None, "tokens in a KV block, a multiple of 16 (alias block_size)", low=16, high=_MANY
    )
    num_kvcache_blocks: int | None = option(
        None, "KV blocks; -1 is auto; a number that does not fit is refused", low=1, parse=_minus_one_is_auto
    )
    enable_prefix_caching: bool = option(True, "reuse the KV of prompt prefixes that were computed before")
    enforce_eager: bool = option(False, "launch every kernel from Python instead of replaying CUDA graphs")
    tensor_parallel_size: int = option(1, "GPUs that share one model", low=1, high=1024)
    kernels: str = option(
        "auto", "native or torch on CPUs, triton on GPUs", choices=("auto", "native", "torch", "triton")
    )
    deterministic: bool = option(
        False, "give a request the same tokens and logprobs, bit for bit, whatever its batch, chunking and cache hits"
    )
    quantization: str | None = option(
        None, "form in which weights are kept, from any float checkpoint", choices=("int8", "int4", "int4g128")
    )
    attention_backend: str = option(
        "auto", "attention implementation", choices=("auto", "reference", "cpu", "triton", "flashinfer")
    )
    scheduling_policy: str = option("fcfs", "order of waiting requests", choices=SCHEDULING_POLICIES)
    run_ahead: int | None = option(
        None, "steps that may be planned before the result of the previous one is known", low=0, high=16
    )
    seed: int | None = option(
        None, "seed of the seeds that requests without one get (auto: another one each start), and of dummy weights",
        low=0, high=2**63 - 1,
    )  # fmt: skip
    threads: int | None = option(None, "CPU threads; auto is one per physical core", low=1, high=4096)

    def __post_init__(self) -> None:
        check_fields(self, lambda message, name: ConfigError(message))
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", self.device):
            raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {show(self.device)}")
        if self.kvcache_block_size is not None and self.kvcache_block_size % 16:
            raise ConfigError(f"kvcache_block_size must be a multiple of 16, got {self.kvcache_block_size}")
        if self.tensor_parallel_size != 1:
            raise ConfigError(
                f"tensor_parallel_size={self.tensor_parallel_size}: this version runs a model on one device; use 1"
            )


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
        if self.policy not in SCHEDULING_POLICIES:
            raise ConfigError(f"policy must be one of {', '.join(SCHEDULING_POLICIES)}, got {self.policy!r}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}:"
                " each running sequence needs one token of every step; raise the one or lower the other"
            )
