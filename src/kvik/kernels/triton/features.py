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

    @classmethod
    def of(cls, device: torch.device) -> Features:
        """Those of the GPU `device`; of any other device none."""
        return cls.of_capability(torch.cuda.get_device_capability(device)) if device.type == "cuda" else NO_FEATURES

    @classmethod
    def of_capability(cls, capability: tuple[int, int]) -> Features:
        """Those of GPUs of a compute capability."""
        return cls(pdl=capability >= (9, 0), hopper=capability[0] == 9 and knows_gluon())


NO_FEATURES = Features(pdl=False, hopper=False)


def knows_gluon() -> bool:
    """Whether this Triton has the Gluon that kernels for Hopper are written in, a language that it calls experimental.

    Known are the versions that the kernels were tried with, which are those of torch's that Kvik was."""
    import triton

    return str(triton.__version__).startswith(("3.6.", "3.7."))
