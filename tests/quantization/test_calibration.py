"""Calibrated rounding, and how the projections that get more bits are chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_cases import SHAPES, logits, quantize, receipt
from safetensors.torch import load_file
from tiny_models import make_tiny
from torch import Tensor

from kvik.config import EngineConfig
from kvik.kernels.api import LinearWeight
from kvik.models.decoder import LayerWeights
from kvik.models.loader import open_checkpoint
from kvik.models.spec import DecoderSpec
from kvik.models.weights import EMBEDDING
from kvik.quantization import reference
from kvik.quantization.calibrate import calibrated
from kvik.quantization.convert import ROLES, read_layer, read_plain
from kvik.quantization.formats import GROUPS, StoredQuantization, role_sizes
from kvik.quantization.receipt import kl_divergence
from kvik.quantization.sensitivity import raised, sensitivities
from kvik.quantization.windows import LayerStream, hidden_states, kv_layers
from kvik.startup import inspect_model, load_decoder

TEXT = torch.randint(0, 384, (256, 64), generator=torch.Generator().manual_seed(0))


def one_layer(path: Path, name: str) -> tuple[DecoderSpec, LayerWeights, LayerStream]:
    arch, fields = SHAPES[name]
    folder = make_tiny(path / "plain", arch, **fields)
    spec = inspect_model(EngineConfig(str(folder))).spec
    checkpoint = open_checkpoint(folder, spec)
    return spec, read_layer(checkpoint, spec, 0), LayerStream(spec, TEXT, read_plain(checkpoint, EMBEDDING))


def to_nearest(layer: LayerWeights, fmt: str) -> dict[str, tuple[Tensor, Tensor]]:
    return {role: reference.quantize(getattr(layer, role).weight, fmt) for role in ROLES}


def with_weights(layer: LayerWeights, made: Mapping[str, tuple[Tensor, Tensor]], fmt: str) -> LayerWeights:
    values: dict[str, Any] = {
        role: LinearWeight(reference.dequantize(*made[role], fmt), getattr(layer, role).bias) for role in made
    }
    return replace(layer, **values)


@pytest.mark.parametrize("fmt", GROUPS)
@pytest.mark.parametrize("name", ["llama-biases", "qwen3-gqa", "mistral"])
def test_calibration_lowers_the_error_of_a_layers_outputs(name: str, fmt: str, tmp_path: Path) -> None:
    _, layer, stream = one_layer(tmp_path, name)
    target = stream.block(0, layer, stream.hidden)
    start = to_nearest(layer, fmt)
    made = calibrated(0, layer, dict.fromkeys(ROLES, fmt), start, stream, target)

    def error(rounded: Mapping[str, tuple[Tensor, Tensor]]) -> float:
        return float((stream.block(0, with_weights(layer, rounded, fmt), stream.hidden) - target).square().mean())

    assert error(made) < 0.92 * error(start)
    for role, (q, scales) in made.items():
        assert q.dtype == torch.int8 and q.shape == start[role][0].shape and scales.shape == start[role][1].shape
        assert int(q.min()) >= (-127 if fmt == "int8" else -8) and int(q.max()) <= (127 if fmt == "int8" else 7)
        assert fmt == "int8" or torch.equal(scales, scales.half().float())


def test_calibration_survives_weights_and_states_that_are_zero(tmp_path: Path) -> None:
    _, layer, stream = one_layer(tmp_path, "llama")
    layer.o.weight[:, :32] = 0
    layer.down.weight[3] = 0
    stream.hidden[2:] = 0
    start = to_nearest(layer, "int4g32")
    target = stream.block(0, layer, stream.hidden)
    made = calibrated(0, layer, dict.fromkeys(ROLES, "int4g32"), start, stream, target)
    values = with_weights(layer, made, "int4g32")
    assert not values.o.weight[:, :32].any() and not values.down.weight[3].any()
    for role in ROLES:
        plain, now = getattr(layer, role).weight, getattr(values, role).weight
        assert float((now - plain).norm() / plain.norm()) < 0.3


def test_a_sensitivity_is_the_divergence_of_a_model_with_one_rounded_projection(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "plain", "qwen2", tie_word_embeddings=True)
    config = EngineConfig(str(folder), device="cpu", kernels="torch", max_num_seqs=2, max_num_batched_tokens=128)
    info = inspect_model(config)
    decoder, windows = load_decoder(config, info), TEXT[:2]
    costs = sensitivities(folder, info.spec, "int4g128", windows)
    assert set(costs) == {f"{index}.{role}" for index in range(2) for role in ROLES}

    def scores() -> Tensor:
        kv = kv_layers(info.spec, 64, torch.float32, 128)
        return torch.cat([decoder.logits(hidden) for hidden in hidden_states(decoder, windows, kv, 128)])

    plain = scores()
    for name in ("0.qkv", "0.down", "1.gate_up"):
        index, role = name.split(".")
        weight: Tensor = getattr(decoder.weights.layers[int(index)], role).weight
        kept = weight.clone()
        weight.copy_(reference.dequantize(*reference.quantize(kept, "int4g128"), "int4g128"))
        assert costs[name] == pytest.approx(float(kl_divergence(plain, scores()).mean()), rel=1e-3, abs=1e-7)
        weight.copy_(kept)


def test_what_saves_most_for_a_byte_is_raised_first(tmp_path: Path) -> None:
    spec, _, _ = one_layer(tmp_path, "llama")
    costs = {f"{index}.{role}": float(size) for index in range(2) for role, size in role_sizes(spec).items()}
    costs["1.o"] *= 5
    costs["0.down"] *= 3
    total = sum(costs.values())
    stored = StoredQuantization("int4g32")
    for keep in (1.0, 0.999 - costs["1.o"] / total):
        wanted = 0.01 * keep
        chosen = list(raised(costs, spec, stored, 0.01, wanted))
        assert chosen == (["1.o"] if keep == 1 else ["1.o", "0.down"])
    more = raised(costs, spec, replace(stored, overrides={"0.qkv": "int8"}), 0.01, 0.01)
    assert list(more) == ["0.qkv", "1.o"]
    assert set(raised(costs, spec, stored, 0.01, 0.0)) == set(costs)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("plain") / "tiny", "qwen3", num_hidden_layers=4)


def test_the_gate_gives_more_bits_until_it_is_content(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agreements = {}
    for fmt in ("int4g128", "int8"):
        assert quantize(tiny, tmp_path / fmt, fmt) == 0
        agreements[fmt] = receipt(tmp_path / fmt)["top1_agreement"]
    wanted = (agreements["int4g128"] + agreements["int8"]) / 2
    capsys.readouterr()
    assert quantize(tiny, tmp_path / "out", "int4g128", "--min-top1", wanted) == 0
    made = receipt(tmp_path / "out")
    assert made["top1_agreement"] >= wanted
    assert 0 < len(made["overrides"]) < 16 and set(made["overrides"].values()) == {"int8"}
    assert 4.125 < made["bits_per_weight"] < 8
    shown = capsys.readouterr().out
    assert ", ".join(made["overrides"]) in shown and f"{made['bits_per_weight']:.2f} bits a weight" in shown
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["overrides"] == made["overrides"]
    sizes = [receipt(tmp_path / name)["size_bytes"] for name in ("int4g128", "out", "int8")]
    assert sizes[0] < sizes[1] < sizes[2]
    assert logits(tmp_path / "out").isfinite().all()


def test_calibration_gives_the_same_weights_twice_and_better_ones(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    for name in ("a", "b"):
        flags = ["--calibration", text, "--text", text, "--threads", 1]
        assert quantize(tiny, tmp_path / name, "int4", *flags) == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert quantize(tiny, tmp_path / "none", "int4") == 0
    assert receipt(tmp_path / "a")["kl_divergence"] < 0.8 * receipt(tmp_path / "none")["kl_divergence"]
