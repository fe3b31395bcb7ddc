"""Every "auto" of EngineConfig decided, in one place and once: arithmetic over the model's spec and the platform."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvik.config import EngineConfig, SchedulerConfig
from kvik.errors import CapacityError, ConfigError
from kvik.models.spec import DecoderSpec
from kvik.runtime.memory import MemoryPlan, activation_bytes, gib
from kvik.runtime.platform import Platform

__all__ = ["ResolvedConfig", "resolve"]

MIN_AUTO_CONTEXT = 256
"""An automatic plan that leaves less context than this is refused rather than started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """Complete settings of an engine: no None, nothing automatic. `notes` says what was decided and why."""

    dtype: torch.dtype
    scheduler: SchedulerConfig
    memory: MemoryPlan
    notes: tuple[str, ...]


def resolve(
    config: EngineConfig, spec: DecoderSpec, checkpoint_dtype: torch.dtype, platform: Platform
) -> ResolvedConfig:
    """Decide every automatic setting. Raises ConfigError for a contradiction, CapacityError for what does not fit."""
    notes: list[str] = []
    dtype = _dtype(config, checkpoint_dtype, platform, notes)
    block_size = config.kvcache_block_size or platform.default_block_size
    num_seqs, budget_tokens = _batch(config, platform)
    wanted_len = _wanted_context(config, spec)
    weights = spec.weight_bytes(dtype)
    activations = activation_bytes(spec, dtype, budget_tokens, num_seqs)
    budget = min(platform.available_memory(), int(platform.total_memory() * config.gpu_memory_utilization))
    block_bytes = block_size * spec.kv_bytes_per_token(dtype)
    fitting = max(0, budget - weights - activations) // block_bytes
    num_blocks = _num_blocks(config, fitting, block_bytes, num_seqs * -(-wanted_len // block_size))
    memory = MemoryPlan(
        device_name=platform.name,
        total=platform.total_memory(),
        budget=budget,
        weights=weights,
        activations=activations,
        num_blocks=num_blocks,
        block_size=block_size,
        kv_bytes_per_token=spec.kv_bytes_per_token(dtype),
    )
    max_model_len = _context(config, wanted_len, memory, notes)
    scheduler = SchedulerConfig(
        block_size=block_size,
        num_blocks=num_blocks,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=budget_tokens,
        max_model_len=max_model_len,
        enable_prefix_caching=config.enable_prefix_caching,
        policy=config.scheduling_policy,
        run_ahead=platform.default_run_ahead if config.run_ahead is None else config.run_ahead,
    )
    return ResolvedConfig(dtype=dtype, scheduler=scheduler, memory=memory, notes=tuple(notes))


def _dtype(config: EngineConfig, checkpoint: torch.dtype, platform: Platform, notes: list[str]) -> torch.dtype:
    if config.dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[config.dtype]
    dtype = platform.dtype_for(checkpoint)
    if dtype is not checkpoint:
        notes.append(f"dtype {dtype}: the checkpoint's {checkpoint} is slow on this device")
    return dtype


def _batch(config: EngineConfig, platform: Platform) -> tuple[int, int]:
    """(max_num_seqs, max_num_batched_tokens): an automatic one yields to the other."""
    num_seqs, num_tokens = config.max_num_seqs, config.max_num_batched_tokens
    if num_seqs is None:
        num_seqs = min(platform.default_num_seqs, num_tokens or platform.default_num_seqs)
    return num_seqs, num_tokens or max(platform.default_batched_tokens, num_seqs)


def _wanted_context(config: EngineConfig, spec: DecoderSpec) -> int:
    if config.max_model_len is not None and config.max_model_len > spec.context_len:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is more than the {spec.context_len} positions that the model was"
            f" made for; use max_model_len <= {spec.context_len}"
        )
    return config.max_model_len or spec.context_len


def _num_blocks(config: EngineConfig, fitting: int, block_bytes: int, useful: int) -> int:
    """Blocks of the KV pool: as asked for, else half of what fits, and never more than all sequences could use."""
    if config.num_kvcache_blocks is not None:
        if config.num_kvcache_blocks > fitting:
            raise CapacityError(
                f"num_kvcache_blocks {config.num_kvcache_blocks} needs {gib(config.num_kvcache_blocks * block_bytes)};"
                f" {fitting} blocks ({gib(fitting * block_bytes)}) fit beside weights and activations"
            )
        return config.num_kvcache_blocks
    if config.kv_cache_memory is not None:
        asked = config.kv_cache_memory // block_bytes
        if not 1 <= asked <= fitting:
            raise CapacityError(
                f"kv_cache_memory {gib(config.kv_cache_memory)} is {asked} blocks of {gib(block_bytes)}; from 1 to"
                f" {fitting} ({gib(fitting * block_bytes)}) fit beside weights and activations"
            )
        return min(asked, useful)
    return min(fitting // 2, useful)


def _context(config: EngineConfig, wanted: int, memory: MemoryPlan, notes: list[str]) -> int:
    """The longest context that the pool can hold: an automatic one is lowered with a note, an explicit one refused."""
    if memory.kv_tokens >= wanted:
        return wanted
    shortfall = (
        f"a context of {wanted} tokens needs {gib(wanted * memory.kv_bytes_per_token)} of KV cache and"
        f" {gib(memory.kv_cache)} ({memory.kv_tokens} tokens) are planned:\n{memory.render()}"
    )
    if config.max_model_len is not None or memory.kv_tokens < min(wanted, MIN_AUTO_CONTEXT):
        fix = (
            f"max_model_len={memory.kv_tokens}" if memory.kv_tokens >= MIN_AUTO_CONTEXT else "a smaller model or dtype"
        )
        raise CapacityError(f"{shortfall}\nuse {fix}, or raise kv_cache_memory if memory is free")
    notes.append(f"max_model_len lowered from {wanted} to {memory.kv_tokens}: that is what the KV cache holds")
    return memory.kv_tokens
