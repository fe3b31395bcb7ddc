"""The native CPU kernels: one C++ library without dependencies, called through ctypes.

`native` finds and loads it and has its thread pool, `packing` the packed weights, `ops` the operations one by one and
`tape` recorded forward passes. The sources are in `native/`: `kvik_cpu.h` is the ABI, `pool.hpp` how threads share the
work, `gemm.hpp` the layout of weights. Without a compiled library `native.available()` is False and Kvik runs on torch.
"""

from __future__ import annotations

__all__: list[str] = []
