"""Malformed and abusive requests against a running server, with control requests beside them.

    python tests/clients/fuzz.py http://127.0.0.1:8000 --count 10000

Passes if every answer is a client error or a success (never a 5xx), and the control requests stay bit-identical. Only
for a server of your own on this machine; tests/server/test_fuzz.py runs a smaller one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import httpx

__all__ = ["Fuzz", "abuse", "run"]

PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize",
    "/apply-template", "/generate", "/generate_stream", "/batch_generate",
)  # fmt: skip
FIELDS = (
    "add_generation_prompt", "add_special_tokens", "allowed_token_ids", "bad_words", "best_of", "cache_salt",
    "chat_template", "chat_template_kwargs", "continue_final_message", "echo", "frequency_penalty", "guided_json",
    "ignore_eos", "include_stop_str_in_output", "input", "instructions", "logit_bias", "logprobs",
    "max_completion_tokens", "max_output_tokens", "max_tokens", "messages", "metadata", "min_p", "min_tokens", "model",
    "n", "presence_penalty", "priority", "prompt", "prompts", "reasoning_effort", "repetition_penalty",
    "response_format", "return_token_ids", "seed", "skip_special_tokens", "stop", "stop_token_ids", "stream",
    "stream_options", "suffix", "temperature", "tokens", "tool_choice", "tools", "top_k", "top_logprobs", "top_p",
    "truncate_prompt_tokens", "user", "__class__", "", "\u0000", "logits_processors",
)  # fmt: skip
JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 64, 383, 384, 10**6, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.0, 0.5, 1.5, -0.1,
    1e308, -1e308, "", " ", "x", "none", "auto", "true", "1", "\u0000", "\ud7ff", "\uffff", "🙂" * 50, "a" * 5000,
    "{{ 7 * 7 }}", "{% for i in range(10**9) %}x{% endfor %}", "<|im_start|>", "../../etc", [], {}, [[]], [{}], [None],
    [0], [1, 2, 3], [384], [-1], [1.5], ["a", "b"], [["a"]], [[1, 2], [3]], ["x"] * 100, {"a": 1}, {"type": "text"},
    {"1": 5}, {"384": 5}, {"-1": 5}, {"1": 1e9}, {"1": "x"}, {str(i): 1 for i in range(300)},
    [{"role": "user", "content": "Hi"}], [{"role": "user"}], [{"role": 5, "content": "Hi"}], [{"content": []}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    {"include_usage": True}, {"include_usage": 1}, {"add_generation_prompt": False}, {"messages": [], "x": {}},
)  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 2},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 2},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1, 2]},
    "/apply-template": {"messages": [{"role": "user", "content": "Hi"}]},
    "/generate": {"prompt": "Hi", "max_tokens": 2},
    "/generate_stream": {"prompt": "Hi", "max_tokens": 2},
    "/batch_generate": {"prompts": ["Hi"], "max_tokens": 2},
}
CONTROL = {
    "prompt": "Once upon a time",
    "max_tokens": 12,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
}


class Fuzz:
    """A reproducible stream of bad requests."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def request(self) -> tuple[str, str, dict[str, str], bytes]:
        """Method, path, headers and body."""
        rng = self._rng
        path, method = rng.choice(PATHS), "POST"
        headers = {"content-type": "application/json"}
        body = json.dumps(self._mutate(BASES.get(path, {}))).encode()
        roll = rng.random()
        if roll < 0.15:
            body = self._broken(body)
        elif roll < 0.18:
            headers["content-type"] = rng.choice(("text/plain", "", "application/xml", "x" * 500))
        elif roll < 0.22:
            method = rng.choice(("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"))
        elif roll < 0.25:
            path = rng.choice(("/", "/v1", "/v1/models/" + "x" * 300, "/%2e%2e/%00", "/debug", "/v1/completions/"))
        return method, path, headers, body

    def _mutate(self, base: dict[str, Any]) -> dict[str, Any]:
        body = dict(base)
        for _ in range(self._rng.randint(1, 3)):
            body[self._rng.choice(FIELDS)] = self._rng.choice(JUNK)
        if self._rng.random() < 0.1 and body:
            del body[self._rng.choice(sorted(body))]
        return body

    def _broken(self, body: bytes) -> bytes:
        rng = self._rng
        cut = rng.randrange(len(body))
        return rng.choice(
            (
                body[:cut],
                body[:cut] + bytes([rng.randrange(256)]) + body[cut + 1 :],
                b"[" * 100_000,
                b'{"a":' * 20_000,
                b'{"prompt": NaN}',
                b'{"temperature": 1e999, "prompt": "x"}',
                b'{"n": ' + b"9" * 5000 + b"}",
                b'{"prompt": "\\ud800", "max_tokens": 1}',
                b'{"prompt": "\xff\xfe"}',
                b"null",
                b"[]",
                b"",
                b'{"prompt": "' + b"y" * 300_000 + b'"}',
            )
        )


async def run(url: str, count: int, seed: int = 0, concurrency: int = 16) -> Counter[int]:
    """Send `count` bad requests; the answers by status. Raises AssertionError for a 5xx or a changed control."""
    fuzz, statuses = Fuzz(seed), Counter[int]()
    limits = httpx.Limits(max_connections=concurrency + 2)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def control() -> Any:
            answer = await client.post("/v1/completions", json=CONTROL)
            assert answer.status_code in (200, 429), answer.text
            return answer.json()["choices"] if answer.status_code == 200 else None

        expected = await control()
        left = iter(range(count))

        async def work() -> None:
            for number in left:
                method, path, headers, body = fuzz.request()
                answer = await client.request(method, path, headers=headers, content=body)
                statuses[answer.status_code] += 1
                assert answer.status_code < 500, (method, path, body[:300], answer.text)
                if answer.status_code >= 400 and method != "HEAD":
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text
                if number % 20 == 0:
                    assert await control() in (expected, None), "a control request changed"

        await asyncio.gather(*(work() for _ in range(concurrency)))
        assert await control() == expected
    return statuses


async def abuse(url: str, connections: int = 500) -> None:
    """Connections that say nothing or half a request, and a body of ten megabytes; a good request must get through."""
    parts = urlsplit(url)
    sockets = []
    for number in range(connections):
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
        if number % 2:
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            writer.write(head + b"content-length: 1000\r\n\r\n{")
        sockets.append(writer)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        large = await client.post("/v1/completions", json={"prompt": "z" * 10_000_000})
        assert large.status_code == 413, large.text
        fine = await client.post("/v1/completions", json=CONTROL)
        assert fine.status_code == 200, fine.text
    for writer in sockets:
        writer.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    host = urlsplit(args.url).hostname
    if host not in ("127.0.0.1", "localhost", "::1"):
        sys.exit("this program sends abusive requests: only a server on this machine")
    statuses = asyncio.run(run(args.url, args.count, args.seed))
    asyncio.run(abuse(args.url))
    print(dict(sorted(statuses.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
