"""From the name of a model to a folder with its files, and the JSON files of that folder.

A name is `demo` (bundled), a local folder (then nothing here touches the network), a Hugging Face id, or
`modelscope:ORG/NAME`. Downloads are left to the hub's own library, which honours HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN
and its cache folder; only the files that Kvik reads are fetched, and .bin weights only where there are no safetensors.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import re
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from kvik.errors import ModelLoadError, did_you_mean

__all__ = [
    "BUNDLED_MODELS", "folder_digest", "load_config", "load_generation_config", "read_json", "resolve_model",
    "unreadable",
]  # fmt: skip

BUNDLED_MODELS = ("demo", "demo-draft")
_TEMPLATES = "additional_chat_templates/*.jinja"
_TEXT_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", _TEMPLATES)
_SAFETENSORS = ("model*.safetensors",)
_BIN = ("pytorch_model*.bin",)
# Patterns match whole paths: original/, onnx/ and the like, all but "ad...", are other forms of the same model.
_SUBFOLDERS = ("[!a]*/*", "a[!d]*/*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_MODELSCOPE = "modelscope:"
_WHOLE, _SAMPLE, _NUM_SAMPLES = 2**25, 4096, 64  # of folder_digest: bytes, bytes, and how many for each large file


def resolve_model(name: str, revision: str | None = None, *, load_format: str = "auto") -> Path:
    """The folder of the model called `name`, downloaded if need be; with `load_format="dummy"` without its weights.

    Raises ModelLoadError that says what to do when there is no such model or it cannot be had.
    """
    local, bundled = Path(os.path.expanduser(name)), name in BUNDLED_MODELS
    if local.exists() or bundled:
        if revision is not None:
            raise ModelLoadError(f"{name} is local and has no revisions; leave revision={revision!r} out")
        hidden = bundled and not (local / "config.json").is_file()  # by a folder that is no model
        return _bundled(name) if hidden else _checked_folder(local)
    if name.startswith(_MODELSCOPE):
        return _modelscope(name.removeprefix(_MODELSCOPE), revision)
    if not _HUB_ID.fullmatch(name):
        raise ModelLoadError(f"there is no folder {name}{_near_folders(name)}")
    return _hugging_face(name, revision, load_format)


def load_config(path: Path) -> dict[str, Any]:
    """config.json of the folder `path`. Raises ModelLoadError when it is absent or damaged."""
    return read_json(_checked_folder(path) / "config.json")


def load_generation_config(path: Path) -> dict[str, Any]:
    """generation_config.json of the folder `path`, or {} where there is none."""
    return read_json(path / "generation_config.json", missing={})


def read_json(path: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in a JSON file; `missing` where there is no such file. Raises ModelLoadError for anything else."""
    if missing is not None and not path.is_file():
        return missing
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON ({error}); download the file again") from error
    if not isinstance(data, dict):
        raise ModelLoadError(f"{path} holds a {type(data).__name__}, not an object; download the file again")
    return data


def unreadable(path: Path, error: OSError) -> ModelLoadError:
    """What to raise for a file that the system does not let us read."""
    return ModelLoadError(f"cannot read {path}: {error.strerror or error}; check the path and its permissions")


def _checked_folder(path: Path) -> Path:
    if path.is_file():
        raise ModelLoadError(f"{path} is a file; give the folder that holds config.json and the weights")
    if not path.is_dir():
        raise ModelLoadError(f"there is no folder {path}{_near_folders(str(path))}")
    if not (path / "config.json").is_file():
        names = sorted(p.name for p in path.iterdir())
        inner = sorted(p.parent.name for p in path.glob("*/config.json"))
        tip = f"did you mean {path / inner[0]}?" if inner else f"it has {', '.join(names[:5]) or 'no files at all'}"
        raise ModelLoadError(f"{path} has no config.json, so it is not a model folder; {tip}")
    return path


def _near_folders(name: str) -> str:
    """' (did you mean …?)' or the folders beside the one that does not exist."""
    path = Path(os.path.expanduser(name))
    if not path.parent.is_dir():
        return f" (nor {path.parent})"
    siblings = sorted(p.name for p in path.parent.iterdir() if p.is_dir() and not p.name.startswith("."))
    return did_you_mean(path.name, siblings) or (f"; {path.parent} has {', '.join(siblings[:5])}" if siblings else "")


def _bundled(name: str) -> Path:
    path = Path(str(importlib.resources.files("kvik"))) / "assets" / name
    if not (path / "config.json").is_file():
        raise ModelLoadError(f"the bundled model {name!r} is not in this installation ({path}); reinstall kvik")
    return path


def _hugging_face(name: str, revision: str | None, load_format: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The first base is the error of whichever HTTP library this huggingface_hub uses; hf_xet raises RuntimeError.
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]

    def fetch(*patterns: str) -> Path:
        allow = [*_TEXT_FILES, *patterns]
        return Path(snapshot_download(name, revision=revision, allow_patterns=allow, ignore_patterns=list(_SUBFOLDERS)))

    try:
        path = _fetch_weights(fetch, load_format)
    except (http_error, OSError, HFValidationError, RuntimeError) as error:
        raise ModelLoadError(_hub_message(name, revision, error)) from error
    return _checked_folder(path)


def _fetch_weights(fetch: Callable[..., Path], load_format: str) -> Path:
    if load_format == "dummy":
        return fetch()
    if load_format == "pt":
        return fetch(*_BIN)
    path = fetch(*_SAFETENSORS)
    has_weights = any(path.glob(_SAFETENSORS[0]))
    return path if has_weights or load_format == "safetensors" else fetch(*_BIN)


def _hub_message(name: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import errors

    where = f"{name!r}{f' at revision {revision!r}' if revision else ''}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{where} is gated: accept its terms on its Hugging Face page, then set HF_TOKEN to a token of that account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"model {name!r} has no revision {revision!r}"
    if isinstance(error, errors.RepositoryNotFoundError):
        nearby = [str(p) for p in Path(name).parent.glob("*") if p.is_dir()]
        hint = did_you_mean(name, [*BUNDLED_MODELS, *nearby])
        return f"{name!r} is neither a Hugging Face model nor a local folder{hint}; if it is private, set HF_TOKEN"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return (
            f"{where} is not in the local cache and cannot be downloaded: no connection, or HF_HUB_OFFLINE is set; "
            "connect, set HF_ENDPOINT to a mirror, or give a local folder"
        )
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return f"downloading {where} failed: {reason}; try again, or give a local folder"


def _modelscope(name: str, revision: str | None) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise ModelLoadError(
            f"{_MODELSCOPE}{name} needs the modelscope extra: pip install 'kvik[modelscope]'"
        ) from error
    try:
        path = Path(snapshot_download(name, revision=revision))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelLoadError(f"downloading {name!r} from ModelScope failed: {error}") from error
    return _checked_folder(path)


def folder_digest(path: Path) -> str:
    """A hash of a model folder: small files whole, of large ones the size and samples of 4 KiB, so that it is quick."""
    digest = blake2b(digest_size=16)
    patterns = (*_TEXT_FILES, "*.safetensors", "*.bin")
    for file in sorted({found for pattern in patterns for found in path.glob(pattern)}):
        size = file.stat().st_size
        digest.update(f"{file.name}/{size}/".encode())
        with file.open("rb", buffering=0) as data:
            if size <= _WHOLE:
                digest.update(data.readall())
                continue
            for number in range(_NUM_SAMPLES):
                data.seek(number * (size - _SAMPLE) // (_NUM_SAMPLES - 1))
                digest.update(data.read(_SAMPLE))
    return digest.hexdigest()
