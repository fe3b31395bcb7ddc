"""Drawing tokens from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from kvik.errors import ConfigError
from kvik.ops.checks import check_floating
from kvik.ops.devices import operators
from kvik.sampling_params import SamplingParams

__all__ = ["sample"]


@torch.no_grad()
def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    position: int = 0,
) -> Tensor:
    """A token id for each row of `logits` [rows, vocab_size] -> [rows] int64; -1 for a row without a finite maximum.

    temperature 0 takes the largest logit, the lowest id among equals. Otherwise the logits over `temperature` go
    through top_k (0 is off), top_p and min_p in this order, and argmax(x + Gumbel noise) draws from what is left; row i
    gets the noise of seed + i at `position` of a sequence (docs/numerics.md). So a draw is a function of its arguments,
    and the same on a CPU and a GPU but for the last bit of their logarithms. Raises RequestError for a value that
    `SamplingParams` would not take.

    On a GPU the workspace is allocated in each call, 8 bytes per logit.
    """
    check_floating("sample", "logits", logits)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ConfigError(f"sample: logits must be [rows, vocab_size], got {list(logits.shape)}; use logits.view")
    if position < 0:
        raise ConfigError(f"sample: position is the number of tokens before the one drawn, got {position}")
    if len(logits) == 0:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    return operators(logits.device).sample(logits.contiguous(), params, seed, position)
