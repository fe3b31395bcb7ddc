"""The native CPU kernels: the library and its thread pool (`native`), packed weights (`packing`), operations (`ops`)
and recorded forward passes (`tape`). The C++ sources are in `native/`; without a compiled library, `available()` is
False and Kvik runs on torch."""

from __future__ import annotations

__all__: list[str] = []
