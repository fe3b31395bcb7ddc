"""From a plain checkpoint to quantised tensors, one layer after the other.

A layer is read, quantised, and given to the writer; the text for the receipt, and the text for calibration if there
is one, move through it at the same time. So the plain form of one layer is in memory, beside the embedding.
"""

from __future__ import annotations

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
from kvik.models.loader import check_finite, open_checkpoint
from kvik.models.spec import DecoderSpec
from kvik.models.weights import EMBEDDING, FINAL_NORM, LM_HEAD, layer_views
from kvik.quantization.calibrate import calibrated
from kvik.quantization.formats import ROLES, SCALE_SUFFIX, StoredQuantization, pack_nibbles, stored_dtypes
from kvik.quantization.reference import dequantize, quantize
from kvik.quantization.windows import LayerStream
from kvik.quantization.writer import ShardWriter

__all__ = ["Baseline", "convert", "read_layer", "read_plain"]

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
    embedding = read_plain(job.checkpoint, EMBEDDING)
    if not spec.tie_word_embeddings:
        writer.add(EMBEDDING, embedding)
    measured = LayerStream(spec, text, embedding)
    learning = None if calibration is None else _Learning.of(spec, calibration, embedding)
    for index in tqdm(range(spec.num_layers), desc="Quantising", unit="layer", delay=0.5, leave=False, disable=None):
        layer = read_layer(job.checkpoint, spec, index)
        measured.advance(index, layer)
        job.quantise_layer(index, layer, learning)
    final_norm = read_plain(job.checkpoint, FINAL_NORM)
    writer.add(FINAL_NORM, final_norm)
    name, head = (EMBEDDING, embedding) if spec.tie_word_embeddings else (LM_HEAD, read_plain(job.checkpoint, LM_HEAD))
    job.store(name, stored.head_format, *job.to_nearest(head, stored.head_format))
    writer.finish()
    hidden = measured.hidden.flatten(0, 1)
    return Baseline(ReferenceOps().rms_norm(hidden, final_norm.float(), spec.rms_norm_eps), head)


@dataclass(frozen=True, slots=True, eq=False)
class _Learning:
    """The text for calibration on its way through the plain layers, and through those that were quantised."""

    plain: LayerStream
    quantised: LayerStream

    @classmethod
    def of(cls, spec: DecoderSpec, windows: Tensor, embedding: Tensor) -> _Learning:
        return cls(LayerStream(spec, windows, embedding), LayerStream(spec, windows, embedding))


def read_plain(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor as the checkpoint has it."""
    info = checkpoint.tensors[name]
    tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
    checkpoint.read(name, tensor)
    check_finite(name, tensor)
    return tensor


def read_layer(checkpoint: Checkpoint, spec: DecoderSpec, index: int) -> LayerWeights:
    """A layer in fp32."""
    layer = allocate_layer(spec, torch.float32, torch.device("cpu"))
    for name, view in layer_views(spec, index, layer).items():
        checkpoint.read(name, view)
        check_finite(name, view)
    return layer


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

    def quantise_layer(self, index: int, layer: LayerWeights, learning: _Learning | None) -> None:
        """Store the layer, rounded to nearest or, with text for it, calibrated; the text is moved on."""
        formats = {role: self.stored.of_role(index, role) for role in ROLES}
        made = {role: self.to_nearest(getattr(layer, role).weight, fmt) for role, fmt in formats.items()}
        biases = {role: getattr(layer, role).bias for role in ROLES}
        if learning is not None:
            learning.plain.advance(index, layer)
            made = calibrated(index, layer, formats, made, learning.quantised, learning.plain.hidden)
            rounded: dict[str, Any] = {
                role: LinearWeight(dequantize(*made[role], fmt), biases[role]) for role, fmt in formats.items()
            }
            learning.quantised.advance(index, replace(layer, **rounded))
        values: dict[str, Any] = {role: LinearWeight(q, biases[role]) for role, (q, _) in made.items()}
        scales: dict[str, Any] = {role: LinearWeight(scale) for role, (_, scale) in made.items()}
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

    def to_nearest(self, weight: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
        """(q int8 [out, in], scales [out, groups]), some rows at a time."""
        parts = [self._rows_to_nearest(part, fmt) for part in _parts(weight)]
        return torch.cat([q for q, _ in parts]), torch.cat([scales for _, scales in parts])

    def _rows_to_nearest(self, weight: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
        if self.pool is None:
            return quantize(weight, fmt)
        return pack_linear(weight, None, fmt, pool=self.pool).quantized(self.pool)

    def store(self, name: str, fmt: str, q: Tensor, scales: Tensor) -> None:
        """Give a projection to the writer. Copies, for views hold on to more than they show."""
        values = q.clone() if fmt == "int8" else pack_nibbles(q)
        kept = scales.to(stored_dtypes(fmt)[1], copy=True)
        self.writer.add(name, values)
        self.writer.add(name + SCALE_SUFFIX, kept.view(-1) if fmt == "int8" else kept)
