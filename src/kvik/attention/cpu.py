"""Attention for CPUs in torch operations."""

from __future__ import annotations

from kvik.attention.reference import ReferenceAttention

__all__ = ["CpuAttention"]


class CpuAttention(ReferenceAttention):
    """TEMP."""
