"""Peak memory of `kvik generate` for the 0.6B shape, in each format, over the size of the weights in use.

    python benchmarks/peak_memory.py --folder FOLDER [--formats bf16 int8 int4] [--runs 3] [--json FILE]

FOLDER keeps a checkpoint with random weights. What counts is anonymous memory (files that are mapped can be dropped),
looked at every 2 ms, less what a process has that only imported torch. Linux only.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pairs import SHAPES, add_folder, model_folder, write_line

QUANTIZATION = {"bf16": None, "int8": "int8", "int4": "int4"}
BITS = {"bf16": (16.0, 16.0), "int8": (8.0, 8.0), "int4": (4.5, 8.0)}  # of the blocks' weights, and of the head's


def checkpoint(shape: str, root: Path) -> Path:
    """A folder with random bf16 weights of `shape` in the safetensors format, and the demo model's tokenizer."""
    import torch
    from safetensors.torch import save_file

    import kvik
    from kvik.models.registry import build_spec
    from kvik.models.weights import parameter_shapes

    folder = model_folder(shape, root)
    file = folder / "model.safetensors"
    if not file.exists():
        shapes = parameter_shapes(build_spec(SHAPES[shape]))
        save_file({name: torch.randn(size).mul_(0.02).bfloat16() for name, size in shapes.items()}, file)
        demo = Path(kvik.__file__).parent / "assets" / "demo"
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo / name, folder)
    return folder


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory that a process has now; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def peak(command: list[str]) -> int:
    """The most anonymous memory that `command` had at any time."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        most = max(most, anonymous(process.pid))
        time.sleep(0.002)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return most


def weights_in_use(shape: str, fmt: str) -> int:
    """Bytes of the blocks' projections and of the head, which is the embedding too."""
    from kvik.models.registry import build_spec

    spec = build_spec(SHAPES[shape])
    head = spec.vocab_size * spec.hidden_size
    blocks, outer = BITS[fmt]
    return int(((spec.num_parameters - head) * blocks + head * outer) / 8)


def measure(shape: str, fmt: str, folder: Path, runs: int) -> dict[str, Any]:
    base = peak([sys.executable, "-c", "import torch"])
    options = ["--max-tokens", "32", "--temperature", "0", *(["--quantization", q] if (q := QUANTIZATION[fmt]) else [])]
    command = [sys.executable, "-m", "kvik", "generate", str(folder), "Once upon a time", *options]
    most, weights = max(peak(command) for _ in range(runs)), weights_in_use(shape, fmt)
    facts = {"peak_bytes": most - base, "torch_bytes": base, "weights_bytes": weights, "ratio": (most - base) / weights}
    print(
        f"{fmt}: {facts['peak_bytes'] / 1e6:.0f} MB for {weights / 1e6:.0f} MB of weights, {facts['ratio']:.2f}x",
        flush=True,
    )
    return {"shape": shape, "format": fmt, "runs": runs, **facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folder(parser)
    parser.add_argument("--formats", nargs="+", default=list(QUANTIZATION), choices=list(QUANTIZATION))
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    shape = "Qwen3-0.6B"
    folder = checkpoint(shape, args.folder)
    records = [measure(shape, fmt, folder, args.runs) for fmt in args.formats]
    write_line(args.json, "peak_memory", records=records)


if __name__ == "__main__":
    main()
