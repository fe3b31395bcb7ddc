"""From a model's name to weights on a device: `hub`, `registry`, `spec`, the one `decoder`, and the `loader`."""

from __future__ import annotations

__all__: list[str] = []
