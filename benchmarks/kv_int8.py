"""The int8 KV cache against the bfloat16 one: step times of a 0.6B-shaped decoder, and agreement on the demo model.

    python benchmarks/kv_int8.py [--times] [--agreement] [--tokens 16384] [--json FILE]

Times: one sequence with int8 weights, after 128 and after 4,096 tokens, both caches in turns, medians of 60 steps.
Agreement: the demo model's predictions with an int8 cache against those with a bfloat16 one on the held-out text of
receipts, with bf16 and with int8 weights. Without an option, both.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_ops import BLOCK_SIZE, caches, qwen3_shape, random_weights, seconds, step_batch
from pairs import write_line

from kvik.attention.base import ForwardBatch
from kvik.kernels.api import KVLayer
from kvik.kernels.cpu.native import NativePool
from kvik.layers.rope import RopeTable
from kvik.runtime.native_decoder import NativeDecoder

STEPS = 60
KINDS = {"bfloat16": torch.bfloat16, "int8": torch.int8}


def step_times() -> list[dict[str, Any]]:
    """Median milliseconds of a decode step by cache and context."""
    spec, pool, records = qwen3_shape(), NativePool(), []
    decoder = NativeDecoder(
        spec, random_weights(spec, "int8", pool), RopeTable(spec.rope, 8192, torch.device("cpu")), pool, 16
    )
    num_blocks = 4096 // BLOCK_SIZE + 4
    kv = {name: tuple(caches(spec, num_blocks, dtype)) for name, dtype in KINDS.items()}
    for context in (128, 4096):
        batch = step_batch(1, 1, context, num_blocks)
        taken: dict[str, list[float]] = {name: [] for name in kv}
        for _ in range(STEPS):
            for name, cache in kv.items():
                taken[name].append(seconds(partial(_step, decoder, batch, cache)))
        record = {"context": context, **{f"{name}_ms": 1e3 * statistics.median(t) for name, t in taken.items()}}
        records.append(record)
        print(record, flush=True)
    return records


def _step(decoder: NativeDecoder, batch: ForwardBatch, cache: tuple[KVLayer, ...]) -> torch.Tensor:
    return decoder.logits(decoder.forward(batch, cache))


def agreement(num_tokens: int) -> list[dict[str, Any]]:
    """How far predictions with an int8 cache are from those with a bfloat16 one, by the weights' format."""
    import kvik
    from kvik.config import EngineConfig
    from kvik.quantization.receipt import compare
    from kvik.quantization.windows import cut_windows, hidden_states, kv_layers
    from kvik.startup import inspect_model, load_decoder
    from kvik.text.tokenizer import Tokenizer

    records = []
    for quantization in (None, "int8"):
        config = EngineConfig("demo", quantization=quantization, max_num_seqs=4, max_num_batched_tokens=2048, seed=0)
        info = inspect_model(config)
        decoder = load_decoder(config, info)
        text = (Path(kvik.__file__).parent / "assets" / "heldout.txt").read_text(encoding="utf-8")
        windows = cut_windows(Tokenizer.from_folder(info.path).encode(text, add_special_tokens=False), 512, num_tokens)
        caches_of_windows = kv_layers(info.spec, windows.shape[1], torch.bfloat16)
        hidden = torch.cat(list(hidden_states(decoder, windows, caches_of_windows)))

        def plain(rows: torch.Tensor, decoder: Any = decoder) -> torch.Tensor:
            return torch.Tensor(decoder.logits(rows)).clone()  # the decoder's memory is used again

        quality = compare(decoder, hidden, plain, windows, torch.int8)
        record = {
            "weights": quantization or "bf16", "tokens": quality.num_tokens, "top1": quality.top1_agreement,
            "kl": quality.kl_divergence, "perplexity_change": quality.perplexity_change,
        }  # fmt: skip
        records.append(record)
        print(record, flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", action="store_true", help="step times only")
    parser.add_argument("--agreement", action="store_true", help="agreement only")
    parser.add_argument("--tokens", type=int, default=16384, help="of the held-out text")
    parser.add_argument("--json", type=Path, help="append one line with machine, versions and all records")
    args = parser.parse_args()
    facts: dict[str, Any] = {}
    if not args.agreement:
        facts["times"] = step_times()
    if not args.times:
        facts["agreement"] = agreement(args.tokens)
    write_line(args.json, "kv_int8", **facts)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
