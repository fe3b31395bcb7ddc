"""Every kernel of attention, sampling and state lowers to machine code of the H200 (sm_90), which needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from kvik.kernels.triton.features import knows_gluon

SPILLS = {
    "prefill 64 fp32",  # products of tf32 parts
    # a single warp's registers are for one query, whole blocks
    "decode 8B speculating", "decode 0.6B blocks of 1", "decode 8B blocks of 16",
    # 16 and 24 bytes of a thread with Triton 3.7, none with 3.6
    "prefill 0.6B exact", *(f"hopper linear (192, 256, 1, 4, True) 128 {rest}" for rest in (128, 64, 32)),
}  # fmt: skip


@pytest.mark.parametrize("group", ["attention", "hopper", "hopper_linear", "sampling", "state"])
def test_kernels_compile_for_hopper_without_spills(group: str) -> None:
    """In a process of its own, since this one may interpret."""
    if group.startswith("hopper") and not knows_gluon():
        pytest.skip("this Triton has a Gluon that the kernels were not tried with")
    program = Path(__file__).parent / "compile_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(program), group], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    found = {kernel["name"]: kernel for kernel in map(json.loads, run.stdout.splitlines())}
    assert found
    assert {name for name, kernel in found.items() if kernel["spilled"]} <= SPILLS
    assert all(kernel["shared"] <= 227 * 1024 for kernel in found.values())
    assert not any(kernel["serialized"] for name, kernel in found.items() if name.startswith("hopper"))
    for name in {name.split(maxsplit=1)[1] for name in found if name.endswith("exact")}:
        assert found[f"decode {name}"]["matrix"] == found[f"prefill {name}"]["matrix"] != ""


@pytest.mark.parametrize("capability", [("8", "0"), ("8", "9")], ids=".".join)
def test_gpus_with_less_shared_memory_launch_what_it_holds(capability: tuple[str, str]) -> None:
    program = Path(__file__).parent / "small_shared_memory.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(program), *capability], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr


def test_gluon_is_imported_only_for_kernels_that_are_written_in_it() -> None:
    """Kvik runs with versions of Triton that have none, or another one."""
    modules = "kvik.kernels.triton.ops, kvik.attention.triton, kvik.runtime.tune, kvik.runtime.kernel_compiler"
    code = f"import sys; sys.modules['triton.experimental.gluon'] = None; import {modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
