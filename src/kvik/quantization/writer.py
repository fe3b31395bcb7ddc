"""Writing a model folder so that it is there whole or not at all: a hidden folder beside it, renamed at the end.

Tensors go to shards of at most about `SHARD_BYTES`, each written as soon as it is full.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kvik.errors import ConfigError

__all__ = ["SHARD_BYTES", "ShardWriter", "check_out", "copy_companions", "folder_bytes", "staged"]

SHARD_BYTES = 1 << 30
_COMPANIONS = (
    "*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*",
    "NOTICE*",
)  # fmt: skip
_REWRITTEN = ("config.json", "quantization_receipt.json")
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def check_out(out: Path, model: Path, *, force: bool) -> None:
    """Raise ConfigError unless the folder `out` may be made: it is absent or empty, or `force` and a model's."""
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent}, where {out.name} would be made, is not a folder")
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"{out.parent}, where {out.name} would be made, is not writable")
    real, source = out.resolve(), model.resolve()
    if real == source or real in source.parents:
        raise ConfigError(f"{out} is or holds the model {model} itself; choose another folder")
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise ConfigError(f"{out} exists and is not a folder; choose another name")
    if os.path.ismount(out):
        raise ConfigError(f"{out} is a mount point, which nothing can take the place of; choose {out / 'model'}, say")
    if not any(out.iterdir()):
        return
    if not force:
        raise ConfigError(f"{out} is not empty; choose another folder, or --force to replace it")
    if not (out / "config.json").is_file():
        raise ConfigError(f"{out} has no config.json: --force replaces model folders only; choose another folder")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` at the end, and is removed if anything is raised."""
    own = secrets.token_hex(4)  # and not the process id, which others have in containers of their own
    staging, old = (out.with_name(f".{out.name}.{own}.{kind}") for kind in ("partial", "old"))
    staging.mkdir()
    try:
        yield staging
        try:
            if out.exists():
                out.rename(old)
            staging.rename(out)
        except BaseException:
            if old.exists() and not out.exists():
                old.rename(out)
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


class ShardWriter:
    """Tensors to safetensors files in `folder`. Raises OSError where they cannot be written."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._names: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write `tensor` sooner or later; it must not change until then."""
        assert name not in self._pending and all(name not in names for names in self._names)
        pending = sum(t.nbytes for t in self._pending.values())
        if self._pending and pending + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._total += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, and the index if there is more than one file."""
        self._flush()
        count = len(self._names)
        if count == 1:
            self._file(1).rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._names, 1):
            final = f"model-{number:05}-of-{count:05}.safetensors"
            self._file(number).rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _file(self, number: int) -> Path:
        return self._folder / f"part-{number:05}.safetensors"

    def _flush(self) -> None:
        if not self._pending:
            return
        self._names.append(list(self._pending))
        file = self._file(len(self._names))
        try:
            save_file(self._pending, file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {file}: {error}") from error
        self._pending = {}


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer, the generation defaults and the licence of a model."""
    for pattern in _COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and file.name not in _REWRITTEN and not file.name.endswith(".index.json"):
                copy = folder / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def folder_bytes(folder: Path) -> int:
    """Bytes of the weight files of a model folder: safetensors, or .bin where there are none."""
    for pattern in _WEIGHTS:
        sizes = [file.stat().st_size for file in folder.glob(pattern)]
        if sizes:
            return sum(sizes)
    return 0
