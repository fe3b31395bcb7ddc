"""Every exception that Kvik raises on purpose.

KvikError
├── ConfigError       an option is unknown, malformed, contradictory or cannot be had on this machine
├── ModelLoadError    a model folder, checkpoint, tokenizer or architecture cannot be used
├── RequestError      one request is wrong; no other request is touched
├── CapacityError     what was asked for does not fit (context length, KV pool, memory)
└── WorkerError       the engine itself failed; it must be restarted

A message says what is wrong, why, and the nearest fix, with numbers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["CapacityError", "ConfigError", "KvikError", "ModelLoadError", "RequestError", "WorkerError", "did_you_mean"]


class KvikError(Exception):
    """Base of every error that Kvik raises on purpose."""


class ConfigError(KvikError, ValueError):
    """An option is unknown, malformed, contradictory, or cannot be had on this machine."""


class ModelLoadError(KvikError):
    """A model folder, checkpoint, tokenizer or architecture cannot be used."""


class RequestError(KvikError, ValueError):
    """One request is wrong. `param` names the field at fault, `code` the kind of fault, where there is one."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class CapacityError(KvikError):
    """What was asked for does not fit: context length, KV pool or memory."""


class WorkerError(KvikError):
    """The engine failed in a way that no single request caused; it must be restarted."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """' (did you mean X?)' for the nearest of `options`, or '' when none is near."""
    near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
