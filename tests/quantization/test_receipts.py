"""Receipts of the demo model: computed anew and compared with the numbers that were once measured, and with the
engine's own log-probabilities."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from quantization_cases import receipt

from kvik import LLM, SamplingParams
from kvik.cli.main import main
from kvik.kernels.cpu.native import available
from kvik.kernels.cpu.packing import FORMATS
from kvik.quantization.formats import GROUPS
from kvik.text.tokenizer import Tokenizer

EXPECTED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("receipts.json").read_text())
WITHIN = {"top1_agreement": 1e-3, "kl_divergence": 2e-5}
GATES = {"int8": 0.99, "int4": 0.95}  # least top-1 agreement
HELD_OUT = Path(__file__).parents[2] / "src" / "kvik" / "assets" / "heldout.txt"


@pytest.mark.skipif(not available(), reason="the numbers are those of the native kernels")
@pytest.mark.parametrize("fmt", EXPECTED)
def test_the_demo_models_receipt_is_what_it_was(fmt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVIK_CPU_ISA", "generic")  # the last bits, and with them near ties, depend on the processor
    flags = ["--quantization", fmt, "--calibration", "none", "--tokens", "4096"]
    assert main(["quantize", "demo", str(tmp_path / "out"), *flags]) == 0
    made = receipt(tmp_path / "out")
    for name, value in EXPECTED[fmt].items():
        assert made[name] == pytest.approx(value, abs=WITHIN.get(name, 1e-3 * value)), name
    assert made["num_tokens"] == 4096
    assert made["perplexity"] == pytest.approx(perplexity(tmp_path / "out"), rel=1e-3)


@pytest.mark.skipif(not available(), reason="the numbers are those of the native kernels")
@pytest.mark.parametrize("fmt", GATES)
def test_the_demo_model_keeps_its_predictions(fmt: str, tmp_path: Path) -> None:
    flags = ["--quantization", fmt, "--calibration", "none"]
    assert main(["quantize", "demo", str(tmp_path / "out"), *flags]) == 0
    made = receipt(tmp_path / "out")
    assert made["num_tokens"] == 16384 and not made["overrides"]
    assert made["top1_agreement"] >= GATES[fmt]


def perplexity(folder: Path) -> float:
    """That of the first eight windows of 512 tokens, from what the engine reports for prompts."""
    ids = Tokenizer.from_folder(folder).encode(HELD_OUT.read_text(encoding="utf-8"), add_special_tokens=False)
    windows = [ids[begin : begin + 512] for begin in range(0, 4096, 512)]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with LLM(str(folder), enable_prefix_caching=False) as llm:
        outputs = llm.generate(windows, params)
    logprobs = [item.logprob for out in outputs for item in out.prompt_logprobs or () if item is not None]
    assert len(logprobs) == 8 * 511
    return math.exp(-sum(logprobs) / len(logprobs))


def test_the_held_out_text_is_long_and_plain() -> None:
    text = HELD_OUT.read_text(encoding="utf-8")
    assert 60_000 < len(text.encode()) < 100_000
    assert "<|" not in text and "http" not in text
    assert text not in (HELD_OUT.parent / "calibration.txt").read_text(encoding="utf-8")


def test_the_formats_are_those_of_the_kernels() -> None:
    assert {name: group for name, (_, group) in FORMATS.items() if name.startswith("int")} == dict(GROUPS)
