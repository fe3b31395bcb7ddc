"""What serving costs: the same requests through `LLM.generate` and through `kvik serve`, in alternating runs.

    python benchmarks/http_cost.py --model Qwen3-0.6B --quantization int8 --clients 16 --pairs 5 --json FILE

Both engines live in processes of their own and sleep while the other runs. A run is `--clients` requests at once, of
random token ids, never the same twice; served ones are streams of /v1/completions, read from plain sockets by this
process, as seldom as it can. A named shape has random weights and a vocabulary of words, so that every token is an
event of its own. Reported are the ratio of the throughputs of each pair, and the processor time of every process per
1000 tokens, which suffers less from other work on the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
from local_server import LocalServer, cpu_seconds, flags, make_folder
from pairs import SHAPES, write_line

Prompts = list[list[int]]
HIGHEST_ID = 5000  # below every vocabulary's size
READ_INTERVAL = 0.005
"""Seconds between two looks at the answers. A client that wakes for every event takes a core from the engine."""


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The same for both engines."""
    options = {"max_num_seqs": args.clients, "max_model_len": args.prompt + args.output, "threads": args.threads}
    more = {"load_format": "dummy" if args.model in SHAPES else None, "quantization": args.quantization}
    return {name: value for name, value in {**options, **more}.items() if value is not None}


def offline_worker(model: str, output: int, options: dict[str, Any]) -> None:
    """Read lists of prompts from stdin, answer each with the seconds that `LLM.generate` took."""
    from kvik import LLM, SamplingParams

    llm = LLM(model, **options)
    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    print("ready", flush=True)
    for line in sys.stdin:
        prompts = json.loads(line)
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - begin
        assert sum(item.usage.completion_tokens for item in outputs) == len(prompts) * output
        print(seconds, flush=True)


class Offline:
    """The worker in a process of its own."""

    name = "offline"

    def __init__(self, model: str, args: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--offline", model, str(args.output), json.dumps(engine_options(args))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.processes = {"offline": psutil.Process(self._process.pid)}
        self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the offline engine died; its message is above")
        return line

    def run(self, prompts: Prompts) -> float:
        """Seconds for all prompts."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(prompts) + "\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


class Server:
    """`kvik serve` and its clients."""

    name = "served"

    def __init__(self, model: str, args: argparse.Namespace, log: Path) -> None:
        self._output = args.output
        self._server = LocalServer(model, [*flags(engine_options(args)), *args.serve], log)
        self.processes = {"client": psutil.Process(), **self._server.processes}

    def run(self, prompts: Prompts) -> float:
        """Seconds from the first connection to the last byte."""
        heads = [self._request(prompt) for prompt in prompts]
        answers = {i: bytearray() for i in range(len(prompts))}
        waiting = selectors.DefaultSelector()
        begin = time.perf_counter()
        for i, head in enumerate(heads):
            client = socket.create_connection(self._server.address)
            client.sendall(head)
            waiting.register(client, selectors.EVENT_READ, i)
        while waiting.get_map():
            time.sleep(READ_INTERVAL)
            for key, _ in waiting.select():
                assert isinstance(key.fileobj, socket.socket)
                data = key.fileobj.recv(65536)
                answers[key.data] += data
                if not data:
                    waiting.unregister(key.fileobj)
                    key.fileobj.close()
        seconds = time.perf_counter() - begin
        for answer in answers.values():
            assert answer.startswith(b"HTTP/1.1 200") and b"[DONE]" in answer, answer[-2000:]
            assert f'"completion_tokens":{self._output},'.encode() in answer, answer[-2000:]
        self.num_events = sum(answer.count(b"data: ") for answer in answers.values())
        return seconds

    def _request(self, prompt: list[int]) -> bytes:
        fields = {
            "prompt": prompt, "max_tokens": self._output, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        body = json.dumps(fields).encode()
        lines = ["POST /v1/completions HTTP/1.1", "host: kvik", "connection: close", "content-type: application/json"]
        return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body

    def close(self) -> None:
        self._server.close()


def timed(side: Offline | Server, prompts: Prompts) -> tuple[float, dict[str, float]]:
    """Seconds of a run, and processor seconds of every process in it."""
    before = cpu_seconds(side.processes)
    seconds = side.run(prompts)
    return seconds, {name: spent - before[name] for name, spent in cpu_seconds(side.processes).items()}


def measure(model: str, args: argparse.Namespace, log: Path) -> dict[str, Any]:
    """Alternate both sides and return the record."""
    rng = random.Random(args.seed)

    def prompts() -> Prompts:
        return [[rng.randint(3, HIGHEST_ID) for _ in range(args.prompt)] for _ in range(args.clients)]

    ratios, cpu, seconds = [], defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    num_tokens = args.clients * args.output
    with closing(Offline(model, args)) as offline, closing(Server(model, args, log)) as server:
        for side in (offline, server):
            side.run(prompts())
        for number in range(args.pairs):
            pair = {}
            for side in (offline, server) if number % 2 == 0 else (server, offline):
                pair[side.name], spent = timed(side, prompts())
                seconds[side.name].append(pair[side.name])
                for name, value in spent.items():
                    cpu[name].append(1000 * value / num_tokens)
            ratios.append(pair["offline"] / pair["served"])
            print(f"offline {pair['offline']:.2f} s, served {pair['served']:.2f} s, ratio {ratios[-1]:.3f}", flush=True)
    return {
        "model": args.model, "options": engine_options(args), "serve": args.serve, "clients": args.clients,
        "prompt_tokens": args.prompt, "output_tokens": args.output, "pairs": args.pairs,
        "events_per_token": server.num_events / num_tokens,
        **{f"{name}_tok_s": num_tokens / statistics.median(times) for name, times in seconds.items()},
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
        "cpu_s_per_1000_tokens": {name: statistics.median(values) for name, values in cpu.items()},
    }  # fmt: skip


def main() -> None:
    """Parse the command line; the hidden first word starts the worker."""
    if sys.argv[1:2] == ["--offline"]:
        return offline_worker(sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-0.6B", help=f"{', '.join(SHAPES)}, or a model with weights")
    parser.add_argument("--quantization", help="of the weights, as for kvik serve")
    parser.add_argument("--threads", type=int, help="of the engine")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens")
    parser.add_argument("--output", type=int, default=128, help="output tokens")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="more flags of kvik serve; comes last")
    parser.add_argument("--json", type=Path, help="append one line with machine, versions and the record")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model in SHAPES:
            model = folder
            make_folder(SHAPES[args.model], Path(folder))
        record = measure(model, args, Path(folder) / "log")
    print(json.dumps(record, indent=2))
    return write_line(args.json, "http_cost", records=[record])


if __name__ == "__main__":
    main()
