"""Every "auto" of EngineConfig decided, in one place and once: arithmetic over the model's spec and the platform."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvik.attention.flashinfer import flashinfer_obstacle
from kvik.config import EngineConfig, SchedulerConfig
from kvik.errors import CapacityError, ConfigError
from kvik.kernels.cpu import native
from kvik.kernels.cpu.ops import MAX_HEAD_DIM
from kvik.models.spec import DecoderSpec
from kvik.quantization.formats import BITS, StoredQuantization
from kvik.runtime.memory import MemoryPlan, activation_bytes, gib
from kvik.runtime.native_decoder import attention_parts_bytes
from kvik.runtime.platform import Platform

__all__ = ["ResolvedConfig", "resolve"]

MIN_AUTO_CONTEXT = 256
"""An automatic plan that leaves less context than this is refused rather than started."""

_KEPT = 4  # times the blocks that sequences of the longest context take: what others have left is for the prefix cache


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """Complete settings of an engine: no None, nothing automatic. `notes` says what was decided and why."""

    dtype: torch.dtype
    kv_dtype: torch.dtype  # of the KV cache
    kernels: str  # native, triton or torch
    graphs: bool  # whether steps are CUDA graphs
    weight_format: str  # of the blocks' projections: bf16, fp32, int8, int4g32, int4g128
    head_format: str  # of the output head
    scheduler: SchedulerConfig
    memory: MemoryPlan
    notes: tuple[str, ...]


def resolve(
    config: EngineConfig, spec: DecoderSpec, checkpoint_dtype: torch.dtype, platform: Platform,
    stored: StoredQuantization | None = None,
) -> ResolvedConfig:  # fmt: skip
    """Decide every automatic setting; `stored` is how the model's folder is quantised.

    Raises ConfigError for a contradiction, CapacityError for what does not fit.
    """
    notes: list[str] = []
    dtype = _dtype(config, checkpoint_dtype, platform, notes)
    block_size = config.kvcache_block_size or platform.default_block_size
    kernels = _kernels(config, dtype, spec, platform)
    graphs, kv_dtype = _graphs(config, spec, kernels, notes), _kv_dtype(config, dtype, kernels)
    weight_format, head_format = _formats(config, dtype, stored)
    num_seqs, budget_tokens = _batch(config, platform)
    weights = _weight_bytes(spec, dtype, kernels, weight_format, head_format, stored, notes)
    budget = min(platform.available_memory(), int(platform.total_memory() * config.gpu_memory_utilization))
    block_bytes = block_size * spec.kv_bytes_per_token(kv_dtype)

    def plan(context: int) -> MemoryPlan:
        """Where the memory goes if sequences may have so many tokens."""
        sizes = num_seqs, budget_tokens, context, block_size
        activations = platform.reserved_memory + _activation_bytes(config, spec, dtype, kernels, graphs, sizes)
        fitting = max(0, budget - weights - activations) // block_bytes
        useful = num_seqs * -(-context // block_size) * (_KEPT if config.enable_prefix_caching else 1)
        return MemoryPlan(
            device_name=platform.name,
            total=platform.total_memory(),
            budget=budget,
            weights=weights,
            activations=activations,
            num_blocks=_num_blocks(config, platform, fitting, block_bytes, useful),
            block_size=block_size,
            kv_bytes_per_token=spec.kv_bytes_per_token(kv_dtype),
        )

    asked_tokens = None if (asked := _asked_blocks(config, block_bytes)) is None else asked * block_size
    max_model_len = _context(config, _wanted_context(config, spec), asked_tokens, plan, platform, notes)
    memory = plan(max_model_len)
    scheduler = SchedulerConfig(
        block_size=block_size,
        num_blocks=memory.num_blocks,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=budget_tokens,
        max_model_len=max_model_len,
        enable_prefix_caching=config.enable_prefix_caching,
        policy=config.scheduling_policy,
        run_ahead=platform.default_run_ahead if config.run_ahead is None else config.run_ahead,
    )
    return ResolvedConfig(
        dtype=dtype,
        kv_dtype=kv_dtype,
        kernels=kernels,
        graphs=graphs,
        weight_format=weight_format,
        head_format=head_format,
        scheduler=scheduler,
        memory=memory,
        notes=tuple(notes),
    )


def _dtype(config: EngineConfig, checkpoint: torch.dtype, platform: Platform, notes: list[str]) -> torch.dtype:
    if config.dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[config.dtype]
    dtype = platform.dtype_for(checkpoint)
    if dtype is not checkpoint:
        notes.append(f"dtype {dtype}: the checkpoint's {checkpoint} is slow on this device")
    return dtype


def _kernels(config: EngineConfig, dtype: torch.dtype, spec: DecoderSpec, platform: Platform) -> str:
    """triton on GPUs, native on CPUs where library, types and shapes allow it; a choice by name is had or refused."""
    on_gpu = platform.device.type != "cpu"
    own = ("triton",) if on_gpu else ("native", "torch")
    if config.kernels not in ("auto", *own):
        raise ConfigError(f"kernels={config.kernels!r} do not run on {platform.device}, which has {' and '.join(own)}")
    if on_gpu:
        _check_gpu_attention(config, dtype, spec)
        return "triton"
    if config.attention_backend in ("triton", "flashinfer"):
        raise ConfigError(f"attention_backend={config.attention_backend!r} runs on NVIDIA GPUs only; leave it out")
    obstacle = None
    if not native.available():
        obstacle = "Kvik was installed without them; reinstall it where a C++ compiler is"
    elif dtype not in (torch.bfloat16, torch.float32):
        obstacle = f"they compute in bfloat16 or float32, not {dtype}; leave dtype out"
    elif spec.head_dim % 2 or spec.head_dim > MAX_HEAD_DIM:
        obstacle = f"they need an even head_dim of at most {MAX_HEAD_DIM}; this model has {spec.head_dim}"
    elif config.attention_backend != "auto":
        obstacle = f"they have their own attention; attention_backend={config.attention_backend!r} is torch's"
    elif config.kernels == "torch":
        obstacle = "kernels='torch' leaves them out; leave that out"
    if obstacle and config.deterministic:
        raise ConfigError(
            "deterministic=True on a CPU needs the native kernels, since torch adds up a row's products in an order"
            f" that depends on how many rows there are: {obstacle}"
        )
    if obstacle and config.kernels == "native":
        raise ConfigError(f"kernels='native' needs the native CPU kernels: {obstacle}")
    return "torch" if obstacle else "native"


def _check_gpu_attention(config: EngineConfig, dtype: torch.dtype, spec: DecoderSpec) -> None:
    name, obstacle = config.attention_backend, None
    if name == "flashinfer":
        obstacle = flashinfer_obstacle(spec.head_dim, dtype, deterministic=config.deterministic)
    elif name not in ("auto", "triton"):
        obstacle = "it does not run on a GPU"
    if obstacle:
        raise ConfigError(f"attention_backend={name!r}: {obstacle}; or leave attention_backend out, which is triton")


def _graphs(config: EngineConfig, spec: DecoderSpec, kernels: str, notes: list[str]) -> bool:
    """Whether steps are CUDA graphs: on GPUs, unless the user wants none or a step needs the host."""
    if kernels != "triton" or config.enforce_eager:
        return False
    if config.attention_backend == "flashinfer":
        notes.append("attention_backend='flashinfer': it plans every step on the host, so there are no CUDA graphs")
        return False
    if spec.rope.depends_on_length:
        notes.append("angles of RoPE depend on lengths that the host knows, so there are no CUDA graphs")
        return False
    return True


def _kv_dtype(config: EngineConfig, dtype: torch.dtype, kernels: str) -> torch.dtype:
    if kernels == "triton" and config.kv_cache_dtype != "auto":
        raise ConfigError(f"kv_cache_dtype={config.kv_cache_dtype!r}: on a GPU keys and values are kept as {dtype}")
    return {"auto": dtype, "bfloat16": torch.bfloat16, "int8": torch.int8}[config.kv_cache_dtype]


def _formats(config: EngineConfig, dtype: torch.dtype, stored: StoredQuantization | None) -> tuple[str, str]:
    """(projections of the blocks, output head). At 4 bits the head keeps 8: it decides every token."""
    asked = None if config.quantization is None else {"int4": "int4g32"}.get(config.quantization, config.quantization)
    if stored is not None:
        if asked is not None and asked != stored.format:
            raise ConfigError(
                f"quantization={config.quantization!r}: the folder is quantised to {stored.format} already; leave the"
                " option out, or start from the unquantised checkpoint"
            )
        return stored.format, stored.head_format
    if asked is None:
        plain = "fp32" if dtype is torch.float32 else "bf16"
        return plain, plain
    return asked, "int8"


def _weight_bytes(
    spec: DecoderSpec,
    dtype: torch.dtype,
    kernels: str,
    weight_format: str,
    head_format: str,
    stored: StoredQuantization | None,
    notes: list[str],
) -> int:
    """Bytes of the weights as they will be kept. Without native kernels quantised ones are kept in `dtype`."""
    bits = BITS.get(weight_format) if stored is None else stored.block_bits(spec)
    packed = spec.weight_bytes(dtype, bits, BITS.get(head_format))
    if bits is None or kernels == "native":
        return packed
    plain = spec.weight_bytes(dtype)
    notes.append(
        f"{weight_format} weights are kept as {str(dtype).removeprefix('torch.')} without the native kernels:"
        f" {gib(plain)} instead of {gib(packed)}, and no faster"
    )
    return plain


def _batch(config: EngineConfig, platform: Platform) -> tuple[int, int]:
    """(max_num_seqs, max_num_batched_tokens): an automatic one yields to the other."""
    num_seqs, num_tokens = config.max_num_seqs, config.max_num_batched_tokens
    if num_seqs is None:
        num_seqs = min(platform.default_num_seqs, num_tokens or platform.default_num_seqs)
    return num_seqs, num_tokens or max(platform.default_batched_tokens, num_seqs)


def _activation_bytes(
    config: EngineConfig, spec: DecoderSpec, dtype: torch.dtype, kernels: str, graphs: bool,
    sizes: tuple[int, int, int, int],
) -> int:  # fmt: skip
    """What a step takes beside weights and KV cache, at most; sizes: (sequences, tokens, context, block size)."""
    num_seqs, num_tokens, max_model_len, _ = sizes
    needed = activation_bytes(spec, dtype, num_tokens, num_seqs) + spec.rope.table_bytes(max_model_len)
    if kernels == "triton":
        from kvik.runtime.gpu import partial_bytes, workspace_bytes  # imports triton

        if graphs:  # they keep what they compute in between
            needed += activation_bytes(spec, dtype, num_tokens, num_seqs)
        needed += workspace_bytes(
            spec, dtype, *sizes, deterministic=config.deterministic, backend=config.attention_backend
        )
        needed += partial_bytes(spec, dtype, num_tokens, num_seqs) if config.deterministic else 0
    elif config.deterministic:
        needed += attention_parts_bytes(spec, num_tokens, max_model_len)
    return needed


def _wanted_context(config: EngineConfig, spec: DecoderSpec) -> int:
    if config.max_model_len is not None and config.max_model_len > spec.context_len:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is more than the {spec.context_len} positions that the model was"
            f" made for; use max_model_len <= {spec.context_len}"
        )
    return config.max_model_len or spec.context_len


def _asked_blocks(config: EngineConfig, block_bytes: int) -> int | None:
    """Blocks of the KV pool that the user asked for."""
    if config.num_kvcache_blocks is not None or config.kv_cache_memory is None:
        return config.num_kvcache_blocks
    return config.kv_cache_memory // block_bytes


def _num_blocks(config: EngineConfig, platform: Platform, fitting: int, block_bytes: int, useful: int) -> int:
    """Blocks of the KV pool: as asked for, else the platform's share of what fits, and never more than is useful."""
    asked = _asked_blocks(config, block_bytes)
    if asked is None:
        return min(int(fitting * platform.kv_share), useful)
    if config.num_kvcache_blocks is not None and asked > fitting:
        raise CapacityError(
            f"num_kvcache_blocks {asked} needs {gib(asked * block_bytes)};"
            f" {fitting} blocks ({gib(fitting * block_bytes)}) fit beside weights and activations"
        )
    if config.kv_cache_memory is not None and not 1 <= asked <= fitting:
        raise CapacityError(
            f"kv_cache_memory {gib(config.kv_cache_memory)} is {asked} blocks of {gib(block_bytes)}; from 1 to"
            f" {fitting} ({gib(fitting * block_bytes)}) fit beside weights and activations"
        )
    return asked


