"""Names of a checkpoint's tensors and the place of each in the decoder's (stacked) weights.

`layer_views` is the name table: a checkpoint name maps to a view of the tensor it fills, so loading is one copy per
name and nothing is stacked afterwards. All architectures of this package share the table. `random_fill` makes weights
without a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from kvik.kernels.api import LinearWeight
from kvik.models.decoder import LayerWeights, allocate_layer
from kvik.models.spec import DecoderSpec

__all__ = ["EMBEDDING", "FINAL_NORM", "LM_HEAD", "Fill", "is_ignored", "layer_views", "parameter_shapes", "random_fill"]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

Fill = Callable[[Mapping[str, Tensor]], None]
"""Fills tensors by their names in a checkpoint."""

# Tensors that some checkpoints carry and no model needs: RoPE frequencies are computed from the config.
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")


def is_ignored(name: str, spec: DecoderSpec) -> bool:
    """Whether a checkpoint may have the tensor `name` although nothing is filled from it."""
    return (spec.tie_word_embeddings and name == LM_HEAD) or _IGNORED.fullmatch(name) is not None


def layer_views(spec: DecoderSpec, index: int, layer: LayerWeights) -> dict[str, Tensor]:
    """Every name that the checkpoint must have for a layer, with the view of `layer` that its tensor is copied to."""
    return {f"model.layers.{index}.{name}": view for name, view in _layer_views(spec, layer)}


def parameter_shapes(spec: DecoderSpec) -> dict[str, torch.Size]:
    """Every name that the checkpoint must have, with the shape of its tensor."""
    layer = allocate_layer(spec, torch.float32, torch.device("meta"))
    shapes = {EMBEDDING: torch.Size((spec.vocab_size, spec.hidden_size)), FINAL_NORM: torch.Size((spec.hidden_size,))}
    for index in range(spec.num_layers):
        shapes |= {name: view.shape for name, view in layer_views(spec, index, layer).items()}
    if not spec.tie_word_embeddings:
        shapes[LM_HEAD] = shapes[EMBEDDING]
    return shapes


def _layer_views(spec: DecoderSpec, layer: LayerWeights) -> Iterator[tuple[str, Tensor]]:
    yield "input_layernorm.weight", layer.attention_norm
    yield "post_attention_layernorm.weight", layer.mlp_norm
    if layer.q_norm is not None and layer.k_norm is not None:
        yield "self_attn.q_norm.weight", layer.q_norm
        yield "self_attn.k_norm.weight", layer.k_norm
    heads = {"self_attn.q_proj": spec.q_size, "self_attn.k_proj": spec.kv_size, "self_attn.v_proj": spec.kv_size}
    yield from _stacked(layer.qkv, heads)
    yield from _stacked(layer.o, {"self_attn.o_proj": spec.hidden_size})
    yield from _stacked(layer.gate_up, {"mlp.gate_proj": spec.intermediate_size, "mlp.up_proj": spec.intermediate_size})
    yield from _stacked(layer.down, {"mlp.down_proj": spec.hidden_size})


def _stacked(linear: LinearWeight, rows: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """The parts of a projection whose output rows are those of several checkpoint tensors, one below the other."""
    sizes = list(rows.values())
    for name, part in zip(rows, torch.split_with_sizes(linear.weight, sizes), strict=True):
        yield f"{name}.weight", part
    if linear.bias is not None:
        for name, part in zip(rows, torch.split_with_sizes(linear.bias, sizes), strict=True):
            yield f"{name}.bias", part


def random_fill(spec: DecoderSpec, seed: int, device: torch.device) -> Fill:
    """Random weights that keep activations near unit variance; the same `seed` and device give the same weights.

    Matrices are uniform with variance 1 / in_features, those that write to the residual stream smaller by
    sqrt(2 * num_layers), norms are one and biases zero.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def fill(views: Mapping[str, Tensor]) -> None:
        for name, view in views.items():
            if name.endswith("norm.weight"):
                view.fill_(1.0)
            elif name.endswith(".bias"):
                view.zero_()
            else:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                variance = 1 / view.shape[1] / (2 * spec.num_layers if writes_residual else 1)
                bound = (3 * variance) ** 0.5
                view.uniform_(-bound, bound, generator=generator)

    return fill
