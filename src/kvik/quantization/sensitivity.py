"""Which projections suffer from few bits, measured; and which of them to raise to int8 for a wanted loss.

Each projection is rounded alone, to nearest, and the divergence of the whole model's predictions from the plain ones is
what that costs. Small errors add up, nearly: so the divergence of any choice can be foretold from theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvik.kernels.api import LinearWeight
from kvik.kernels.reference import ReferenceOps
from kvik.models.loader import open_checkpoint
from kvik.models.spec import DecoderSpec
from kvik.models.weights import EMBEDDING, FINAL_NORM, LM_HEAD
from kvik.quantization.convert import Baseline, read_layer, read_plain
from kvik.quantization.formats import ROLES, StoredQuantization, role_sizes
from kvik.quantization.receipt import kl_divergence
from kvik.quantization.reference import dequantize, quantize
from kvik.quantization.windows import LayerStream

__all__ = ["raised", "sensitivities"]


@torch.no_grad()
def sensitivities(path: Path, spec: DecoderSpec, fmt: str, windows: Tensor) -> dict[str, float]:
    """'LAYER.ROLE' to the KL divergence, in nats per token, when that projection alone is rounded to `fmt`.

    `windows` [num_windows, length] are token ids. One layer at a time is in memory, beside the embedding and the hidden
    states of `windows` for every projection. Raises ModelLoadError for a bad checkpoint.
    """
    checkpoint = open_checkpoint(path, spec)
    embedding = read_plain(checkpoint, EMBEDDING)
    stream, names = LayerStream(spec, windows, embedding), list[str]()
    for index in range(spec.num_layers):
        layer, before = read_layer(checkpoint, spec, index), stream.hidden[: len(windows)]
        stream.advance(index, layer)
        states = [stream.hidden]
        for role in ROLES:
            linear: LinearWeight = getattr(layer, role)
            values: dict[str, Any] = {role: replace(linear, weight=dequantize(*quantize(linear.weight, fmt), fmt))}
            states.append(stream.block(index, replace(layer, **values), before))
            names.append(f"{index}.{role}")
        stream.hidden = torch.cat(states)
    norm = read_plain(checkpoint, FINAL_NORM).float()
    head = embedding if spec.tie_word_embeddings else read_plain(checkpoint, LM_HEAD)
    hidden = ReferenceOps().rms_norm(stream.hidden, norm, spec.rms_norm_eps)
    total = dict.fromkeys(names, 0.0)
    for plain, *states in hidden.view(-1, *windows.shape, spec.hidden_size).unbind(1):
        baseline = Baseline(plain, head)
        scores = baseline.logits(plain)
        for name, state in zip(names, states, strict=True):
            total[name] += float(kl_divergence(scores, baseline.logits(state)).mean()) / len(windows)
    return total


def raised(
    costs: Mapping[str, float], spec: DecoderSpec, stored: StoredQuantization, divergence: float, wanted: float
) -> dict[str, str]:
    """Overrides that bring the measured `divergence` of `stored` down to `wanted`, as far as `costs` foretell it.

    Beside those of `stored`, at least one more projection becomes int8, first what saves most for a byte.
    """
    sizes = role_sizes(spec)
    overrides = dict(stored.overrides)
    left = {name: cost for name, cost in costs.items() if name not in overrides}
    order = sorted(left, key=lambda name: -left[name] / sizes[name.split(".")[1]])
    before = remaining = sum(left.values())
    for name in order:
        if overrides != stored.overrides and remaining * divergence <= wanted * before:
            break
        overrides[name] = "int8"
        remaining -= left[name]
    return overrides
