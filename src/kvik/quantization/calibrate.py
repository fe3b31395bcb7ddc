"""Rounding that knows what a layer is for: values and scales are trained until the layer does what the plain one does.

All values and scales of a layer are free, and the squared error of its outputs on the calibration text is lowered by
Adam, with the gradient going straight through the rounding: Block-AP of EfficientQAT (Chen et al. 2024,
arXiv:2407.11062), begun at rounding to nearest. A layer's inputs are those that the quantised layers before it make,
its aim is what the plain layers make of the plain text: so it makes good what it can of the errors before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvik.kernels.api import LinearWeight
from kvik.models.decoder import LayerWeights
from kvik.quantization.formats import GROUPS
from kvik.quantization.windows import LayerStream

__all__ = ["calibrated"]

_PASSES = 8
_TOKENS = 1024  # in a step
_RATE = 0.005  # of values, in units of their scale
_SCALE_RATE = 0.001  # of scales, relative
_DECAYS = (0.9, 0.99)


def calibrated(
    index: int,
    layer: LayerWeights,
    formats: Mapping[str, str],
    start: Mapping[str, tuple[Tensor, Tensor]],
    stream: LayerStream,
    target: Tensor,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Projection to (q int8 [out, in], scales [out, groups]) such that `layer` makes `target` of `stream`'s states.

    `formats` and `start`, (q, scales) rounded to nearest, are by projection. `target` is of the shape of the states.
    The same inputs and number of threads give the same result.
    """
    parts = {role: _Trained(getattr(layer, role), fmt, *start[role]) for role, fmt in formats.items()}
    optimizer = torch.optim.Adam(
        [
            {"params": [part.values for part in parts.values()], "lr": _RATE},
            {"params": [part.stretch for part in parts.values()], "lr": _SCALE_RATE},
        ],
        betas=_DECAYS,
    )
    batches = _batches(*target.shape[:2])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step / len(batches)))
    for rows in batches:
        weights: dict[str, Any] = {role: part.weight() for role, part in parts.items()}
        out = stream.block(index, replace(layer, **weights), stream.hidden[rows])
        # Relative to each token, for some are a thousand times larger and every layer begins with a norm.
        error = (out - target[rows]).square().sum(-1) / target[rows].square().sum(-1).clamp_min(1e-12)
        optimizer.zero_grad()
        torch.autograd.backward(error.sum())
        optimizer.step()
        schedule.step()
    return {role: part.rounded() for role, part in parts.items()}


def _batches(num_windows: int, length: int) -> list[Tensor]:
    """Indices of the windows of each step: every pass in another order."""
    generator = torch.Generator().manual_seed(0)
    size = max(1, _TOKENS // length)
    return [
        rows for _ in range(_PASSES) for rows in torch.split(torch.randperm(num_windows, generator=generator), size)
    ]  # fmt: skip


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


class _Trained:
    """A projection whose values, in units of their scales, and scales are trained."""

    def __init__(self, plain: LinearWeight, fmt: str, q: Tensor, scales: Tensor) -> None:
        rows, columns = q.shape
        self._plain = plain
        self._limits = (-127, 127) if fmt == "int8" else (-8, 7)
        self._halves = fmt != "int8"
        self._scales = scales.float().view(rows, -1, 1)
        group = GROUPS[fmt] or columns
        padded = F.pad(plain.weight, (0, -columns % group)).view(rows, -1, group)
        self.values = torch.where(self._scales == 0, 0, padded / self._scales).requires_grad_()
        self.stretch = torch.zeros_like(self._scales).requires_grad_()

    def weight(self) -> LinearWeight:
        """What the projection is now, in fp32."""
        values = self.values + (self._q() - self.values).detach()
        return replace(self._plain, weight=self._flat(values * (self._scales * (1 + self.stretch))))

    @torch.no_grad()
    def rounded(self) -> tuple[Tensor, Tensor]:
        """(q int8 [out, in], scales [out, groups])."""
        scales = self._scales * (1 + self.stretch)
        if self._halves:
            scales = scales.clamp(-65504, 65504).half().float()
        return self._flat(self._q()).to(torch.int8), scales.squeeze(2)

    def _q(self) -> Tensor:
        return self.values.detach().round().clamp(*self._limits)

    def _flat(self, grouped: Tensor) -> Tensor:
        return grouped.flatten(1)[:, : self._plain.weight.shape[1]]
