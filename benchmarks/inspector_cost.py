"""What the inspector costs the engine process: its loop with nobody, somebody and again nobody at /debug/events.

    python benchmarks/inspector_cost.py --batch 1 32 128 256 --pairs 5 --json FILE

Engine, scheduler, messages and sockets are those of `kvik serve`; in place of the model stands one that answers at
once, so the processor time of a step is all host work, and the inspector's part is seen well. A run is `--batch`
requests at once of `--tokens` tokens each, all decoding together. Reported are microseconds of processor time per step,
medians over the runs, which alternate; `share` is what the inspector adds, of a step that takes as long as a model's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import zmq
from pairs import write_line

from kvik.config import SchedulerConfig
from kvik.core.engine import Engine
from kvik.core.plan import RowResult, StepPlan, StepResult
from kvik.core.scheduler import Scheduler
from kvik.server import messages as wire
from kvik.server.engine_server import EngineServer

PROMPT = 128
H200_STEP_MS = {1: 0.72, 32: 1.48, 128: 2.69, 256: 3.62}
"""Milliseconds of a decode step of Qwen3-0.6B, from decode_bsN in results/h200-throughput-2026-11-20.jsonl."""


class InstantExecutor:
    """A model that has already answered."""

    def __init__(self) -> None:
        self._plans: list[StepPlan] = []

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    def collect(self) -> StepResult:
        plan = self._plans.pop(0)
        rows = tuple(RowResult(chunk.row, (7,) if chunk.sample else ()) for chunk in plan.chunks)
        return StepResult(plan.step_id, rows, (7,) * len(plan.decodes))

    def get_ready(self) -> bool:
        return False

    def reset(self) -> None:
        self._plans.clear()

    def close(self) -> None:
        self._plans.clear()


def client(endpoint: str) -> None:
    """An HTTP process of sorts: a line on stdin is [watch, batch, tokens]; it sends them and waits for their ends."""
    from kvik.core.request import Request
    from kvik.sampling_params import SamplingParams

    dealer: zmq.Socket[bytes] = zmq.Context().socket(zmq.DEALER)
    dealer.setsockopt(zmq.RCVHWM, 0)
    dealer.connect(endpoint)
    dealer.send(wire.encode(wire.Hello()))
    number = 0
    for line in sys.stdin:
        watch, batch, tokens = json.loads(line)
        dealer.send(wire.encode(wire.Watch(watch)))
        for _ in range(batch):
            number += 1
            prompt = tuple(3 + (number * 7919 + i) % 9000 for i in range(PROMPT))
            params = SamplingParams(max_tokens=tokens, ignore_eos=True)
            request = Request(request_id=f"cmpl-{number:024}", prompt_token_ids=prompt, params=params, seed=1)
            dealer.send(wire.encode(wire.pack_request(request)))
        left = batch
        while left:
            message = wire.decode_from_engine(dealer.recv())
            if isinstance(message, wire.Outputs):
                left -= len(message.full)
        print("done", flush=True)


def measure(batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Runs of one batch size; their record."""
    length = PROMPT + args.tokens
    config = SchedulerConfig(
        block_size=64, num_blocks=2 * batch * -(-length // 64), max_num_seqs=batch, max_model_len=length,
        max_num_batched_tokens=batch * PROMPT, run_ahead=1,
    )  # fmt: skip
    engine = Engine(Scheduler(config), InstantExecutor())
    found = defaultdict[str, list[float]](list)
    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/engine"
        server = EngineServer(engine, endpoint, wire.Ready(scheduler=config, vocab_size=10_000, hidden_size=8))
        thread = threading.Thread(target=server.run)
        thread.start()
        peer = subprocess.Popen(
            [sys.executable, __file__, "--client", endpoint], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

        def run(watch: bool) -> float:
            assert peer.stdin is not None and peer.stdout is not None
            steps, begin = engine.stats.num_steps, time.process_time()
            peer.stdin.write(json.dumps([watch, batch, args.tokens]) + "\n")
            peer.stdin.flush()
            assert peer.stdout.readline() == "done\n"
            return 1e6 * (time.process_time() - begin) / (engine.stats.num_steps - steps)

        run(False)
        found["never"] = [run(False) for _ in range(args.pairs)]
        for number in range(args.pairs):
            for watch in (True, False) if number % 2 == 0 else (False, True):
                found["watched" if watch else "after"].append(run(watch))
        assert peer.stdin is not None
        peer.stdin.close()
        peer.wait(30)
        server.stop()
        thread.join()
        server.close()
    added = [watched - after for watched, after in zip(found["watched"], found["after"], strict=True)]
    return {
        "batch": batch, "tokens": args.tokens, "pairs": args.pairs,
        "us_per_step": {name: statistics.median(values) for name, values in found.items()},
        "added_us": statistics.median(added), "added_us_min": min(added), "added_us_max": max(added),
        "h200_step_ms": H200_STEP_MS.get(batch),
        "share": statistics.median(added) / 1e3 / H200_STEP_MS[batch] if batch in H200_STEP_MS else None,
    }  # fmt: skip


def main() -> None:
    """Parse the command line; the hidden first word starts the client."""
    if sys.argv[1:2] == ["--client"]:
        return client(sys.argv[2])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--tokens", type=int, default=512, help="output tokens of each request")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="append one line with machine, versions and all records")
    args = parser.parse_args()
    records = []
    for batch in args.batch:
        record = measure(batch, args)
        records.append(record)
        cost, share = record["us_per_step"], record["share"]
        print(
            f"batch {batch:>3}: us per step {cost['never']:.1f} before anybody watched, {cost['watched']:.1f} watched,"
            f" {cost['after']:.1f} after; the inspector adds {record['added_us']:.1f} us"
            f" ({record['added_us_min']:.1f}..{record['added_us_max']:.1f})"
            + ("" if share is None else f", {100 * share:.2f} % of a step of {record['h200_step_ms']} ms"),
            flush=True,
        )
    return write_line(args.json, "inspector_cost", records=records)


if __name__ == "__main__":
    main()
