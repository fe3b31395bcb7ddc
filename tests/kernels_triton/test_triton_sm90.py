"""The kernels of real models, compiled for Hopper without a GPU: nothing spills, dependent launches are in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

TOOL = Path(__file__).parents[2] / "tools" / "triton_sm90.py"
SHARED_MEMORY = 227 * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("qwen3-0.6b", ["--tokens", "1", "4", "16", "64", "512"]),
        ("qwen3-8b", ["--tokens", "1", "4", "16", "64"]),
        ("qwen2-0.5b", ["--tokens", "1", "16"]),
        ("qwen3-8b", ["--tokens", "1", "--deterministic"]),
    ],
)
def test_kernels_fit_on_hopper(model: str, options: list[str], tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # compile, whatever is cached
    command = [sys.executable, str(TOOL), "--json", "--model", model, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"_embedding_kernel", "_rms_norm_kernel", "_rope_kernel"} <= {kernel["kernel"] for kernel in kernels}
    for kernel in kernels:
        assert kernel["stack"] == 0, f"{kernel} spills registers"
        assert kernel["shared"] <= SHARED_MEMORY, kernel
        assert kernel["waits"] == 1, f"{kernel} must wait for its predecessor, once"
        assert kernel["early_copies"] == 0, f"{kernel}: a pipelined copy stands before the wait"
        if kernel["kernel"] == "_skinny_kernel":
            assert kernel["tensor_cores"] == "wgmma", kernel
        if kernel["kernel"] == "_gemv_kernel":
            assert kernel["early_loads"] > 0, f"{kernel} loads no weights before it waits"
