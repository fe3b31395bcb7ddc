"""Rotary position embeddings: what a config asks for (`RopeSpec`) and the cosines and sines of a step (`RopeTable`).

Kinds: default, linear, dynamic (NTK), llama3 and yarn, with the arithmetic of transformers so that angles agree to the
last bits. All but dynamic are a table over positions; dynamic depends on the length of the sequence as well, so it is
computed per token, and the result does not depend on how a prompt was split into steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvik.errors import ModelLoadError, did_you_mean

__all__ = ["ROPE_KINDS", "RopeSpec", "RopeTable", "inverse_frequencies", "rope_from_config"]

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Everything that fixes the angles. Fields below `theta` are read only by the kinds named beside them."""

    kind: str
    head_dim: int
    theta: float
    factor: float = 1.0  # linear, dynamic, llama3, yarn
    original_len: int = 0  # dynamic, llama3, yarn: the context length before scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # yarn: cosines and sines are multiplied by it

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's angle depends on its sequence's length, so that cached keys cannot be shared by prefix."""
        return self.kind == "dynamic"

    def table_bytes(self, max_len: int) -> int:
        """Device bytes of `RopeTable(self, max_len, ...)`."""
        rows = max_len + 1 if self.depends_on_length else 2 * max_len
        return rows * (self.head_dim // 2) * 4


class RopeTable:
    """Cosines and sines for positions below `max_len`, fp32, on `device`."""

    def __init__(self, spec: RopeSpec, max_len: int, device: torch.device) -> None:
        self.spec = spec
        if spec.depends_on_length:
            lens = torch.arange(max_len + 1)  # all at once: the bits of torch's powers depend on how many there are
            self._table = _dynamic_inverse_frequencies(spec, lens).to(device)  # [max_len + 1, head_dim / 2]
        else:
            positions = torch.arange(max_len, dtype=torch.float32)
            angles = positions[:, None] * inverse_frequencies(spec)  # [max_len, head_dim / 2]
            both = torch.stack((angles.cos(), angles.sin()), dim=1)  # [max_len, 2, head_dim / 2]: one gather takes both
            self._table = (both * spec.attention_factor).to(device)

    def cos_sin(self, positions: Tensor, rope_lens: Tensor | None) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [num_tokens, head_dim / 2] fp32, of positions [num_tokens]. Rows are contiguous.

        `rope_lens` [num_tokens] is read when `spec.depends_on_length`: the length that a token's sequence had when the
        token was computed in a whole-prompt prefill or one-token decode, max(num_prompt_tokens, position + 1).
        """
        if not self.spec.depends_on_length:
            cos, sin = self._table.index_select(0, positions).unbind(1)
            return cos, sin
        assert rope_lens is not None, "rope_lens is required when the RoPE depends on length"
        angles = positions[:, None].float() * self._table.index_select(0, rope_lens)
        return angles.cos(), angles.sin()


def inverse_frequencies(spec: RopeSpec) -> Tensor:
    """Radians per position of each pair of dimensions (dynamic: unscaled), [head_dim / 2] fp32 on the CPU."""
    inv_freq = 1.0 / spec.theta ** _exponents(spec.head_dim)
    if spec.kind == "linear":
        return inv_freq / spec.factor
    if spec.kind == "llama3":
        return _llama3(spec, inv_freq)
    if spec.kind == "yarn":
        return _yarn(spec)
    return inv_freq


