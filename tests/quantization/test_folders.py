"""Quantised folders: what they hold, that they load to the same bits as quantising on load, and damage."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_cases import PROMPT, SHAPES, edit, logits, quantize
from safetensors.torch import load_file
from tiny_models import make_tiny
from torch import Tensor

from kvik import LLM, SamplingParams
from kvik.cli.main import main
from kvik.errors import ConfigError, ModelLoadError
from kvik.kernels.cpu.native import available

needs_native = pytest.mark.skipif(not available(), reason="the native kernels were not compiled")
FORMATS = ("int8", "int4", "int4g128")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("plain") / "tiny", "qwen3", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    for fmt in FORMATS:
        assert quantize(tiny, root / fmt, fmt) == 0
    return {fmt: root / fmt for fmt in FORMATS}


# What loads


@needs_native
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_folder_loads_to_the_bits_of_quantising_on_load(name: str, fmt: str, tmp_path: Path) -> None:
    arch, fields = SHAPES[name]
    plain = make_tiny(tmp_path / "plain", arch, dtype=torch.bfloat16, **fields)
    assert quantize(plain, tmp_path / "out", fmt) == 0
    saved = logits(tmp_path / "out", kernels="native")
    assert torch.equal(saved, logits(plain, quantization=fmt, kernels="native"))
    assert torch.equal(logits(tmp_path / "out", kernels="torch"), logits(plain, quantization=fmt, kernels="torch"))


@needs_native
@pytest.mark.parametrize("fmt", FORMATS)
def test_greedy_tokens_are_those_of_quantising_on_load(fmt: str, tiny: Path, made: dict[str, Path]) -> None:
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    with LLM(str(tiny), quantization=fmt) as on_load, LLM(str(made[fmt])) as saved:
        tokens = [llm.generate([PROMPT], params)[0].token_ids for llm in (on_load, saved)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("fmt", FORMATS)
def test_torch_is_close_to_the_kernels(fmt: str, made: dict[str, Path]) -> None:
    plain = logits(made[fmt], kernels="torch", dtype="float32")
    auto = logits(made[fmt], dtype="float32")
    assert float((plain - auto).norm() / plain.norm()) < 0.05


def test_files_have_the_names_of_the_checkpoint(tiny: Path, made: dict[str, Path]) -> None:
    before = load_file(tiny / "model.safetensors")
    for fmt, (dtype, width, scale_dtype) in {
        "int8": (torch.int8, 64, torch.float32),
        "int4": (torch.uint8, 32, torch.float16),
    }.items():
        state = load_file(made[fmt] / "model.safetensors")
        scales = {name for name in state if name.endswith("_scale")}
        assert set(state) - scales == set(before)
        assert state[Q_PROJ].dtype == dtype
        assert state[Q_PROJ].shape[1] == width
        assert state[f"{Q_PROJ}_scale"].dtype == scale_dtype
        assert state["lm_head.weight"].dtype == torch.int8
        for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_norm.weight"):
            assert torch.equal(state[name], before[name])
        assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {
            file.name for file in made[fmt].iterdir()
        }
        config = json.loads((made[fmt] / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "kvik"
        assert config["quantization_config"]["receipt"] == json.loads(
            (made[fmt] / "quantization_receipt.json").read_text()
        )


def test_companions_are_copied_with_their_folders(tmp_path: Path) -> None:
    from kvik.quantization.writer import copy_companions

    source, copy = tmp_path / "source", tmp_path / "copy"
    (source / "additional_chat_templates").mkdir(parents=True)
    copy.mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    copy_companions(source, copy)
    assert (copy / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"


def test_shards_make_the_same_model(tiny: Path, made: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    from kvik.quantization import writer

    monkeypatch.setattr(writer.ShardWriter.__init__, "__defaults__", (20_000,))
    assert quantize(tiny, tmp_path / "out", "int8") == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert torch.equal(logits(tmp_path / "out"), logits(made["int8"]))


def test_a_sharded_checkpoint_is_read(tiny: Path, made: dict[str, Path], tmp_path: Path) -> None:
    make_tiny(tmp_path / "plain", "qwen3", dtype=torch.bfloat16, max_shard_size="50KB")
    assert (tmp_path / "plain" / "model.safetensors.index.json").is_file()
    assert quantize(tmp_path / "plain", tmp_path / "out", "int8") == 0
    assert torch.equal(logits(tmp_path / "out"), logits(made["int8"]))


def test_the_receipt_is_logged_and_shown(
    made: dict[str, Path], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "kvik"):
        logits(made["int4"])
    assert "weights quantised to int4g32 (output head int8); top-1 agreement" in caplog.text
    assert main(["info", str(made["int4"])]) == 0
    assert "int4g32 (output head int8); top-1 agreement" in capsys.readouterr().out


def test_without_native_kernels_one_warning_says_what_it_takes(
    tiny: Path, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from kvik.kernels.cpu import native

    want = logits(made["int4"], kernels="torch")
    monkeypatch.setattr(native, "available", lambda: False)
    params = SamplingParams(temperature=0, max_tokens=2)
    with caplog.at_level(logging.WARNING, "kvik"), LLM(str(tiny), device="cpu", quantization="int4") as llm:
        llm.generate(PROMPT, params)
    assert [record.message for record in caplog.records if "without the native kernels" in record.message]
    assert len(caplog.records) == 1
    assert torch.equal(logits(made["int4"]), want)


def test_a_folder_can_be_made_without_native_kernels(
    tiny: Path, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvik.kernels.cpu import native

    monkeypatch.setattr(native, "available", lambda: False)
    assert quantize(tiny, tmp_path / "out", "int4") == 0
    a, b = load_file(tmp_path / "out" / "model.safetensors"), load_file(made["int4"] / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# What does not


def drop_scale(state: dict[str, Tensor]) -> None:
    del state[f"{Q_PROJ}_scale"]


def narrow(state: dict[str, Tensor]) -> None:
    state[Q_PROJ] = state[Q_PROJ][:, :-1].contiguous()


def short_scale(state: dict[str, Tensor]) -> None:
    state[f"{Q_PROJ}_scale"] = state[f"{Q_PROJ}_scale"][:-1].contiguous()


def plain_weight(state: dict[str, Tensor]) -> None:
    state[Q_PROJ] = torch.zeros(64, 64)


def extra(state: dict[str, Tensor]) -> None:
    state["model.layers.0.extra_scale"] = torch.zeros(1)


def broken_scale(state: dict[str, Tensor]) -> None:
    state[f"{Q_PROJ}_scale"].view(-1)[3] = float("nan")


def endless_scale(state: dict[str, Tensor]) -> None:
    state[f"{Q_PROJ}_scale"].view(-1)[3] = float("inf")


@pytest.mark.parametrize("fmt", ["int8", "int4"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_scale, r"1 missing: model.layers.1.self_attn.q_proj.weight_scale"),
        (narrow, r"1 misshaped: model.layers.1.self_attn.q_proj.weight \(expected"),
        (short_scale, r"1 misshaped: model.layers.1.self_attn.q_proj.weight_scale \(expected"),
        (plain_weight, r"q_proj.weight in .* is float32: Kvik loads u?int8 there"),
        (extra, r"1 unexpected: model.layers.0.extra_scale"),
        (broken_scale, r"model.layers.1.self_attn.q_proj.weight_scale holds NaN or infinity"),
        (endless_scale, r"model.layers.1.self_attn.q_proj.weight_scale holds NaN or infinity"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_folders_are_refused(
    fmt: str, change: Callable[[dict[str, Tensor]], None], message: str, made: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made[fmt], tmp_path / "damaged"))
    edit(folder, change)
    with pytest.raises(ModelLoadError, match=message):
        logits(folder)


def test_another_quantization_than_the_folders_is_refused(made: dict[str, Path]) -> None:
    logits(made["int8"], quantization="int8")
    with pytest.raises(ConfigError, match="quantised to int8 already"):
        logits(made["int8"], quantization="int4")


def test_a_receipt_that_is_damaged_does_not_stop_the_model(
    made: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(made["int8"], tmp_path / "damaged"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["receipt"] = {"top1_agreement": "high"}
    (folder / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.INFO, "kvik"):
        logits(folder)
    assert "receipt that is damaged" in caplog.text
