"""Loading: every format gives the same weights, and every damaged or mismatched checkpoint one readable error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny
from torch import Tensor

from kvik.attention.registry import select_backend
from kvik.errors import ModelLoadError
from kvik.kernels.reference import ReferenceOps
from kvik.models.decoder import Decoder
from kvik.models.hub import load_config
from kvik.models.loader import load_model
from kvik.models.registry import build_spec

CPU = torch.device("cpu")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def load(path: Path, load_format: str = "auto", *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    return load_model(
        path, build_spec(load_config(path)), dtype=dtype, device=CPU, load_format=load_format, seed=seed,
        ops=ReferenceOps(), attention=select_backend("auto", CPU), max_model_len=32, progress=False,
    )  # fmt: skip


def same(a: Decoder, b: Decoder) -> bool:
    pairs = zip(a.weights.tensors(), b.weights.tensors(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "model", "qwen2", tokenizer=False)


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit(model: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(model / "model.safetensors")
    change(state)
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})


def shard(model: Path, suffix: str = "safetensors") -> dict[str, str]:
    """Split the single file in two with an index; returns the index's weight map."""
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    stem, names = ("model", sorted(state)) if suffix == "safetensors" else ("pytorch_model", sorted(state))
    weight_map = {name: f"{stem}-{i % 2 + 1:05}-of-00002.{suffix}" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        part = {name: state[name] for name in names if weight_map[name] == file}
        if suffix == "safetensors":
            save_file(part, model / file)
        else:
            torch.save(part, model / file)
    (model / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def fails(model: Path, message: str, load_format: str = "auto") -> str:
    with pytest.raises(ModelLoadError, match=message) as caught:
        load(model, load_format)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What loads


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_load_like_one_file(original: Path, model: Path, suffix: str) -> None:
    shard(model, suffix)
    assert same(load(model), load(original))


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_loads_like_safetensors(original: Path, model: Path, zipped: bool) -> None:
    torch.save(
        load_file(model / "model.safetensors"), model / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
    )
    (model / "model.safetensors").unlink()
    assert same(load(model), load(original))
    assert same(load(model, "pt"), load(original))


def test_a_file_that_may_not_be_read_is_not_corrupt(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert "model.safetensors: Permission denied; check the path and its permissions" in fails(model, "cannot read")


def test_auto_prefers_safetensors_and_an_explicit_format_is_obeyed(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"nothing")
    load(model)
    fails(model, r"pytorch_model.bin holds more than tensors or is corrupt", "pt")


def test_fused_parts_are_where_they_belong(model: Path) -> None:
    state, decoder = load_file(model / "model.safetensors"), load(model)
    layer, prefix = decoder.weights.layers[1], "model.layers.1."
    qkv = torch.cat([state[f"{prefix}self_attn.{x}_proj.weight"] for x in "qkv"])
    biases = torch.cat([state[f"{prefix}self_attn.{x}_proj.bias"] for x in "qkv"])
    gate_up = torch.cat([state[f"{prefix}mlp.{x}_proj.weight"] for x in ("gate", "up")])
    assert torch.equal(layer.qkv.weight, qkv)
    assert layer.qkv.bias is not None
    assert torch.equal(layer.qkv.bias, biases)
    assert torch.equal(layer.gate_up.weight, gate_up)


def test_weights_are_converted(original: Path) -> None:
    wide, narrow = load(original), load(original, dtype=torch.bfloat16)
    pairs = zip(wide.weights.tensors(), narrow.weights.tensors(), strict=True)
    assert all(torch.equal(x.bfloat16(), y) for x, y in pairs)


def test_needless_tensors_are_ignored(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "tied", "llama", tie_word_embeddings=True, tokenizer=False)
    before = load(model)
    edit(
        model,
        lambda s: s.update(
            {"lm_head.weight": torch.ones(3), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
        ),
    )
    after = load(model)
    assert same(before, after)
    assert after.weights.lm_head.weight is after.weights.embedding


def test_dummy_weights_depend_on_the_seed_only(model: Path) -> None:
    (model / "model.safetensors").unlink()
    first, again, other = (load(model, "dummy", seed=seed) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)
    w = first.weights
    assert torch.equal(w.final_norm, torch.ones_like(w.final_norm))
    assert 0.9 < float(w.embedding.std()) * w.embedding.shape[1] ** 0.5 < 1.1


# What does not


def test_missing_unexpected_and_misshaped_names_are_listed(model: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        del state["model.norm.weight"]
        state["model.layers.7.extra"] = torch.ones(2)
        state[Q_PROJ] = torch.ones(5, 64)

    edit(model, change)
    text = fails(model, "1 missing: model.norm.weight; 1 unexpected: model.layers.7.extra; 1 misshaped: ")
    assert f"{Q_PROJ} (expected [64, 64], found [5, 64])" in text
    assert "Qwen2ForCausalLM" in text


def test_at_most_ten_names_are_listed(model: Path) -> None:
    edit(model, lambda state: [state.pop(name) for name in list(state) if "layers.0" in name])
    text = fails(model, "12 missing: ")
    assert text.count("model.layers.0") == 10
    assert text.endswith(", …")


def test_a_tensor_in_two_shards(model: Path) -> None:
    weight_map = shard(model)
    other = next(file for file in weight_map.values() if file != weight_map[Q_PROJ])
    state = load_file(model / other)
    save_file({**state, Q_PROJ: torch.ones(64, 64)}, model / other)
    fails(model, f"{Q_PROJ} is in the checkpoint twice: in .* and in ")


def test_quantised_tensors(model: Path) -> None:
    edit(model, lambda state: state.update({Q_PROJ: torch.ones(64, 64, dtype=torch.int8)}))
    fails(model, f"{Q_PROJ} in .* is int8")


@pytest.mark.parametrize("keep", [0, 5, 100, 50_000])
def test_truncated_safetensors(model: Path, keep: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    fails(model, rf"model.safetensors \({keep} bytes\) is truncated or corrupt")


def test_garbage_and_truncated_bin(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"<html>not found</html>" * 100)
    fails(model, "truncated or corrupt")
    torch.save(load_file_of_ones(), model / "pytorch_model.bin")
    whole = (model / "pytorch_model.bin").read_bytes()
    for keep in (0, 10, len(whole) // 2, len(whole) - 10):
        (model / "pytorch_model.bin").write_bytes(whole[:keep])
        fails(model, "or corrupt", "pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("old", "new"), [(b"model.norm", b"\xffodel.norm"), (b"q\x01", b"hc")])
def test_a_bin_with_other_bytes(model: Path, old: bytes, new: bytes, zipped: bool) -> None:
    torch.save(load_file_of_ones(), model / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    whole = (model / "pytorch_model.bin").read_bytes()
    (model / "pytorch_model.bin").write_bytes(whole.replace(old, new))
    fails(model, "or corrupt", "pt")


def load_file_of_ones() -> dict[str, Tensor]:
    return {"model.norm.weight": torch.ones(64, 64)}


class Payload:
    """What a hostile checkpoint does: run code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_a_pickle_is_not_executed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model.norm.weight": Payload()}, model / "pytorch_model.bin")
    fails(model, "runs no code from a checkpoint", "pt")
    assert not Path("executed").exists()


def test_bin_without_tensors(model: Path) -> None:
    torch.save([1, 2], model / "pytorch_model.bin")
    fails(model, "holds a list, not a dictionary", "pt")
    torch.save({"a": 1}, model / "pytorch_model.bin")
    fails(model, "'a' is a int, not a tensor", "pt")


def test_an_index_that_names_absent_shards(model: Path) -> None:
    weight_map = shard(model)
    gone = sorted(set(weight_map.values()))[1]
    (model / gone).unlink()
    fails(model, f"1 of 2 files that .*index.json names are absent: {gone}")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index(model: Path, text: str) -> None:
    shard(model)
    (model / "model.safetensors.index.json").write_text(text)
    fails(model, "model.safetensors.index.json is damaged")


def test_an_index_that_points_outside(model: Path) -> None:
    shard(model)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q_PROJ: "../other.safetensors"}}))
    fails(model, "not a file of its own folder")


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    fails(model, r"no model.safetensors or pytorch_model.bin \(nor its index\).*it has adapter_model.safetensors")
    fails(model, r"no pytorch_model.bin ", "pt")
    (model / "adapter_model.safetensors").unlink()
    fails(model, "no weight files at all")


_MEASURE = """
import resource, sys
from pathlib import Path
import torch
from kvik.attention.registry import select_backend
from kvik.kernels.reference import ReferenceOps
from kvik.models.hub import load_config
from kvik.models.loader import load_model
from kvik.models.registry import build_spec
path, cpu = Path(sys.argv[1]), torch.device("cpu")
spec = build_spec(load_config(path))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decoder = load_model(path, spec, dtype=torch.bfloat16, device=cpu, ops=ReferenceOps(),
                     attention=select_backend("auto", cpu), max_model_len=32)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024, sum(t.nbytes for t in decoder.weights.tensors()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_peak_memory_is_the_model_and_about_one_shard(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shards, shard_bytes = write_shards(tmp_path, config), 0
    shard_bytes = max(file.stat().st_size for file in shards)
    command = [sys.executable, "-c", _MEASURE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, weights = map(int, result.stdout.split())
    assert sum(file.stat().st_size for file in shards) > 380e6
    assert grown < weights + 1.5 * shard_bytes + 30e6
    assert result.stderr == ""  # no progress bar where there is no terminal


def write_shards(path: Path, config: dict[str, Any]) -> list[Path]:
    """An fp32 checkpoint of about 400 MB (200 MB as bf16), one shard per layer, written without holding it whole."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {f"self_attn.{x}_proj": (hidden, hidden) for x in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    shapes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    ends = {
        "model.embed_tokens": (config["vocab_size"], hidden),
        "lm_head": (config["vocab_size"], hidden),
        "model.norm": (hidden,),
    }
    parts = [{f"model.layers.{i}.{name}": s for name, s in shapes.items()} for i in range(config["num_hidden_layers"])]
    weight_map = {}
    for number, part in enumerate([ends, *parts]):
        file = f"model-{number}.safetensors"
        save_file({f"{name}.weight": torch.ones(shape) for name, shape in part.items()}, path / file)
        weight_map |= {f"{name}.weight": file for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sorted(path.glob("*.safetensors"))
