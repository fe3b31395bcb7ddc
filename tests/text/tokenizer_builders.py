"""Tiny tokenizers of every kind, trained here, and model folders around them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello world, hello there! How are you today?",
    "Don't stop me now; it's 12:34 and the answer is 42. <b>bold</b> {'key': [1, 2, 3]}\n\nNew paragraph\n\tindented",
    "你好世界，今天天气很好。こんにちは世界。안녕하세요 세계",
    "naïve café über straße Ωμέγα привет мир 👋🌍 🎉🎉",
    "system user assistant tool function name arguments city Paris weather sunny celsius",
] * 4

TEXTS = [
    "Hello world",
    " leading and  double  spaces ",
    "你好世界，天气",
    "👨‍👩‍👧‍👦 family 🏳️‍🌈 flag 🇩🇰",
    "e\u0301 combining a\u0308\u0332",
    "tabs\tand\nnewlines\r\n\n",
    "naïve café",
    "",
    " ",
    "x",
    "zero\u200bwidth \u202eright-to-left",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈",
]

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@functools.cache
def _byte_level_json() -> str:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(CHATML),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<think>", "</think>", "｜端｜"])
    return str(backend.to_str())


def byte_level() -> Any:
    """Byte-level BPE with ChatML special tokens, in the style of GPT-2, Llama 3 and Qwen."""
    return Backend.from_str(_byte_level_json())


@functools.cache
def _byte_fallback_json() -> str:
    plain = Backend(models.BPE(unk_token="<unk>"))
    plain.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(plain.to_str())["model"]
    words = sorted(learned["vocab"], key=learned["vocab"].get)
    vocab = {token: i for i, token in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *BYTE_TOKENS, *words]))}
    merges = [tuple(merge) for merge in learned["merges"]]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return str(backend.to_str())


def byte_fallback() -> Any:
    """Sentencepiece BPE with byte fallback, in the style of Llama 2: <s> is put before a text."""
    return Backend.from_str(_byte_fallback_json())


@functools.cache
def _unigram_json() -> str:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return str(backend.to_str())


def unigram() -> Any:
    """Unigram with Metaspace on both sides."""
    return Backend.from_str(_unigram_json())


@functools.cache
def _wordpiece_json() -> str:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return str(backend.to_str())


def wordpiece() -> Any:
    """WordPiece: pieces inside a word start with ##."""
    return Backend.from_str(_wordpiece_json())


@functools.cache
def _word_suffix_json() -> str:
    backend = Backend(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return str(backend.to_str())


def word_suffix() -> Any:
    """BPE whose words end in </w>: what a token contributes depends on the next one."""
    return Backend.from_str(_word_suffix_json())


def no_decoder() -> Any:
    """Whole words, joined by spaces for want of a decoder."""
    backend = Backend(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2, "</s>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    return backend


def byte_level_in_sequence() -> Any:
    """A byte-level decoder among others, which only the window detokeniser can handle."""
    backend = byte_level()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\U000fffff", "")])
    return backend


BUILDERS: dict[str, Callable[[], Any]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "unigram": unigram,
    "wordpiece": wordpiece,
    "word_suffix": word_suffix,
    "no_decoder": no_decoder,
    "byte_level_in_sequence": byte_level_in_sequence,
}


def write_folder(
    folder: Path,
    backend: Any,
    *,
    settings: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    generation_config: dict[str, Any] | None = None,
) -> Path:
    """A model folder with a tokenizer.json and the given configuration files."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    files = {"tokenizer_config.json": settings, "config.json": config, "generation_config.json": generation_config}
    for name, data in files.items():
        if data is not None:
            (folder / name).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return folder
