"""Where kernel tests run: without a GPU through Triton's interpreter, and on a GPU (`-m gpu`)."""

from __future__ import annotations

import pytest
import torch

from triton_mode import HAS_GPU, HAS_TRITON, INTERPRETED


def pytest_report_header() -> str:
    mode = "interpreted" if INTERPRETED else "on the GPU" if HAS_GPU else "compiled only"
    return f"triton kernels: {mode}" if HAS_TRITON else "triton kernels: skipped, triton is not installed"


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a kernel test runs: through the interpreter on CPU tensors, and compiled on a GPU."""
    if request.param == "cuda" and (not HAS_GPU or INTERPRETED):
        pytest.skip("needs an NVIDIA GPU, and TRITON_INTERPRET not set")
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("Triton compiles for the GPU in this process; TRITON_INTERPRET=1 interprets instead")
    return torch.device(request.param)
