"""Shared by the tests of quantised folders: making one, editing its tensors, and the logits of a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvik.cli.main import main
from kvik.config import EngineConfig
from kvik.quantization.windows import cut_windows, hidden_states, kv_layers
from kvik.startup import inspect_model, load_decoder

__all__ = ["PROMPT", "SHAPES", "edit", "logits", "quantize", "receipt"]

PROMPT = [(7 * i + 3) % 384 for i in range(60)]
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "intermediate_size": 100}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3-gqa": ("qwen3", {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 112, "head_dim": 16}),
    "mistral": ("mistral", {"num_hidden_layers": 3, "sliding_window": 20}),
}


def quantize(model: object, out: Path, fmt: str, *flags: object) -> int:
    """Run the command on a short text, without calibration, and return its exit code."""
    text = out.parent / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    defaults = {"--text": text, "--calibration": "none"}
    given = [item for name, value in defaults.items() if name not in flags for item in (name, value)]
    return main(["quantize", str(model), str(out), "--quantization", fmt, *map(str, (*given, *flags))])


def receipt(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "quantization_receipt.json").read_text())
    return loaded


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a folder with a single file."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def logits(folder: Path, **options: Any) -> Tensor:
    """Scores after every token of PROMPT."""
    config = EngineConfig(str(folder), device="cpu", max_num_seqs=2, max_num_batched_tokens=128, **options)
    info = inspect_model(config)
    decoder, windows = load_decoder(config, info), cut_windows(PROMPT, 60, 60)
    kv = kv_layers(info.spec, 60, info.resolved.dtype, 128)
    return torch.cat([decoder.logits(hidden).clone() for hidden in hidden_states(decoder, windows, kv, 128)])
