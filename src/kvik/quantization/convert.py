"""From a plain checkpoint to quantised tensors, one layer after the other.

A layer is read, quantised, and given to the writer; the text for the receipt, and the text for calibration if there
is one, move through it at the same time. So the plain form of one layer is in memory, beside the embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kvik.kernels.api import LinearWeight
from kvik.kernels.cpu.native import NativePool
from kvik.kernels.cpu.packing import pack_linear
from kvik.kernels.reference import ReferenceOps
from kvik.models.checkpoint import Checkpoint
from kvik.models.decoder import LayerWeights, allocate_layer
from kvik.models.loader import open_checkpoint
from kvik.models.spec import DecoderSpec
from kvik.models.weights import EMBEDDING, FINAL_NORM, LM_HEAD, layer_views
from kvik.quantization.calibrate import Moments, calibrated
from kvik.quantization.formats import SCALE_SUFFIX, StoredQuantization, pack_nibbles, stored_dtypes
from kvik.quantization.reference import dequantize, quantize
from kvik.quantization.windows import LayerStream
from kvik.quantization.writer import ShardWriter

__all__ = ["Baseline", "convert"]

_ROLES = ("qkv", "o", "gate_up", "down")
_HEAD_ROWS = 8192


@dataclass(frozen=True, slots=True, eq=False)
class Baseline:
    """The unquantised model as far as a receipt needs it."""

    hidden: Tensor  # [num_tokens, hidden_size] fp32, after the final norm
    head: Tensor  # [vocab_size, hidden_size] as in the checkpoint

    def logits(self, hidden: Tensor) -> Tensor:
        """[num_rows, vocab_size] fp32."""
        return torch.cat([hidden @ part.float().T for part in _parts(self.head)], 1)


def convert(
    path: Path,
    spec: DecoderSpec,
    stored: StoredQuantization,
    writer: ShardWriter,
    text: Tensor,
    calibration: Tensor | None,
    pool: NativePool | None,
) -> Baseline:
    """Quantise the checkpoint in `path` as `stored` says, to `writer`; `text` is for the receipt.

    `text` and `calibration` [num_windows, length] are token ids. Raises ModelLoadError for a bad checkpoint.
    """
    job = _Job(spec, stored, open_checkpoint(path, spec), writer, pool)
    embedding = job.plain(EMBEDDING)
    if not spec.tie_word_embeddings:
        writer.add(EMBEDDING, embedding)
    measured = LayerStream(spec, text, embedding)
    moving = None if calibration is None else LayerStream(spec, calibration, embedding)
    for index in tqdm(range(spec.num_layers), desc="Quantising", unit="layer", delay=0.5, leave=False, disable=None):
        layer = job.read_layer(index)
        measured.hidden = measured.advance(index, layer)
        job.quantise_layer(index, layer, moving)
    final_norm = job.plain(FINAL_NORM)
    writer.add(FINAL_NORM, final_norm)
    name, head = (EMBEDDING, embedding) if spec.tie_word_embeddings else (LM_HEAD, job.plain(LM_HEAD))

    def normed(hidden: Tensor) -> Tensor:
        return ReferenceOps().rms_norm(hidden, final_norm.float(), spec.rms_norm_eps)

    moments = None if moving is None else Moments.of(normed(moving.hidden))
    job.store(name, stored.head_format, *job.quantise_rows(head, stored.head_format, moments))
    writer.finish()
    return Baseline(normed(measured.hidden), head)


def _parts(weight: Tensor) -> list[Tensor]:
    """Some rows at a time, so that no wide copy of a whole vocabulary is made."""
    return [weight[begin : begin + _HEAD_ROWS] for begin in range(0, len(weight), _HEAD_ROWS)]


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    spec: DecoderSpec
    stored: StoredQuantization
    checkpoint: Checkpoint
    writer: ShardWriter
    pool: NativePool | None

    def plain(self, name: str) -> Tensor:
        """A tensor as the checkpoint has it."""
        info = self.checkpoint.tensors[name]
        tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
        self.checkpoint.read(name, tensor)
        return tensor

    def read_layer(self, index: int) -> LayerWeights:
        layer = allocate_layer(self.spec, torch.float32, torch.device("cpu"))
        for name, view in layer_views(self.spec, index, layer).items():
            self.checkpoint.read(name, view)
        return layer

    def quantise_layer(self, index: int, layer: LayerWeights, moving: LayerStream | None) -> None:
        """Store the layer; with `moving` text, calibrate on its activations and move it on."""
        moments: dict[int, Moments] = {}
        if moving is not None:

            def observe(weight: LinearWeight, x: Tensor) -> None:
                moments.setdefault(id(weight), Moments.zero(x.shape[1])).add(x)

            moving.advance(index, layer, observe)
        values, scales, rounded = dict[str, Any](), dict[str, Any](), dict[str, Any]()
        for role in _ROLES:
            weight: LinearWeight = getattr(layer, role)
            fmt = self.stored.of_role(index, role)
            q, scale = self.quantise_rows(weight.weight, fmt, moments.get(id(weight)))
            values[role], scales[role] = LinearWeight(q, weight.bias), LinearWeight(scale)
            if moving is not None:
                rounded[role] = LinearWeight(dequantize(q, scale, fmt), weight.bias)
        if moving is not None:
            moving.hidden = moving.advance(index, replace(layer, **rounded))
        self._store_layer(index, replace(layer, **values), replace(layer, **scales))

    def _store_layer(self, index: int, layer: LayerWeights, scales: LayerWeights) -> None:
        parts = layer_views(self.spec, index, scales)
        for name, view in layer_views(self.spec, index, layer).items():
            fmt = self.stored.of_tensor(name, self.spec)
            if fmt is None:
                dtype: torch.dtype = getattr(torch, self.checkpoint.tensors[name].dtype)
                self.writer.add(name, view.to(dtype, copy=True))
            else:
                self.store(name, fmt, view, parts[name])

    def quantise_rows(self, weight: Tensor, fmt: str, moments: Moments | None) -> tuple[Tensor, Tensor]:
        """(q int8 [out, in], scales [out, groups]): to nearest, or calibrated, some rows at a time."""
        if moments is not None:
            quantise: Callable[[Tensor], tuple[Tensor, Tensor]] = calibrated(fmt, moments)
        elif self.pool is not None:
            pool = self.pool

            def quantise(part: Tensor) -> tuple[Tensor, Tensor]:
                return pack_linear(part, None, fmt, pool=pool).quantized(pool)
        else:

            def quantise(part: Tensor) -> tuple[Tensor, Tensor]:
                return quantize(part, fmt)

        parts = [quantise(part) for part in _parts(weight)]
        return torch.cat([q for q, _ in parts]), torch.cat([scales for _, scales in parts])

    def store(self, name: str, fmt: str, q: Tensor, scales: Tensor) -> None:
        """Give a projection to the writer. Copies, for views hold on to more than they show."""
        values = q.clone() if fmt == "int8" else pack_nibbles(q)
        kept = scales.to(stored_dtypes(fmt)[1], copy=True)
        self.writer.add(name, values)
        self.writer.add(name + SCALE_SUFFIX, kept.view(-1) if fmt == "int8" else kept)
