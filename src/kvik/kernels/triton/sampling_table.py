"""What the sampling kernels read: one entry per row of the request table, and the workspace of a step.

Kernels sample a list `rows` of table rows, one per row of the logits; -1 is padding, which gets no token. Optional
features are padded matrices: -1 ends a list of ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "DEFAULT_TILES", "FILTER_PASSES", "LISTS", "MASK", "PENALTIES", "SamplerTiles", "SamplingTable",
    "SamplingWorkspace",
]  # fmt: skip

PENALTIES = 1  # bits of SamplingTable.edits
MASK = 2
LISTS = 4

FILTER_PASSES = 8


@dataclass(frozen=True, slots=True)
class SamplerTiles:
    """The tuning parameters of the sampling kernels. One choice for all batches: sums over a row follow its slices."""

    slice: int = 2048  # vocabulary entries per program
    part: int = 256  # entries of a slice that a pass of the filters measures at a time
    tokens: int = 1024  # tokens of a request that one program counts
    warps: int = 4  # of the kernels that go over the vocabulary
    draw_warps: int = 2  # of the one that draws


DEFAULT_TILES = SamplerTiles()


@dataclass(frozen=True, slots=True, eq=False)
class SamplingTable:
    """Device tensors with one entry per table row; `edits` has the bits of what changes a row's logits."""

    token_ids: Tensor  # [table_rows, max_model_len] int32, prompt and output
    num_tokens: Tensor  # [table_rows] int32, the position of the next token
    num_prompt: Tensor  # [table_rows] int32
    seed: Tensor  # [table_rows] int64
    temperature: Tensor  # [table_rows] float32, 0 is greedy
    top_k: Tensor  # [table_rows] int32, 0 is off
    top_p: Tensor  # [table_rows] float64, 1 is off
    log_min_p: Tensor  # [table_rows] float32, natural logarithm, -inf is off
    edits: Tensor  # [table_rows] int32
    repetition: Tensor  # [table_rows] float32
    presence: Tensor  # [table_rows] float32
    frequency: Tensor  # [table_rows] float32
    allowed: Tensor  # [table_rows, ceil(vocab / 32)] int32, bit v % 32 of word v // 32: v may be drawn
    bias_ids: Tensor  # [table_rows, max_biases] int32
    bias: Tensor  # [table_rows, max_biases] float32
    stop_ids: Tensor  # [table_rows, max_stops] int32, not drawn before min_tokens
    min_tokens: Tensor  # [table_rows] int32
    bad_words: Tensor  # [table_rows, max_words, max_word_len] int32, -1 before a shorter word's first id

    @classmethod
    def zeros(
        cls, rows: int, max_model_len: int, vocab_size: int, device: torch.device, *,
        max_biases: int = 512, max_stops: int = 32, max_words: int = 128, max_word_len: int = 8,
    ) -> SamplingTable:  # fmt: skip
        """A table in which every row is greedy and plain."""

        def full(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((rows, *shape), value, dtype=dtype, device=device)

        ints, floats = torch.int32, torch.float32
        return cls(
            token_ids=full((max_model_len,), 0, ints),
            num_tokens=full((), 0, ints),
            num_prompt=full((), 0, ints),
            seed=full((), 0, torch.int64),
            temperature=full((), 0, floats),
            top_k=full((), 0, ints),
            top_p=full((), 1, torch.float64),
            log_min_p=full((), -torch.inf, floats),
            edits=full((), 0, ints),
            repetition=full((), 1, floats),
            presence=full((), 0, floats),
            frequency=full((), 0, floats),
            allowed=full((-(-vocab_size // 32),), -1, ints),
            bias_ids=full((max_biases,), -1, ints),
            bias=full((max_biases,), 0, floats),
            stop_ids=full((max_stops,), -1, ints),
            min_tokens=full((), 0, ints),
            bad_words=full((max_words, max_word_len), -1, ints),
        )


class SamplingWorkspace:
    """Scratch of a step of up to `max_rows` rows, allocated once."""

    def __init__(
        self, max_rows: int, vocab_size: int, device: torch.device, tiles: SamplerTiles = DEFAULT_TILES
    ) -> None:
        slices = -(-vocab_size // tiles.slice)

        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty((max_rows, *shape), dtype=dtype, device=device)

        self.tiles, self.slices = tiles, slices
        self.edited = empty(torch.float32, vocab_size)
        self.counts = torch.zeros((max_rows, vocab_size), dtype=torch.int32, device=device)  # zeros between steps
        self.peaks = empty(torch.float32, slices)
        self.sums = empty(torch.float64, FILTER_PASSES, slices, 16)
        self.lows = empty(torch.int32, FILTER_PASSES)
        self.limits = empty(torch.int32)
        self.best = empty(torch.float32, slices)
        self.best_groups = empty(torch.int32, slices)
        self.tokens = empty(torch.int32)
