"""Rounding that knows what the weights are multiplied with.

GPTQ (Frantar et al. 2022, arXiv:2210.17323): inputs are quantised one after the other, and the error that each makes
in the outputs is made good, as far as it can be, by the inputs that are still to come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "calibrated", "gptq"]


@dataclass(slots=True, eq=False)
class Moments:
    """x.T @ x summed over the inputs of a projection, [in, in] fp32, and how many there were."""

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


def calibrated(fmt: str, moments: Moments) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A quantiser of weights [out, in] that are multiplied with inputs of `moments`."""
    return lambda weight: gptq(weight, fmt, moments)


def gptq(weight: Tensor, fmt: str, moments: Moments, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    raise NotImplementedError
