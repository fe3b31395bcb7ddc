"""A server under mixed load for as long as you like: does its memory stay flat, and does anything go wrong?

    python tests/clients/soak.py --minutes 30 --json soak.json
    python tests/clients/soak.py --minutes 3 -- --max-num-seqs 8       # what follows -- goes to kvik serve

It starts `kvik serve demo` with few KV blocks, so that sequences are preempted and cached prefixes evicted, and sends
chats, completions and embeddings, streamed and whole, short and long, with priorities, several choices, log-
probabilities and shared prefixes. One request in twenty is abandoned half-way. The result is JSON; the exit code is 0
if nothing failed, memory is flat, no block is held at the end, and the server ends cleanly.

Memory is flat if no process has, in the last third of the time, a median of 2 % or 4 MiB more than in the second third,
whichever is more.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import httpx
import psutil

__all__ = ["main"]

ABORTED = 0.05
SAMPLE_SECONDS = 10.0
SERVER_FLAGS = ("--port", "0", "--kv-cache-memory", "16MiB")
IDLE = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
TEXT = "the old king of that far land saw a ship come home and said to her now we will go out to sea again"
WORDS = TEXT.split()
SHARED = " ".join(WORDS * 6)


class Soak:
    """Callers that each wait for their answer, and what they saw."""

    def __init__(self, client: httpx.AsyncClient, seed: int) -> None:
        self._client = client
        self._rng = random.Random(seed)
        self.begin = time.monotonic()
        self.counts, self.errors = Counter[str](), Counter[str]()
        self.latencies: dict[int, list[float]] = defaultdict(list)
        self.first_tokens: dict[int, list[float]] = defaultdict(list)

    def draw(self) -> tuple[str, str, dict[str, Any]]:
        """A name, a path and a body."""
        rng = self._rng
        text = " ".join(rng.choices(WORDS, k=rng.choice((3, 20, 100, 400))))
        text = f"{SHARED} {text}" if rng.random() < 0.3 else text
        if rng.random() < 0.15:
            return "embeddings", "/v1/embeddings", {"input": [text, "a second text"]}
        body: dict[str, Any] = {"max_tokens": rng.choice((1, 16, 64, 250)), "temperature": rng.choice((0, 0.8))}
        body |= {"priority": rng.choice((-5, 0, 0, 5)), "n": rng.choice((1, 1, 1, 2, 4)), "ignore_eos": True}
        chat = rng.random() < 0.5
        if rng.random() < 0.1:
            body["logprobs"] = True if chat else 2
        body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        stream = rng.random() < 0.6
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        kind = f"{'chat' if chat else 'completions'} {'stream' if stream else 'whole'}"
        return kind, "/v1/chat/completions" if chat else "/v1/completions", body

    async def caller(self, end: float) -> None:
        """Send one request after the other until `end`."""
        while time.monotonic() < end:
            kind, path, body = self.draw()
            aborted = self._rng.random() < ABORTED
            patience = self._rng.uniform(0.01, 0.3) if aborted else 300.0
            start = time.monotonic()
            try:
                error = await asyncio.wait_for(self._send(path, body, start), patience)
            except asyncio.TimeoutError:
                error = "" if aborted else "timeout"
            except httpx.HTTPError as failure:
                error = type(failure).__name__
            else:
                aborted = False  # it was over before its caller left
                self.latencies[self._minute(start)].append(time.monotonic() - start)
            self.counts["aborted" if aborted else kind] += 1
            if error:
                self.errors[f"{kind}: {error}"] += 1

    async def _send(self, path: str, body: dict[str, Any], start: float) -> str:
        """Send a request and check its answer; what is wrong with it, if anything."""
        if not body.get("stream"):
            reply = await self._client.post(path, json=body)
            if reply.status_code != 200:
                return f"HTTP {reply.status_code}"
            answer = reply.json()
            good = len(answer["data"]) == 2 if "data" in answer else self._is_whole(answer["usage"], body)
            return "" if good else "an answer of the wrong size"
        last, usage = "", None
        async with self._client.stream("POST", path, json=body) as reply:
            if reply.status_code != 200:
                return f"HTTP {reply.status_code}"
            async for line in reply.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if not last:
                    self.first_tokens[self._minute(start)].append(time.monotonic() - start)
                last = line
                event = {} if line == "data: [DONE]" else json.loads(line[6:])
                if "error" in event:
                    return f"error event {event['error']['code']}"
                usage = event.get("usage") or usage
        if last != "data: [DONE]":
            return "a stream without an end"
        return "" if usage and self._is_whole(usage, body) else "a stream of the wrong size"

    @staticmethod
    def _is_whole(usage: dict[str, Any], body: dict[str, Any]) -> bool:
        return bool(usage["completion_tokens"] == body["n"] * body["max_tokens"])

    def _minute(self, at: float) -> int:
        return int((at - self.begin) // 60)


async def sample(process: psutil.Process, memory: dict[str, list[float]], end: float) -> None:
    """Note the resident memory (MiB) of the server's processes every ten seconds."""
    while time.monotonic() < end:
        await asyncio.sleep(min(SAMPLE_SECONDS, max(0.0, end - time.monotonic())))
        for member in (process, *process.children()):
            line = " ".join(member.cmdline())
            role = next((role for role in ("engine", "http") if f"{role}_process" in line), "supervisor")
            memory[f"{role} {member.pid}"].append(member.memory_info().rss / 2**20)


