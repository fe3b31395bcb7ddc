"""What a busy process on one core costs decoding, with threads that are bound to cores and with threads that are not.

    python benchmarks/busy_neighbour.py [--formats bf16 int8 int4g32] [--pairs 9] [--json FILE]

A Qwen3-0.6B-shaped decoder with random weights decodes one sequence at 128 tokens of context with all cores, in turns
beside a process that spins on the first core and beside the same process stopped. `kept` is the median of the ratios of
neighbouring turns; `left` is what the neighbour left of the machine, from its own CPU time. A neighbour that costs no
more than it takes has kept >= left. What else the machine does counts on both sides: measure when it is idle.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from cpu_ops import caches, qwen3_shape, random_weights, step_batch
from pairs import write_line

from kvik.kernels.cpu.native import NativePool, usable_cores
from kvik.layers.rope import RopeTable
from kvik.runtime.native_decoder import NativeDecoder

CONTEXT, TURN_SECONDS = 128, 1.0


@contextmanager
def spinner(core: int) -> Iterator[psutil.Process]:
    """A process that spins on `core`, stopped at first."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    os.kill(process.pid, signal.SIGSTOP)
    neighbour = psutil.Process(process.pid)
    neighbour.cpu_affinity([core])
    try:
        yield neighbour
    finally:
        process.kill()
        process.wait()


def speed(step: Callable[[], object]) -> float:
    """Steps per second over one turn."""
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < TURN_SECONDS:
        step()
        count += 1
    return count / (time.perf_counter() - begin)


def turns(step: Callable[[], object], neighbour: psutil.Process, pairs: int) -> dict[str, float]:
    kept, left, quiet = [], [], []
    for _ in range(pairs):
        alone = speed(step)
        neighbour.resume()
        before, begin = sum(neighbour.cpu_times()[:2]), time.perf_counter()
        beside = speed(step)
        taken = (sum(neighbour.cpu_times()[:2]) - before) / (time.perf_counter() - begin)
        neighbour.suspend()
        kept.append(beside / alone)
        left.append(1 - taken / len(usable_cores()))
        quiet.append(alone)
    return {
        "tok_s": statistics.median(quiet), "kept": statistics.median(kept), "kept_min": min(kept),
        "kept_max": max(kept), "left": statistics.median(left),
    }  # fmt: skip


def measure(fmt: str, pairs: int) -> list[dict[str, Any]]:
    """One record for threads that may move and one for bound ones, on the same weights."""
    spec, records = qwen3_shape(), []
    packer = NativePool()
    weights = random_weights(spec, fmt, packer)
    batch = step_batch(1, 1, CONTEXT, 8)
    for pin in (False, True):
        pool = NativePool(pin=pin)
        decoder = NativeDecoder(spec, weights, RopeTable(spec.rope, 1024, torch.device("cpu")), pool, 16)
        kv = tuple(caches(spec, 8, torch.bfloat16))

        def step(decoder: NativeDecoder = decoder, kv: Any = kv) -> object:
            return decoder.logits(decoder.forward(batch, kv))

        with spinner(usable_cores()[0]) as neighbour:
            step()
            found = turns(step, neighbour, pairs)
        records.append({"format": fmt, "pinned": pin, "threads": pool.threads, "pairs": pairs, **found})
        print(
            f"{fmt:8} {'pinned' if pin else 'free':7} {found['tok_s']:6.1f} tok/s alone, kept {found['kept']:.2f} "
            f"({found['kept_min']:.2f}..{found['kept_max']:.2f}) where {found['left']:.2f} was left", flush=True,
        )  # fmt: skip
        pool.close()
    packer.close()
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8", "int4g32"])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json", type=Path, help="append one line with machine, versions and all records")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    records = [record for fmt in args.formats for record in measure(fmt, args.pairs)]
    write_line(args.json, "busy_neighbour", load_average_before=load, records=records)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
