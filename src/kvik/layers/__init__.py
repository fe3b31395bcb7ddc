"""Parts of a model that are more than one operation: today rotary position embeddings (`rope`)."""

from __future__ import annotations

__all__: list[str] = []
