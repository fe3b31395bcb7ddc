"""What a decoder-only model is, as data: `DecoderSpec`, made from config.json by one small builder per architecture.

The spec fixes every shape, so the bytes of weights and KV cache are known before anything is allocated. `decoder.py`
is the one decoder made from it; `spec_from_config` reads what all architectures write in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvik.errors import ModelLoadError
from kvik.layers.rope import RopeSpec, rope_from_config

__all__ = ["DecoderSpec", "flag", "layer_windows", "positive_int", "sliding_windows", "spec_from_config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """A Llama-shaped decoder: pre-norm RMSNorm, rotary attention with grouped heads, SwiGLU."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeSpec
    windows: tuple[int | None, ...]  # per layer: how many positions a query sees, or None for all
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelLoadError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads")
        if len(self.windows) != self.num_layers:
            raise ModelLoadError(f"layer_types has {len(self.windows)} entries but num_hidden_layers={self.num_layers}")

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def context_len(self) -> int:
        """The longest context that the config promises: RoPE scaling stretches max_position_embeddings."""
        if self.rope.kind in ("linear", "dynamic"):
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.kind == "yarn":
            return max(self.max_position_embeddings, int(self.rope.original_len * self.rope.factor))
        return self.max_position_embeddings

    @property
    def num_parameters(self) -> int:
        """Parameters held in memory; a tied embedding counts once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.hidden_size + self.num_layers * (self._layer_matrices + self._layer_vectors)

    @property
    def _layer_matrices(self) -> int:
        qkv = self.q_size + 2 * self.kv_size
        return self.hidden_size * (qkv + self.q_size + 3 * self.intermediate_size)

    @property
    def _layer_vectors(self) -> int:
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        qkv = self.q_size + 2 * self.kv_size
        biases = (qkv if self.qkv_bias else 0) + (self.hidden_size if self.o_bias else 0)
        return norms + biases + (2 * self.intermediate_size + self.hidden_size if self.mlp_bias else 0)

    @property
    def shallow_layers(self) -> tuple[int, ...]:
        """The first two layers of each window: they launch every kernel that all layers do, the first and one that
        follows another."""
        return tuple(i for i, window in enumerate(self.windows) if self.windows[:i].count(window) < 2)

    def shallow(self) -> DecoderSpec:
        """The same decoder with its `shallow_layers` alone."""
        kept = self.shallow_layers
        return replace(self, num_layers=len(kept), windows=tuple(self.windows[i] for i in kept))

    def weight_bytes(self, dtype: torch.dtype, bits: float | None = None, head_bits: float | None = None) -> int:
        """Bytes of all weights in `dtype`; with the projections of the blocks at `bits` and the head at `head_bits`."""
        plain = 8 * dtype.itemsize
        matrices, head = self.num_layers * self._layer_matrices, self.vocab_size * self.hidden_size
        rest = self.num_parameters - matrices - head
        return int(matrices * (bits or plain) + head * (head_bits or plain) + rest * plain) // 8

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values of one token over all layers; int8 ones have an fp32 scale per head."""
        scale = 4 if dtype is torch.int8 else 0
        return 2 * self.num_layers * self.num_kv_heads * (self.head_dim * dtype.itemsize + scale)


def spec_from_config(
    config: Mapping[str, Any],
    *,
    windows: tuple[int | None, ...] | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    default_head_dim: int | None = None,
) -> DecoderSpec:
    """The spec of a config.json whose common fields have their usual names; the rest is given by the architecture.

    Raises ModelLoadError when a field is missing, is not a positive number, or asks for something Kvik does not do.
    """
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelLoadError(f"hidden_act={activation!r} is not supported: this decoder's MLP uses silu")
    hidden_size, num_heads = positive_int(config, "hidden_size"), positive_int(config, "num_attention_heads")
    num_layers = positive_int(config, "num_hidden_layers")
    head_dim = positive_int(config, "head_dim", default_head_dim or hidden_size // num_heads)
    return DecoderSpec(
        architecture=(config.get("architectures") or [str(config.get("model_type", ""))])[0],
        vocab_size=positive_int(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=positive_int(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=positive_int(config, "num_key_value_heads", num_heads),
        head_dim=head_dim,
        rms_norm_eps=_epsilon(config),
        max_position_embeddings=positive_int(config, "max_position_embeddings", 2048),
        rope=rope_from_config(config, head_dim),
        windows=windows if windows is not None else (None,) * num_layers,
        tie_word_embeddings=flag(config, "tie_word_embeddings"),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
    )


def _epsilon(config: Mapping[str, Any]) -> float:
    value = config.get("rms_norm_eps", 1e-6)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ModelLoadError(f"config.json: 'rms_norm_eps' must be a number between 0 and 1, got {value!r}")
    return float(value)


def sliding_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Per-layer windows of the Qwen family: `use_sliding_window`, then `layer_types` or `max_window_layers`."""
    first = config.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise ModelLoadError(f"config.json: 'max_window_layers' must be an integer, got {first!r}")
    slides = (i >= first for i in range(positive_int(config, "num_hidden_layers")))
    window = config.get("sliding_window", 4096) if flag(config, "use_sliding_window") else None  # transformers' default
    return layer_windows(config, window, slides)


def layer_windows(config: Mapping[str, Any], window: Any, slides: Iterable[bool]) -> tuple[int | None, ...]:
    """Per layer the `window`, checked, or None: for the layers that `layer_types` says, or else those that slide."""
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list):
            raise ModelLoadError(f"config.json: 'layer_types' must be a list, got {kinds!r}")
        unknown = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
        if unknown:
            raise ModelLoadError(f"layer type {unknown[0]!r} is not supported; Kvik has full and sliding attention")
        slides = (kind == "sliding_attention" for kind in kinds)
    checked = None if window is None else positive_int({"sliding_window": window}, "sliding_window")
    return tuple(checked if slide else None for slide in slides)


def flag(config: Mapping[str, Any], key: str) -> bool:
    """`config[key]`, or False when it is absent or null. Raises ModelLoadError for anything but true or false."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ModelLoadError(f"config.json: {key!r} must be true or false, got {value!r}")
    return bool(value)


def positive_int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """`config[key]`, or `default` when it is absent or null. Raises ModelLoadError for anything but a count >= 1."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelLoadError(f"config.json has no {key!r}; the file is incomplete or not a language model's")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelLoadError(f"config.json: {key!r} must be a positive integer, got {value!r}")
    return value
