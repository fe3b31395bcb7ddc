"""The operations that a decoder block is made of: their signatures (`api`) and their implementations."""

from __future__ import annotations

__all__: list[str] = []
