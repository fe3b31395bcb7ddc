"""Attention by Triton and by FlashInfer on a GPU: one layer of decode steps and of prefills. Needs FlashInfer.

    python benchmarks/attention_backends.py --json FILE

bfloat16, heads of 128, blocks of 64 tokens in random order, of four layers, as a `KVPool` has them. `us` is a layer's
share of a CUDA graph of all four, without planning, the median of runs in turns; `flashinfer_plan_us` is the time that
the host takes to plan a step, `gap` the largest difference of the two results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvik.attention.base import ForwardBatch
from kvik.attention.flashinfer import FlashInferAttention
from kvik.attention.triton import AttentionLimits, TritonAttention
from kvik.kernels.api import KVLayer
from kvik.kernels.triton.features import Features

LAYERS, BLOCK_SIZE, HEAD_DIM = 4, 64, 128
SCALE = HEAD_DIM**-0.5
HEADS = ((16, 8), (32, 8))
CASES = ((32, 1, 600), (256, 1, 860), (16, 3900, 3900), (8, 1000, 3000))  # sequences, queries and context of each
DEVICE = torch.device("cuda")


class Case:
    """Random keys and values of a step, and both backends set up for it."""

    def __init__(self, heads: tuple[int, int], num_seqs: int, queries: int, context: int) -> None:
        self.heads, self.num_seqs, self.queries, self.context = heads, num_seqs, queries, context
        blocks = -(-context // BLOCK_SIZE)
        shape = (num_seqs * blocks, LAYERS, 2, heads[1], BLOCK_SIZE, HEAD_DIM)
        pool = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)
        self.kv = [KVLayer(pool[:, i, 0], pool[:, i, 1]) for i in range(LAYERS)]
        self.q = torch.randn(num_seqs * queries, heads[0], HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
        none, starts = torch.empty(0, dtype=torch.int64), range(0, (num_seqs + 1) * queries, queries)
        self.batch = ForwardBatch(
            none, none, none, torch.tensor(starts, dtype=torch.int32, device=DEVICE),
            torch.full((num_seqs,), context, dtype=torch.int32, device=DEVICE),
            torch.randperm(num_seqs * blocks, dtype=torch.int32, device=DEVICE).view(num_seqs, blocks),
            none, tuple(starts), (context,) * num_seqs,
        )  # fmt: skip
        sizes = num_seqs, num_seqs * queries, num_seqs * context
        limits = AttentionLimits(*heads, HEAD_DIM, *sizes, block_size=BLOCK_SIZE)
        pdl, hopper = Features.of(DEVICE)
        self.backends = {
            "triton": TritonAttention(limits, DEVICE, pdl=pdl, tma=pdl, hopper=hopper),
            "flashinfer": FlashInferAttention(limits, DEVICE),
        }

    def forward(self, name: str) -> Tensor:
        """All layers, of a step that was prepared; the result of the last one."""
        for kv in self.kv:
            out = self.backends[name].forward(self.q, kv, self.batch, scale=SCALE, window=None)
        return out

    def warm_up(self) -> float:
        """Compile and plan; the largest difference of the two backends' results."""
        for backend in self.backends.values():
            backend.prepare(self.batch)
        first, second = (self.forward(name).float() for name in self.backends)
        return (first - second).abs().max().item()

    def measure(self, rounds: int) -> dict[str, Any]:
        gap = self.warm_up()
        replays = {name: self._graph(name).replay for name in self.backends}
        taken: dict[str, list[float]] = {name: [] for name in replays}
        for _ in range(rounds):
            for name, replay in replays.items():
                taken[name].append(_seconds(replay) / LAYERS)
        us = {name: round(1e6 * statistics.median(times), 2) for name, times in taken.items()}
        return {
            "kernel": "attention of a layer by backend",
            "heads": list(self.heads),
            "batch": self.num_seqs,
            "queries": self.queries,
            "context": self.context,
            "us": us,
            "fastest_us": {name: round(1e6 * min(times), 2) for name, times in taken.items()},
            "flashinfer_over_triton": round(us["flashinfer"] / us["triton"], 3),
            **{f"{name}_{self._unit[0]}": round(self._work / us[name] / self._unit[1], 2) for name in us},
            "flashinfer_plan_us": round(1e6 * self._plan_seconds(), 1),
            "gap": gap,
        }

    def _graph(self, name: str) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            self.forward(name)
        graph.replay()
        return graph

    @property
    def _unit(self) -> tuple[str, float]:
        return ("GB_s", 1e3) if self.queries == 1 else ("TFLOP_s", 1e6)

    @property
    def _work(self) -> float:
        """Bytes of keys and values of a decode, or operations of a prefill, of a layer."""
        if self.queries == 1:
            return self.num_seqs * self.context * 2 * self.heads[1] * HEAD_DIM * 2
        seen = self.queries * (self.context - self.queries) + self.queries * (self.queries + 1) // 2
        return 4 * self.num_seqs * seen * self.heads[0] * HEAD_DIM

    def _plan_seconds(self) -> float:
        attention, times = self.backends["flashinfer"], []
        assert isinstance(attention, FlashInferAttention)
        for _ in range(10):
            torch.cuda.synchronize()
            attention.prepare(self.batch)
            begin = time.perf_counter()
            attention._plan(self.q, self.kv[0], self.batch, SCALE, None)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)


def _seconds(compute: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    compute()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="append the results to this file")
    args = parser.parse_args()
    facts = {
        "machine": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "triton", "flashinfer-python")},
        "time": time.strftime("%Y-%m-%d", time.gmtime()),
        "how": "benchmarks/attention_backends.py",
    }
    for heads in HEADS:
        for case in CASES:
            record = Case(heads, *case).measure(args.rounds) | facts
            print(json.dumps(record), flush=True)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
