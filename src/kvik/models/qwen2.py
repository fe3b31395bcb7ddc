"""Qwen2 and Qwen2.5 (and DeepSeek-R1-Distill-Qwen): biases on q, k and v only, optionally a window on upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvik.models.spec import DecoderSpec, sliding_windows, spec_from_config

__all__ = ["qwen2_spec"]


def qwen2_spec(config: Mapping[str, Any]) -> DecoderSpec:
    return spec_from_config(config, windows=sliding_windows(config), qkv_bias=True)
