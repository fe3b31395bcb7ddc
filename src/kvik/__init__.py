"""Kvik: a small, fast LLM inference engine.

    from kvik import LLM, SamplingParams
    with LLM("demo") as llm:
        print(llm.generate("Once upon a time", SamplingParams(max_tokens=40)).text)

Importing this package is cheap: torch is loaded when an engine is made.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "AsyncLLM": "kvik.async_llm",
    "CapacityError": "kvik.errors",
    "CompletionOutput": "kvik.outputs",
    "ConfigError": "kvik.errors",
    "EngineConfig": "kvik.config",
    "FinishReason": "kvik.outputs",
    "KvikError": "kvik.errors",
    "LLM": "kvik.llm",
    "LLMEngine": "kvik.llm_engine",
    "ModelLoadError": "kvik.errors",
    "RequestError": "kvik.errors",
    "RequestOutput": "kvik.outputs",
    "SamplingParams": "kvik.sampling_params",
    "TokenLogprobs": "kvik.outputs",
    "WorkerError": "kvik.errors",
}

__all__ = [
    "AsyncLLM",
    "CapacityError",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "FinishReason",
    "KvikError",
    "LLM",
    "LLMEngine",
    "ModelLoadError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "TokenLogprobs",
    "WorkerError",
]

if TYPE_CHECKING:
    from kvik.async_llm import AsyncLLM
    from kvik.config import EngineConfig
    from kvik.errors import CapacityError, ConfigError, KvikError, ModelLoadError, RequestError, WorkerError
    from kvik.llm import LLM
    from kvik.llm_engine import LLMEngine
    from kvik.outputs import CompletionOutput, FinishReason, RequestOutput, TokenLogprobs
    from kvik.sampling_params import SamplingParams


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvik' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
