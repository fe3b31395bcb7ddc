"""Weights in chunks by threads arrive as they do one by one; on a GPU through page-locked memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny

from kvik.errors import ModelLoadError
from kvik.models.checkpoint import Checkpoint
from kvik.models.hub import load_config
from kvik.models.loader import load_weights, stream_weights
from kvik.models.registry import build_spec
from kvik.models.weight_stream import WeightStream
from kvik.quantization.loading import rounded

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "model", "qwen2", tokenizer=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [104, 1 << 20])
def test_chunks_join_to_the_tensors(model: Path, dtype: torch.dtype, chunk_bytes: int) -> None:
    spec = build_spec(load_config(model))
    done: list[int] = []
    checkpoint = Checkpoint(model, "auto")
    with WeightStream(checkpoint, CPU, num_threads=3, chunk_bytes=chunk_bytes) as stream:
        streamed = stream_weights(spec, dtype, CPU, stream, progress=lambda: done.append(1))
    plain = load_weights(model, spec, dtype=dtype, device=CPU, progress=False)
    assert all(map(torch.equal, streamed.tensors(), plain.tensors()))
    assert len(done) == len(checkpoint.tensors)


def test_what_packs_a_projection_finds_it_there(model: Path) -> None:
    spec, pack = build_spec(load_config(model)), rounded("int8", "int8")
    with WeightStream(Checkpoint(model, "auto"), CPU, num_threads=2, chunk_bytes=1024) as stream:
        streamed = stream_weights(spec, torch.float32, CPU, stream, pack)
    plain = load_weights(model, spec, dtype=torch.float32, device=CPU, progress=False, pack=pack)
    assert all(map(torch.equal, streamed.tensors(), plain.tensors()))


def test_a_file_that_is_cut_off_meanwhile_is_one_error(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((model / "model.safetensors").read_bytes())
    checkpoint = Checkpoint(tmp_path, "auto")
    file.write_bytes(file.read_bytes()[:-1000])
    spec = build_spec(load_config(model))
    with (
        WeightStream(checkpoint, CPU, num_threads=2, chunk_bytes=512) as stream,
        pytest.raises(ModelLoadError, match=r"truncated or corrupt \(.* is cut off\)"),
    ):
        stream_weights(spec, torch.float32, CPU, stream)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gets_the_same_weights(model: Path, dtype: torch.dtype) -> None:
    spec, device = build_spec(load_config(model)), torch.accelerator.current_accelerator()
    assert device is not None
    plain = load_weights(model, spec, dtype=dtype, device=CPU, progress=False)
    loaded = load_weights(model, spec, dtype=dtype, device=device, progress=False)
    assert all(map(torch.equal, (tensor.cpu() for tensor in loaded.tensors()), plain.tensors()))
    with WeightStream(Checkpoint(model, "auto"), device, num_threads=3, chunk_bytes=104) as stream:
        streamed = stream_weights(spec, dtype, device, stream)
    assert all(map(torch.equal, (tensor.cpu() for tensor in streamed.tensors()), plain.tensors()))
