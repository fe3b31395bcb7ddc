"""Building a decoder from a checkpoint: strict and streaming, layer by layer.

Names and shapes are compared with the files' headers first: every parameter must be there once, every tensor used or
known to be needless; anything else is one error that lists the names. Then each layer's tensors are copied to their
places and handed to `pack`, which may turn projections into another form (quantised, prepacked): the plain form of no
more than one layer exists at a time. To a GPU they go through a `WeightStream`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kvik.attention.base import AttentionBackend
from kvik.errors import ModelLoadError
from kvik.kernels.api import LinearWeight, Ops
from kvik.layers.rope import RopeTable
from kvik.models.checkpoint import Checkpoint
from kvik.models.decoder import Decoder, DecoderWeights, allocate_layer
from kvik.models.spec import DecoderSpec
from kvik.models.weight_stream import WeightStream
from kvik.models.weights import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    Fill,
    is_ignored,
    layer_views,
    parameter_shapes,
    random_fill,
)
from kvik.quantization.formats import SCALE_SUFFIX, StoredQuantization
from kvik.quantization.loading import (
    PackQuantized,
    build_quantized_weights,
    dequantized,
    expected_tensors,
    read_values,
)

__all__ = [
    "Pack", "build_weights", "checkpoint_dtype", "keep_plain", "load_model", "load_weights", "open_checkpoint",
    "stream_weights",
]  # fmt: skip

Pack = Callable[[str, LinearWeight], LinearWeight]
"""`pack(role, weight)` for role qkv, o, gate_up, down and lm_head: the form in which the projection is kept."""


def keep_plain(role: str, weight: LinearWeight) -> LinearWeight:
    """A projection as the checkpoint has it."""
    return weight


def load_model(
    path: Path,
    spec: DecoderSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops[Any],
    attention: AttentionBackend,
    max_model_len: int,
    load_format: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Decoder:
    """The decoder of `spec` on `device` with the weights in the folder `path`, converted to `dtype`.

    RoPE tables cover positions below `max_model_len`; the rest as in `load_weights`. Raises ModelLoadError.
    """
    weights = load_weights(
        path, spec, dtype=dtype, device=device, load_format=load_format, seed=seed, progress=progress
    )
    return Decoder(spec, weights, RopeTable(spec.rope, max_model_len, device), ops, attention)


def load_weights(
    path: Path,
    spec: DecoderSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    seed: int = 0,
    progress: bool = True,
    pack: Pack = keep_plain,
    stored: StoredQuantization | None = None,
    pack_quantized: PackQuantized | None = None,
    finite: bool = False,
) -> DecoderWeights:
    """The weights in the folder `path`. Raises ModelLoadError listing every name that is wrong.

    `load_format` is auto, safetensors, pt, or dummy for random weights from `seed` (no file is read). `progress` shows
    a bar on a terminal. `stored` says how the folder is quantised: its projections go to `pack_quantized` rather than
    to `pack`, and by default are kept in `dtype`. With `finite`, NaN and infinity in a weight are errors, too.
    """
    if load_format == "dummy":
        return build_weights(spec, dtype, device, random_fill(spec, seed, device), pack)
    checkpoint = open_checkpoint(path, spec, load_format, stored)
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(
                total=len(checkpoint.tensors),
                desc="Loading weights",
                unit="tensor",
                delay=0.5,
                leave=False,
                disable=None if progress else True,
            )
        )

        def fill(views: Mapping[str, Tensor]) -> None:
            for name, view in views.items():
                read_values(checkpoint, name, view)
                if finite or name.endswith(SCALE_SUFFIX):  # which kernels would make finite
                    check_finite(name, view)
                bar.update()

        if stored is not None:
            keep = pack_quantized or dequantized(dtype, device)
            return build_quantized_weights(spec, stored, dtype, device, fill, keep)
        if device.type == "cpu" or any(info.start is None for info in checkpoint.tensors.values()):
            return build_weights(spec, dtype, device, fill, pack)
        assert not finite or pack is not keep_plain
        stream = stack.enter_context(WeightStream(checkpoint, device))
        return stream_weights(spec, dtype, device, stream, pack, bar.update, finite=finite)


def stream_weights(
    spec: DecoderSpec,
    dtype: torch.dtype,
    device: torch.device,
    stream: WeightStream,
    pack: Pack = keep_plain,
    progress: Callable[[], object] = lambda: None,
    *,
    finite: bool = False,
) -> DecoderWeights:
    """`build_weights` from a stream. Layers are allocated while earlier ones are on their way, if `pack` allows it."""

    def fill(views: Mapping[str, Tensor]) -> None:
        for name, view in views.items():
            stream.put(name, view)
        if pack is not keep_plain:  # it reads what it packs
            stream.wait(progress)
        for name, view in views.items() if finite else ():
            check_finite(name, view)

    weights = build_weights(spec, dtype, device, fill, pack)
    stream.wait(progress)
    return weights


def build_weights(
    spec: DecoderSpec, dtype: torch.dtype, device: torch.device, fill: Fill, pack: Pack = keep_plain
) -> DecoderWeights:
    """Allocate, fill and pack: the head, while nothing else is in memory beside it, then one layer after the other."""
    head = torch.empty((spec.vocab_size, spec.hidden_size), dtype=dtype, device=device)
    fill({EMBEDDING if spec.tie_word_embeddings else LM_HEAD: head})
    packed_head = pack("lm_head", LinearWeight(head))
    del head
    embedding = packed_head.weight
    if not spec.tie_word_embeddings:
        embedding = torch.empty((spec.vocab_size, spec.hidden_size), dtype=dtype, device=device)
        fill({EMBEDDING: embedding})
    layers = []
    for index in range(spec.num_layers):
        layer = allocate_layer(spec, dtype, device)
        fill(layer_views(spec, index, layer))
        layers.append(
            replace(
                layer,
                qkv=pack("qkv", layer.qkv),
                o=pack("o", layer.o),
                gate_up=pack("gate_up", layer.gate_up),
                down=pack("down", layer.down),
            )
        )
    final_norm = torch.empty(spec.hidden_size, dtype=dtype, device=device)
    fill({FINAL_NORM: final_norm})
    return DecoderWeights(embedding, tuple(layers), final_norm, packed_head)


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ModelLoadError for NaN or infinity where they might be hidden: in a weight to be rounded, or in a scale."""
    if not weight.sum(dtype=torch.float32).isfinite():
        raise ModelLoadError(f"{name} holds NaN or infinity, as no quantised weight can; download or make it again")


