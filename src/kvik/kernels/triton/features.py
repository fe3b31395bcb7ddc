"""What some GPUs have and others have not, as far as Kvik's kernels make use of it."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["NO_FEATURES", "Features", "knows_gluon"]


class Features(NamedTuple):
    """Those of one GPU."""

    pdl: bool
    """Kernels can overlap their predecessors (`kernels/triton/pdl.py`), and the tensor memory accelerator copies
    tiles: Hopper and newer."""
    hopper: bool
    """Kernels in Hopper's own instructions, which no later GPU has, can run there."""
    shared_bytes: int = 227 << 10
    """Shared memory that one program may have: of GPUs from Ampere on, those of data centres have the most."""

    @classmethod
    def of(cls, device: torch.device) -> Features:
        """Those of the GPU `device`; of any other device none."""
        return cls.of_capability(torch.cuda.get_device_capability(device)) if device.type == "cuda" else NO_FEATURES

    @classmethod
    def of_capability(cls, capability: tuple[int, int]) -> Features:
        """Those of GPUs of a compute capability."""
        major, minor = capability
        shared = {8: 99 if minor in (6, 9) else 163, 12: 99}.get(major, 227)  # KiB, from CUDA's table of capabilities
        return cls(capability >= (9, 0), major == 9 and knows_gluon(), shared << 10)


NO_FEATURES = Features(pdl=False, hopper=False)


def knows_gluon() -> bool:
    """Whether this Triton has the Gluon that kernels for Hopper are written in, a language that it calls experimental.

    Known are the versions that the kernels were tried with, which are those of torch's that Kvik was."""
    import triton

    return str(triton.__version__).startswith(("3.6.", "3.7."))
