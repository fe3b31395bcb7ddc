"""From a config to a running engine, and how long each part of the start took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvik.attention.registry import select_backend
from kvik.config import EngineConfig
from kvik.core.engine import Engine
from kvik.core.scheduler import Scheduler
from kvik.distributed.uniproc import UniprocExecutor
from kvik.kernels.reference import ReferenceOps
from kvik.log import logger
from kvik.models.hub import load_config, resolve_model
from kvik.models.loader import checkpoint_dtype, load_model
from kvik.models.registry import build_spec
from kvik.models.spec import DecoderSpec
from kvik.resolve import ResolvedConfig, resolve
from kvik.runtime.kv_pool import KVPool
from kvik.runtime.model_runner import ModelRunner
from kvik.runtime.platform import Platform, select_platform
from kvik.runtime.request_table import RequestTable
from kvik.tracing import NO_TRACE, NoTrace

__all__ = ["ModelInfo", "StartupLedger", "build_engine", "inspect_model"]


@dataclass(slots=True)
class StartupLedger:
    """Seconds spent in each named phase of the start."""

    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - begin

    def render(self) -> str:
        total = sum(self.phases.values())
        return f"ready in {total:.2f} s: " + ", ".join(f"{name} {s:.2f}" for name, s in self.phases.items())


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model before any weight is read."""

    path: Path
    hf_config: Mapping[str, Any]
    spec: DecoderSpec
    platform: Platform
    resolved: ResolvedConfig


def inspect_model(config: EngineConfig) -> ModelInfo:
    """Find the model and decide every setting, without allocating anything. Raises the errors that a start would."""
    path = resolve_model(config.model, config.revision, load_format=config.load_format)
    hf_config = load_config(path)
    spec = build_spec(hf_config)
    platform = select_platform(config.device)
    resolved = resolve(config, spec, checkpoint_dtype(hf_config) or torch.float32, platform)
    return ModelInfo(path, hf_config, spec, platform, resolved)


def build_engine(config: EngineConfig, info: ModelInfo, ledger: StartupLedger, tracer: NoTrace = NO_TRACE) -> Engine:
    """Load the weights, allocate the KV cache, and join scheduler and runner."""
    settings, device = info.resolved.scheduler, info.platform.device
    for note in info.resolved.notes:
        logger.warning("%s", note)
    info.platform.start(config.threads)
    with ledger.phase("weights"):
        model = load_model(
            info.path, info.spec, dtype=info.resolved.dtype, device=device, ops=ReferenceOps(),
            attention=select_backend(config.attention_backend, device), max_model_len=settings.max_model_len,
            load_format=config.load_format, seed=config.seed or 0, progress=True,
        )  # fmt: skip
    with ledger.phase("KV cache"):
        pool = KVPool(info.spec, settings.num_blocks, settings.block_size, info.resolved.dtype, device)
        table = RequestTable(settings.max_num_seqs, settings.max_model_len, settings.block_size, device)
    runner = ModelRunner(model, pool, table, tracer)
    return Engine(Scheduler(settings), UniprocExecutor(runner), tracer)
