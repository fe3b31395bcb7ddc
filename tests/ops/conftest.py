"""Where the operators are tested: on the CPU with and without compiled kernels, and with `-m gpu` on an NVIDIA GPU."""

from __future__ import annotations

import pytest
import torch

from kvik.kernels.cpu import native
from kvik.ops import devices


@pytest.fixture(params=["cpu", "torch", pytest.param("cuda:0", id="gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cuda:0" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda: False)
        plain = devices.CpuOperators(1)
        plain.native = None
        monkeypatch.setattr(devices, "_operators", lambda device, threads: plain)
    return torch.device("cpu" if request.param == "torch" else request.param)
