"""`kvik info [MODEL]`: the machine and the installation; of a model, what it is and the memory it would take.

No weight is read or downloaded: everything follows from config.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvik.cli.engine import load_torch, render_config
from kvik.cli.environment import commit, machine, model_places, versions
from kvik.cli.options import Parser, add_engine_flags, read_engine_options
from kvik.config import EngineConfig
from kvik.errors import CapacityError
from kvik.log import configure

if TYPE_CHECKING:
    from kvik.models.spec import DecoderSpec
    from kvik.quantization.formats import StoredQuantization
    from kvik.resolve import ResolvedConfig
    from kvik.runtime.platform import Platform

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code: 2 if the model does not fit."""
    parser = Parser("kvik info", "Show this machine and installation, and what a model would take. Reads no weights.")
    parser.usage = "kvik info [MODEL] [options]"
    parser.add_argument("names", metavar="MODEL", nargs="?", help="a model, named as for the other commands")
    add_engine_flags(parser, model=False, sampling=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse(argv)
    if args.names and getattr(args, "engine.model") is not None:
        parser.error(f"give one model, not {args.names} and --model {getattr(args, 'engine.model')}")
    setattr(args, "engine.model", args.names or getattr(args, "engine.model"))
    options = read_engine_options(args)
    if args.print_config:
        print(render_config(options, sampling=False))
        return 0
    configure(args.log_level)
    load_torch()
    report: dict[str, Any] = {"machine": machine(), "versions": versions(), "commit": commit()}
    if "model" in options.engine.given:
        report["model"] = _model(options.engine.make())
    else:
        report["models are looked for in"] = model_places()
    print(json.dumps(report) if args.json else _render(report))
    return 0 if report.get("model", {}).get("fits", True) else 2


def _model(config: EngineConfig) -> dict[str, Any]:
    """Everything about a model that its config.json tells, and the plan of an engine for it."""
    from kvik.models.hub import load_config, resolve_model
    from kvik.models.loader import checkpoint_dtype
    from kvik.models.registry import build_spec
    from kvik.quantization.formats import read_quantization
    from kvik.quantization.receipt import describe_receipt
    from kvik.runtime.platform import select_platform
    from kvik.text.frontend import Frontend, ModelFacts
    from kvik.text.tokenizer import has_tokenizer

    path = resolve_model(config.model, config.revision, load_format="dummy")
    hf_config = load_config(path)
    spec, platform = build_spec(hf_config), select_platform(config.device)
    if has_tokenizer(path) or config.tokenizer is not None or config.chat_template is not None:
        size = ModelFacts(spec.vocab_size, spec.rope.depends_on_length)
        Frontend.from_folder(path, size, tokenizer=config.tokenizer, chat_template=config.chat_template)
    stored = checkpoint_dtype(hf_config)
    quantization = read_quantization(hf_config)
    resolved, problem = _try_resolve(config, spec, stored, platform, quantization)
    facts: dict[str, Any] = {
        "model": config.model,
        "folder": str(path),
        "architecture": spec.architecture,
        "parameters": spec.num_parameters,
        "context": spec.context_len,
        "checkpoint dtype": None if stored is None else str(stored).removeprefix("torch."),
        "device": platform.name,
        "fits": resolved is not None,
    }
    if quantization is not None:
        facts |= {"quantization": describe_receipt(quantization), "receipt": quantization.receipt}
    if resolved is None:
        return {**facts, "problem": problem, "fix": _fix(config, spec, stored, platform, quantization)}
    plan, settings = resolved.memory, resolved.scheduler
    memory = {**dataclasses.asdict(plan), "kv_cache": plan.kv_cache, "used": plan.used}
    return {
        **facts,
        "dtype": str(resolved.dtype).removeprefix("torch."),
        "kernels": _kernels(config, resolved, platform),
        "KV cache dtype": str(resolved.kv_dtype).removeprefix("torch."),
        "KV bytes per token": plan.kv_bytes_per_token,
        "settings": dataclasses.asdict(settings),
        "notes": list(resolved.notes),
        "memory": memory,
        "ledger": plan.render(),
    }


def _kernels(config: EngineConfig, resolved: ResolvedConfig, platform: Platform) -> str:
    """What computes: the native kernels and their instruction set, triton, or torch; and whose attention."""
    if resolved.kernels == "triton":
        return "triton (FlashInferAttention)" if config.attention_backend == "flashinfer" else "triton"
    from kvik.attention.registry import select_backend
    from kvik.kernels.cpu.native import load_library

    if resolved.kernels == "native":
        return f"native ({load_library().isa})"
    return f"torch ({type(select_backend(config.attention_backend, platform.device)).__name__})"


def _try_resolve(
    config: EngineConfig,
    spec: DecoderSpec,
    stored: Any,
    platform: Platform,
    quantization: StoredQuantization | None,
) -> tuple[ResolvedConfig | None, str]:
    import torch

    from kvik.resolve import resolve

    try:
        return resolve(config, spec, stored or torch.float32, platform, quantization), ""
    except CapacityError as error:
        return None, str(error)


def _fix(
    config: EngineConfig,
    spec: DecoderSpec,
    stored: Any,
    platform: Platform,
    quantization: StoredQuantization | None,
) -> str | None:
    """The first change of options with which the model fits, as flags; None if there is none."""
    length, changes = config.max_model_len or spec.context_len, list[dict[str, Any]]()
    while length > 256:
        length //= 2
        changes.append({"max_model_len": length})
    changes += [
        {"kv_cache_memory": None, "num_kvcache_blocks": None},
        {"max_num_seqs": 1},
        {"max_num_seqs": 1, "max_num_batched_tokens": 256},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "max_model_len": 256, "max_num_seqs": 1, "max_num_batched_tokens": 256},
    ]
    for change in changes:
        if _try_resolve(dataclasses.replace(config, **change), spec, stored, platform, quantization)[0] is not None:
            flags = [f"--{name.replace('_', '-')} {value}" for name, value in change.items() if value is not None]
            return " ".join(flags) or "no --kv-cache-memory and no --num-kvcache-blocks"
    return None


