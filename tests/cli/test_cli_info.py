"""`kvik info`: the machine without a model, a model without its weights, and the flag that makes a plan fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_harness import Result

from kvik import LLM

Kvik = Callable[..., Result]


def test_machine_and_versions(kvik: Kvik) -> None:
    result = kvik("info")
    assert result.code == 0 and result.err == ""
    for text in (
        "CPU",
        "memory",
        "GPUs",
        f"torch                  {torch.__version__}",
        "Hugging Face cache",
        "bundled",
    ):
        assert text in result.out
    facts = json.loads(kvik("info", "--json").out)
    assert facts["machine"]["memory"] > 0 and facts["versions"]["torch"] == torch.__version__


def test_a_model_needs_no_weights(kvik: Kvik, model: str, tmp_path: Path) -> None:
    shutil.copy(Path(model) / "config.json", tmp_path)
    result = kvik("info", tmp_path, "--dtype", "float32")
    assert result.code == 0
    for text in ("Qwen3ForCausalLM", "110,976", "512 tokens", "512 bytes per token", "KV cache", "fits"):
        assert text in result.out
    assert "int8, 160 bytes per token" in kvik("info", tmp_path, "--device", "cpu", "--kv-cache-dtype", "int8").out
    facts = json.loads(kvik("info", tmp_path, "--json", "--max-num-seqs", 3).out)["model"]
    assert facts["settings"]["max_num_seqs"] == 3 and facts["fits"]
    with LLM(model, max_num_seqs=3) as llm:
        assert facts["memory"]["num_blocks"] == llm.llm_engine.resolved.memory.num_blocks


def test_what_would_not_load_is_told(kvik: Kvik, model: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    assert kvik("info", model, "--model", model).code == 2
    for flag in ("--tokenizer", "--chat-template"):
        result = kvik("info", model, flag, tmp_path / "absent")
        assert result.code == 2 and "absent" in result.err
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in kvik("info", folder).err


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        (("--kv-cache-memory", "128KiB", "--max-model-len", "512"), "--max-model-len 256"),
        (("--kv-cache-memory", "64KiB"), "no --kv-cache-memory and no --num-kvcache-blocks"),
        (("--num-kvcache-blocks", "1000000000"), "no --kv-cache-memory and no --num-kvcache-blocks"),
        (("--max-num-seqs", "1000000000"), "--max-num-seqs 1"),
    ],
)
def test_what_does_not_fit_gets_a_fix_that_fits(kvik: Kvik, model: str, flags: tuple[str, ...], fix: str) -> None:
    flags = ("--device", "cpu", "--dtype", "float32", *flags)
    result = kvik("info", model, *flags)
    assert result.code == 2 and f"it fits with {fix}" in result.out
    assert json.loads(kvik("info", model, *flags, "--json").out)["model"]["fits"] is False


def test_wrong_models_are_errors(kvik: Kvik, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kvik("info", f"{model}x").code == 2
    monkeypatch.setenv("KVIK_MODEL", model)
    assert "Qwen3ForCausalLM" in kvik("info").out
