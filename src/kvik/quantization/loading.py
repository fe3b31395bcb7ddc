"""From a folder that `kvik quantize` made to the decoder's weights: nothing is quantised again.

The rows of a stacked projection are assembled from the values and scales of its parts, one projection at a time, and
handed to `pack`: the native packer, or `dequantized` where there are no native kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvik.kernels.api import LinearWeight
from kvik.models.checkpoint import Checkpoint
from kvik.models.decoder import DecoderWeights, LayerWeights, allocate_layer
from kvik.models.spec import DecoderSpec
from kvik.models.weights import EMBEDDING, FINAL_NORM, LM_HEAD, Fill, layer_views, parameter_shapes
from kvik.quantization.formats import (
    ROLES,
    SCALE_SUFFIX,
    StoredQuantization,
    scale_shape,
    stored_dtypes,
    stored_shape,
    unpack_nibbles,
)
from kvik.quantization.reference import dequantize, quantize

__all__ = [
    "PackQuantized",
    "QuantizedWeight",
    "build_quantized_weights",
    "dequantized",
    "expected_tensors",
    "read_values",
    "rounded",
]

_FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A projection as it is stored: `q` int8 [out, in], `scales` [out, groups] or [out]."""

    fmt: str
    q: Tensor
    scales: Tensor
    bias: Tensor | None = None


PackQuantized = Callable[[str, QuantizedWeight], LinearWeight]
"""`pack(role, weight)`: the form in which a quantised projection is kept."""


def dequantized(dtype: torch.dtype, device: torch.device) -> PackQuantized:
    """Keeps q * scale as plain tensors of `dtype`."""

    def pack(role: str, weight: QuantizedWeight) -> LinearWeight:
        return LinearWeight(dequantize(weight.q, weight.scales, weight.fmt).to(device, dtype), weight.bias)

    return pack


def rounded(fmt: str, head_fmt: str) -> Callable[[str, LinearWeight], LinearWeight]:
    """Keeps what quantising on load makes of a projection, as plain tensors of the projection's own dtype."""

    def pack(role: str, weight: LinearWeight) -> LinearWeight:
        chosen = head_fmt if role == "lm_head" else fmt
        values = dequantize(*quantize(weight.weight, chosen), chosen)
        return LinearWeight(values.to(weight.weight.dtype), weight.bias)

    return pack


def expected_tensors(spec: DecoderSpec, stored: StoredQuantization) -> dict[str, tuple[torch.Size, tuple[str, ...]]]:
    """Every name that the folder must have, with its shape and the dtypes that it may have."""
    expected: dict[str, tuple[torch.Size, tuple[str, ...]]] = {}
    for name, shape in parameter_shapes(spec).items():
        fmt = stored.of_tensor(name, spec)
        if fmt is None:
            expected[name] = (shape, _FLOATS)
        else:
            values, scales = (str(dtype).removeprefix("torch.") for dtype in stored_dtypes(fmt))
            expected[name] = (stored_shape(shape, fmt), (values,))
            expected[name + SCALE_SUFFIX] = (scale_shape(shape, fmt), (scales,))
    return expected


def read_values(checkpoint: Checkpoint, name: str, view: Tensor) -> None:
    """Read a tensor to `view`; two 4-bit values a byte become int8."""
    info = checkpoint.tensors[name]
    if info.dtype == "uint8":
        packed = torch.empty(info.shape, dtype=torch.uint8)
        checkpoint.read(name, packed)
        unpack_nibbles(packed, view)
    else:
        checkpoint.read(name, view)


def build_quantized_weights(
    spec: DecoderSpec,
    stored: StoredQuantization,
    dtype: torch.dtype,
    device: torch.device,
    fill: Fill,
    pack: PackQuantized,
) -> DecoderWeights:
    """Allocate, fill and pack, as `kvik.models.loader.build_weights` does for plain weights."""
    vocabulary = torch.Size((spec.vocab_size, spec.hidden_size))
    head_name = EMBEDDING if spec.tie_word_embeddings else LM_HEAD
    q, scales = _allocate(vocabulary, stored.head_format)
    fill({head_name: q, head_name + SCALE_SUFFIX: scales})
    head = pack("lm_head", QuantizedWeight(stored.head_format, q, scales))
    del q
    embedding = head.weight
    if not spec.tie_word_embeddings:
        embedding = torch.empty(vocabulary, dtype=dtype, device=device)
        fill({EMBEDDING: embedding})
    layers = tuple(_layer(spec, stored, index, dtype, device, fill, pack) for index in range(spec.num_layers))
    final_norm = torch.empty(spec.hidden_size, dtype=dtype, device=device)
    fill({FINAL_NORM: final_norm})
    return DecoderWeights(embedding, layers, final_norm, head)


def _allocate(shape: torch.Size, fmt: str) -> tuple[Tensor, Tensor]:
    return torch.empty(shape, dtype=torch.int8), torch.empty(scale_shape(shape, fmt), dtype=stored_dtypes(fmt)[1])


def _layer(
    spec: DecoderSpec,
    stored: StoredQuantization,
    index: int,
    dtype: torch.dtype,
    device: torch.device,
    fill: Fill,
    pack: PackQuantized,
) -> LayerWeights:
    plan = allocate_layer(spec, dtype, torch.device("meta"))
    values: dict[str, LinearWeight] = {}
    scales: dict[str, LinearWeight] = {}
    for role in ROLES:
        weight: LinearWeight = getattr(plan, role)
        bias = None if weight.bias is None else torch.empty_like(weight.bias, device=device)
        q, scale = _allocate(weight.weight.shape, stored.of_role(index, role))
        values[role], scales[role] = LinearWeight(q, bias), LinearWeight(scale)
    norms: dict[str, Any] = {
        name: torch.empty_like(norm, device=device)
        for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")
        if (norm := getattr(plan, name)) is not None
    }
    layer = replace(plan, **(norms | values))
    views = layer_views(spec, index, layer)
    parts = layer_views(spec, index, replace(plan, **dict[str, Any](scales)))
    views |= {name + SCALE_SUFFIX: view for name, view in parts.items() if name.endswith("_proj.weight")}
    fill(views)
    packed: dict[str, Any] = {
        role: pack(role, QuantizedWeight(stored.of_role(index, role), w.weight, scales[role].weight, w.bias))
        for role, w in values.items()
    }
    return replace(layer, **packed)
