"""The compiled kernels against plain torch, and quantised weights against every schedule: the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny

from engine_runs import run, same
from kvik import LLM, ConfigError, RequestOutput
from kvik.kernels.cpu.native import available, load_library

pytestmark = pytest.mark.skipif(not available(), reason="Kvik was built without its native kernels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), arch="qwen3", num_attention_heads=8, num_key_value_heads=2)


@pytest.fixture(scope="module")
def plain_torch(folder: Path) -> list[RequestOutput]:
    return run(folder, kernels="torch", max_num_seqs=1, enable_prefix_caching=False)


def test_automatic_is_native(folder: Path) -> None:
    with LLM(str(folder)) as llm:
        assert llm.llm_engine.resolved.kernels == "native"
    with LLM(str(folder), attention_backend="reference") as llm:
        assert llm.llm_engine.resolved.kernels == "torch"
    with pytest.raises(ConfigError, match="native"):
        LLM(str(folder), kernels="native", attention_backend="reference")


@pytest.mark.parametrize("options", [{"max_num_seqs": 1}, {"max_num_seqs": 8}, {"max_num_batched_tokens": 16}], ids=str)
def test_native_is_torch(folder: Path, plain_torch: list[RequestOutput], options: dict[str, Any]) -> None:
    same(run(folder, kernels="native", **options), plain_torch)


@pytest.mark.parametrize("threads", [1, 3])
def test_thread_count(folder: Path, plain_torch: list[RequestOutput], threads: int) -> None:
    same(run(folder, kernels="native", threads=threads), plain_torch)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "mistral"])
def test_architectures(tmp_path: Path, arch: str) -> None:
    overrides = {"sliding_window": 20} if arch == "mistral" else {"tie_word_embeddings": True}
    tiny = make_tiny(tmp_path, arch=arch, num_attention_heads=6, num_key_value_heads=2, hidden_size=96, **overrides)
    same(run(tiny, kernels="native"), run(tiny, kernels="torch", max_num_seqs=1))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_weights_under_every_schedule(folder: Path, quantization: str) -> None:
    expected = run(folder, quantization=quantization, max_num_seqs=1, enable_prefix_caching=False)
    for options in (
        {"max_num_seqs": 16},
        {"max_num_batched_tokens": 16, "max_num_seqs": 4},
        {"num_kvcache_blocks": 10},
    ):
        same(run(folder, quantization=quantization, **options), expected)


_SCRIPT = """
import sys, json
sys.path[:0] = json.loads(sys.argv[2])
from engine_runs import run
print(json.dumps([output.token_ids for output in run(sys.argv[1], kernels="native")]))
"""


def test_every_instruction_set_gives_the_same_tokens(folder: Path, plain_torch: list[RequestOutput]) -> None:
    names = load_library().isa_names
    here = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    for isa in names[: names.index(load_library().best_isa) + 1]:
        command = [sys.executable, "-c", _SCRIPT, str(folder), json.dumps(here)]
        done = subprocess.run(
            command, env={**os.environ, "KVIK_CPU_ISA": isa}, capture_output=True, text=True, check=True, timeout=120
        )
        tokens = [tuple(ids) for ids in json.loads(done.stdout.splitlines()[-1])]
        assert tokens == [output.token_ids for output in plain_torch], isa
