"""Rounding that knows what the weights are multiplied with.

GPTQ (Frantar et al. 2022, arXiv:2210.17323), inputs in the order of their energy: one input after the other is
quantised, and the error that it makes in the outputs is made good, as far as it can be, by those still to come. Then,
for int4, sweeps of coordinate descent over values and scales, each step of which lowers the squared error of the
outputs, |(W - Q) X|^2 over the calibration text. int4 scales begin as the best of a grid, inputs weighted by energy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvik.quantization.formats import GROUPS

__all__ = ["Moments", "calibrated"]

_DAMPING = 0.01  # of the mean energy of an input
_BLOCK = 64
_SWEEPS = 2
_GRID = (*(-8 * (1 + 0.03 * i) for i in range(-6, 16)), *(7 * (1 + 0.03 * i) for i in range(-4, 12)))
"""What the extreme value of an int4 group may become."""
_SMALLEST_SCALE = 2.0**-24


@dataclass(slots=True, eq=False)
class Moments:
    """x.T @ x summed over the inputs x of a projection, [in, in] fp32."""

    total: Tensor
    count: int = 0

    @classmethod
    def zero(cls, features: int) -> Moments:
        return cls(torch.zeros(features, features))

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Those of x [num_tokens, in]."""
        moments = cls.zero(x.shape[1])
        moments.add(x)
        return moments

    def add(self, x: Tensor) -> None:
        """Count x [num_tokens, in]."""
        self.total.addmm_(x.T, x)
        self.count += len(x)

    def damped(self) -> Tensor:
        """The mean of x.T @ x, with something on the diagonal that makes it safely invertible."""
        mean = self.total / max(1, self.count)
        energy = float(mean.diagonal().mean())
        mean.diagonal().add_(_DAMPING * energy if energy > 0 else 1.0)
        return mean


def calibrated(fmt: str, moments: Moments) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A quantiser of weights [out, in] whose inputs have these `moments`: (q int8 [out, in], scales [out, groups])."""
    energy = moments.damped()
    order = torch.argsort(energy.diagonal(), descending=True, stable=True)
    ordered = energy[order][:, order].double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    factor = torch.linalg.cholesky(inverse, upper=True).float()

    def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
        wide = weight.float()
        scales = _row_scales(wide) if fmt == "int8" else _group_scales(wide, energy.diagonal(), GROUPS[fmt])
        q = _compensate(wide, scales, order, factor, fmt)
        if fmt != "int8":
            for _ in range(_SWEEPS):
                _descend(wide, energy, q, scales, GROUPS[fmt])
        return q.to(torch.int8), scales

    return quantise


def _limits(fmt: str) -> tuple[int, int]:
    return (-127, 127) if fmt == "int8" else (-8, 7)


def _row_scales(weight: Tensor) -> Tensor:
    most = weight.abs().amax(1, keepdim=True)
    return torch.where(most > 0, most / 127.0, 1.0)


def _group_scales(weight: Tensor, energy: Tensor, group: int) -> Tensor:
    """[out, groups]: of a grid, rounded to fp16, the scale with the least squared error weighted by `energy` [in]."""
    parts = []
    for begin in range(0, weight.shape[1], group):
        part, weighting = weight[:, begin : begin + group], energy[begin : begin + group]
        extreme = part.gather(1, part.abs().argmax(1, keepdim=True))
        best, scales = torch.full_like(extreme, torch.inf), torch.full_like(extreme, _SMALLEST_SCALE)
        for limit in _GRID:
            scale = _as_half(extreme / limit)
            q = (part / scale).round_().clamp_(-8, 7)
            error = (part - q * scale).square_() @ weighting[:, None]
            scales = torch.where(error < best, scale, scales)
            best = torch.minimum(best, error)
        parts.append(scales)
    return torch.cat(parts, 1)


def _as_half(scale: Tensor) -> Tensor:
    """What fp16 makes of a scale; never zero."""
    rounded = scale.clamp(-65504.0, 65504.0).half().float()
    return torch.where(rounded == 0, _SMALLEST_SCALE, rounded)


def _compensate(weight: Tensor, scales: Tensor, order: Tensor, factor: Tensor, fmt: str) -> Tensor:
    """GPTQ: the quantised values [out, in] as floats. `factor` is the upper Cholesky factor of the inverse moments."""
    low, high = _limits(fmt)
    columns = weight.shape[1]
    group = GROUPS[fmt] or columns
    left = weight[:, order]
    q = torch.empty_like(left)
    scale_of = scales[:, order // group]
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        errors = torch.empty(len(weight), end - begin)
        for j in range(begin, end):
            q[:, j] = (left[:, j] / scale_of[:, j]).round_().clamp_(low, high)
            errors[:, j - begin] = (left[:, j] - q[:, j] * scale_of[:, j]) / factor[j, j]
            left[:, j + 1 : end].addr_(errors[:, j - begin], factor[j, j + 1 : end], alpha=-1)
        left[:, end:] -= errors @ factor[begin:end, end:]
    back = torch.empty_like(order)
    back[order] = torch.arange(columns)
    return q[:, back]


def _descend(weight: Tensor, energy: Tensor, q: Tensor, scales: Tensor, group: int) -> None:
    """One sweep over the values, then one over the scales; `q` and `scales` are changed."""
    spread = scales.repeat_interleave(group, 1)[:, : weight.shape[1]]
    slope = (weight - q * spread) @ energy  # [out, in]: half the slope of the squared error, negated
    for begin in range(0, weight.shape[1], _BLOCK):
        end = min(begin + _BLOCK, weight.shape[1])
        moves = torch.empty(len(weight), end - begin)
        for j in range(begin, end):
            best = (q[:, j] + slope[:, j] / (energy[j, j] * spread[:, j])).round_().clamp_(-8, 7)
            moves[:, j - begin] = (best - q[:, j]) * spread[:, j]
            q[:, j] = best
            slope[:, j + 1 : end].addr_(moves[:, j - begin], energy[j, j + 1 : end], alpha=-1)
            slope[:, begin : j + 1].addr_(moves[:, j - begin], energy[j, begin : j + 1], alpha=-1)
        slope[:, :begin] -= moves @ energy[begin:end, :begin]
        slope[:, end:] -= moves @ energy[begin:end, end:]
    for k in range(scales.shape[1]):
        part = slice(k * group, (k + 1) * group)
        values = q[:, part]
        curvature = ((values @ energy[part, part]) * values).sum(1)
        step = (values * slope[:, part]).sum(1) / curvature.clamp_min(1e-30)
        new = _as_half(torch.where(curvature > 0, scales[:, k] + step, scales[:, k]))
        slope -= (values * (new - scales[:, k])[:, None]) @ energy[part]
        scales[:, k] = new