def _render(report: dict[str, Any]) -> str:
    lines = ["machine", *_machine_lines(report["machine"]), "", "versions"]
    lines += [f"  {name:<22} {version or 'not installed'}" for name, version in report["versions"].items()]
    if report["commit"]:
        lines.append(f"  {'commit':<22} {report['commit']}")
    if "model" in report:
        lines += ["", "model", *_model_lines(report["model"])]
    else:
        lines += ["", "models are looked for in"]
        lines += [f"  {name:<22} {place}" for name, place in report["models are looked for in"].items()]
    return "\n".join(lines)


def _machine_lines(facts: dict[str, Any]) -> list[str]:
    rows = {
        "OS": facts["os"],
        "CPU": facts["cpu"],
        "cores": f"{facts['cores']} ({facts['hardware_threads']} hardware threads, {facts['usable_threads']} usable)",
        "instruction sets": " ".join(facts["isa"]) or "unknown",
        "memory": f"{facts['memory'] / 2**30:.1f} GiB, {facts['memory_available'] / 2**30:.1f} GiB available",
        "GPUs": "; ".join(facts["gpus"]) or "none that torch can use",
    }
    return [f"  {name:<22} {value}" for name, value in rows.items()]


def _model_lines(facts: dict[str, Any]) -> list[str]:
    plain = ("folder", "architecture", "quantization", "checkpoint dtype", "dtype", "device", "kernels")
    rows = {name: facts[name] for name in plain if facts.get(name)}
    rows["parameters"] = f"{facts['parameters']:,}"
    rows["context"] = f"{facts['context']:,} tokens"
    if not facts["fits"]:
        lines = [f"  {name:<22} {value}" for name, value in rows.items()]
        fix = f"it fits with {facts['fix']}" if facts["fix"] else "no option makes it fit on this machine"
        return [*lines, "", f"does not fit: {facts['problem']}", fix]
    rows["KV cache"] = f"{facts['KV cache dtype']}, {facts['KV bytes per token']:,} bytes per token"
    rows["at once"] = "{max_num_seqs} sequences, {max_num_batched_tokens} tokens a step".format(**facts["settings"])
    lines = [f"  {name:<22} {value}" for name, value in rows.items()]
    lines += [f"  note: {note}" for note in facts["notes"]]
    return [*lines, "", "memory", *(f"  {line}" for line in facts["ledger"].splitlines())]
