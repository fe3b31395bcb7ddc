"""The CPU time of a server that nobody asks: all processes of `kvik serve`, after one request, in percent of a core.

python benchmarks/rest_load.py [--model demo] [--seconds 20] [--json FILE] [--serve FLAGS OF kvik serve ...]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from pairs import write_line


@contextmanager
def server(model: str, flags: list[str]) -> Iterator[tuple[psutil.Process, str]]:
    """`kvik serve`, ready: its process and its address."""
    command = [sys.executable, "-m", "kvik.cli.main", "serve", model, "--port=0", *flags]
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not (found := re.search(r"serving on (http://\S+)", Path(log.name).read_text())):
                if process.poll() is not None:
                    raise RuntimeError(Path(log.name).read_text())
                time.sleep(0.1)
            yield psutil.Process(process.pid), found[1]
        finally:
            process.terminate()
            process.wait(30)


def complete(address: str, model: str) -> None:
    """One request, so that everything has run once."""
    body = json.dumps({"model": model, "prompt": "Once upon a time", "max_tokens": 16}).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{address}/v1/completions", body, headers), timeout=60
    ) as answer:
        assert json.load(answer)["choices"][0]["text"]


def cpu_seconds(process: psutil.Process) -> dict[int, float]:
    return {p.pid: sum(p.cpu_times()[:2]) for p in (process, *process.children(recursive=True))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="append one line with machine, versions and the result")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="flags of kvik serve; comes last")
    args = parser.parse_args()
    with server(args.model, args.serve) as (process, address):
        complete(address, args.model)
        time.sleep(2)
        before = cpu_seconds(process)
        time.sleep(args.seconds)
        after = cpu_seconds(process)
    used = sum(after.values()) - sum(before[pid] for pid in after)
    percent = 100 * used / args.seconds
    print(f"{len(after)} processes used {used:.2f} s in {args.seconds:.0f} s: {percent:.2f} % of a core")
    write_line(
        args.json, "rest_load", model=args.model, seconds=args.seconds, processes=len(after), percent_of_a_core=percent
    )


if __name__ == "__main__":
    main()
