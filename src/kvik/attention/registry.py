"""The choice of an attention backend by name: `auto` takes the best for the device, a name must succeed or raise."""

from __future__ import annotations

import torch

from kvik.attention.base import AttentionBackend
from kvik.attention.cpu import CpuAttention
from kvik.attention.reference import ReferenceAttention
from kvik.errors import ConfigError, did_you_mean

__all__ = ["ATTENTION_BACKENDS", "select_backend"]

ATTENTION_BACKENDS = ("auto", "reference", "cpu")
"""Those that run on torch; that of GPUs belongs to their kernels (`resolve.py`)."""


def select_backend(name: str, device: torch.device) -> AttentionBackend:
    """The backend called `name` for `device`. Raises ConfigError for an unknown one and one that cannot run there."""
    if name not in ATTENTION_BACKENDS:
        hint, known = did_you_mean(name, ATTENTION_BACKENDS), ", ".join(ATTENTION_BACKENDS)
        raise ConfigError(f"unknown attention backend {name!r}{hint}; Kvik has {known}")
    if name == "reference":
        return ReferenceAttention()
    if name == "cpu" and device.type != "cpu":
        raise ConfigError(f"attention backend 'cpu' cannot run on {device}; use auto")
    return CpuAttention() if device.type == "cpu" else ReferenceAttention()
