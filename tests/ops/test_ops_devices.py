"""Where an operator runs, and what is loaded for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kvik import ConfigError, ops


def test_importing_and_running_on_a_cpu_does_not_load_triton() -> None:
    code = (
        "import sys, torch, kvik.ops; kvik.ops.rms_norm(torch.ones(2, 4), torch.ones(4));"
        " print(sorted({m.split('.')[0] for m in sys.modules} & {'triton', 'transformers', 'tokenizers'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_device_without_kernels_is_named() -> None:
    with pytest.raises(ConfigError, match="meta"):
        ops.rms_norm(torch.ones(2, 4, device="meta"), torch.ones(4, device="meta"))


def test_the_number_of_threads_is_that_of_torch() -> None:
    x, weight, threads = torch.randn(300, 64), torch.ones(64), torch.get_num_threads()
    alone = ops.rms_norm(x, weight)
    try:
        torch.set_num_threads(3)
        assert torch.equal(ops.rms_norm(x, weight), alone)
        native = getattr(ops.devices.operators(x.device), "native", None)
        assert native is None or native.pool.threads == 3
    finally:
        torch.set_num_threads(threads)
