"""Memory planned in bytes before anything is allocated: the ledger, and the option that makes a plan fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvik.models.spec import DecoderSpec

__all__ = ["MemoryPlan", "activation_bytes", "gib"]


def gib(num_bytes: float) -> str:
    """Bytes for people: '1.19 GiB', '34.0 MiB'."""
    return f"{num_bytes / 2**30:.2f} GiB" if abs(num_bytes) >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def activation_bytes(spec: DecoderSpec, dtype: torch.dtype, num_tokens: int, num_rows: int) -> int:
    """Upper bound of what one step allocates: the widest layer's activations and the logits of `num_rows` sequences.

    At most, a block holds its input, the normed input, the projection and the output; norms work in fp32.
    """
    widest = max(spec.q_size + 2 * spec.kv_size, 3 * spec.intermediate_size)
    per_token = (3 * spec.hidden_size + widest) * dtype.itemsize + 2 * spec.hidden_size * 4
    logits = 4 * num_rows * spec.vocab_size * 4
    return num_tokens * per_token + logits


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where the memory goes, in bytes. `budget` is what Kvik may use of the device."""

    device_name: str
    total: int
    budget: int
    weights: int
    activations: int
    num_blocks: int
    block_size: int
    kv_bytes_per_token: int

    @property
    def kv_cache(self) -> int:
        return self.num_blocks * self.block_size * self.kv_bytes_per_token

    @property
    def used(self) -> int:
        return self.weights + self.activations + self.kv_cache

    @property
    def fits(self) -> bool:
        return self.used <= self.budget

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def render(self) -> str:
        """The ledger as a table."""
        rows = (
            ("weights", self.weights, ""),
            ("activations and logits, at most", self.activations, ""),
            ("KV cache", self.kv_cache, f"{self.num_blocks} blocks x {self.block_size} = {self.kv_tokens} tokens"),
            ("sum", self.used, "fits" if self.fits else f"{gib(self.used - self.budget)} too much"),
            ("may be used", self.budget, f"of {gib(self.total)} on {self.device_name}"),
        )
        return "\n".join(f"{name:<32} {count:>16,} B {gib(count):>12}  {note}".rstrip() for name, count, note in rows)
