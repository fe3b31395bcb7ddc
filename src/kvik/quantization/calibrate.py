"""Rounding that knows what the weights are multiplied with.

GPTQ (Frantar et al. 2022, arXiv:2210.17323), inputs in the order of their energy: one input after the other is
quantised, and the error that it makes in the outputs is made good, as far as it can be, by those still to come. Then,
for int4, sweeps of coordinate descent over values and scales, each step of which lowers the squared error of the
outputs over the calibration text. What is aimed at are the outputs that the unquantised model has (as in GPTAQ, Li et
al. 2025, arXiv:2504.02692): with X the inputs in the quantised model and E those in the exact one, |W E - Q X|^2 is
least for the weights W E X' (X X')^-1, which take W's place, so that layers make good what earlier ones lost. int4
scales begin as the best of a grid, inputs weighted by energy.
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
    """Sums over the tokens of a text: x.T @ x of a projection's inputs x, and exact.T @ x, each [in, in] fp32.

    `exact` are the inputs that the projection has in the unquantised model.
    """

    total: Tensor
    cross: Tensor
    count: int = 0

    @classmethod
    def zero(cls, features: int) -> Moments:
        return cls(torch.zeros(features, features), torch.zeros(features, features))

    @classmethod
    def of(cls, x: Tensor, exact: Tensor | None = None) -> Moments:
        """Those of x [num_tokens, in]."""
        moments = cls.zero(x.shape[1])
        moments.add(x, exact)
        return moments

    def add(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Count x [num_tokens, in]; without `exact`, the inputs are the exact ones."""
        self.total.addmm_(x.T, x)
        self.cross.addmm_((x if exact is None else exact).T, x)
        self.count += len(x)

    def damped(self) -> tuple[Tensor, Tensor]:
        """The means, with something on the diagonals that makes the first safely invertible."""
        total, cross = (moment / max(1, self.count) for moment in (self.total, self.cross))
        energy = float(total.diagonal().mean())
        for mean in (total, cross):
            mean.diagonal().add_(_DAMPING * energy if energy > 0 else 1.0)
        return total, cross


def calibrated(fmt: str, moments: Moments) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A quantiser of weights [out, in] whose inputs have these `moments`: (q int8 [out, in], scales [out, groups])."""
    energy, cross = moments.damped()
    aim = torch.cholesky_solve(cross.double().T, torch.linalg.cholesky(energy.double())).T.float()
    order = torch.argsort(energy.diagonal(), descending=True, stable=True)
    ordered = energy[order][:, order].double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    factor = torch.linalg.cholesky(inverse, upper=True).float()

    def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
        wide = weight.float() @ aim
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
    left = weight.T[order]  # [in, out], as everything below: an input is a contiguous row
    scale_of = scales.T[order // (GROUPS[fmt] or columns)]
    q = torch.empty_like(left)
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        errors = torch.empty(end - begin, len(weight))
        for j in range(begin, end):
            q[j] = (left[j] / scale_of[j]).round_().clamp_(low, high)
            errors[j - begin] = (left[j] - q[j] * scale_of[j]) / factor[j, j]
            left[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j - begin], alpha=-1)
        left[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(columns)
    return q[back].T.contiguous()


def _descend(weight: Tensor, energy: Tensor, q: Tensor, scales: Tensor, group: int) -> None:
    """One sweep over the values, then one over the scales; `q` and `scales` are changed."""
    spread = scales.T.repeat_interleave(group, 0)[: weight.shape[1]]  # [in, out]
    values = q.T.contiguous()
    slope = energy @ (weight.T - values * spread)  # [in, out]: half the slope of the squared error, negated
    for begin in range(0, weight.shape[1], _BLOCK):
        end = min(begin + _BLOCK, weight.shape[1])
        moves = torch.empty(end - begin, len(weight))
        for j in range(begin, end):
            best = (values[j] + slope[j] / (energy[j, j] * spread[j])).round_().clamp_(-8, 7)
            moves[j - begin] = (best - values[j]) * spread[j]
            values[j] = best
            slope[begin:end].addr_(energy[j, begin:end], moves[j - begin], alpha=-1)
        slope[:begin].addmm_(energy[:begin, begin:end], moves, alpha=-1)
        slope[end:].addmm_(energy[end:, begin:end], moves, alpha=-1)
    q.copy_(values.T)
    for k in range(scales.shape[1]):
        part = slice(k * group, (k + 1) * group)
        inner = values[part]
        curvature = ((energy[part, part] @ inner) * inner).sum(0)
        step = (inner * slope[part]).sum(0) / curvature.clamp_min(1e-30)
        new = _as_half(torch.where(curvature > 0, scales[:, k] + step, scales[:, k]))
        slope.addmm_(energy[:, part], inner * (new - scales[:, k]), alpha=-1)
        scales[:, k] = new
