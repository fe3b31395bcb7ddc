"""lm-eval's local-completions and local-chat-completions against a running server, with tasks that need no download.

    python -m venv /tmp/lm-eval && /tmp/lm-eval/bin/pip install "lm-eval[api]" transformers
    kvik serve demo --dtype float32 --repetition-penalty 1
    /tmp/lm-eval/bin/python tests/clients/lm_eval_local.py http://127.0.0.1:8000 --tokenizer src/kvik/assets/demo

The tasks in `lm_eval_tasks/` have the server's own greedy text as their answers, which is asked for first. lm-eval must
find every text greedy, likelier than its words backwards, and the same when it asks again: every score must be 1. The
flags make greedy mean the most likely token: the demo's own defaults penalise repetition, and in bfloat16 two tokens
can be as likely as each other.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

__all__ = ["main"]

TASKS = Path(__file__).resolve().parent / "lm_eval_tasks"
MAX_TOKENS = 12
PROMPTS = (
    "Once upon a time", "The old king", "In the morning", "She opened the door and", "It was a dark night when",
    "The captain of the ship", "My dear friend,", "There was a house", "He said nothing, but", "Far over the hills,",
)  # fmt: skip


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps({"temperature": 0, "max_tokens": MAX_TOKENS, **body}).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        found: dict[str, Any] = json.loads(reply.read())
    return found


def make_items(url: str, file: Path) -> None:
    """Write the prompts with the server's greedy completions and answers, and each completion's words backwards."""
    items = []
    for prompt in PROMPTS:
        text = _post(f"{url}/v1/completions", {"prompt": prompt})["choices"][0]["text"]
        answer = _post(f"{url}/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}]})
        backwards = " ".join(["", *reversed(text.split())])
        content = answer["choices"][0]["message"]["content"]
        items.append({"prompt": prompt, "completion": text, "answer": content, "choices": [text, backwards]})
    file.write_text("".join(json.dumps(item) + "\n" for item in items))


def evaluate(kind: str, options: str, tasks: str, folder: Path, *flags: str) -> dict[str, dict[str, Any]]:
    """Run lm-eval in `folder`; the results of each task."""
    command = [sys.executable, "-m", "lm_eval", "--model", kind, "--model_args", options, "--tasks", tasks]
    command += ["--include_path", str(TASKS), "--output_path", str(folder / kind), *flags]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    print(done.stdout[done.stdout.index("|") :] if "|" in done.stdout else done.stdout)
    (file,) = (folder / kind).rglob("results_*.json")
    results: dict[str, dict[str, Any]] = json.loads(file.read_text())["results"]
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--tokenizer", required=True, help="folder of the served model, for its tokenizer")
    parser.add_argument("--model", default="demo")
    args = parser.parse_args()
    tokenizer = Path(args.tokenizer).resolve()
    common = f"model={args.model},max_retries=1,max_length=512"
    completions = f"{common},base_url={args.url}/v1/completions,tokenizer_backend=huggingface,tokenizer={tokenizer}"
    chat = f"{common},base_url={args.url}/v1/chat/completions"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_items(args.url, folder / "items.jsonl")
        tasks = "kvik_greedy,kvik_choice,kvik_generate,kvik_perplexity"
        found = evaluate("local-completions", f"{completions},num_concurrent=4", tasks, folder)
        found |= evaluate("local-chat-completions", chat, "kvik_chat", folder, "--apply_chat_template")
    scores = {
        "greedy": found["kvik_greedy"]["acc,none"],
        "choice": found["kvik_choice"]["acc,none"],
        "generate": found["kvik_generate"]["exact_match,none"],
        "chat": found["kvik_chat"]["exact_match,none"],
    }
    perplexity = found["kvik_perplexity"]["byte_perplexity,none"]
    fine = all(score == 1 for score in scores.values()) and 1 < perplexity < math.inf
    print(json.dumps({**scores, "byte_perplexity": perplexity, "passed": fine}))
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
