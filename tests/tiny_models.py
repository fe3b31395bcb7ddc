"""Tiny random checkpoints in the Hugging Face layout, for every test that needs a model.

`make_tiny` saves config, weights, generation config and a byte-level tokenizer with a chat template. Unlike a freshly
initialised transformers model, norms and biases are random too and the logits are spread out, so that a forgotten bias
or a wrong norm shows and greedy decoding is stable.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["ARCHITECTURES", "EOS_ID", "TINY_VOCAB_SIZE", "hf_model", "make_tiny", "make_tiny_tokenizer", "to_old_style"]

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral")
TINY_VOCAB_SIZE = 384
EOS_ID = 0
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_BASE: dict[str, Any] = {
    "vocab_size": TINY_VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": EOS_ID,
}
_ARCH_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = (
    "Once upon a time there was a small engine that could read very quickly.",
    "It kept the keys and the values of every word that it had seen.",
    "The quick brown fox jumps over the lazy dog; 0123456789, again and again.",
)


def make_tiny(
    path: Path,
    arch: str = "qwen3",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    old_style: bool = False,
    tokenizer: bool = True,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Save a random checkpoint of `arch` in the folder `path` (made if absent) and return `path`.

    `overrides` are fields of the transformers config (`num_hidden_layers=4`, `rope_parameters={...}`). `old_style`
    rewrites config.json as transformers 4 wrote it (`rope_theta`, `rope_scaling`, `torch_dtype`).
    """
    path.mkdir(parents=True, exist_ok=True)
    model = hf_model(arch, seed=seed, **overrides).to(dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    if old_style:
        to_old_style(path)
    if tokenizer:
        make_tiny_tokenizer(path)
    return path


def hf_model(arch: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A random transformers model of `arch` in fp32, in eval mode, with eager attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**_BASE, **_ARCH_DEFAULTS[arch], **overrides}
    config = AutoConfig.for_model(arch, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    _randomise(model, seed)
    return model.eval()


def _randomise(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * 1.2 / parameter.shape[1] ** 0.5)


def to_old_style(path: Path) -> None:
    """Rewrite `path`/config.json as transformers 4 wrote it."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters", None) or {}
    config["rope_theta"] = rope.pop("rope_theta", 10000.0)
    kind = rope.pop("rope_type", "default")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype", "float32")
    config.pop("layer_types", None)
    config["transformers_version"] = "4.40.0"
    file.write_text(json.dumps(config, indent=2))


@lru_cache(maxsize=1)
def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCAB_SIZE,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return str(tokenizer.to_str())


def make_tiny_tokenizer(path: Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json in `path`: byte-level BPE of at most TINY_VOCAB_SIZE tokens."""
    (path / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _SPECIAL[0],
        "pad_token": _SPECIAL[0],
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return path
