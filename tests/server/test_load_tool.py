"""`kvik bench serve` against `kvik serve`: both count the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from server_harness import Served

from kvik.cli.main import main

NAMES = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:request_success_total")


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_the_tool_and_the_server_count_the_same(served: Served, tmp_path: Path, endpoint: str) -> None:
    served.wait_idle()
    before = [served.metric(name) for name in NAMES]
    argv = ["--clients", "3", "--requests", "7", "--prompt-tokens", "5..40", "--output-tokens", "3..20"]
    argv += ["--warm-up", "0", "--endpoint", endpoint, "--json", str(tmp_path / "r.jsonl")]
    argv += ["--token-ids", "3..299"] if endpoint == "completions" else []
    assert main(["bench", "serve", served.url, *argv]) == 0
    result = json.loads((tmp_path / "r.jsonl").read_text())["result"]
    tokens, prompts, requests = (served.metric(name) - old for name, old in zip(NAMES, before, strict=True))
    assert result["completed"] == 7 == requests - 1  # one asks whether the server works at all
    assert result["output_tokens"] == tokens - 2 and 21 <= result["output_tokens"] <= 140
    assert 0 < prompts - result["prompt_tokens"] < result["prompt_tokens"]
    assert not result["without_usage"] and not result["errors"]
