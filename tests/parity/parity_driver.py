"""The least that can run a `Decoder`: block tables, one step at a time, logits of every token.

The cache starts full of huge numbers and blocks are handed out in a shuffled order, so reading a slot that was never
written shows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvik.attention.base import ForwardBatch
from kvik.attention.registry import select_backend
from kvik.kernels.api import KVLayer, Ops
from kvik.kernels.reference import ReferenceOps
from kvik.models.decoder import Decoder
from kvik.models.hub import load_config
from kvik.models.loader import load_model
from kvik.models.registry import build_spec

__all__ = ["PagedDriver", "load_decoder", "load_hf", "relative_error"]

HUGE = 3e4  # a number of every float type


def load_decoder(
    path: Path, device: str = "cpu", *, dtype: torch.dtype = torch.float32, backend: str = "auto", max_len: int = 512
) -> Decoder:
    """The decoder on torch's operations on the CPU, and on Triton's on a GPU or (device="interpreter") interpreted."""
    place, spec = torch.device("cuda" if device == "cuda" else "cpu"), build_spec(load_config(path))
    ops: Ops[Any] = ReferenceOps()
    if device == "cpu":
        attention = select_backend(backend, place)
    else:
        from kvik.kernels.triton.ops import TritonOps
        from kvik.runtime.gpu import gpu_attention

        ops, attention = (
            TritonOps(place),
            gpu_attention(spec, 8, max_len, max_len, place, dtype=dtype, deterministic=False),
        )
    return load_model(
        path, spec, dtype=dtype, device=place, ops=ops, attention=attention, max_model_len=max_len, progress=False
    )


def load_hf(path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=dtype).eval()
    return model.to("cuda" if device == "cuda" else "cpu")


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference as a share of the largest wanted value."""
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


class PagedDriver:
    """Sequences by name over one paged cache."""

    def __init__(self, decoder: Decoder, *, block_size: int = 16, num_blocks: int = 64) -> None:
        spec = decoder.spec
        embedding = decoder.weights.embedding
        shape = (num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        self.decoder, self.block_size = decoder, block_size
        self.device = embedding.device
        self.kv = [KVLayer(*(embedding.new_full(shape, HUGE) for _ in "kv")) for _ in spec.windows]
        self.free = random.Random(0).sample(range(num_blocks), num_blocks)
        self.blocks: dict[str, list[int]] = {}
        self.length: dict[str, int] = {}
        self.prompt_len: dict[str, int] = {}

    @torch.inference_mode()
    def step(self, work: dict[str, list[int]], prompt_lens: dict[str, int] | None = None) -> dict[str, Tensor]:
        """Compute the given tokens of each sequence; their logits [num_tokens, vocab_size] by sequence.

        The first tokens of a sequence are its whole prompt, unless `prompt_lens` says how long the prompt will be.
        """
        positions: list[int] = []
        slots: list[int] = []
        rope_lens: list[int] = []
        starts = [0]
        for name, tokens in work.items():
            begin = self.length.setdefault(name, 0)
            prompt_len = self.prompt_len.setdefault(name, (prompt_lens or {}).get(name, len(tokens)))
            table = self.blocks.setdefault(name, [])
            for position in range(begin, begin + len(tokens)):
                if position // self.block_size == len(table):
                    table.append(self.free.pop())
                positions.append(position)
                slots.append(table[position // self.block_size] * self.block_size + position % self.block_size)
                rope_lens.append(max(prompt_len, position + 1))
            self.length[name] = begin + len(tokens)
            starts.append(starts[-1] + len(tokens))
        batch = self._batch(work, positions, slots, rope_lens, starts)
        rows = self.decoder.logits(self.decoder.forward(batch, self.kv))
        return dict(zip(work, rows.split([len(tokens) for tokens in work.values()]), strict=True))

    def _batch(
        self,
        work: dict[str, list[int]],
        positions: list[int],
        slots: list[int],
        rope_lens: list[int],
        starts: list[int],
    ) -> ForwardBatch:
        lens = [self.length[name] for name in work]
        tables = [self.blocks[name] for name in work]
        width = max(map(len, tables))
        rope_lens_of = self._ints(rope_lens) if self.decoder.spec.rope.depends_on_length else None
        return ForwardBatch(
            input_ids=self._ints([token for tokens in work.values() for token in tokens]),
            positions=self._ints(positions),
            slots=self._ints(slots),
            query_starts=self._ints(starts).int(),
            seq_lens=self._ints(lens).int(),
            block_tables=self._ints([table + [0] * (width - len(table)) for table in tables]).int(),
            logit_indices=self._ints(range(len(positions))),
            query_starts_host=tuple(starts),
            seq_lens_host=tuple(lens),
            rope_lens=rope_lens_of,
        )

    def _ints(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def greedy(self, prompts: dict[str, list[int]], num_tokens: int) -> dict[str, list[int]]:
        """`num_tokens` greedy tokens of each prompt, prompts prefilled whole and all sequences decoded together."""
        output: dict[str, list[int]] = {name: [] for name in prompts}
        work = prompts
        for _ in range(num_tokens):
            rows = self.step(work)
            work = {name: [int(logits[-1].argmax())] for name, logits in rows.items()}
            for name, tokens in work.items():
                output[name] += tokens
        return output
