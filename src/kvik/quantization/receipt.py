"""What quantisation cost: the comparison of a quantised model with the unquantised one, on text that neither has seen.

Every position of every window is compared. The unquantised side is exact: the checkpoint's weights, computed in fp32.
The quantised side is what runs: the kernels of this machine, with their quantised activations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvik.quantization.formats import StoredQuantization
from kvik.quantization.windows import Scorer, hidden_states, kv_layers

__all__ = ["Quality", "Receipt", "compare", "describe_receipt", "kl_divergence"]

_SCORES_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class Quality:
    """How far a model is from another. Divergences are in nats per token."""

    top1_agreement: float  # share of positions at which both find the same token likeliest
    kl_divergence: float  # mean KL(unquantised || quantised)
    perplexity: float
    perplexity_unquantized: float
    num_tokens: int
    window: int

    @property
    def perplexity_change(self) -> float:
        return self.perplexity / self.perplexity_unquantized - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """`quantization_receipt.json`."""

    model: str
    format: str
    head_format: str
    overrides: Mapping[str, str]
    bits_per_weight: float  # of the blocks' projections, scales included
    calibration: str | None
    text: str
    quality: Quality
    size_bytes: int
    size_bytes_unquantized: int
    decode_tok_s: float | None
    prefill_tok_s: float | None
    kernels: str
    machine: Mapping[str, Any]
    kvik_version: str

    def to_json(self) -> dict[str, Any]:
        """Plain values; the quality's fields stand beside the others."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        quality = dataclasses.asdict(fields.pop("quality"))
        return {
            **fields,
            "machine": dict(self.machine),
            "overrides": dict(self.overrides),
            **quality,
            "perplexity_change": self.quality.perplexity_change,
        }


def compare(
    model: Scorer, plain_hidden: Tensor, plain_logits: Callable[[Tensor], Tensor], windows: Tensor, dtype: torch.dtype
) -> Quality:
    """Compare `model`, with a KV cache of `dtype`, with the one whose final hidden states are `plain_hidden`.

    `plain_hidden` [windows.numel(), hidden_size], in the order of `windows` [num_windows, length].
    """
    length = windows.shape[1]
    targets = windows.roll(-1, 1).reshape(-1)
    has_target = (torch.arange(length) < length - 1).repeat(len(windows))
    rows_at_once = max(1, _SCORES_AT_ONCE // model.spec.vocab_size)
    agree, divergence, begin = 0, 0.0, 0
    losses = [0.0, 0.0]
    for hidden in hidden_states(model, windows, kv_layers(model.spec, length, dtype)):
        for first in range(0, len(hidden), rows_at_once):
            part = hidden[first : first + rows_at_once]
            rows = slice(begin, begin + len(part))
            begin = rows.stop
            scores = [plain_logits(plain_hidden[rows]), model.logits(part)]
            agree += int((scores[0].argmax(1) == scores[1].argmax(1)).sum())
            divergence += float(kl_divergence(*scores).double().sum())
            for i, score in enumerate(scores):
                picked = score.log_softmax(1).gather(1, targets[rows, None])[has_target[rows]]
                losses[i] -= float(picked.double().sum())
    assert begin == windows.numel() == len(plain_hidden)
    count = max(1, int(has_target.sum()))
    before, after = (math.exp(loss / count) for loss in losses)
    return Quality(agree / begin, divergence / begin, after, before, begin, length)


def kl_divergence(plain: Tensor, quantised: Tensor) -> Tensor:
    """KL(plain || quantised) of each row, [num_rows], of scores [num_rows, vocab_size]."""
    logs = plain.log_softmax(1)
    return (logs.exp() * (logs - quantised.log_softmax(1))).sum(1)


def describe_receipt(stored: StoredQuantization) -> str:
    """The receipt of a quantised folder in one line."""
    head = "" if stored.head_format == stored.format else f" (output head {stored.head_format})"
    raised = f", {len(stored.overrides)} projections in other formats" if stored.overrides else ""
    facts = f"weights quantised to {stored.format}{head}{raised}"
    receipt = stored.receipt
    if not receipt:
        return f"{facts}, without a receipt"
    try:
        quality = (
            f"top-1 agreement {receipt['top1_agreement']:.2%}, KL divergence {receipt['kl_divergence']:.2g},"
            f" perplexity {receipt['perplexity_change']:+.2%} on {receipt['num_tokens']:,} tokens of {receipt['text']}"
        )
        sizes = f"{receipt['size_bytes'] / 1e6:,.1f} MB of {receipt['size_bytes_unquantized'] / 1e6:,.1f}"
    except (KeyError, TypeError, ValueError):
        return f"{facts}, with a receipt that is damaged"
    speeds = [
        f"{name} {receipt[key]:,.0f} tok/s"
        for name, key in (("decode", "decode_tok_s"), ("prefill", "prefill_tok_s"))
        if isinstance(receipt.get(key), (int, float))
    ]
    return "; ".join([facts, quality, sizes, *speeds])
