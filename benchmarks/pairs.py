"""What the comparisons share: shapes, Kvik's worker, and alternating runs of two engines in processes of their own.

Each engine sleeps while the other runs, so both meet the machine in the same minute; what is reported are medians of
pairwise ratios, with their spread. A prompt has 512 tokens; 128 are generated, greedily.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 4096, "rope_theta": 1000000, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    },
    "Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096,
        "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 4096, "rope_theta": 1000000, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
    "Qwen2-0.5B": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "rope_theta": 1000000, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    },
}  # fmt: skip
PROMPT, OUTPUT, THREADS = 512, 128, 2
_RANDOM = random.Random(0)


def kvik_worker(folder: Path, quantization: str | None) -> None:
    """Read user counts from stdin, answer each with {"prefill": seconds, "decode": seconds}, both of all users."""
    from kvik import LLM, SamplingParams

    options: dict[str, Any] = {"load_format": "dummy", "threads": THREADS, "max_num_seqs": 8, "max_model_len": 704}
    llm = LLM(str(folder), quantization=quantization, max_num_batched_tokens=8 * PROMPT, **options)
    params = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
    print("ready", flush=True)
    for line in sys.stdin:
        prompts = random_prompts(int(line))
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params)
        total = time.perf_counter() - begin
        prefill = max(output.metrics.time_to_first_token or 0.0 for output in outputs)
        print(json.dumps({"prefill": prefill, "decode": total - prefill}), flush=True)


class Worker:
    """An engine in a process of its own. `start_seconds` is the time until it is ready."""

    def __init__(self, command: list[str]) -> None:
        begin = time.perf_counter()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while self._line() != "ready\n":
            pass
        self.start_seconds = time.perf_counter() - begin

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a worker died; its message is above")
        return line

    def run(self, users: int) -> dict[str, float]:
        """Tokens per second of prefill and decode, all users together."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{users}\n")
        self._process.stdin.flush()
        line = self._line()
        while not line.startswith('{"prefill"'):  # what the engine itself prints
            line = self._line()
        seconds = json.loads(line)
        return {"prefill": users * PROMPT / seconds["prefill"], "decode": users * (OUTPUT - 1) / seconds["decode"]}

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def random_prompts(users: int) -> list[list[int]]:
    """Prompts that no earlier call returned."""
    return [[_RANDOM.randint(3, 9000) for _ in range(PROMPT)] for _ in range(users)]


def alternate(kvik: Worker, peer: Worker, name: str, args: argparse.Namespace, **facts: Any) -> list[dict[str, Any]]:
    """Run `args.pairs` pairs for each number of users; one record for prefill and one for decode of each.

    Both engines first run as many users as ever, so that all memory of their caches has been touched once.
    """
    records = []
    kvik.run(max(args.users)), peer.run(max(args.users))
    for users in args.users:
        kvik.run(users), peer.run(users)
        runs = [(kvik.run(users), peer.run(users)) for _ in range(args.pairs)]
        for phase in ("prefill", "decode"):
            record = {**facts, "users": users, "phase": phase, "pairs": args.pairs, **_medians(runs, name, phase)}
            records.append(record)
            print(
                *facts.values(), f"{users} users {phase:8} kvik {record['kvik_tok_s']:8.1f}  "
                f"{name} {record[f'{name}_tok_s']:8.1f}  ratio {record['ratio']:.2f} "
                f"({record['ratio_min']:.2f}..{record['ratio_max']:.2f})", flush=True,
            )  # fmt: skip
    return records


def _medians(runs: list[tuple[dict[str, float], dict[str, float]]], name: str, phase: str) -> dict[str, float]:
    ratios = sorted(ours[phase] / theirs[phase] for ours, theirs in runs)
    return {
        "kvik_tok_s": statistics.median(ours[phase] for ours, _ in runs),
        f"{name}_tok_s": statistics.median(theirs[phase] for _, theirs in runs),
        "ratio": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every comparison has."""
    add_folder(parser)
    parser.add_argument("--shapes", nargs="+", default=["Qwen3-0.6B"], choices=list(SHAPES))
    parser.add_argument("--users", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--pairs", type=int, default=5)


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Where the models of a measurement are, and where its result goes."""
    parser.add_argument("--folder", type=Path, required=True, help="where model folders are kept")
    parser.add_argument("--json", type=Path, help="append one line with machine, versions and all records")


def model_folder(shape: str, root: Path) -> Path:
    """A folder with the config.json of a shape; engines fill it with random weights."""
    folder = root / shape
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]))
    return folder


def write_line(path: Path | None, benchmark: str, **facts: Any) -> None:
    """Append a result line to `path`, where one is named."""
    if path is None:
        return
    from kvik.cli.environment import commit, machine, versions

    line = {"benchmark": benchmark, "machine": machine(), "versions": versions(), "commit": commit(), **facts}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    kvik_worker(Path(sys.argv[1]), sys.argv[2] or None)
