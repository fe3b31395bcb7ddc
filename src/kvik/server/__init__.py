"""The HTTP server: an engine process, one or more HTTP processes, and a supervisor that owns them."""

from __future__ import annotations

__all__: list[str] = []
