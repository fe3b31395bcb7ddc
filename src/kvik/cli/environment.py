"""What can be said about this machine and installation: for `kvik info`, and beside every benchmark result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

import kvik

__all__ = ["commit", "machine", "model_places", "versions"]

_FLAGS = re.compile(r"avx$|avx2|avx512(f|bw|_bf16|_fp16|_vnni)$|avx_vnni|amx_\w+|f16c|fma$|asimd\w*|bf16|i8mm|sve2?$")


def machine() -> dict[str, Any]:
    """Operating system, processor, memory in bytes, and accelerators that torch can use."""
    memory = psutil.virtual_memory()
    model, flags = _processor()
    return {
        "os": platform.platform(),
        "cpu": model,
        "cores": psutil.cpu_count(logical=False),
        "hardware_threads": psutil.cpu_count(),
        "usable_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count(),
        "isa": sorted({flag for flag in flags if _FLAGS.match(flag)}),
        "memory": memory.total,
        "memory_available": memory.available,
        "gpus": _gpus(),
    }


def versions() -> dict[str, str | None]:
    """Versions of Kvik, Python and everything that Kvik depends on; None for an optional package that is absent."""
    found: dict[str, str | None] = {"kvik": kvik.__version__, "python": platform.python_version()}
    for requirement in _requirements():
        if 'extra == "dev"' in requirement or "extra == 'dev'" in requirement:
            continue
        match = re.match(r"[\w.-]+", requirement)
        if match:
            found[match[0]] = _version(match[0])
    return found


def commit() -> str | None:
    """The git commit of a source checkout, with '+' if files were changed; None for an installed wheel."""
    folder = Path(kvik.__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        inside = subprocess.run(
            [*git[:3], "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, timeout=10
        )
        found = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if inside.returncode == 0 else None


def model_places() -> dict[str, str]:
    """Where `resolve_model` looks for a model, in its order."""
    from huggingface_hub import constants

    from kvik.models.hub import BUNDLED_MODELS

    offline = " (offline: HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    return {
        "a local folder": str(Path.cwd()),
        "bundled": ", ".join(BUNDLED_MODELS),
        "Hugging Face cache": str(constants.HF_HUB_CACHE),
        "Hugging Face endpoint": f"{constants.ENDPOINT}{offline}",
    }


def _version(package: str) -> str | None:
    if package == "torch":
        import torch

        return str(torch.__version__)  # with the CUDA it was built for, which its package need not say
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> list[str]:
    """What Kvik needs, as it was installed; nothing where it runs from its sources."""
    try:
        return importlib.metadata.requires("kvik") or []
    except importlib.metadata.PackageNotFoundError:
        return ["torch", "triton", "numpy", "tokenizers", "safetensors"]


def _processor() -> tuple[str, list[str]]:
    """The processor's name and instruction set flags, as far as the operating system tells."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    if name is None and sys.platform == "darwin":
        brand = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return brand.stdout.strip() or platform.machine(), []
    return (name[1] if name else platform.processor() or platform.machine()), flags[1].split() if flags else []


def _gpus() -> list[str]:
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return []
    module = torch.get_device_module(device)
    if not hasattr(module, "get_device_properties"):
        return [device.type]
    properties = [module.get_device_properties(index) for index in range(torch.accelerator.device_count())]
    return [f"{p.name}, {p.total_memory / 2**30:.0f} GiB" for p in properties]