def open_checkpoint(
    path: Path, spec: DecoderSpec, load_format: str = "auto", stored: StoredQuantization | None = None
) -> Checkpoint:
    """The checkpoint in the folder `path`, its names, dtypes and shapes compared with those of `spec`.

    Raises ModelLoadError listing every name that is wrong.
    """
    checkpoint = Checkpoint(path, load_format)
    _check(path, spec, checkpoint, stored)
    return checkpoint


def _check(path: Path, spec: DecoderSpec, checkpoint: Checkpoint, stored: StoredQuantization | None) -> None:
    """Compare names, dtypes and shapes with those of `spec`."""
    floats: tuple[str, ...] = ("float64", "float32", "float16", "bfloat16")
    expected = {name: (shape, floats) for name, shape in parameter_shapes(spec).items()}
    if stored is not None:
        expected = expected_tensors(spec, stored)
    unexpected, misshaped = [], []
    for name, info in checkpoint.tensors.items():
        if name not in expected:
            checkpoint.skip(name)
            if not is_ignored(name, spec):
                unexpected.append(name)
        elif info.dtype not in expected[name][1]:
            wanted = "unquantised float weights only" if stored is None else f"{' or '.join(expected[name][1])} there"
            raise ModelLoadError(f"{name} in {info.file} is {info.dtype}: Kvik loads {wanted}")
        elif info.shape != expected[name][0]:
            misshaped.append(f"{name} (expected {list(expected[name][0])}, found {list(info.shape)})")
    missing = [name for name in expected if name not in checkpoint.tensors]
    problems = [
        f"{len(names)} {kind}: {_first(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
        if names
    ]
    if problems:
        raise ModelLoadError(
            f"the weights in {path} do not fit {spec.architecture} as its config.json describes it; "
            + "; ".join(problems)
        )


def _first(names: Iterable[str], limit: int = 10) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")


def checkpoint_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that config.json says its weights have (`dtype` or `torch_dtype`), or None if it does not say."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name and name not in known:
        raise ModelLoadError(f"config.json says dtype={name!r}; Kvik computes in {', '.join(known)}")
    return known.get(name)
