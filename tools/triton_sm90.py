"""Compile the Triton kernels of a model's shapes for Hopper (sm_90), without a GPU, and show what they need.

The launchers run as they are, on tensors without memory; a driver that stands in for CUDA's hands over each compiled
kernel instead of loading it. One line per kernel: registers and stack (spills) per thread, shared memory per program.

    python tools/triton_sm90.py [--model qwen3-8b] [--tokens 1 4 16 64] [--json]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvik.kernels.api import KVLayer, LinearWeight
from kvik.kernels.triton.compile_only import StandInDriver, compile_only
from kvik.kernels.triton.features import Features
from kvik.kernels.triton.ops import TritonOps

__all__ = ["Compiled", "Sizes", "compile_model", "main"]

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers of a model that shapes are made of."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    bias: bool = False
    qk_norm: bool = True


MODELS = {
    "qwen3-0.6b": Sizes(1024, 16, 8, 128, 3072, 151936),
    "qwen3-8b": Sizes(4096, 32, 8, 128, 12288, 151936),
    "qwen2-0.5b": Sizes(896, 14, 2, 64, 4864, 151936, bias=True, qk_norm=False),
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one compiled kernel needs; `early_copies`, `early_loads`: instructions before the dependency wait."""

    label: str
    kernel: str
    registers: int
    stack: int  # bytes per thread: spilled registers
    shared: int  # bytes per program
    warps: int
    tensor_cores: str  # wgmma, mma or none
    waits: int
    early_copies: int
    early_loads: int


def _keep_kernels(found: list[Compiled], label: Callable[[], str]) -> None:
    """From now on whatever Triton compiles is added to `found`, once."""
    from triton import knobs

    binaries: list[bytes] = []

    def keep(module: object, function: object, name: str, group: dict[str, str], digest: str) -> None:
        files = {Path(path).suffix: Path(path) for path in group.values()}
        found.append(_describe(label(), name, files, binaries.pop()))

    compile_only(StandInDriver((9, 0), on_binary=binaries.append))
    knobs.runtime.kernel_load_end_hook = keep


def _describe(label: str, name: str, files: dict[str, Path], cubin: bytes) -> Compiled:
    from triton import knobs

    metadata, ptx = json.loads(files[".json"].read_text()), files[".ptx"].read_text()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    early = ptx.partition("griddepcontrol.wait")[0]
    return Compiled(
        label,
        name,
        counts["REG"],
        counts["STACK"],
        metadata["shared"],
        metadata["num_warps"],
        next((unit for unit in ("wgmma", "mma") if f"{unit}." in ptx), "none"),
        ptx.count("griddepcontrol.wait"),
        early.count("cp.async.") - early.count("cp.async.bulk.prefetch"),
        early.count("ld.global"),
    )


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _run_block(ops: TritonOps, sizes: Sizes, m: int) -> Iterator[str]:
    """Every operation of a decoder's step of `m` tokens; yields the name of each before it runs."""
    qkv_size = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim

    def linear(n: int, k: int, bias: bool = False) -> LinearWeight:
        return LinearWeight(_empty(n, k), _empty(n) if bias else None)

    x, gain = _empty(m, sizes.hidden), _empty(sizes.hidden)
    ids = _empty(m, dtype=torch.int64)
    yield "embedding"
    ops.embedding(ids, _empty(sizes.vocab, sizes.hidden))
    yield "rms_norm"
    ops.rms_norm(x, gain, 1e-6)
    yield "qkv"
    qkv = ops.norm_linear(x, gain, 1e-6, linear(qkv_size, sizes.hidden, sizes.bias))
    yield "rope"
    cache = _empty(8, sizes.kv_heads, 64, sizes.head_dim)
    angles = _empty(m, sizes.head_dim // 2, dtype=torch.float32)
    head_gain = _empty(sizes.head_dim) if sizes.qk_norm else None
    q = ops.qk_norm_rope_store(qkv, angles, angles, ids, KVLayer(cache, cache), head_gain, head_gain, 1e-6)
    yield "o"
    hidden = ops.linear_add(q.flatten(1), linear(sizes.hidden, sizes.heads * sizes.head_dim), x)
    yield "gate_up"
    inner = ops.norm_linear_swiglu(hidden, gain, 1e-6, linear(2 * sizes.intermediate, sizes.hidden))
    yield "down"
    hidden = ops.linear_add(inner, linear(sizes.hidden, sizes.intermediate), hidden)
    yield "final_norm"
    ops.rms_norm(hidden, gain, 1e-6)
    yield "lm_head"
    ops.linear(x, linear(sizes.vocab, sizes.hidden))


def compile_model(sizes: Sizes, tokens: Sequence[int], *, deterministic: bool = False) -> list[Compiled]:
    """Every kernel of a step at each number of tokens, in the order in which they are first needed."""
    ops = TritonOps(META, deterministic=deterministic, defer=True, features=Features.of_capability((9, 0)))
    found: list[Compiled] = []
    label = ""
    _keep_kernels(found, lambda: label)
    for m in tokens:
        for operation in _run_block(ops, sizes, m):
            label = f"m{m} {operation}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object per kernel")
    args = parser.parse_args()
    for kernel in compile_model(MODELS[args.model], args.tokens, deterministic=args.deterministic):
        if args.json:
            print(json.dumps(asdict(kernel)))
        else:
            print(
                f"{kernel.label:14} {kernel.kernel:16} {kernel.registers:4} registers {kernel.stack:4} B stack"
                f" {kernel.shared:7} B shared {kernel.warps:3} warps {kernel.tensor_cores:6}"
                f" early: {kernel.early_loads} loads, {kernel.early_copies} copies"
            )


if __name__ == "__main__":
    main()
