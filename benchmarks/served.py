"""The table of served loads: `kvik serve` under `kvik bench serve`, and the same requests offline.

    python benchmarks/served.py --model Qwen3-0.6B --json FILE
    python benchmarks/served.py --model FOLDER --rows 128 256 --scale 0.5 --engine max_num_seqs=512

First an engine alone (in a process of its own, which ends before the server starts) runs the requests of the closed
loads named by --offline, as many at a time as there will be clients: for 256 clients and `max_num_seqs` 256 that is
`LLM.generate`. Then the server gets every row: N clients who each wait for their answer, or R/s with Poisson arrivals.
Prompts are 100 to 1024 random ids, answers 100 to 512 tokens, streamed completions, greedy.

With --watch N every row follows N more times twice, first with somebody at the inspector's /debug/events. With
--same-prompts every row sends the requests of the others over again, so that most prompts are in the prefix cache.

A named shape has random weights and a vocabulary of words, so that every token is an event of its own; so has a folder
that holds a config.json and no tokenizer. Every row says which share of a core each process took: near 1, that process
is what the row measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from local_server import LocalServer, cpu_seconds, flags, make_folder
from pairs import SHAPES, write_line

TINY: dict[str, Any] = {
    **SHAPES["Qwen3-0.6B"], "vocab_size": 16384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "torch_dtype": "float32",
}  # fmt: skip
MODELS = {**SHAPES, "tiny": TINY}
REQUESTS = {1: 12, 32: 192, 128: 640, 256: 1024}
REQUESTS_PER_CLIENT, RATE_SECONDS = 4, 15.0
PROMPT_TOKENS, OUTPUT_TOKENS, TOKEN_IDS = (100, 1024), (100, 512), (3, 10_000)
WARM_UP = 8


def prepare(model: str, root: Path) -> tuple[str, dict[str, Any]]:
    """The folder of a model, with a tokenizer, and the options that its weights need."""
    folder = Path(model)
    if model not in MODELS and (not (folder / "config.json").is_file() or any(folder.glob("tokenizer*"))):
        return model, {}
    config = MODELS[model] if model in MODELS else json.loads((folder / "config.json").read_text())
    made = root / folder.name
    made.mkdir()
    make_folder(config, made)
    return str(made), {"load_format": "dummy"}


def num_requests(clients: int, scale: float) -> int:
    """How many requests a closed load sends."""
    return max(clients, round(scale * REQUESTS.get(clients, REQUESTS_PER_CLIENT * clients)))


def offline_worker(
    model: str, clients: Sequence[int], seed: str, same: bool, scale: float, options: dict[str, Any]
) -> None:
    """Print a JSON object for each closed load: what an engine alone makes of the same requests."""
    from kvik import LLMEngine
    from kvik.cli.bench_load import Load, Workload, planned
    from kvik.cli.bench_measure import measure
    from kvik.cli.bench_workloads import BenchRequest

    engine = LLMEngine(model, **options)
    ids = range(TOKEN_IDS[0], TOKEN_IDS[1] + 1)

    def run(seed: str, users: int, count: int) -> dict[str, Any]:
        workload = Workload(
            prompt_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS, seed=seed, num_requests=count, duration=None
        )
        rng, plan = random.Random(f"{seed}/0"), planned(workload, Load("clients", users))
        requests = [BenchRequest(rng.choices(ids, k=int(item.prompt)), item.output_tokens) for item in plan]
        return measure(engine, requests, 0.0, users).summary()

    run(f"{seed}/warm-up", WARM_UP, WARM_UP)
    for users in clients:
        found = run(seed if same else f"{seed}/{users}", users, num_requests(users, scale))
        print(json.dumps({"clients": users, "max_num_seqs": engine.resolved.scheduler.max_num_seqs, **found}))


def offline(model: str, args: argparse.Namespace, options: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What the worker found, by the number of clients."""
    if not args.offline:
        return {}
    clients = [str(users) for users in args.offline]
    facts = json.dumps([args.seed, args.same_prompts, args.scale, options])
    command = [sys.executable, __file__, "--offline-worker", model, facts]
    done = subprocess.run([*command, *clients], stdout=subprocess.PIPE, text=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"clients"')]
    for record in records:
        print(f"offline, {record['clients']} at a time: {record['output_tok_s']:,.0f} tok/s", flush=True)
    return {record["clients"]: record for record in records}


def load_flags(row: str, args: argparse.Namespace) -> list[str]:
    """How `kvik bench serve` is told of a row."""
    if row.endswith("/s"):
        return ["--rate", row[:-2], "--duration", str(RATE_SECONDS * args.scale)]
    return ["--clients", row, "--requests", str(num_requests(int(row), args.scale))]


def load(server: LocalServer, seed: str, how: Sequence[str], results: Path) -> dict[str, Any]:
    """Load the server once; the result. Raises RuntimeError where nothing could be measured."""
    lengths = [f"{low}..{high}" for low, high in (PROMPT_TOKENS, OUTPUT_TOKENS, TOKEN_IDS)]
    names = ("--prompt-tokens", "--output-tokens", "--token-ids")
    more = [part for pair in zip(names, lengths, strict=True) for part in pair]
    command = [sys.executable, "-m", "kvik.cli.main", "bench", "serve", server.url, *how, *more]
    command += ["--seed", seed, "--warm-up", "0", "--json", str(results)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout)
    result: dict[str, Any] = json.loads(results.read_text().splitlines()[-1])["result"]
    return result


@contextmanager
def watching(server: LocalServer) -> Iterator[None]:
    """Read the inspector's events until the block ends."""

    def read() -> None:
        while connection.recv(1 << 20):
            pass

    with socket.create_connection(server.address) as connection:
        connection.sendall(b"GET /debug/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1 << 20).startswith(b"HTTP/1.1 200 ")
        reader = threading.Thread(target=read)
        reader.start()
        yield
        assert reader.is_alive(), "the events ended"
        connection.shutdown(socket.SHUT_RDWR)
        reader.join()


def served(
    server: LocalServer, row: str, args: argparse.Namespace, results: Path, *, watched: bool = False
) -> dict[str, Any]:
    """Load the server with a row; its record."""
    before = cpu_seconds(server.processes)
    seed = args.seed if args.same_prompts else f"{args.seed}/{row}"
    with watching(server) if watched else nullcontext():
        result = load(server, seed, load_flags(row, args), results)
    spent = {name: value - before[name] for name, value in cpu_seconds(server.processes).items()}
    shares = {name: value / result["seconds"] for name, value in spent.items()}
    shares = {"client": result["client"]["cpu_share"], **shares}
    return {"load": row, "watched": watched, **result, "cpu_share": shares}


def show(record: dict[str, Any]) -> None:
    """Print a row of the table."""
    cells = [f"{record['load']:>6}{' watched' if record['watched'] else ''}", f"{record['output_tok_s']:>9,.0f} tok/s"]
    for name, title in (("ttft_s", "TTFT"), ("later_ttft_s", "later"), ("tpot_s", "TPOT")):
        if found := record.get(name):
            cells.append(f"{title} ms " + " / ".join(f"{1e3 * value:.1f}" for value in found.values()))
    if "served_to_offline" in record:
        cells.append(f"{100 * record['served_to_offline']:.1f} % of offline")
    if record["failed"] or record["unfinished"]:
        cells.append(f"{record['failed']} FAILED, {record['unfinished']} unfinished: {json.dumps(record['errors'])}")
    shares = ", ".join(f"{name} {100 * share:.0f}" for name, share in record["cpu_share"].items())
    print("   ".join([*cells, f"% of a core: {shares}"]), flush=True)


def measure_rows(model: str, args: argparse.Namespace, options: dict[str, Any], root: Path) -> list[dict[str, Any]]:
    """Serve the model and load it with every row; what was measured before a failure is kept."""
    alone, records = offline(model, args, options), list[dict[str, Any]]()
    with closing(LocalServer(model, [*flags(options), *args.serve], root / "log")) as server:
        print(f"ready after {server.start_seconds:.1f} s", flush=True)
        how = ["--clients", str(WARM_UP), "--requests", str(WARM_UP)]
        load(server, f"{args.seed}/warm-up", how, root / "results")
        for row, watched in itertools.product(args.rows, [False, *[True, False] * args.watch]):
            try:
                record = served(server, row, args, root / "results", watched=watched)
            except RuntimeError as error:
                print(f"{row}: {error}\nthe server said: {(root / 'log').read_text()[-4000:]}", file=sys.stderr)
                break
            if row.isdecimal() and int(row) in alone:
                record["served_to_offline"] = record["output_tok_s"] / alone[int(row)]["output_tok_s"]
            show(record)
            records.append({**record, "start_seconds": server.start_seconds})
    return [*({"offline": True, **record} for record in alone.values()), *records]


def option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON where it is."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main() -> int:
    """Parse the command line; the hidden first word starts the worker. 1 if not every row was measured."""
    if sys.argv[1:2] == ["--offline-worker"]:
        model, facts, *clients = sys.argv[2:]
        offline_worker(model, [int(users) for users in clients], *json.loads(facts))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-0.6B", help=f"{', '.join(MODELS)}, or the folder of a model")
    parser.add_argument(
        "--rows", nargs="+", default=["1", "32", "128", "256", "16/s", "64/s"], help="N clients, or R/s"
    )
    parser.add_argument(
        "--offline", nargs="*", type=int, default=[128, 256], help="clients to compare; none: no engine"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of requests, and of Poisson seconds")
    parser.add_argument("--seed", default="0", help="of lengths, arrivals and ids")
    parser.add_argument("--watch", type=int, default=0, metavar="N", help="pairs of rows with and without an inspector")
    parser.add_argument("--same-prompts", action="store_true", help="one seed for all rows, not one each")
    parser.add_argument("--engine", nargs="*", default=[], type=option, help="options of both engines, NAME=VALUE")
    parser.add_argument("--json", type=Path, help="append one line with machine, versions and all records")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="more flags of kvik serve; comes last")
    args = parser.parse_args()
    if args.watch < 0:
        parser.error(f"--watch must be at least 0, got {args.watch}")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model, needed = prepare(args.model, Path(folder))
        options = {**needed, **dict(args.engine)}
        records = measure_rows(model, args, options, Path(folder))
    name = Path(args.model).resolve().name if Path(args.model).is_dir() else args.model
    facts = {"model": name, "engine": options, "serve": args.serve, "scale": args.scale, "seed": args.seed}
    facts["same_prompts"] = args.same_prompts
    write_line(args.json, "served", **facts, seconds=time.perf_counter() - begin, records=records)
    print(f"{time.perf_counter() - begin:.0f} s in all")
    return int(sum("offline" not in record for record in records) < len(args.rows) * (1 + 2 * args.watch))


if __name__ == "__main__":
    sys.exit(main())
