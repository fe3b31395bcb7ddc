"""The GPU kernels, in Triton: one operation per file, and `ops.TritonOps`, which picks among them.

Nothing here imports triton before a module with kernels is imported, so the package may be named on machines without
it. Numbers that decide speed and not results (tile sizes, warps, which path) are arguments of the launchers; they come
from one table, `dispatch.Table`. `pdl` and `tiles` hold what kernels share.
"""

from __future__ import annotations

__all__: list[str] = []
