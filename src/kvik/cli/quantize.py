"""`kvik quantize MODEL OUT`: a folder with quantised weights, and a receipt of what that cost.

OUT appears when everything is done: conversion, comparison with the unquantised model, the gate, the speeds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.cli.engine import load_torch, read_text
from kvik.cli.environment import machine
from kvik.cli.options import Parser
from kvik.config import EngineConfig
from kvik.errors import ConfigError, KvikError
from kvik.log import configure, logger

if TYPE_CHECKING:
    from torch import Tensor

    from kvik.quantization.convert import Baseline
    from kvik.quantization.formats import StoredQuantization
    from kvik.quantization.receipt import Quality, Receipt
    from kvik.startup import ModelInfo

__all__ = ["run"]

_FORMATS = {"int8": "int8", "int4": "int4g32", "int4g128": "int4g128"}
_WINDOW = 512
_HELD_OUT, _CALIBRATION = "heldout.txt", "calibration.txt"
_COST_TOKENS = 1024
_MARGIN = 0.9
_SPEED_PROMPT, _SPEED_OUTPUT = 256, 64
_LOG_LEVELS = ("debug", "info", "warning", "error")


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    args = _read(argv)
    configure(args.log_level)
    load_torch()
    from kvik.models.hub import resolve_model
    from kvik.quantization.writer import check_out

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # which removes what is half made
    path, out = resolve_model(args.model, args.revision), Path(os.path.abspath(os.path.expanduser(args.out)))
    check_out(out, path, force=args.force)
    receipt = _Quantizer(args, path, out).run()
    print(json.dumps(receipt.to_json()) if args.json else _render(receipt, out))
    return 0


def _read(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("kvik quantize", "Write a model folder with quantised weights, and a receipt of what that cost.")
    parser.add_argument("model", metavar="MODEL", help="an unquantised model, named as for the other commands")
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument("--quantization", choices=_FORMATS, required=True, help="form of the weights")
    parser.add_argument(
        "--min-top1", type=float, metavar="X", help="raise projections to int8 until top-1 agreement is X"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it holds a model")
    parser.add_argument("--text", metavar="FILE", help="text to compare on (default: held-out English fiction)")
    parser.add_argument("--tokens", type=int, default=16384, metavar="N", help="tokens to compare on (default: 16384)")
    parser.add_argument(
        "--calibration", metavar="FILE", help="text to calibrate on, or none (default: other English fiction)"
    )
    parser.add_argument("--revision", metavar="TEXT", help="branch, tag or commit of a downloaded model")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one per physical core)")
    parser.add_argument("--kernels", choices=("auto", "native", "torch"), default="auto", help="kernels to compare on")
    parser.add_argument("--json", action="store_true", help="print the receipt as one JSON object")
    parser.add_argument("--log-level", choices=_LOG_LEVELS, default="warning", help="log lines to show on stderr")
    args = parser.parse(argv)
    if args.min_top1 is not None and not 0 <= args.min_top1 <= 1:
        raise ConfigError(f"--min-top1 is a share from 0 to 1, got {args.min_top1:g}; for 95 % write 0.95")
    if args.tokens < 2:
        raise ConfigError(f"--tokens must be at least 2, got {args.tokens}")
    return args


class _Quantizer:
    """One run of the command."""

    def __init__(self, args: argparse.Namespace, path: Path, out: Path) -> None:
        self._args = args
        self._path = path
        self._out = out

    def run(self) -> Receipt:
        """Make the folder. Raises ConfigError when the gate refuses it, and then nothing is left of it."""
        import kvik
        from kvik.models.hub import load_config
        from kvik.quantization.writer import copy_companions, staged

        config = load_config(self._path)
        info = self._inspect(self._path)
        if info.stored is not None:
            raise ConfigError(f"{self._args.model} is quantised already, to {info.stored.format}; use the original")
        text, calibration = self._texts(info)
        stored = self._plan()
        with staged(self._out) as folder:
            copy_companions(self._path, folder)
            costs: dict[str, float] = {}
            while True:
                baseline = self._convert(info, stored, folder, text, calibration)
                self._write_config(folder, {**config, "quantization_config": stored.to_json(kvik.__version__)})
                made, quality = self._compare(folder, text, baseline)
                if self._passes(stored, info, quality):
                    break
                costs = costs or self._costs(info, stored, text if calibration is None else calibration)
                stored = self._more_bits(info, stored, quality, costs)
            receipt = self._receipt(info, made, stored, folder, quality)
            (folder / "quantization_receipt.json").write_text(
                json.dumps(receipt.to_json(), indent=2) + "\n", encoding="utf-8"
            )
            entry = {**stored.to_json(kvik.__version__), "receipt": receipt.to_json()}
            self._write_config(folder, {**config, "quantization_config": entry})
        return receipt

    def _inspect(self, path: Path) -> ModelInfo:
        from kvik.startup import inspect_model

        return inspect_model(self._engine_config(path))

    def _engine_config(self, path: Path) -> EngineConfig:
        """On the CPU, whose kernels compute in the formats; on GPUs the weights would be dequantised."""
        return EngineConfig(
            str(path), device="cpu", threads=self._args.threads, kernels=self._args.kernels, max_num_seqs=4,
            max_num_batched_tokens=2048, seed=0,
        )  # fmt: skip

    def _plan(self) -> StoredQuantization:
        from kvik.quantization.formats import StoredQuantization

        return StoredQuantization(
            _FORMATS[self._args.quantization], calibration=_text_name(self._args.calibration, _CALIBRATION)
        )

    def _texts(self, info: ModelInfo) -> tuple[Tensor, Tensor | None]:
        """Windows of the text for the receipt, and of that for calibration if there is one."""
        from kvik.quantization.windows import cut_windows
        from kvik.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_folder(info.path)
        length = min(_WINDOW, info.resolved.scheduler.max_model_len)

        def windows(file: str | None, bundled: str) -> Tensor:
            ids = tokenizer.encode(_read_text(file, bundled), add_special_tokens=False)
            ids = [token_id for token_id in ids if token_id < info.spec.vocab_size]
            if len(ids) < 2:
                raise ConfigError(f"{file or bundled} has {len(ids)} tokens, too few to compare anything on")
            return cut_windows(ids, length, self._args.tokens)

        calibrates = self._args.calibration != "none"
        calibration = windows(self._args.calibration, _CALIBRATION) if calibrates else None
        return windows(self._args.text, _HELD_OUT), calibration

    def _convert(
        self, info: ModelInfo, stored: StoredQuantization, folder: Path, text: Tensor, calibration: Tensor | None
    ) -> Baseline:
        from kvik.kernels.cpu.native import NativePool
        from kvik.quantization.convert import convert
        from kvik.quantization.writer import ShardWriter

        for old in folder.glob("model*.safetensors*"):
            old.unlink()
        info.platform.start(self._args.threads)
        pool = NativePool(self._args.threads) if info.resolved.kernels == "native" else None
        try:
            return convert(info.path, info.spec, stored, ShardWriter(folder), text, calibration, pool)
        finally:
            if pool is not None:
                pool.close()

    def _compare(self, folder: Path, text: Tensor, baseline: Baseline) -> tuple[ModelInfo, Quality]:
        from kvik.quantization.receipt import compare
        from kvik.startup import load_decoder

        made = self._inspect(folder)
        decoder = load_decoder(self._engine_config(folder), made)
        return made, compare(decoder, baseline.hidden, baseline.logits, text, made.resolved.kv_dtype)

    def _passes(self, stored: StoredQuantization, info: ModelInfo, quality: Quality) -> bool:
        """Whether the gate lets this through. Raises ConfigError when no more bits can be given."""
        wanted = self._args.min_top1
        if wanted is None or quality.top1_agreement >= wanted:
            return True
        if stored.block_bits(info.spec) >= 8:
            raise ConfigError(
                f"top-1 agreement is {quality.top1_agreement:.4f} on {quality.num_tokens:,} tokens with every weight in"
                f" int8, below --min-top1 {wanted:g}: nothing was written; use a lower --min-top1"
            )
        return False

    def _costs(self, info: ModelInfo, stored: StoredQuantization, windows: Tensor) -> dict[str, float]:
        from kvik.quantization.sensitivity import sensitivities

        count = max(1, _COST_TOKENS // windows.shape[1])
        return sensitivities(info.path, info.spec, stored.format, windows[:count])

    def _more_bits(
        self, info: ModelInfo, stored: StoredQuantization, quality: Quality, costs: dict[str, float]
    ) -> StoredQuantization:
        """`stored` with more projections in int8, so many that the gate should let it through.

        Disagreement grows as the square root of the divergence; a tenth of what the gate allows is kept as a margin.
        """
        from kvik.quantization.sensitivity import raised

        share = _MARGIN * (1 - self._args.min_top1) / (1 - quality.top1_agreement)
        aim = quality.kl_divergence * share**2
        overrides = raised(costs, info.spec, stored, quality.kl_divergence, aim)
        logger.warning(
            "top-1 agreement is %.4f, below --min-top1 %g: trying again with %d of %d projections in int8",
            quality.top1_agreement, self._args.min_top1, len(overrides), len(costs),
        )  # fmt: skip
        return replace(stored, overrides=overrides)

    def _receipt(
        self, info: ModelInfo, made: ModelInfo, stored: StoredQuantization, folder: Path, quality: Quality
    ) -> Receipt:
        import kvik
        from kvik.quantization.receipt import Receipt
        from kvik.quantization.writer import folder_bytes

        decode, prefill = self._speeds(folder)
        facts = machine()
        return Receipt(
            model=self._args.model, format=stored.format, head_format=stored.head_format, overrides=stored.overrides,
            bits_per_weight=stored.block_bits(info.spec), calibration=stored.calibration,
            text=_text_name(self._args.text, _HELD_OUT) or "", quality=quality, size_bytes=folder_bytes(folder),
            size_bytes_unquantized=folder_bytes(self._path), decode_tok_s=decode, prefill_tok_s=prefill,
            kernels=_kernels(made), kvik_version=kvik.__version__,
            machine={"cpu": facts["cpu"], "cores": facts["cores"], "memory": facts["memory"], "os": facts["os"]},
        )  # fmt: skip

    def _speeds(self, folder: Path) -> tuple[float | None, float | None]:
        """(decode, prefill) tokens per second of one sequence, the better of two runs."""
        from kvik.cli.bench_measure import measure
        from kvik.cli.bench_workloads import BenchRequest
        from kvik.llm_engine import LLMEngine

        with LLMEngine(self._engine_config(folder)) as engine:
            limit = engine.resolved.scheduler.max_model_len
            num_prompt, num_output = min(_SPEED_PROMPT, limit // 2), min(_SPEED_OUTPUT, limit // 4)
            decode, prefill = [], []
            for shift in range(3):  # the first run warms up; prompts differ, so that no prefix is cached
                prompt = [(7 * i + 13 * shift) % engine.spec.vocab_size for i in range(num_prompt)]
                run = measure(engine, [BenchRequest(prompt, num_output)], 0.0, None)
                decode.append(run.speeds.decode_speed or 0.0)
                prefill.append(run.speeds.prefill_speed or 0.0)
        return max(decode[1:]) or None, max(prefill[1:]) or None

    def _write_config(self, folder: Path, config: dict[str, Any]) -> None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _kernels(info: ModelInfo) -> str:
    if info.resolved.kernels != "native":
        return info.resolved.kernels
    from kvik.kernels.cpu.native import load_library

    return f"native {load_library().isa}"


def _text_name(file: str | None, bundled: str) -> str | None:
    """How a receipt names a text."""
    if file == "none":
        return None
    return f"kvik/{bundled}" if file is None else Path(file).name


def _read_text(file: str | None, bundled: str) -> str:
    if file is not None:
        return read_text(file)
    import importlib.resources

    try:
        return (importlib.resources.files("kvik") / "assets" / bundled).read_text(encoding="utf-8")
    except OSError as error:
        raise KvikError(f"the bundled text {bundled} is not in this installation; reinstall kvik") from error


def _render(receipt: Receipt, out: Path) -> str:
    quality, cpu = receipt.quality, receipt.machine["cpu"]
    before, after = quality.perplexity_unquantized, quality.perplexity
    rows = {
        "top-1 agreement": f"{quality.top1_agreement:.2%} of {quality.num_tokens:,} tokens of {receipt.text}",
        "KL divergence": f"{quality.kl_divergence:.3g} nats per token",
        "perplexity": f"{before:.3f} -> {after:.3f} ({quality.perplexity_change:+.2%})",
        "size": f"{receipt.size_bytes_unquantized / 1e6:,.1f} MB -> {receipt.size_bytes / 1e6:,.1f} MB",
        "calibration": receipt.calibration or "none",
    }
    if receipt.overrides:
        rows["also in int8"] = f"{', '.join(receipt.overrides)} ({receipt.bits_per_weight:.2f} bits a weight)"
    if receipt.decode_tok_s and receipt.prefill_tok_s:
        speeds = f"decode {receipt.decode_tok_s:,.0f} tok/s, prefill {receipt.prefill_tok_s:,.0f} tok/s"
        rows["speed"] = f"{speeds} ({receipt.kernels}; {cpu})"
    lines = [f"  {name:<16} {value}" for name, value in rows.items()]
    return "\n".join([f"{out}: {receipt.model} in {receipt.format}, output head {receipt.head_format}", *lines])
