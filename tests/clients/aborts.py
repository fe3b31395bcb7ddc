"""Clients that go away at every stage, against a running server: is everything freed?

    python tests/clients/aborts.py http://127.0.0.1:8000 --count 10000

Each request is cut off at a random moment: in the middle of its body, at once, while it is queued or its prompt is
computed, after some events, while it is stalled (nobody reads), or not at all. Passes if at the end nothing runs or
waits, no KV block is in use, and a control request has the answer that it had before. Only for a server of your own on
this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from urllib.parse import urlsplit

import httpx

__all__ = ["run"]

CONCURRENCY = 48
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
CONTROL = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
STAGES = {"half a body": 2, "at once": 4, "soon": 6, "after events": 4, "stalled": 3, "at the end": 1}
"""Where requests are cut off, and how often beside each other."""


class Leaver:
    """Sends requests and leaves."""

    def __init__(self, url: str, seed: int) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._rng = random.Random(seed)
        self.left = Counter[str]()

    def request(self) -> bytes:
        rng = self._rng
        fields = {
            "prompt": [rng.randint(3, 200) for _ in range(rng.choice((1, 20, 300)))],
            "max_tokens": rng.choice((1, 10, 60, 200)),
            "n": rng.choice((1, 1, 1, 3)),
            "stream": rng.random() < 0.7,
            "ignore_eos": True,
            **({"stop": ["e", "the"]} if rng.random() < 0.2 else {}),
            **({"logprobs": 2} if rng.random() < 0.1 else {}),
        }
        body = json.dumps(fields).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        return head.encode() + b"\r\nconnection: close\r\n\r\n" + body

    async def one(self) -> None:
        """One request, cut off at a random stage."""
        rng, stage = self._rng, self._rng.choices([*STAGES], [*STAGES.values()])[0]
        reader, writer = await asyncio.open_connection(self._host, self._port)
        data = self.request()
        try:
            writer.write(data[: len(data) // 2] if stage == "half a body" else data)
            await writer.drain()
            if stage == "soon":
                await asyncio.sleep(rng.random() * 0.1)
            elif stage == "after events":
                for _ in range(rng.randint(1, 20)):
                    if not await reader.read(1000):
                        break
            elif stage == "stalled":
                await reader.read(1)
                await asyncio.sleep(rng.random() * 0.5)
            elif stage == "at the end":
                await reader.read()
        finally:
            self.left[stage] += 1
            writer.transport.abort()


async def _gauges(client: httpx.AsyncClient) -> list[float]:
    text = (await client.get("/metrics")).text
    return [float(found) for name in GAUGES for found in re.findall(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE)]


async def run(url: str, count: int, seed: int = 0) -> Counter[str]:
    """Send `count` requests; where they were cut off. Raises AssertionError where something is left or has changed."""
    leaver, numbers = Leaver(url, seed), iter(range(count))
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def control() -> str:
            answer = await client.post("/v1/completions", json=CONTROL)
            return str(answer.raise_for_status().json()["choices"][0]["text"])

        async def work() -> None:
            for _ in numbers:
                await leaver.one()

        expected = await control()
        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
        end = time.monotonic() + 30
        await asyncio.sleep(1.0)  # gauges are at most half a second old
        while any(left := await _gauges(client)):
            assert time.monotonic() < end, dict(zip(GAUGES, left, strict=True))
            await asyncio.sleep(0.5)
        assert len(left) == len(GAUGES), "the server does not tell what it holds"
        assert await control() == expected, "a control request changed"
    return leaver.left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if urlsplit(args.url).hostname not in ("127.0.0.1", "localhost", "::1"):
        sys.exit("this program leaves requests behind: only for a server on this machine")
    print(dict(asyncio.run(run(args.url, args.count, args.seed))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
