"""Receipts of the demo model: computed anew and compared with the numbers that were once measured, and with the
engine's own log-probabilities."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_cases import receipt

from kvik import LLM, SamplingParams
from kvik.cli.main import main
from kvik.kernels.cpu.native import available
from kvik.kernels.cpu.packing import FORMATS
from kvik.quantization.calibrate import Moments, calibrated
from kvik.quantization.formats import GROUPS
from kvik.quantization.reference import dequantize, quantize
from kvik.text.tokenizer import Tokenizer

EXPECTED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("receipts.json").read_text())
HELD_OUT = Path(__file__).parents[2] / "src" / "kvik" / "assets" / "heldout.txt"


@pytest.mark.skipif(not available(), reason="the numbers are those of the native kernels")
@pytest.mark.parametrize("fmt", EXPECTED)
def test_the_demo_models_receipt_is_what_it_was(fmt: str, tmp_path: Path) -> None:
    flags = ["--quantization", fmt, "--calibration", "none", "--tokens", "4096"]
    assert main(["quantize", "demo", str(tmp_path / "out"), *flags]) == 0
    made = receipt(tmp_path / "out")
    for name, value in EXPECTED[fmt].items():
        assert made[name] == pytest.approx(value, abs=1e-3, rel=1e-3 if value > 1 else 0), name
    assert made["num_tokens"] == 4096
    assert made["perplexity"] == pytest.approx(perplexity(tmp_path / "out"), rel=1e-3)


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


@pytest.mark.parametrize("columns", [32, 100, 129])
@pytest.mark.parametrize("fmt", GROUPS)
def test_calibration_lowers_the_error_of_outputs(fmt: str, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(2000, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight = torch.randn(40, columns, generator=generator)
    weight[3] = 0

    def error(q: torch.Tensor, scales: torch.Tensor) -> float:
        return float((x @ (dequantize(q, scales, fmt) - weight).T).square().mean())

    q, scales = calibrated(fmt, Moments.of(x))(weight)
    assert q.dtype == torch.int8 and scales.shape == quantize(weight, fmt)[1].shape
    assert int(q.min()) >= (-127 if fmt == "int8" else -8) and int(q.max()) <= (127 if fmt == "int8" else 7)
    assert not q[3].any()
    assert fmt == "int8" or torch.equal(scales, scales.half().float())
    assert error(q, scales) < 0.7 * error(*quantize(weight, fmt))


@pytest.mark.parametrize("fmt", GROUPS)
def test_calibration_survives_inputs_that_are_always_zero(fmt: str) -> None:
    weight = torch.randn(8, 64)
    for x in (torch.zeros(4, 64), torch.eye(64)[:3]):
        q, scales = calibrated(fmt, Moments.of(x))(weight)
        values = dequantize(q, scales, fmt)
        assert values.isfinite().all()
        assert float((values - weight).norm() / weight.norm()) < 0.25


def test_the_formats_are_those_of_the_kernels() -> None:
    assert {name: group for name, (_, group) in FORMATS.items() if name.startswith("int")} == dict(GROUPS)
