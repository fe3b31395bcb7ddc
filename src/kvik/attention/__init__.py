"""Attention over the paged KV cache: the protocol (`base`), its backends, and the choice of one (`registry`)."""

from __future__ import annotations

__all__: list[str] = []