def _context(
    config: EngineConfig, wanted: int, asked_tokens: int | None, plan: Callable[[int], MemoryPlan], platform: Platform,
    notes: list[str],
) -> int:  # fmt: skip
    """The longest context that the pool can hold: an automatic one is lowered with a note, an explicit one refused.

    A shorter one leaves more for the pool, since some activations are as long as it is.
    """
    automatic = config.max_model_len is None
    if automatic and asked_tokens is not None and 0 < asked_tokens < wanted - 1:
        longest = asked_tokens
    else:
        memory = plan(wanted)
        if memory.kv_tokens >= wanted - 1:  # the last token's key is of no use to anybody
            return wanted
        longest = _longest(wanted, memory.block_size, plan)
    if automatic and longest >= min(wanted, MIN_AUTO_CONTEXT):
        notes.append(f"max_model_len lowered from {wanted} to {longest}: that is what the KV cache holds")
        return longest
    needed = min(wanted, MIN_AUTO_CONTEXT) if automatic else wanted
    raise CapacityError(_shortfall(config, needed, longest, plan(needed), platform))


def _longest(below: int, block_size: int, plan: Callable[[int], MemoryPlan]) -> int:
    """The longest context, in whole blocks, whose plan holds it; that of `below` does not."""
    low, high = 0, -(-below // block_size)
    while high - low > 1:
        blocks = (low + high) // 2
        fits = plan(blocks * block_size).num_blocks >= blocks
        low, high = (blocks, high) if fits else (low, blocks)
    return low * block_size


def _shortfall(config: EngineConfig, needed: int, longest: int, memory: MemoryPlan, platform: Platform) -> str:
    """What is missing for a context of `needed` tokens, and what to change."""
    fix = "a smaller model or dtype, or a smaller max_num_batched_tokens or max_num_seqs"
    if longest >= MIN_AUTO_CONTEXT:
        fix = f"max_model_len={longest}"
    if config.num_kvcache_blocks is None and config.kv_cache_memory is None:
        kv_bytes = (needed + memory.block_size) * memory.kv_bytes_per_token / platform.kv_share
        total = memory.weights + memory.activations + kv_bytes
        share = math.ceil(1000 * total / memory.total) / 1000
        if config.gpu_memory_utilization < share <= 1 and total <= platform.available_memory():
            fix = f"gpu_memory_utilization={share:g}, which holds it, or {fix}"
    return (
        f"a context of {needed} tokens needs {gib(needed * memory.kv_bytes_per_token)} of KV cache and"
        f" {gib(memory.kv_cache)} ({memory.kv_tokens} tokens) are planned:\n{memory.render()}\n"
        f"use {fix}, or raise kv_cache_memory if memory is free"
    )
