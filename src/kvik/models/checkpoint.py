"""Reading checkpoint files: which files a folder's weights are in, and their tensors by name, one at a time.

safetensors, single or sharded with an index, and `pytorch_model.bin` likewise (tensors only: nothing in a file is
executed). Files are memory-mapped, and mapped anew every 64 MiB, so a tensor costs memory only while it is copied.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from kvik.errors import KvikError, ModelLoadError
from kvik.models.hub import unreadable

__all__ = ["Checkpoint", "TensorInfo", "find_checkpoint"]

_MAPPED_BYTES = 64 << 20  # what was read stays in memory as long as its file is mapped
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


class TensorInfo(NamedTuple):
    """What a file's header says of a tensor."""

    file: Path
    shape: torch.Size
    dtype: str  # as in torch: float32, bfloat16, int8
    start: int | None  # of its bytes in the file; None for a file that only torch can read


class Checkpoint:
    """The tensors of a folder's weight files by name. Files are mapped while they are read.

    Raises ModelLoadError when a file is truncated, corrupt, or holds anything but tensors, and for a name in two files.
    """

    def __init__(self, folder: Path, load_format: str) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self._open: dict[Path, Callable[[str], Tensor]] = {}
        self._unread: Counter[Path] = Counter()
        self._mapped: Counter[Path] = Counter()
        for file in find_checkpoint(folder, load_format):
            with _readable(file):
                infos = _open_file(file)[0]
                starts = _starts(file) if file.suffix == ".safetensors" else {}
            for name, (shape, dtype) in infos.items():
                if name in self.tensors:
                    both = f"{self.tensors[name].file.name} and in {file.name}"
                    raise ModelLoadError(f"{name} is in the checkpoint twice: in {both}")
                self.tensors[name] = TensorInfo(file, shape, dtype, starts.get(name))
            self._unread[file] = len(infos)

    def skip(self, name: str) -> None:
        """Say that a tensor will not be read, so that its file need not stay open for it."""
        self._done(self.tensors[name].file)

    def read(self, name: str, into: Tensor) -> None:
        """Copy a tensor to `into`, converting its dtype. Each tensor is read once."""
        file = self.tensors[name].file
        with _readable(file):
            if file not in self._open:
                self._open[file] = _open_file(file)[1]
            into.copy_(self._open[file](name))
        self._mapped[file] += into.nbytes
        if self._mapped[file] > _MAPPED_BYTES and _can_be_mapped(file):
            self._close(file)
        self._done(file)

    def read_part(self, name: str, start: int, into: Tensor) -> None:
        """Copy the bytes of a tensor from its byte `start` on to `into`, contiguous uint8 [num_bytes] on the CPU.

        For tensors with a `TensorInfo.start`. Holds nothing open, and may be called by several threads at once.
        """
        info, rest = self.tensors[name], into.numpy().data
        assert info.start is not None
        with _readable(info.file), info.file.open("rb", buffering=0) as file:
            file.seek(info.start + start)
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise EOFError(f"{name} is cut off")
                rest = rest[count:]

    def _done(self, file: Path) -> None:
        self._unread[file] -= 1
        if self._unread[file] == 0:
            self._close(file)

    def _close(self, file: Path) -> None:
        self._open.pop(file, None)
        self._mapped[file] = 0


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn what the libraries raise for a bad file into a ModelLoadError."""
    try:
        yield
    except UnpicklingError as error:
        hint = (
            "holds more than tensors or is corrupt; Kvik runs no code from a checkpoint, so use a safetensors version"
        )
        raise ModelLoadError(f"{file} {hint}") from error
    except PermissionError as error:
        raise unreadable(file, error) from error
    except (KvikError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle makes torch raise almost anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        size = f"{file.stat().st_size} bytes"
        raise ModelLoadError(f"{file} ({size}) is truncated or corrupt ({reason}); download it again") from error


_Infos = dict[str, tuple[torch.Size, str]]


def _open_file(file: Path) -> tuple[_Infos, Callable[[str], Tensor]]:
    """Names with shape and dtype, and a function that reads a tensor: a view of the mapped file, to be copied."""
    file.open("rb").close()  # the libraries say of a file that may not be read that there is none
    if file.suffix == ".safetensors":
        reader = safe_open(file, framework="pt", device="cpu").__enter__()  # type: ignore[no-untyped-call]
        slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 (not a mapping)
        infos = {name: (torch.Size(part.get_shape()), _dtype_name(part.get_dtype())) for name, part in slices.items()}
        return infos, reader.get_tensor
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=_can_be_mapped(file))
    if not isinstance(state, dict):
        raise ModelLoadError(f"{file} holds a {type(state).__name__}, not a dictionary of tensors")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ModelLoadError(f"{file}: {name!r} is a {type(tensor).__name__}, not a tensor")
    return {name: (t.shape, str(t.dtype).removeprefix("torch.")) for name, t in state.items()}, state.__getitem__


def _can_be_mapped(file: Path) -> bool:
    """Whether tensors stay in the file until they are copied, unlike those of .bin files from before torch 1.6."""
    return file.suffix == ".safetensors" or zipfile.is_zipfile(file)


def _starts(file: Path) -> dict[str, int]:
    """Where the bytes of each tensor of a safetensors file begin: behind a header, whose length comes first."""
    with file.open("rb") as source:
        size = int.from_bytes(source.read(8), "little")
        header = json.loads(source.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _dtype_name(name: str) -> str:
    """'BF16' of a safetensors header is torch's 'bfloat16'."""
    kinds = {"BF": "bfloat", "F": "float", "I": "int", "U": "uint"}
    letters = name.rstrip("0123456789")
    return kinds.get(letters, letters.lower()) + name[len(letters) :]
