"""Tokens per second of the ways to call Kvik from Python: `LLM.generate`, `LLM.stream`, and tasks on one `AsyncLLM`.

    python benchmarks/python_api.py MODEL [--load-format dummy] [--requests 256] [--tokens 256] [--runs 3] [--json FILE]

All requests begin at once and have prompts of 128 tokens; both streaming ways take every output as it comes. Each way
has an engine of its own and runs once before it is measured, so that graphs are there. The best run counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pairs import write_line

from kvik import LLM, AsyncLLM, SamplingParams

PROMPT = 128


def offline(call: Callable[[LLM], object], options: dict[str, Any], runs: int) -> list[float]:
    """Seconds of each run of `call`, the first one included."""
    times = []
    with LLM(**options) as llm:
        for _ in range(runs + 1):
            begin = time.perf_counter()
            call(llm)
            times.append(time.perf_counter() - begin)
    return times


def concurrent(prompts: Sequence[list[int]], params: SamplingParams, options: dict[str, Any], runs: int) -> list[float]:
    """Seconds of each run of a task for each prompt on an `AsyncLLM`."""

    async def main() -> list[float]:
        async with AsyncLLM(**options) as llm:

            async def read(prompt: list[int]) -> None:
                async for _ in llm.generate(prompt, params):
                    pass

            times = []
            for _ in range(runs + 1):
                begin = time.perf_counter()
                await asyncio.gather(*map(read, prompts))
                times.append(time.perf_counter() - begin)
            return times

    return asyncio.run(main())


def main() -> None:
    """Parse the command line, print a line for each way, and append the record where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256, help="output tokens of each request")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="append one line with machine, versions and the speeds")
    args = parser.parse_args()
    from kvik.cli.environment import commit, machine, versions

    print(f"{json.dumps(machine())}\n{json.dumps(versions())}\ncommit {commit()}")
    options = {"model": args.model, "load_format": args.load_format, "max_num_seqs": args.requests}
    prompts = [[3 + i % 200] * PROMPT for i in range(args.requests)]
    params = SamplingParams(max_tokens=args.tokens, ignore_eos=True)
    speeds: dict[str, list[float]] = {}
    for name, measure in (
        ("LLM.generate", lambda: offline(lambda llm: llm.generate(prompts, params), options, args.runs)),
        ("LLM.stream", lambda: offline(lambda llm: sum(1 for _ in llm.stream(prompts, params)), options, args.runs)),
        ("AsyncLLM", lambda: concurrent(prompts, params, options, args.runs)),
    ):
        speeds[name] = [args.requests * args.tokens / seconds for seconds in measure()[1:]]
        ratio = max(speeds[name]) / max(speeds["LLM.generate"])
        print(f"{name:<14}{max(speeds[name]):>10,.0f} tok/s  {ratio:.2f} of LLM.generate", flush=True)
    sizes = {"requests": args.requests, "tokens": args.tokens, "prompt": PROMPT}
    write_line(args.json, "python_api", model=Path(args.model).name, **sizes, output_tok_s=speeds)


if __name__ == "__main__":
    main()
