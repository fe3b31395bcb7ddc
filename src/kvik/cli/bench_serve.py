"""`kvik bench serve URL`: load any server that speaks OpenAI's API, and measure what its users would see."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import importlib.util
import os
import random
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.cli.options import Parser, results_file
from kvik.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from kvik.cli.bench_client import Answer, Client
    from kvik.cli.bench_load import Load, Recipe, Workload

__all__ = ["run"]

_NEEDED = ("httptools", "msgspec", "uvloop")
_DESCRIPTION = """Load a server that speaks OpenAI's API and measure what its users would see.

The load is --clients callers who each wait for their answer, --rate requests a second (Poisson), a --trace, or a
--sweep of several loads. Ctrl-C prints what was measured so far."""
_KEY_VARIABLE = "OPENAI_API_KEY"
_DEFAULTS = {"prompt_tokens": "128", "output_tokens": "128", "token_ids": "3..5000"}
_REQUESTS_PER_CLIENT, _OPEN_SECONDS = 8, 30.0
_NOT_RECORDED = ("api_key", "debug", "url", "json", "plot")
_INTERRUPTED = 130


def run(argv: Sequence[str]) -> int:
    """Run the command: 0, 1 if a load completed no request, 130 after Ctrl-C."""
    args = _parser().parse(argv)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"kvik bench serve needs {', '.join(missing)}: pip install 'kvik[server]'")
    loads, goals = _loads(args), _goals(args.goodput)
    import uvloop

    from kvik.cli.bench_report import check_plot, plot

    if args.plot:
        check_plot(args.plot)
    records, interrupted = uvloop.run(_measure(args, loads, goals))
    if args.plot and records:
        plot(records, Path(args.plot))
    if interrupted:
        print("interrupted: these are the numbers so far" if records else "interrupted before anything was measured")
        return _INTERRUPTED
    return int(any(not record["result"]["completed"] for record in records))


def _parser() -> Parser:
    parser = Parser("kvik bench serve", _DESCRIPTION)
    parser.add_argument("url", metavar="URL", help="of the server, such as http://127.0.0.1:8000")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--clients", type=int, metavar="N", help="callers who each wait for their answer (default: 16)")
    load.add_argument("--rate", type=float, metavar="R", help="requests per second, with Poisson arrivals")
    load.add_argument("--trace", metavar="FILE", help="JSONL with time, prompt or prompt_tokens, and output_tokens")
    load.add_argument("--sweep", metavar="LOADS", help="several loads: 1,4,16 clients, or rates: 0.5/s,1/s,2/s")
    parser.add_argument("--requests", type=int, metavar="N", help="requests of a load (default: 8 for each client)")
    parser.add_argument("--duration", type=float, metavar="S", help="no request starts later (default with a rate: 30)")
    parser.add_argument("--warm-up", type=int, default=4, metavar="N", help="requests at first that do not count")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="after which a request has failed")
    parser.add_argument("--endpoint", choices=("completions", "chat"), default="completions", help="which API to use")
    parser.add_argument("--model", metavar="NAME", help="default: the first that the server lists")
    parser.add_argument("--api-key", metavar="KEY", help=f"bearer token (or set {_KEY_VARIABLE})")
    parser.add_argument("--prompt-tokens", metavar="A..B", help="tokens of a prompt, drawn uniformly (128)")
    parser.add_argument("--output-tokens", metavar="A..B", help="tokens to generate, drawn uniformly (128)")
    parser.add_argument("--prompts", choices=("ids", "words"), help="random token ids (not for chat), or random words")
    parser.add_argument("--token-ids", metavar="A..B", help="ids that prompts are drawn from (3..5000)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="of the sampling")
    parser.add_argument("--seed", default="0", metavar="SEED", help="of lengths, arrivals and prompts")
    parser.add_argument("--goodput", metavar="GOALS", help="count requests within goals in ms, as ttft:200,tpot:20")
    parser.add_argument(
        "--json", type=results_file, metavar="FILE", help="append every load's result to a file, as one line"
    )
    parser.add_argument(
        "--plot", type=results_file, metavar="FILE", help="draw latency against throughput (needs matplotlib)"
    )
    return parser


def _loads(args: argparse.Namespace) -> list[tuple[Load, Workload]]:
    """The loads and what each sends. Raises ConfigError."""
    from kvik.cli.bench_load import Load, Workload, read_trace

    for name in ("clients", "rate", "requests", "duration", "timeout"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} must be above 0, got {value:g}")
    if args.warm_up < 0:
        raise ConfigError(f"--warm-up must be at least 0, got {args.warm_up}")
    if args.prompts == "ids" and args.endpoint == "chat":
        raise ConfigError("a chat has no token ids: use --prompts words, or --endpoint completions")
    if args.token_ids and (args.prompts == "words" or args.endpoint == "chat"):
        raise ConfigError("--token-ids has no effect on prompts of words: leave it out, or use --prompts ids")
    if args.trace and (args.prompt_tokens or args.output_tokens):
        raise ConfigError("a --trace says how long its requests are: leave out --prompt-tokens and --output-tokens")
    for name, value in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    trace = read_trace(Path(args.trace)) if args.trace else ()
    if args.endpoint == "chat" and any(isinstance(request.prompt, list) for request in trace):
        raise ConfigError(f"{args.trace} has prompts of token ids, which a chat cannot have")
    if args.sweep:
        loads = [_load(item.strip()) for item in args.sweep.split(",")]
    elif args.rate:
        loads = [Load("rate", args.rate)]
    else:
        loads = [Load("trace", len(trace)) if trace else Load("clients", args.clients or 16)]
    ranges = {name: _range(name, getattr(args, name)) for name in ("prompt_tokens", "output_tokens")}
    workloads = []
    for load in loads:
        num_requests, duration = _ends(args, load)
        workloads.append(Workload(**ranges, seed=args.seed, trace=trace, num_requests=num_requests, duration=duration))
    return list(zip(loads, workloads, strict=True))


def _load(text: str) -> Load:
    from kvik.cli.bench_load import Load

    match = re.fullmatch(r"(\d+)|(\d+\.?\d*|\.\d+)/s", text)
    if match is None or float(match[1] or match[2]) == 0:
        raise ConfigError(f"--sweep has {text!r}; a load is a number of clients, such as 16, or a rate, such as 2.5/s")
    return Load("clients", int(match[1])) if match[1] else Load("rate", float(match[2]))


def _ends(args: argparse.Namespace, load: Load) -> tuple[int | None, float | None]:
    """How many requests, and until when they may start."""
    if args.requests or args.duration or load.kind == "trace":
        return args.requests, args.duration
    return (_REQUESTS_PER_CLIENT * int(load.value), None) if load.kind == "clients" else (None, _OPEN_SECONDS)


def _range(name: str, text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise ConfigError(f"--{name.replace('_', '-')} must be N or A..B with 1 <= A <= B, got {text!r}")
    return low, high


def _goals(text: str | None) -> dict[str, float]:
    from kvik.cli.bench_report import GOALS

    goals: dict[str, float] = {}
    for item in text.split(",") if text else ():
        name, _, value = item.strip().partition(":")
        if name not in GOALS or not re.fullmatch(r"\d+\.?\d*|\.\d+", value):
            raise ConfigError(f"--goodput has {item!r}; a goal is one of {', '.join(GOALS)} with ms, such as ttft:200")
        goals[name] = float(value)
    return goals


@dataclass(frozen=True, slots=True)
class _Session:
    """What every load of a command shares."""

    client: Client
    recipe: Recipe
    args: argparse.Namespace
    goals: dict[str, float]
    stop: asyncio.Event

    async def measure(self, load: Load, workload: Workload, index: int) -> dict[str, Any] | None:
        """Everything about a load, as it is written to a results file; None if stopped while it warmed up.

        Raises ConfigError if no request of the first load's warm-up succeeds: nor would the others.
        """
        from kvik.cli.bench_load import Load, run_load, warm_up
        from kvik.cli.bench_report import summarize

        count = self.args.warm_up
        if count:
            first = Load("clients", count)
            before = await run_load(
                self.client, self.recipe, warm_up(workload, count), first, f"warm-up {index}", self.stop
            )
            answers = before.answers
            if index == 0 and answers and all(answer.error for answer in answers):
                why = f"{answers[0].error}: {answers[0].message}"
                raise ConfigError(f"every request of the warm-up failed, the first with {why}")
        if self.stop.is_set():
            return None
        found = await run_load(self.client, self.recipe, workload, load, str(index), self.stop)
        return {
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "mode": "serve",
            "url": self.args.url,
            "path": self.recipe.path,
            "model": self.recipe.model,
            "load": str(load),
            "options": {name: value for name, value in vars(self.args).items() if name not in _NOT_RECORDED},
            "ignore_eos": self.recipe.ignore_eos,
            "result": summarize(found, self.goals, int(load.value) if load.kind == "clients" else 0),
        }


async def _measure(
    args: argparse.Namespace, loads: Sequence[tuple[Load, Workload]], goals: dict[str, float]
) -> tuple[list[dict[str, Any]], bool]:
    """Run the loads, printing each as it ends; their records, and whether Ctrl-C cut them off."""
    from kvik.cli.bench import append
    from kvik.cli.bench_client import Client
    from kvik.cli.bench_report import render, row
    from kvik.cli.environment import commit, machine, versions

    records: list[dict[str, Any]] = []
    about = {"machine": machine(), "versions": versions(), "commit": commit()} if args.json else {}
    with contextlib.closing(Client(args.url, args.api_key or os.environ.get(_KEY_VARIABLE), args.timeout)) as client:
        session = _Session(client, await _probe(client, args), args, goals, asyncio.Event())
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, session.stop.set)
        if len(loads) > 1:
            print(row(None), flush=True)
        for index, (load, workload) in enumerate(loads):
            record = await session.measure(load, workload, index)
            if record is not None:
                records.append(record)
                print((row if len(loads) > 1 else render)(record), flush=True)
                if args.json:
                    append(Path(args.json), {**record, **about})
            if session.stop.is_set():
                break
    return records, session.stop.is_set()


async def _probe(client: Client, args: argparse.Namespace) -> Recipe:
    """Ask for the models and for one token: what cannot work is found before the load. Raises ConfigError."""
    from kvik.cli.bench_load import Planned, Recipe

    listing = await client.get("/v1/models")
    _refuse_hopeless(listing, args.url)
    names = _model_names(listing)
    model = args.model or (names[0] if names else None)
    if model is None:
        raise ConfigError(f"{args.url} does not list its models (HTTP {listing.status}): give --model")
    if names and model not in names:
        shown = ", ".join(names[:10])
        raise ConfigError(f"{args.url} has no model {model!r}{did_you_mean(model, names)}; it has {shown}")
    chat = args.endpoint == "chat"
    recipe: dict[str, Any] = {
        "model": model,
        "chat": chat,
        "words": chat or args.prompts == "words",
        "token_ids": _range("token_ids", args.token_ids),
        "temperature": args.temperature,
    }
    highest = Planned(0, 4 if recipe["words"] else [recipe["token_ids"][1]] * 4, 2)
    for ignore_eos in (True, False):
        made = Recipe(**recipe, ignore_eos=ignore_eos)
        answer = await client.stream(made.path, made.body(highest, random.Random(args.seed)))
        if answer.status not in (400, 422):
            break
    _refuse_hopeless(answer, args.url)
    if answer.status in (400, 404, 405, 422):
        raise ConfigError(f"{args.url}{made.path} refuses a short request (HTTP {answer.status}): {answer.message}")
    if not ignore_eos:
        print("the server does not take ignore_eos: answers may be shorter than --output-tokens")
    return made


def _refuse_hopeless(answer: Answer, url: str) -> None:
    if answer.error == "malformed answer":
        raise ConfigError(f"{url} answers, but not as a server of OpenAI's API does: {answer.message}")
    if answer.error in ("no connection", "timeout"):
        raise ConfigError(f"cannot reach {url}: {answer.message}; does the server run, and is the URL right?")
    if answer.status in (401, 403):
        raise ConfigError(f"{url} refuses the key (HTTP {answer.status}): give --api-key or set {_KEY_VARIABLE}")


def _model_names(answer: Answer) -> list[str]:
    import msgspec

    try:
        return [str(model["id"]) for model in msgspec.json.decode(answer.body)["data"]]
    except (msgspec.DecodeError, LookupError, TypeError):
        return []
