"""What a GPU multiplies for seconds on end, when its power limit has lowered its clock: the library's products alone.

    python benchmarks/sustained_matmul.py --model Qwen3-8B --tokens 256 8192 --json FILE

The four projections of eight layers, with random weights, for as many tokens at a time, over and over. The first half
second is that of a cool GPU; the last is what a workload of several seconds can hope for. Power and clock are
`nvidia-smi`'s at the end.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

import torch
from pairs import write_line

SIZES = {"Qwen3-8B": (4096, 4096, 1024, 12288), "Qwen3-0.6B": (1024, 2048, 1024, 3072)}
LAYERS, WINDOW = 8, 0.5


def weights(hidden: int, q_size: int, kv_size: int, intermediate: int) -> list[torch.Tensor]:
    """[out, in] of q, k and v, of the output, of gate and up, and of down, for every layer."""
    shapes = [(q_size + 2 * kv_size, hidden), (hidden, q_size), (2 * intermediate, hidden), (hidden, intermediate)]
    return [0.02 * torch.randn(shape, device="cuda").bfloat16() for _ in range(LAYERS) for shape in shapes]


def rates(matrices: list[torch.Tensor], num_tokens: int, seconds: float) -> list[float]:
    """TFLOP/s in each half second."""
    inputs = {w.shape[1]: torch.randn(num_tokens, w.shape[1], device="cuda").bfloat16() for w in matrices}
    outputs = {w.shape[0]: torch.empty(num_tokens, w.shape[0], device="cuda").bfloat16() for w in matrices}
    flops = sum(2 * num_tokens * w.numel() for w in matrices)

    def once() -> None:
        for w in matrices:
            torch.mm(inputs[w.shape[1]], w.T, out=outputs[w.shape[0]])

    once()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    found, repeats = [], max(1, round(WINDOW * 600e12 / flops))
    for _ in range(round(seconds / WINDOW)):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        found.append(1e-9 * repeats * flops / begin.elapsed_time(end))
    return found


def main() -> None:
    """Parse the command line and print a line for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SIZES), default="Qwen3-8B")
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 8192])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--json", type=Path, help="append one line with machine, versions and all rates")
    args = parser.parse_args()
    matrices, records = weights(*SIZES[args.model]), list[dict[str, Any]]()
    for num_tokens in args.tokens:
        found = rates(matrices, num_tokens, args.seconds)
        query = ["nvidia-smi", "--query-gpu=power.draw,clocks.sm", "--format=csv,noheader", "--id=0"]
        state = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        print(f"{num_tokens} tokens: {found[0]:.0f} TFLOP/s at first, {found[-1]:.0f} in the end ({state})", flush=True)
        records.append({"tokens": num_tokens, "tflop_per_s": found, "power_and_clock": state})
    write_line(args.json, "sustained_matmul", model=args.model, records=records)


if __name__ == "__main__":
    main()