def _exponents(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim  # [head_dim / 2]


def _dynamic_inverse_frequencies(spec: RopeSpec, rope_lens: Tensor) -> Tensor:
    """[num_tokens, head_dim / 2]: the base grows with the length past the original one ("dynamic NTK" by emozilla)."""
    lens = rope_lens.clamp(min=spec.original_len).float()
    growth = spec.factor * lens / spec.original_len - (spec.factor - 1)
    base = spec.theta * growth ** (spec.head_dim / (spec.head_dim - 2))  # [num_tokens]
    return 1.0 / base[:, None] ** _exponents(spec.head_dim).to(base.device)


def _llama3(spec: RopeSpec, inv_freq: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / inv_freq
    low, high = spec.low_freq_factor, spec.high_freq_factor
    smooth = ((spec.original_len / wavelength - low) / (high - low)).clamp(0, 1)
    blended = (1 - smooth) * inv_freq / spec.factor + smooth * inv_freq
    is_long, is_short = wavelength > spec.original_len / low, wavelength < spec.original_len / high
    return torch.where(is_long, inv_freq / spec.factor, torch.where(is_short, inv_freq, blended))


def _yarn(spec: RopeSpec) -> Tensor:
    """YaRN (https://arxiv.org/abs/2309.00071): interpolate slow dimensions, keep fast ones, ramp between."""

    def dimension(rotations: float) -> float:
        turns = spec.original_len / (rotations * 2 * math.pi)
        return spec.head_dim * math.log(turns) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.head_dim - 1)
    if low == high:
        high += 0.001  # a ramp needs a width
    ramp = (torch.arange(spec.head_dim // 2, dtype=torch.float32) - low) / (high - low)
    keep = 1 - ramp.clamp(0, 1)
    periods = spec.theta ** _exponents(spec.head_dim)
    return 1.0 / (spec.factor * periods) * (1 - keep) + 1.0 / periods * keep


def rope_from_config(config: Mapping[str, Any], head_dim: int) -> RopeSpec:
    """The RoPE of a config.json, with `rope_theta` + `rope_scaling` or with transformers 5's `rope_parameters`.

    Raises ModelLoadError for a kind that Kvik does not have, and for a missing or meaningless parameter.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise ModelLoadError(f"config.json: {name!r} must be an object, got {config[name]!r}")
    params = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = str(params.get("rope_type") or params.get("type") or "default")
    if any(isinstance(value, Mapping) for value in params.values()):
        raise ModelLoadError(f"a different RoPE per layer type ({', '.join(params)}) is not supported")
    if kind not in ROPE_KINDS:
        hint, known = did_you_mean(kind, ROPE_KINDS), ", ".join(ROPE_KINDS)
        raise ModelLoadError(f"RoPE kind {kind!r} is not supported{hint}; Kvik has {known}")
    partial = params.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ModelLoadError(f"partial_rotary_factor={partial} is not supported: Kvik rotates whole heads")
    if head_dim % 2:
        raise ModelLoadError(f"RoPE needs an even head_dim, got {head_dim}")
    theta = _positive(params if params.get("rope_theta") else config, "rope_theta", kind, 10000.0)
    return _scaled(kind, head_dim, theta, params, config)


def _scaled(kind: str, head_dim: int, theta: float, params: Mapping[str, Any], config: Mapping[str, Any]) -> RopeSpec:
    max_len = int(_positive(config, "max_position_embeddings", kind, 2048))
    if kind == "default":
        if (factor := _positive(params, "factor", kind, 1.0)) != 1:
            raise ModelLoadError(f"RoPE is scaled by factor {factor:g} but says no kind that scales: add 'rope_type'")
        return RopeSpec(kind, head_dim, theta)
    if kind in ("linear", "dynamic"):
        return RopeSpec(kind, head_dim, theta, factor=_positive(params, "factor", kind), original_len=max_len)
    inner = _positive(params, "original_max_position_embeddings", kind, max_len)
    original_len = int(_positive(config, "original_max_position_embeddings", kind, inner))
    if kind == "llama3":
        low, high = _positive(params, "low_freq_factor", kind), _positive(params, "high_freq_factor", kind)
        if high <= low:
            raise ModelLoadError(f"llama3 RoPE needs high_freq_factor > low_freq_factor, got {high} and {low}")
        factor = _positive(params, "factor", kind)
        return RopeSpec(kind, head_dim, theta, factor, original_len, low_freq_factor=low, high_freq_factor=high)
    factor = _positive(params, "factor", kind, max_len / original_len)
    return RopeSpec(
        kind,
        head_dim,
        theta,
        factor,
        original_len,
        beta_fast=_positive(params, "beta_fast", kind, 32.0),
        beta_slow=_positive(params, "beta_slow", kind, 1.0),
        truncate=bool(params.get("truncate", True)),
        attention_factor=_yarn_attention_factor(params, factor),
    )


def _yarn_attention_factor(params: Mapping[str, Any], factor: float) -> float:
    if params.get("attention_factor") is not None:
        return _positive(params, "attention_factor", "yarn")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if params.get("mscale") and params.get("mscale_all_dim"):
        return mscale(_positive(params, "mscale", "yarn")) / mscale(_positive(params, "mscale_all_dim", "yarn"))
    return mscale(1.0)


def _positive(params: Mapping[str, Any], key: str, kind: str, default: float | None = None) -> float:
    """`params[key]` as a float, or `default` when it is absent or null."""
    value = params.get(key)
    if value is None:
        if default is None:
            raise ModelLoadError(f"RoPE kind {kind!r} needs {key!r}, which config.json does not give")
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ModelLoadError(f"RoPE parameter {key!r} must be a positive number, got {value!r}")
    return float(value)
