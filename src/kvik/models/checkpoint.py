"""Reading checkpoint files: which files a folder's weights are in, and the tensors of each, one at a time.

safetensors, single or sharded with an index, and `pytorch_model.bin` likewise (tensors only: nothing in a file is
executed). Files are memory-mapped, so a tensor costs memory only while it is being copied.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvik.errors import ModelLoadError

__all__ = ["find_checkpoint", "iterate_tensors"]

_NAMES = {"safetensors": "model.safetensors", "pt": "pytorch_model.bin"}


def find_checkpoint(folder: Path, load_format: str) -> tuple[Path, ...]:
    """The files of the weights in `folder`. `load_format` is auto (safetensors before .bin), safetensors or pt.

    Raises ModelLoadError when there are none, or when an index is damaged or names files that are absent.
    """
    formats = list(_NAMES) if load_format == "auto" else [load_format]
    for name in (_NAMES[fmt] for fmt in formats):
        if (folder / name).is_file():
            return (folder / name,)
        if (folder / f"{name}.index.json").is_file():
            return _indexed(folder, f"{name}.index.json")
    present = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf"))
    wanted = " or ".join(_NAMES[fmt] for fmt in formats)
    found = f"it has {', '.join(present[:5])}" if present else "it has no weight files at all"
    raise ModelLoadError(f"no {wanted} (nor its index) in {folder}: {found}")


def _indexed(folder: Path, index: str) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{folder / index} is damaged ({error!r}); download it again") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise ModelLoadError(f"{folder / index} names {outside[0]!r}, which is not a file of its own folder")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        count, listed = f"{len(absent)} of {len(names)}", ", ".join(absent[:10])
        raise ModelLoadError(f"{count} files that {folder / index} names are absent: {listed}; download them again")
    return tuple(folder / name for name in names)


def iterate_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, CPU tensor) pairs of one file. The tensors are views of the mapped file: copy, do not keep.

    Raises ModelLoadError when the file is truncated, corrupt, or holds anything but tensors.
    """
    try:
        yield from _read_safetensors(file) if file.suffix == ".safetensors" else _read_pt(file)
    except UnpicklingError as error:
        hint = (
            "holds more than tensors or is corrupt; Kvik runs no code from a checkpoint, so use a safetensors version"
        )
        raise ModelLoadError(f"{file} {hint}") from error
    except (SafetensorError, EOFError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        size = f"{file.stat().st_size} bytes"
        raise ModelLoadError(f"{file} ({size}) is truncated or corrupt ({reason}); download it again") from error


def _read_safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt", device="cpu") as reader:
        for name in reader.keys():  # noqa: SIM118 (safe_open is not a mapping)
            yield name, reader.get_tensor(name)


def _read_pt(file: Path) -> Iterator[tuple[str, Tensor]]:
    # Files older than torch 1.6 are not zip archives and cannot be mapped.
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    if not isinstance(state, dict):
        raise ModelLoadError(f"{file} holds a {type(state).__name__}, not a dictionary of tensors")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ModelLoadError(f"{file}: {name!r} is a {type(tensor).__name__}, not a tensor")
        yield name, tensor
