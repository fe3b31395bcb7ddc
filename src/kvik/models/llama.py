"""Llama 1, 2 and 3.x, and the many models saved as LlamaForCausalLM (DeepSeek-R1-Distill-Llama, Yi, SmolLM …)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvik.models.spec import DecoderSpec, spec_from_config

__all__ = ["llama_spec"]


def llama_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """`attention_bias` puts a bias on all four projections of attention, `mlp_bias` on the three of the MLP."""
    attention_bias = bool(config.get("attention_bias", False))
    return spec_from_config(
        config,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )
