"""Llama 1, 2 and 3.x, and the many models saved as LlamaForCausalLM (DeepSeek-R1-Distill-Llama, Yi, SmolLM …)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvik.errors import ModelLoadError
from kvik.models.spec import DecoderSpec, flag, layer_windows, spec_from_config

__all__ = ["llama_spec"]


def llama_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """`attention_bias` puts a bias on all four projections of attention, `mlp_bias` on the three of the MLP."""
    attention_bias = flag(config, "attention_bias")
    if any(layer_windows(config, 1, ())):
        raise ModelLoadError("layer_types asks for sliding attention, which LlamaForCausalLM does not have")
    return spec_from_config(
        config,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=flag(config, "mlp_bias"),
    )
