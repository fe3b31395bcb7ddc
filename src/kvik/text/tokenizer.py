"""Text to token ids and back, for every tokenizer that the `tokenizers` library can hold.

`Tokenizer` reads a local model folder: tokenizer.json directly, older formats (tokenizer.model, vocab files) through
transformers where the extra is installed. Token ids are those of transformers 5, except that a BOS which the text
already starts with is not added again. Immutable after loading, so threads may share it.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers

from kvik.errors import ModelLoadError, RequestError
from kvik.models.hub import resolve_model, unreadable
from kvik.structured.grammars import TokenBytes
from kvik.text.detokenizer import Vocabulary
from kvik.text.tokenizer_files import TokenizerFiles

__all__ = ["Tokenizer", "has_tokenizer", "load_tokenizer"]

_LONG = 4096
"""Characters from which on a text is tokenised as a batch of one: only that lets other threads run meanwhile."""

_OLD_FILES = ("tokenizer.model", "spiece.model", "tiktoken.model", "tekken.json", "vocab.json", "vocab.txt")


class Tokenizer:
    """A tokenizer of the `tokenizers` library with what a model folder says about special tokens and templates.

    Attributes: `backend` (tokenizers.Tokenizer), `special_tokens` ({'bos_token': '<s>', ...}), `chat_templates` by
    name, `bos_token_id`, `pad_token_id`, `eos_token_ids` (every id that ends a sequence, ascending),
    `special_token_ids`, `vocab_size` (largest id + 1, added tokens included), `vocabulary` (for detokenisers).
    """

    def __init__(
        self,
        backend: Any,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self.bos_token_id = self._special_id("bos_token")
        self.pad_token_id = self._special_id("pad_token")
        eos = self._special_id("eos_token")
        self.eos_token_ids = tuple(sorted({*eos_token_ids, *(() if eos is None else (eos,))}))
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.vocabulary = Vocabulary(backend, self.special_token_ids)

    @classmethod
    def from_folder(cls, path: Path, *, model: Path | None = None) -> Tokenizer:
        """The tokenizer of a local folder; no network. `model` is the folder of the model, if that is another one.

        Raises ModelLoadError if files are missing or broken, or need the extra `kvik[transformers]`.
        """
        path = Path(path)
        files = TokenizerFiles.read(path)
        eos_ids = files.eos_ids if model in (None, path) else files.eos_ids | TokenizerFiles.read(model).eos_ids
        special_tokens = files.special_tokens
        if (path / "tokenizer.json").is_file():
            backend = _read_backend(path / "tokenizer.json")
            _add_tokens(backend, files)
            _apply_class(backend, files)
            assumed = files.assumed_special_tokens
            special_tokens.update(
                {name: text for name, text in assumed.items() if backend.token_to_id(text) is not None}
            )
        else:
            backend, found = _convert(path)
            special_tokens = {**found, **special_tokens}
        return cls(
            backend,
            special_tokens=special_tokens,
            eos_token_ids=eos_ids,
            chat_templates=files.chat_templates,
        )

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """A tokenizer whose ids 0..255 are bytes and all others are nothing: for models without one, in benchmarks."""
        symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {symbol: token_id for token_id, symbol in enumerate(symbols)}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return cls(backend)

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        token_id: int | None = None if text is None else self.backend.token_to_id(text)
        return token_id

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises RequestError for text that cannot be UTF-8 (a lone surrogate)."""
        try:
            if len(text) < _LONG:
                encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
            else:
                (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise _bad_text(text) from error
        ids: list[int] = encoding.ids
        return self._one_bos(text, ids) if add_special_tokens else ids

    def _one_bos(self, text: str, ids: list[int]) -> list[int]:
        bos = self.special_tokens.get("bos_token")
        doubled = bos is not None and text.startswith(bos) and ids[:2] == [self.bos_token_id] * 2
        return ids[1:] if doubled else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`: exactly what a detokeniser emits for them, piece by piece."""
        return self.vocabulary.decode(ids, skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as it is written in the vocabulary, None for an id that names none."""
        token: str | None = self.backend.id_to_token(token_id)
        return token

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token contributes inside a text; perhaps only part of a character."""
        return self.vocabulary.token_bytes(token_id)

    @property
    def _never_text(self) -> list[int]:
        """Ids that grammars do not take for the bytes that they are written with."""
        return sorted({*self.special_token_ids, *self.eos_token_ids})

    def byte_table(self, vocab_size: int) -> TokenBytes:
        """The bytes of the first `vocab_size` ids, which grammars are matched with."""
        known = min(vocab_size, self.vocab_size)
        tokens = [self.token_bytes(token_id) for token_id in range(known)] + [b""] * (vocab_size - known)
        special, eos = ([i for i in ids if i < known] for ids in (self._never_text, self.eos_token_ids))
        return TokenBytes(tokens, special, eos)

    def spelling_table(self, vocab_size: int) -> TokenBytes:
        """A vocabulary to check grammars with, whose tables are quickly built: every byte, and the special tokens."""
        ids = self._never_text
        tokens = [bytes([value]) for value in range(256)] + [self.token_bytes(token_id) for token_id in ids]
        eos = [256 + ids.index(token_id) for token_id in self.eos_token_ids]
        padding = [b""] * (vocab_size - len(tokens))  # a grammar may name tokens by id
        return TokenBytes(tokens + padding, range(256, len(tokens)), eos)

    def bad_word_ids(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """The id sequences that spell `words` at the start of a text, after a space, and inside a line."""
        words = tuple(words)
        if not words:
            return ()
        found: dict[tuple[int, ...], None] = {}
        newline = self.encode("\n", add_special_tokens=False)
        for word in words:
            for text in (word, " " + word.lstrip(" ")):
                found[tuple(self.encode(text, add_special_tokens=False))] = None
            # Sentencepiece puts a space before a text; after a newline it does not, which gives the bare word.
            after = self.encode("\n" + word, add_special_tokens=False)
            if newline and after[: len(newline)] == newline:
                found[tuple(after[len(newline) :])] = None
        return tuple(ids for ids in found if ids)


def _bad_text(text: object) -> RequestError:
    if not isinstance(text, str):
        return RequestError(f"a text must be a string, got {type(text).__name__}", "prompt")
    at = next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), 0)
    return RequestError(
        f"the text holds half a surrogate pair (U+{ord(text[at]):04X}) at character {at}, which no UTF-8 can hold: "
        "it was cut within a character, or was not UTF-8 when it was read",
        "prompt",
    )


def _read_backend(path: Path) -> Any:
    try:
        path.open("rb").close()
        return tokenizers.Tokenizer.from_file(str(path))
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        raise ModelLoadError(f"cannot use {path}: {error}; download it again, or update `tokenizers`") from error


def _add_tokens(backend: Any, files: TokenizerFiles) -> None:
    """Add the tokens that only tokenizer_config.json knows; for those it has, tokenizer.json rules.

    But named tokens, such as the end of a sequence, are special in any case.
    """
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for token in files.added_tokens:
        if token.content not in known:
            known[token.content] = token
            add = backend.add_special_tokens if token.special else backend.add_tokens
            add([token])
    for text in files.special_tokens.values():
        token = known[text]
        if not token.special:
            flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            backend.add_special_tokens([AddedToken(text, special=True, **flags)])


def _apply_class(backend: Any, files: TokenizerFiles) -> None:
    """Do to tokenizer.json what the tokenizer class named in the folder does in transformers 5.

    Two things differ from the file: LlamaTokenizer, for Llama models, has its own rule for the leading space, and an
    explicit `add_prefix_space` overrides a byte-level pre-tokenizer. `add_bos_token` and `add_eos_token` are
    already part of tokenizer.json's post-processor, which rules.
    """
    prefix_space = files.settings.get("add_prefix_space")
    states = [part.__getstate__() for part in (backend.pre_tokenizer, backend.decoder) if part is not None]
    byte_level = any(b'"ByteLevel"' in state for state in states)
    is_llama = files.tokenizer_class == "LlamaTokenizer" and files.config.get("model_type", "llama") == "llama"
    if is_llama and not byte_level and type(backend.model).__name__ == "BPE":
        prefix = prefix_space is None or bool(prefix_space)
        scheme = "never" if not prefix else "always" if files.settings.get("legacy") else "first"
        strip = [decoders.Strip(content=" ", left=1)] if prefix else []
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
        backend.decoder = decoders.Sequence(steps)
    elif byte_level and isinstance(prefix_space, bool) and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        state = json.loads(backend.pre_tokenizer.__getstate__())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=state["use_regex"])


def has_tokenizer(path: Path) -> bool:
    """Whether a folder has any file that a tokenizer can be read from."""
    return any((path / name).is_file() for name in ("tokenizer.json", *_OLD_FILES))


def load_tokenizer(model: Path, name: str | None = None, *, dummy: bool = False) -> Tokenizer:
    """The tokenizer of the model in a local folder, or that called `name`; bytes for a `dummy` model without one.

    Texts end where either of the two says. Raises ModelLoadError.
    """
    folder = model if name is None else _folder_of(name)
    if dummy and not has_tokenizer(folder):
        return Tokenizer.of_bytes()
    return Tokenizer.from_folder(folder, model=model)


def _folder_of(name: str) -> Path:
    """The folder of a tokenizer, which need not be a model's; of a model on a hub nothing but its text files come."""
    local = Path(os.path.expanduser(name))
    return local if has_tokenizer(local) else resolve_model(name, load_format="dummy")


def _convert(path: Path) -> tuple[Any, dict[str, str]]:
    """A backend and its named special tokens from files older than tokenizer.json, made by transformers."""
    old = next((name for name in _OLD_FILES if (path / name).is_file()), None)
    if old is None:
        raise ModelLoadError(
            f"{path} has no tokenizer.json and no {', '.join(_OLD_FILES)}: there is no tokenizer in it"
        )
    hint = f"{path} has {old} but no tokenizer.json"
    try:
        for name in ("google.protobuf", "sentencepiece"):  # transformers reports their absence in a roundabout way
            importlib.import_module(name)
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelLoadError(
            f"{hint}; converting it needs transformers, sentencepiece and protobuf: pip install 'kvik[transformers]'"
        ) from error
    try:
        made = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelLoadError(f"{hint} and transformers cannot convert it: {error}; add a tokenizer.json") from error
    if not getattr(made, "is_fast", False):
        raise ModelLoadError(f"{hint}, and {type(made).__name__} has no fast form; add a tokenizer.json to the folder")
    return made.backend_tokenizer, dict(made.special_tokens_map)
