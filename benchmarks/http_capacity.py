"""What one HTTP process can carry: streams from an engine that only pretends, at a given pace.

    python benchmarks/http_capacity.py --clients 256 --intervals 0.01 0.0064 --json FILE
    python benchmarks/http_capacity.py --other ../kvik-before/src --pairs 3

Every `interval` seconds the engine gives each open request a token, so N clients are offered N / interval tokens a
second. A process that keeps up sends an event for each; one that does not puts several tokens into one event.
Reported are processor microseconds of the HTTP process for each token and event, and the share of its core; the clients
are `kvik bench serve`. With --other, runs alternate between this version and the one whose `src` folder is given.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from local_server import cpu_seconds, make_folder
from pairs import SHAPES, write_line

CONTEXT = 4096


def fake_engine(endpoint: str, interval: float, vocab_size: int) -> None:
    """Answer requests with one token each per interval, until killed."""
    import zmq

    from kvik.config import SchedulerConfig
    from kvik.outputs import FinishReason, SequenceOutput
    from kvik.server import messages as wire

    router: zmq.Socket[bytes] = zmq.Context().socket(zmq.ROUTER)
    router.setsockopt(zmq.SNDHWM, 0)
    router.setsockopt(zmq.RCVHWM, 0)
    router.bind(endpoint)
    scheduler = SchedulerConfig(
        max_model_len=CONTEXT, max_num_seqs=1024, max_num_batched_tokens=16384, block_size=64, num_blocks=100_000
    )
    ready = wire.Ready(scheduler=scheduler, vocab_size=vocab_size, hidden_size=8)
    status = wire.encode(wire.Status(0, 0, 0, 1, 0, 0, 0, 0.0, 0.0, 0.0))
    peers: set[bytes] = set()
    left: dict[bytes, dict[str, int]] = {}

    def obey(peer: bytes, message: wire.ToEngine) -> None:
        if isinstance(message, wire.Hello):
            peers.add(peer)
            router.send_multipart([peer, wire.encode(ready)])
        elif isinstance(message, wire.Add):
            left.setdefault(peer, {})[message.request_id] = message.params["max_tokens"]
        elif isinstance(message, wire.Finish):
            left[peer].pop(message.request_id, None)

    next_step = next_status = time.perf_counter()
    while True:
        now = time.perf_counter()
        while router.poll(max(0, int(1000 * (next_step - now)))):
            peer, data = router.recv_multipart()
            obey(peer, wire.decode_to_engine(data))
            now = time.perf_counter()
        time.sleep(max(0.0, next_step - now))
        next_step = max(next_step + interval, now)
        for peer, requests in left.items():
            outputs = []
            for request_id, tokens in list(requests.items()):
                requests[request_id] = tokens - 1
                reason = None if tokens > 1 else FinishReason.LENGTH
                ids = (3 + (tokens * 7919) % (vocab_size - 3),)
                outputs.append(SequenceOutput(request_id=request_id, index=0, new_token_ids=ids, finish_reason=reason))
                if reason is not None:
                    del requests[request_id]
            if outputs:
                router.send_multipart([peer, wire.encode(wire.pack_outputs(outputs))])
        if now >= next_status:
            next_status = now + 0.5
            for peer in peers:
                router.send_multipart([peer, status])


@contextmanager
def running(model: Path, source: Path, interval: float, root: Path) -> Iterator[tuple[str, dict[str, psutil.Process]]]:
    """An HTTP process of the version in `source` with a fake engine: its URL, and both processes."""
    endpoint = f"ipc://{root / 'engine'}"
    engine = subprocess.Popen([sys.executable, __file__, "--fake-engine", endpoint, str(interval)])
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    fd = listener.fileno()
    http = subprocess.Popen(
        [sys.executable, "-m", "kvik.server.http_process"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(fd,),
        env={**os.environ, "PYTHONPATH": str(source)},
    )  # fmt: skip
    assert http.stdin is not None
    try:
        http.stdin.write(child_settings(endpoint, model, fd) + b"\n")
        http.stdin.flush()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.close()
        wait_ready(url)
        yield url, {"http": psutil.Process(http.pid), "engine": psutil.Process(engine.pid)}
    finally:
        for process in (http, engine):
            process.terminate()
            process.wait(30)


def child_settings(endpoint: str, model: Path, fd: int) -> bytes:
    """What the supervisor would say to its HTTP process."""
    import msgspec

    from kvik import EngineConfig
    from kvik.server.process import ChildSettings
    from kvik.server_config import ServerConfig

    config = EngineConfig(model=str(model), load_format="dummy")
    settings = ChildSettings(endpoint, config, ServerConfig(api_processes=1), ("fake",), {}, "warning", socket_fd=fd)
    return msgspec.json.encode(settings)


def wait_ready(url: str) -> None:
    """Return when the server takes requests. Raises RuntimeError after a minute."""
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/ready", timeout=10).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{url} is not ready after a minute")


def measure(model: Path, source: Path, interval: float, args: argparse.Namespace) -> dict[str, Any]:
    """One run; its record."""
    with tempfile.TemporaryDirectory() as folder, running(model, source, interval, Path(folder)) as (url, processes):
        results = Path(folder) / "results"
        command = [sys.executable, "-m", "kvik.cli.main", "bench", "serve", url, "--warm-up", "8", "--json", results]
        command += ["--clients", args.clients, "--requests", args.requests, "--prompt-tokens", args.prompt]
        command += ["--output-tokens", args.output]
        before = cpu_seconds(processes)
        done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        spent = {name: value - before[name] for name, value in cpu_seconds(processes).items()}
        if done.returncode:
            raise RuntimeError(done.stdout.decode())
        result = json.loads(results.read_text())["result"]
    assert not result["failed"], result["errors"]
    events, tokens = result["client"]["events"], result["output_tokens"]
    return {
        "interval": interval, "offered_tok_s": args.clients / interval, "output_tok_s": result["output_tok_s"],
        "events_per_token": events / tokens, "us_per_token": 1e6 * spent["http"] / tokens,
        "us_per_event": 1e6 * spent["http"] / events, "cpu_share": spent["http"] / result["seconds"],
        "client_cpu_share": result["client"]["cpu_share"], "engine_cpu_share": spent["engine"] / result["seconds"],
        **{name: result[name] for name in ("ttft_s", "tpot_s", "itl_s")},
    }  # fmt: skip


def show(name: str, record: dict[str, Any]) -> None:
    """Print a run."""
    itl = record["itl_s"]
    print(
        f"{name:<6} {record['offered_tok_s']:8,.0f} tok/s offered, {record['output_tok_s']:8,.0f} served,"
        f" {record['events_per_token']:.2f} events a token, {record['us_per_token']:.1f} us of HTTP a token,"
        f" {100 * record['cpu_share']:.0f} % of a core (client {100 * record['client_cpu_share']:.0f} %),"
        f" TTFT p99 {1e3 * record['ttft_s']['p99']:.0f} ms, ITL p50 {1e3 * itl['p50']:.1f}, p99 {1e3 * itl['p99']:.1f}",
        flush=True,
    )


def main() -> None:
    """Parse the command line; the hidden first word starts the fake engine."""
    if sys.argv[1:2] == ["--fake-engine"]:
        return fake_engine(sys.argv[2], float(sys.argv[3]), SHAPES["Qwen3-0.6B"]["vocab_size"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--prompt", default="100..1024", help="prompt tokens")
    parser.add_argument("--output", default="400", help="output tokens")
    parser.add_argument("--intervals", nargs="+", type=float, default=[0.01, 0.0064], help="seconds between two steps")
    parser.add_argument("--pairs", type=int, default=1, help="runs of each version")
    parser.add_argument("--other", type=Path, help="the src folder of another version to alternate with")
    parser.add_argument("--json", type=Path, help="append one line with machine, versions and all records")
    args = parser.parse_args()
    sources = {"this": Path(__file__).resolve().parents[1] / "src"}
    if args.other:
        sources = {"other": args.other.resolve(), **sources}
    records = []
    with tempfile.TemporaryDirectory() as folder:
        make_folder(SHAPES["Qwen3-0.6B"], Path(folder))
        for interval in args.intervals:
            for number in range(args.pairs):
                for name in sources if number % 2 == 0 else reversed(sources):
                    record = measure(Path(folder), sources[name], interval, args)
                    show(name, record)
                    records.append({"version": name, **record})
            if args.other:
                cost = {
                    name: [r["us_per_token"] for r in records if r["version"] == name and r["interval"] == interval]
                    for name in sources
                }
                ratios = [this / other for this, other in zip(cost["this"], cost["other"], strict=True)]
                print(
                    f"this / other, us a token: {statistics.median(ratios):.3f} ({min(ratios):.3f}..{max(ratios):.3f})"
                )
    return write_line(args.json, "http_capacity", clients=args.clients, records=records)


if __name__ == "__main__":
    main()
