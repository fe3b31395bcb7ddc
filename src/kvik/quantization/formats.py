"""How quantised weights are written: the `quantization_config` of a folder, and which of its tensors have which form.

    int8       NAME.weight int8 [out, in]              NAME.weight_scale fp32 [out]
    int4g32    NAME.weight uint8 [out, ceil(in / 2)]   NAME.weight_scale fp16 [out, ceil(in / 32)]; int4g128 likewise

The low half of a byte is the even input, and a half holds the value + 8. Norms, biases and an embedding that is not
tied stay as the checkpoint has them; a tied embedding is stored once, quantised, for it is the output head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kvik.errors import ModelLoadError
from kvik.models.spec import DecoderSpec
from kvik.models.weights import EMBEDDING, LM_HEAD

__all__ = [
    "BITS",
    "GROUPS",
    "METHOD",
    "PROJECTIONS",
    "ROLES",
    "SCALE_SUFFIX",
    "StoredQuantization",
    "pack_nibbles",
    "read_quantization",
    "role_sizes",
    "scale_shape",
    "stored_dtypes",
    "stored_shape",
    "unpack_nibbles",
]

METHOD = "kvik"
VERSION = 1
SCALE_SUFFIX = "_scale"
GROUPS: Mapping[str, int] = MappingProxyType({"int8": 0, "int4g32": 32, "int4g128": 128})
"""Inputs that share a scale; 0 is all of a row."""
BITS: Mapping[str, float] = MappingProxyType({"int8": 8.0, "int4g32": 4.5, "int4g128": 4.125})
"""Bits that a weight takes, its share of the scales included."""
PROJECTIONS: Mapping[str, str] = MappingProxyType(
    {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o", "gate_proj": "gate_up", "up_proj": "gate_up"}
    | {"down_proj": "down"}
)
"""The decoder's (stacked) projection that a checkpoint's projection is a part of."""
ROLES = tuple(dict.fromkeys(PROJECTIONS.values()))
"""The decoder's (stacked) projections, in the order of a layer."""
_PROJECTION = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj)\.weight")


@dataclass(frozen=True, slots=True)
class StoredQuantization:
    """What `quantization_config` says. `overrides` maps 'LAYER.ROLE' to a format other than `format`."""

    format: str
    head_format: str = "int8"
    overrides: Mapping[str, str] = field(default_factory=dict)
    calibration: str | None = None
    receipt: Mapping[str, Any] | None = None

    def of_role(self, index: int, role: str) -> str:
        """The format of a projection of layer `index`."""
        return self.overrides.get(f"{index}.{role}", self.format)

    def of_tensor(self, name: str, spec: DecoderSpec) -> str | None:
        """The format of the checkpoint tensor `name`; None for one that is not quantised."""
        if name == (EMBEDDING if spec.tie_word_embeddings else LM_HEAD):
            return self.head_format
        match = _PROJECTION.fullmatch(name)
        return None if match is None else self.of_role(int(match[1]), PROJECTIONS[match[2]])

    def block_bits(self, spec: DecoderSpec) -> float:
        """Bits of an average weight of the blocks' projections."""
        sizes = role_sizes(spec)
        total = sum(
            BITS[self.of_role(index, role)] * size for index in range(spec.num_layers) for role, size in sizes.items()
        )
        return total / (spec.num_layers * sum(sizes.values()))

    def to_json(self, kvik_version: str) -> dict[str, Any]:
        """The `quantization_config` of a config.json."""
        return {
            "quant_method": METHOD,
            "version": VERSION,
            "kvik_version": kvik_version,
            "format": self.format,
            "bits": 8 if self.format == "int8" else 4,
            "group_size": GROUPS[self.format] or None,
            "symmetric": True,
            "head_format": self.head_format,
            "overrides": dict(self.overrides),
            "calibration": self.calibration,
            "receipt": None if self.receipt is None else dict(self.receipt),
        }


def role_sizes(spec: DecoderSpec) -> dict[str, int]:
    """Weights of each (stacked) projection of a layer."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    sizes = {"qkv": hidden * (spec.q_size + 2 * spec.kv_size), "o": hidden * spec.q_size}
    return sizes | {"gate_up": 2 * hidden * inner, "down": hidden * inner}


def read_quantization(config: Mapping[str, Any]) -> StoredQuantization | None:
    """The quantisation of a folder with the config.json `config`; None for plain weights.

    Raises ModelLoadError for another program's method, a newer version, and damaged entries.
    """
    entry = config.get("quantization_config") or config.get("compression_config")
    if not entry:
        return None
    method = entry.get("quant_method") if isinstance(entry, Mapping) else entry
    if not isinstance(entry, Mapping) or method != METHOD:
        raise ModelLoadError(
            f"quantised weights ({method}) are not supported; use the model's unquantised checkpoint, with"
            " quantization=int8 or int4, or make a quantised folder of it with kvik quantize"
        )
    if entry.get("version") != VERSION:
        raise ModelLoadError(
            f"the folder was quantised in version {entry.get('version')!r} of Kvik's layout and this Kvik reads"
            f" {VERSION}; quantise the original again"
        )
    overrides = entry.get("overrides") or {}
    if not isinstance(overrides, Mapping):
        raise ModelLoadError(f"quantization_config: overrides is a {type(overrides).__name__}, not an object")
    formats = [entry.get("format"), entry.get("head_format"), *overrides.values()]
    unknown = [name for name in formats if not isinstance(name, str) or name not in GROUPS]
    if unknown:
        raise ModelLoadError(f"quantization_config: format {unknown[0]!r} is not one of {', '.join(GROUPS)}")
    return StoredQuantization(
        entry["format"], entry["head_format"], dict(overrides), entry.get("calibration"), entry.get("receipt")
    )


def stored_shape(shape: torch.Size, fmt: str) -> torch.Size:
    """The shape in which a weight of `shape` [out, in] is stored."""
    return shape if fmt == "int8" else torch.Size((shape[0], -(-shape[1] // 2)))


def scale_shape(shape: torch.Size, fmt: str) -> torch.Size:
    """The shape of its scales: [out], or [out, groups]."""
    return torch.Size(shape[:1]) if fmt == "int8" else torch.Size((shape[0], -(-shape[1] // GROUPS[fmt])))


def stored_dtypes(fmt: str) -> tuple[torch.dtype, torch.dtype]:
    """(values, scales) on disk."""
    return (torch.int8, torch.float32) if fmt == "int8" else (torch.uint8, torch.float16)


def pack_nibbles(q: Tensor) -> Tensor:
    """q int8 [out, in] in [-8, 7] -> uint8 [out, ceil(in / 2)]."""
    halves = (q + 8).to(torch.uint8)
    if q.shape[1] % 2:
        halves = torch.nn.functional.pad(halves, (0, 1), value=8)
    return halves[:, ::2] | (halves[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, into: Tensor) -> None:
    """The inverse of `pack_nibbles`, to `into` int8 [out, in]."""
    into[:, ::2] = (packed & 15).to(torch.int8) - 8
    odd = packed[:, : into.shape[1] // 2] >> 4
    into[:, 1::2] = odd.to(torch.int8) - 8
