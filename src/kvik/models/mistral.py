"""Mistral 7B and its relatives (Nemo, Small): no biases, a head_dim of its own, one window on all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvik.models.spec import DecoderSpec, positive_int, spec_from_config

__all__ = ["mistral_spec"]


def mistral_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """`sliding_window` may be null; absent it is 4096, as the first Mistral had it."""
    window = config.get("sliding_window", 4096)
    return spec_from_config(config, windows=(window,) * positive_int(config, "num_hidden_layers"))
