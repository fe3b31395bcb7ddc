"""What memory that was never written costs a prompt: prefill into fresh blocks of the KV cache, and into used ones.

    python benchmarks/fresh_prefill.py [--tree ROOT] [--pairs 5] [--json FILE]

A Qwen3-0.6B-shaped decoder with random bf16 weights takes a prompt of 512 tokens on two threads. `--tree` runs another
checkout of Kvik (with its own compiled kernels) against this one: processes of both alternate, and ratios are of pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

PROMPT, THREADS, RUNS = 512, 2, 3


def measure() -> dict[str, float]:
    """Median tokens per second of this process's Kvik, into fresh blocks and into the same ones again."""
    import torch
    from cpu_ops import BLOCK_SIZE, qwen3_shape, random_weights, seconds, step_batch

    from kvik.kernels.cpu.native import NativePool
    from kvik.layers.rope import RopeTable
    from kvik.runtime.kv_pool import KVPool
    from kvik.runtime.native_decoder import NativeDecoder

    pool, spec, cpu = NativePool(THREADS), replace(qwen3_shape(), vocab_size=10016), torch.device("cpu")
    weights = random_weights(replace(spec, num_layers=1, windows=(None,)), "bf16", pool)
    weights = replace(weights, layers=weights.layers * spec.num_layers)  # large products do not wait for their weights
    decoder = NativeDecoder(spec, weights, RopeTable(spec.rope, 8192, cpu), pool, PROMPT)
    per_prompt = PROMPT // BLOCK_SIZE
    kv = KVPool(spec, (RUNS + 1) * per_prompt, BLOCK_SIZE, torch.bfloat16, cpu).layers
    batch = step_batch(1, PROMPT, PROMPT, per_prompt)
    table, slots = batch.block_tables.clone(), batch.slots.clone()
    times: dict[str, list[float]] = {"fresh": [], "used": []}
    decoder.forward(batch, kv)  # the first one writes the activations for the first time
    for run in range(1, RUNS + 1):
        batch.block_tables.copy_(table + run * per_prompt)
        batch.slots.copy_(slots + run * PROMPT)
        for name in times:
            times[name].append(seconds(lambda: decoder.forward(batch, kv)))
    return {name: PROMPT / statistics.median(taken) for name, taken in times.items()}


def in_process(tree: Path) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": f"{tree / 'src'}{os.pathsep}{Path(__file__).parent}"}
    command = [sys.executable, __file__, "--once"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return {name: float(speed) for name, speed in json.loads(run.stdout).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, help="root of another checkout")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="append one line with machine, versions and all records")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(measure()))
        return
    trees = {"this": Path(__file__).parents[1], **({"other": args.tree} if args.tree else {})}
    runs = [{name: in_process(tree) for name, tree in trees.items()} for _ in range(args.pairs)]
    records = {
        name: {key: statistics.median(run[name][key] for run in runs) for key in ("fresh", "used")} for name in trees
    }
    print(
        "\n".join(
            f"{name}: " + ", ".join(f"{k} {v:.0f} tok/s" for k, v in speeds.items()) for name, speeds in records.items()
        )
    )
    facts: dict[str, object] = {"pairs": args.pairs, "tok_s": records}
    if args.tree:
        facts["ratio"] = {
            key: sorted(run["this"][key] / run["other"][key] for run in runs) for key in ("fresh", "used")
        }
        print("this over other, sorted:", facts["ratio"])
    from pairs import write_line

    write_line(args.json, "fresh_prefill", **facts)


if __name__ == "__main__":
    main()