def growth(samples: list[float]) -> float:
    """MiB between the medians of the second and the last third."""
    third = len(samples) // 3
    return statistics.median(samples[-third:]) - statistics.median(samples[third : 2 * third])


async def held(client: httpx.AsyncClient) -> dict[str, float]:
    """What the engine still holds, after up to twenty seconds to let go; its status is half a second old at most."""
    await asyncio.sleep(1)
    found: dict[str, float] = {}
    for _ in range(40):
        found = {name: _metric((await client.get("/metrics")).text, name) for name in IDLE}
        if not any(found.values()):
            break
        await asyncio.sleep(0.5)
    return found


def _metric(text: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{name}\{{.*\}} (\S+)$", text, re.MULTILINE))


def _p99(values: list[float]) -> float:
    return round(sorted(values)[math.ceil(0.99 * len(values)) - 1], 3)


async def soak(url: str, process: psutil.Process, minutes: float, callers: int, seed: int) -> dict[str, Any]:
    """Load the server; the numbers of the run."""
    limits = httpx.Limits(max_connections=callers + 1)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        run, memory = Soak(client, seed), defaultdict[str, list[float]](list)
        end = run.begin + 60 * minutes
        await asyncio.gather(sample(process, memory, end), *(run.caller(end) for _ in range(callers)))
        left, text = await held(client), (await client.get("/metrics")).text
    growths = {name: round(growth(samples), 2) for name, samples in memory.items()}
    limits_mib = {name: max(4.0, 0.02 * samples[-1]) for name, samples in memory.items()}
    return {
        "minutes": minutes,
        "requests": dict(run.counts),
        "errors": dict(run.errors),
        "preemptions": _metric(text, "vllm:num_preemptions_total"),
        "generated_tokens": _metric(text, "vllm:generation_tokens_total"),
        "latency_p99_s": [_p99(run.latencies[minute]) for minute in sorted(run.latencies)],
        "first_event_p99_s": [_p99(run.first_tokens[minute]) for minute in sorted(run.first_tokens)],
        "rss_mib": {name: [round(value, 1) for value in samples] for name, samples in memory.items()},
        "growth_mib": growths,
        "flat": all(growths[name] <= limits_mib[name] for name in growths),
        "held_at_the_end": left,
    }


@contextlib.contextmanager
def started(flags: list[str]) -> Any:
    """A server and its URL. Its log is shown if it does not start."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "kvik.cli.main", "serve", "demo", *SERVER_FLAGS, *flags]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            found, end = None, time.monotonic() + 120
            while found is None and process.poll() is None and time.monotonic() < end:
                time.sleep(0.2)
                log.seek(0)
                found = re.search(r"serving on (\S+)", log.read())
            log.seek(0)
            if found is None:
                sys.exit(f"the server did not start:\n{log.read()}")
            yield process, found[1]
        finally:
            process.kill()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--callers", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to a file")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="of kvik serve")
    args = parser.parse_args()
    if 60 * args.minutes < 3 * SAMPLE_SECONDS:
        parser.error(f"--minutes must be at least {3 * SAMPLE_SECONDS / 60:g}, for three samples of the memory")
    with started(args.flags) as (process, url):
        family = psutil.Process(process.pid)
        result = asyncio.run(soak(url, family, args.minutes, args.callers, args.seed))
        children = family.children(recursive=True)
        process.send_signal(signal.SIGTERM)
        result["exit_code"] = process.wait(60)
        _, alive = psutil.wait_procs(children, 5)
        result["processes_left"] = len(alive)
    fine = result["flat"] and not result["errors"] and not any(result["held_at_the_end"].values())
    result["passed"] = bool(fine and result["exit_code"] == 0 and not alive)
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return int(not result["passed"])


if __name__ == "__main__":
    sys.exit(main())
