"""Qwen3 (dense): an RMSNorm on every query and key head before the rotation, and a head_dim of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvik.models.spec import DecoderSpec, flag, sliding_windows, spec_from_config

__all__ = ["qwen3_spec"]


def qwen3_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Absent, head_dim is 128 whatever hidden_size is; `attention_bias` covers all four projections."""
    attention_bias = flag(config, "attention_bias")
    return spec_from_config(
        config,
        windows=sliding_windows(config),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
        default_head_dim=128,
    )
