"""`kvik quantize`: the gate, where it may write, and that what fails leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_cases import logits, quantize, receipt
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny

from cli.cli_harness import start
from engine_runs import options_for
from kvik import LLM, ModelLoadError
from kvik.cli.main import main
from kvik.kernels.cpu import native
from kvik.quantization.writer import staged


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("plain") / "tiny", "qwen2", tie_word_embeddings=True)


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """An empty folder beside nothing else."""
    folder = tmp_path / "clean"
    folder.mkdir()
    return folder


def left_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {"text.txt"}


def test_it_prints_and_writes_the_receipt(tiny: Path, clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(tiny, clean / "out", "int8", "--json") == 0
    written = receipt(clean / "out")
    assert json.loads(capsys.readouterr().out) == written
    assert left_in(clean) == {"out"}
    assert 0.5 < written["top1_agreement"] <= 1
    assert 0 <= written["kl_divergence"] < 0.1
    assert written["size_bytes"] < 0.4 * written["size_bytes_unquantized"]
    assert written["num_tokens"] > 50
    assert written["decode_tok_s"] > 0 and written["prefill_tok_s"] > 0
    assert {"cpu", "cores", "memory", "os"} <= set(written["machine"])
    assert quantize(tiny, clean / "again", "int8") == 0
    shown = capsys.readouterr().out
    assert "top-1 agreement" in shown and "none" in shown


@pytest.mark.gpu
def test_beside_a_gpu_it_runs_on_the_cpu(tiny: Path, clean: Path) -> None:
    with options_for("cuda"):
        assert quantize(tiny, clean / "out", "int8") == 0
        assert receipt(clean / "out")["top1_agreement"] > 0.5
        LLM(str(clean / "out"), device="cuda", max_num_seqs=2).close()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_weights_that_are_no_numbers_are_not_quantised(tiny: Path, clean: Path, value: float, kernels: str) -> None:
    """Rounding might hide them; without it the logits are NaN, which every request is told."""
    model = Path(shutil.copytree(tiny, clean / "model"))
    state, name = load_file(model / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    state[name][3, 5] = value
    save_file(state, model / "model.safetensors")
    if kernels == "native" and not native.available():
        kernels = "torch"
    for quantization in ("int8", "int4"):
        with pytest.raises(ModelLoadError, match=f"{name} holds NaN or infinity"):
            LLM(str(model), device="cpu", kernels=kernels, quantization=quantization)
    assert quantize(model, clean / "out", "int8") == 2
    with LLM(str(model), device="cpu", kernels=kernels) as llm:
        assert "NaN" in str(llm.generate([[5, 6]])[0].error)


def test_the_gate_refuses_with_both_numbers(tiny: Path, clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(tiny, clean / "out", "int4g128", "--min-top1", "1") == 2
    message = capsys.readouterr().err
    assert "top-1 agreement is 0." in message and "below --min-top1 1" in message
    assert left_in(clean) == set()
    assert quantize(tiny, clean / "out", "int4g128", "--min-top1", "0.1") == 0


def test_a_folder_with_something_in_it_is_kept(tiny: Path, clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = clean / "out"
    out.mkdir()
    assert quantize(tiny, out, "int8") == 0  # empty is as good as absent
    before = (out / "model.safetensors").read_bytes()
    assert quantize(tiny, out, "int4") == 2
    assert "is not empty" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before
    assert quantize(tiny, out, "int4", "--force", "--min-top1", "1") == 2
    assert (out / "model.safetensors").read_bytes() == before
    assert quantize(tiny, out, "int4", "--force") == 0
    assert (out / "model.safetensors").read_bytes() != before
    assert left_in(clean) == {"out"}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("notes", "no config.json: --force replaces model folders only"),
        ("file", "exists and is not a folder"),
        ("absent/out", "is not a folder"),
        ("model", "is or holds the model"),
        (".", "is or holds the model"),
    ],
)
def test_places_that_are_refused(
    place: str, message: str, tiny: Path, clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny(clean / "model", "qwen2")
    (clean / "notes").mkdir()
    (clean / "notes" / "diary.txt").write_text("dear diary")
    (clean / "file").write_text("")
    before = left_in(clean)
    assert main(["quantize", str(clean / "model"), str(clean / place), "--quantization", "int8", "--force"]) == 2
    assert message in capsys.readouterr().err
    assert left_in(clean) == before
    assert (clean / "notes" / "diary.txt").is_file()


def test_a_mount_point_is_refused_before_the_work(
    tiny: Path, clean: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (clean / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == clean / "out")
    assert main(["quantize", str(tiny), str(clean / "out"), "--quantization", "int8"]) == 2
    assert f"out is a mount point, which nothing can take the place of; choose {clean / 'out' / 'model'}" in (
        capsys.readouterr().err
    )


def test_two_that_make_the_same_folder_leave_each_other_alone(clean: Path) -> None:
    with staged(clean / "out") as first:
        (first / "config.json").write_text("first")
        with staged(clean / "out") as second:  # with the same process id, as in two containers
            (second / "config.json").write_text("second")
        assert (clean / "out" / "config.json").read_text() == "second"
    assert (clean / "out" / "config.json").read_text() == "first"
    assert left_in(clean) == {"out"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quantization", "int3"], "invalid choice: 'int3'"),
        ([], "required: --quantization"),
        (["--quantization", "int8", "--min-top1", "95"], "for 95 % write 0.95"),
        (["--quantization", "int8", "--tokens", "1"], "--tokens must be at least 2"),
        (["--quantization", "int8", "--text", "absent.txt"], "cannot read absent.txt"),
        (["--quantization", "int8", "--quantisation", "int8"], "unknown argument '--quantisation'"),
    ],
)
def test_wrong_options(
    flags: list[str], message: str, tiny: Path, clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(tiny), str(clean / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert left_in(clean) == set()


def test_a_quantised_model_and_an_empty_text_are_refused(
    tiny: Path, clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(tiny, clean / "out", "int8") == 0
    assert quantize(clean / "out", clean / "twice", "int4") == 2
    assert "is quantised already" in capsys.readouterr().err
    (clean / "empty").write_text("")
    assert quantize(tiny, clean / "other", "int8", "--text", clean / "empty") == 2
    assert "0 tokens, too few" in capsys.readouterr().err
    assert left_in(clean) == {"out", "empty"}


def test_a_full_disk_leaves_nothing(tiny: Path, clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        code = main(["quantize", str(tiny), str(clean / "out"), "--quantization", "int8", "--calibration", "none"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 1
    assert "kvik: error: " in capsys.readouterr().err
    assert left_in(clean) == set()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(tiny: Path, clean: Path, number: int, code: int) -> None:
    text = clean / "text.txt"
    text.write_text("The quick brown fox. " * 20_000)
    options = ("--quantization", "int8", "--text", str(text), "--tokens", "1000000")
    process = start("quantize", str(tiny), str(clean / "out"), *options, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while not left_in(clean) and time.monotonic() < end:
        time.sleep(0.01)
    assert left_in(clean), "the command never began to write"
    process.send_signal(number)
    assert process.wait(30) == code
    assert left_in(clean) == set()


def big_checkpoint(path: Path) -> Path:
    """About 300 MB of bf16: 12 layers and a small vocabulary."""
    from safetensors.torch import save_file

    from kvik.models.hub import load_config
    from kvik.models.registry import build_spec
    from kvik.models.weights import parameter_shapes

    make_tiny(path, "llama", hidden_size=1024, intermediate_size=2816, num_hidden_layers=1)
    config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": 12, "dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(config))
    shapes = parameter_shapes(build_spec(load_config(path)))
    noise = (torch.randn(1 << 20) * 0.02).bfloat16()
    state = {
        name: noise.repeat((shape.numel() >> 20) + 1)[: shape.numel()].view(shape).clone()
        for name, shape in shapes.items()
    }
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


def peak_rss(code: str) -> tuple[int, int]:
    """Bytes that a program took at its highest, and after its imports."""
    tail = "; print(before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    head = (
        "import resource, kvik.llm, kvik.cli.quantize, kvik.quantization.convert, kvik.cli.bench_measure;"
        " before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
    )
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", head + code + tail], capture_output=True, text=True, timeout=120, env=environ, check=True
    )
    before, peak = map(int, done.stdout.split()[-2:])
    return peak - before, before


def test_memory_is_the_quantised_size_and_a_layer(clean: Path) -> None:
    plain = big_checkpoint(clean / "plain")
    size = (plain / "model.safetensors").stat().st_size
    assert 250e6 < size < 350e6
    text = clean / "text.txt"
    text.write_text("The quick brown fox. " * 5)
    layer = 4 * (size // 2 // 12)
    flags: list[Any] = ["--quantization", "int8", "--text", str(text), "--calibration", "none", "--threads", "1"]
    quick = "kvik.cli.quantize._SPEED_PROMPT, kvik.cli.quantize._SPEED_OUTPUT = 16, 4"
    code = f"{quick}; from kvik.cli.main import main; main({['quantize', str(plain), str(clean / 'out'), *flags]!r})"
    made, _ = peak_rss(code)
    quantised = receipt(clean / "out")["size_bytes"]
    assert quantised < 0.55 * size
    assert made < quantised + layer + 100e6, f"{made / 1e6:.0f} MB for {quantised / 1e6:.0f} MB"
    prompt = "'a', SamplingParams(max_tokens=2)"
    options = "kv_cache_memory=16 << 20, max_num_batched_tokens=64, max_num_seqs=1, threads=1"
    load = (
        f"from kvik import LLM, SamplingParams; LLM({str(clean / 'out')!r}, device='cpu', {options}).generate({prompt})"
    )
    loaded, _ = peak_rss(load)
    assert loaded < 1.15 * quantised + layer + 64e6, f"{loaded / 1e6:.0f} MB for {quantised / 1e6:.0f} MB"
    assert logits(clean / "out").isfinite().all()
