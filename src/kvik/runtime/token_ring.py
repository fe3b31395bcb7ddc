"""Tokens on their way to the host: the kernel that appends them to the table writes them to pinned memory as well.

    step 7 ──► turn 7 of `host`, event 7       a copy of its own would keep the GPU waiting between two steps
    step 8 ──► turn 8           event 8        for longer than most kernels run

The device counts its turns itself, so that a CUDA graph can be replayed; the host counts along.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["TokenRing"]

TURNS = 32
"""Steps that may be launched before the tokens of the first are read; the engine runs ahead by at most 16."""


class TokenRing:
    """Room for the tokens of the last TURNS steps of up to `max_rows` rows."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        where = torch.device("cpu") if pinned else device
        self.host = torch.full((TURNS, max_rows), -1, dtype=torch.int32, device=where, pin_memory=pinned)
        self.turn = torch.zeros(1, dtype=torch.int32, device=device)  # of the next step
        self._ready = [torch.cuda.Event() for _ in range(TURNS * pinned)]  # type: ignore[no-untyped-call]
        self._launched = 0

    def take(self, num_rows: int) -> Callable[[], list[int]]:
        """Called once for each step, after its launch: a function that waits for its tokens and returns them."""
        step, turn = self._launched, self._launched % TURNS
        self._launched += 1
        if self._ready:
            self._ready[turn].record()

        def wait() -> list[int]:
            assert self._launched - step <= TURNS, "the tokens of a step were read too late"
            if self._ready:
                self._ready[turn].synchronize()
            tokens: list[int] = self.host[turn, :num_rows].tolist()
            return tokens

        return wait

    def reset(self) -> None:
        """Start over, whatever was launched: nobody will ask for its tokens."""
        self.turn.zero_()
        self._launched = 0
