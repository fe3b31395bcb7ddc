"""Filling a decoder from a checkpoint: streaming and strict.

Every parameter is filled exactly once and every tensor of the checkpoint is used or known to be needless; anything else
is one error that lists the names. Tensors are converted one by one straight into their place, so beside the model only
the mapped file of the moment is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kvik.attention.base import AttentionBackend
from kvik.errors import ModelLoadError
from kvik.kernels.api import Ops
from kvik.layers.rope import RopeTable
from kvik.models.checkpoint import find_checkpoint, iterate_tensors
from kvik.models.decoder import Decoder, DecoderWeights, allocate_weights
from kvik.models.spec import DecoderSpec
from kvik.models.weights import fill_random, is_ignored, parameter_views

__all__ = ["checkpoint_dtype", "load_model", "load_weights"]


def load_model(
    path: Path,
    spec: DecoderSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    attention: AttentionBackend,
    max_model_len: int,
    load_format: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Decoder:
    """The decoder of `spec` on `device` with the weights in the folder `path`, converted to `dtype`.

    `load_format` is auto, safetensors, pt, or dummy for random weights from `seed` (no file is read). `progress` shows
    a bar on a terminal. RoPE tables cover positions below `max_model_len`. Raises ModelLoadError.
    """
    weights = allocate_weights(spec, dtype, device)
    if load_format == "dummy":
        fill_random(spec, weights, seed)
    else:
        load_weights(path, spec, weights, load_format=load_format, progress=progress)
    return Decoder(spec, weights, RopeTable(spec.rope, max_model_len, device), ops, attention)


def load_weights(
    path: Path, spec: DecoderSpec, weights: DecoderWeights, *, load_format: str = "auto", progress: bool = True
) -> None:
    """Copy the checkpoint in the folder `path` into `weights`. Raises ModelLoadError listing wrong names."""
    files = find_checkpoint(path, load_format)
    fill = _Fill(spec, parameter_views(spec, weights))
    with tqdm(total=len(fill.views), desc="Loading weights", unit="tensor", disable=None if progress else True) as bar:
        for file in files:
            for name, tensor in iterate_tensors(file):
                bar.update(fill.take(name, tensor, file))
    fill.check(path)


class _Fill:
    """Which parameters are still empty, and everything about the checkpoint that does not match."""

    def __init__(self, spec: DecoderSpec, views: Mapping[str, Tensor]) -> None:
        self.spec = spec
        self.views = views
        self.source: dict[str, Path] = {}
        self.unexpected: list[str] = []
        self.misshaped: list[str] = []

    def take(self, name: str, tensor: Tensor, file: Path) -> bool:
        """Copy `tensor` to its place; True if it had one."""
        view = self.views.get(name)
        if view is None:
            if not is_ignored(name, self.spec):
                self.unexpected.append(name)
            return False
        if name in self.source:
            raise ModelLoadError(f"{name} is in the checkpoint twice: in {self.source[name].name} and in {file.name}")
        self.source[name] = file
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ModelLoadError(f"{name} in {file} is {_dtype(tensor)}: Kvik loads unquantised float weights only")
        if tensor.shape != view.shape:
            self.misshaped.append(f"{name} (expected {list(view.shape)}, found {list(tensor.shape)})")
        else:
            view.copy_(tensor)
        return True

    def check(self, path: Path) -> None:
        missing = [name for name in self.views if name not in self.source]
        problems = [
            f"{len(names)} {kind}: {_first(names)}"
            for kind, names in (("missing", missing), ("unexpected", self.unexpected), ("misshaped", self.misshaped))
            if names
        ]
        if problems:
            raise ModelLoadError(
                f"the weights in {path} do not fit {self.spec.architecture} as its config.json describes it; "
                + "; ".join(problems)
            )


def _first(names: Iterable[str], limit: int = 10) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def checkpoint_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that config.json says its weights have (`dtype` or `torch_dtype`), or None if it does not say."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name and name not in known:
        raise ModelLoadError(f"config.json says dtype={name!r}; Kvik computes in {', '.join(known)}")
    return known.get(name)
