"""Steps of a Qwen3-0.6B-shaped decoder, of this checkout of Kvik and of another one in turns.

    python benchmarks/compare_trees.py TREE [--format int8] [--pairs 15] [--json FILE]

TREE is the root of the other checkout, with its own compiled kernels. Each has a process of its own, with random
weights and two threads, which sleeps while the other one works. A step is the whole pass with logits: of 1 and of 8
sequences that decode after 128 tokens, and of a prompt of 512 tokens. Reported are medians, and the quartiles of the
pairs' ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

STEPS = {"decode 1 user": (1, 1, 128), "decode 8 users": (8, 1, 128), "prefill 512": (1, 512, 512)}
"""Name to (sequences, tokens of each that are computed, tokens of each in all)."""
THREADS = 2


def work(fmt: str) -> None:
    """Answer every name of a step on stdin with the milliseconds that it took."""
    import torch
    from cpu_ops import caches, qwen3_shape, random_weights, seconds, step_batch

    from kvik.kernels.cpu.native import NativePool
    from kvik.layers.rope import RopeTable
    from kvik.runtime.native_decoder import NativeDecoder

    spec, pool = qwen3_shape(), NativePool(THREADS)
    rope = RopeTable(spec.rope, 1024, torch.device("cpu"))
    decoder = NativeDecoder(spec, random_weights(spec, fmt, pool), rope, pool, 512)
    kv = tuple(caches(spec, 16, torch.bfloat16))
    batches = {name: step_batch(*shape, 16) for name, shape in STEPS.items()}
    print("ready", flush=True)
    for line in sys.stdin:
        batch = batches[line.strip()]
        print(1e3 * seconds(lambda: decoder.logits(decoder.forward(batch, kv))), flush=True)  # noqa: B023


class Tree:
    """A process that works with the Kvik of a checkout."""

    def __init__(self, root: Path, fmt: str) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{Path(__file__).parent}"}
        command = [sys.executable, __file__, str(root), "--format", fmt, "--work"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        if self._line() != "ready\n":
            raise RuntimeError(f"the worker of {root} did not start; its message is above")

    def step(self, name: str) -> float:
        """Milliseconds of a step."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def compare(this: Tree, other: Tree, name: str, pairs: int) -> dict[str, Any]:
    """Steps of both in turns, now one first and now the other, after two of each that do not count."""
    runs = [(this.step(name), other.step(name)) for _ in range(2)]
    for i in range(pairs):
        theirs = other.step(name) if i % 2 else None
        ours = this.step(name)
        runs.append((ours, other.step(name) if theirs is None else theirs))
    runs = runs[2:]
    quartiles = statistics.quantiles((ours / theirs for ours, theirs in runs), n=4)
    ours_ms, theirs_ms = (statistics.median(times) for times in zip(*runs, strict=True))
    return {"step": name, "pairs": pairs, "this_ms": ours_ms, "other_ms": theirs_ms, "ratio_quartiles": quartiles}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="root of the other checkout")
    parser.add_argument("--format", default="int8", help="of the weights")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json", type=Path, help="append one line with machine, versions and all records")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.format)
        return
    this, other = Tree(Path(__file__).parents[1], args.format), Tree(args.tree, args.format)
    records = [compare(this, other, name, args.pairs) for name in STEPS]
    this.close(), other.close()
    for record in records:
        low, middle, high = record["ratio_quartiles"]
        print(
            f"{record['step']:<15} this {record['this_ms']:8.2f} ms  other {record['other_ms']:8.2f} ms"
            f"  ratio {middle:.3f} ({low:.3f}..{high:.3f})"
        )
    from pairs import write_line

    write_line(args.json, "compare_trees", weights=args.format, isa=os.environ.get("KVIK_CPU_ISA"), records=records)


if __name__ == "__main__":
    main()
