"""Mistral 7B and its relatives (Nemo, Small, Ministral): no biases, a head_dim of its own, one window on all layers or
on some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvik.models.spec import DecoderSpec, layer_windows, positive_int, spec_from_config

__all__ = ["mistral_spec"]


def mistral_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """`sliding_window` may be null; absent it is 4096, as the first Mistral had it. It is on all layers, but for those
    that Ministral's `layer_types` leave out."""
    slides = (True,) * positive_int(config, "num_hidden_layers")
    return spec_from_config(config, windows=layer_windows(config, config.get("sliding_window", 4096), slides))
