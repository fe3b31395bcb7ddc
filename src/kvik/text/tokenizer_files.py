"""The files of a model folder that say how its text is tokenised, read as data and merged in one place.

tokenizer_config.json rules; special_tokens_map.json fills in where a folder has no `added_tokens_decoder`; a
chat_template.jinja file and the additional_chat_templates folder go before templates inside the configuration. The
precedence is that of transformers 5, so that both give the same token ids. Owned by `Tokenizer.from_folder`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from kvik.errors import ModelLoadError
from kvik.models.hub import read_json

__all__ = ["TokenizerFiles"]

# Special tokens that the tokenizer classes of transformers assume where tokenizer_config.json does not name them.
_CLASS_DEFAULTS: dict[str, dict[str, str]] = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}


def _content(value: Any) -> str | None:
    """The text of a token written as a string or as a serialised AddedToken."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _added_token(value: Any, *, special: bool) -> AddedToken | None:
    text = _content(value)
    if text is None:
        return None
    flags = {name: bool(value[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value}
    return AddedToken(text, special=special, **(flags if isinstance(value, dict) else {"normalized": False}))


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a model folder says about its tokenizer, apart from the vocabulary itself."""

    folder: Path
    settings: dict[str, Any]
    config: dict[str, Any]
    generation_config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles:
        """Read the folder."""
        if not folder.is_dir():
            raise ModelLoadError(f"there is no folder {folder}; a tokenizer is read from a local model folder")
        settings = read_json(folder / "tokenizer_config.json", missing={})
        if "added_tokens_decoder" not in settings:
            settings = {**settings, **read_json(folder / "special_tokens_map.json", missing={})}
        config = read_json(folder / "config.json", missing={})
        return cls(folder, settings, config, read_json(folder / "generation_config.json", missing={}))

    @property
    def tokenizer_class(self) -> str:
        """The class name that the folder asks for, without 'Fast'; '' if it names none."""
        name = self.settings.get("tokenizer_class") or self.config.get("tokenizer_class") or ""
        return str(name).removesuffix("Fast")

    @property
    def special_tokens(self) -> dict[str, str]:
        """Named special tokens: {'bos_token': '<s>', ...}, also names that only this model has."""
        named = {name: _content(value) for name, value in self.settings.items() if name.endswith("_token")}
        extra = self.settings.get("extra_special_tokens")
        if isinstance(extra, dict):
            named.update({name: _content(value) for name, value in extra.items()})
        return {name: text for name, text in named.items() if text is not None}

    @property
    def assumed_special_tokens(self) -> dict[str, str]:
        """Special tokens that the folder does not name but its tokenizer class has, if they are in the vocabulary."""
        defaults = _CLASS_DEFAULTS.get(self.tokenizer_class, {})
        return {name: text for name, text in defaults.items() if name not in self.settings}

    @property
    def added_tokens(self) -> list[AddedToken]:
        """Tokens that the folder wants added to the vocabulary of tokenizer.json, in the order of their ids."""
        decoder = self.settings.get("added_tokens_decoder")
        entries = decoder if isinstance(decoder, dict) else {}
        if not all(str(token_id).isdigit() for token_id in entries):
            raise ModelLoadError(
                f"{self.folder}: tokenizer_config.json has an added_tokens_decoder with ids that are no integers"
            )
        ordered = [entry for _, entry in sorted(entries.items(), key=lambda item: int(item[0]))]
        tokens = [
            _added_token(entry, special=bool(entry.get("special"))) for entry in ordered if isinstance(entry, dict)
        ]
        extra = self.settings.get("extra_special_tokens") or self.settings.get("additional_special_tokens")
        if isinstance(extra, list):
            tokens += [_added_token(entry, special=True) for entry in extra]
        tokens += [_added_token(text, special=True) for text in self.special_tokens.values()]
        return [token for token in tokens if token is not None]

    @property
    def eos_ids(self) -> set[int]:
        """End-of-sequence ids of config.json and generation_config.json together."""
        ids: set[int] = set()
        for name, data in (("config.json", self.config), ("generation_config.json", self.generation_config)):
            value = data.get("eos_token_id")
            items = [] if value is None else value if isinstance(value, list) else [value]
            if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items):
                raise ModelLoadError(
                    f"{self.folder / name}: eos_token_id must be an id or a list of ids, got {value!r}"
                )
            ids.update(items)
        return ids

    @property
    def chat_templates(self) -> dict[str, str]:
        """Chat templates by name; the usual one is 'default'."""
        files = {path.stem: path for path in sorted((self.folder / "additional_chat_templates").glob("*.jinja"))}
        if (self.folder / "chat_template.jinja").is_file():
            files["default"] = self.folder / "chat_template.jinja"
        if files:
            return {name: _read_text(path) for name, path in files.items()}
        value = self.settings.get("chat_template")
        if value is None:
            value = read_json(self.folder / "chat_template.json", missing={}).get("chat_template")
        if isinstance(value, list):
            value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        templates = value if isinstance(value, dict) else {"default": value} if value is not None else {}
        if not all(isinstance(name, str) and isinstance(text, str) for name, text in templates.items()):
            raise ModelLoadError(f"{self.folder}: chat_template must be text or a list of {{name, template}} objects")
        return templates


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}; it must be UTF-8 text") from error
