"""The request table on the device, from one decode step to the next: what a step computes, and what it sampled.

    rows [num_rows]      table row of each batch row, -1 for padding
    decode_inputs        num_tokens[row] = n ──► id, position n - 1, its slot, context length n, block table
    append_tokens        token_ids[row, n] = token; num_tokens[row] = n + 1; host[turn, i] = token

With this a step needs nothing from the host while the batch stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["DecodeInputs", "append_tokens", "decode_inputs"]

BLOCK = 128  # rows, or entries of a block table, per program


@dataclass(frozen=True, slots=True, eq=False)
class DecodeInputs:
    """Where the inputs of a decode step go: fields of `ForwardBatch`."""

    input_ids: Tensor  # [num_rows] int64
    positions: Tensor  # [num_rows] int64
    slots: Tensor  # [num_rows] int64
    seq_lens: Tensor  # [num_rows] int32
    block_tables: Tensor  # [num_rows, max_blocks] int32

    @classmethod
    def empty(cls, num_rows: int, max_blocks: int, device: torch.device) -> DecodeInputs:
        """Uninitialised tensors for `num_rows` rows."""
        return cls(
            input_ids=torch.empty(num_rows, dtype=torch.int64, device=device),
            positions=torch.empty(num_rows, dtype=torch.int64, device=device),
            slots=torch.empty(num_rows, dtype=torch.int64, device=device),
            seq_lens=torch.empty(num_rows, dtype=torch.int32, device=device),
            block_tables=torch.empty((num_rows, max_blocks), dtype=torch.int32, device=device),
        )

    def first(self, num_rows: int) -> DecodeInputs:
        """The first rows: views."""
        fields = self.input_ids, self.positions, self.slots, self.seq_lens, self.block_tables
        return DecodeInputs(*(tensor[:num_rows] for tensor in fields))


@triton.jit(do_not_specialize=["out_blocks"])
def _inputs(rows: tl.tensor, token_ids: tl.tensor, num_tokens: tl.tensor, tables: tl.tensor, input_ids: tl.tensor,
            positions: tl.tensor, slots: tl.tensor, seq_lens: tl.tensor, out_tables: tl.tensor, width: tl.tensor,
            max_blocks: tl.tensor, out_blocks: tl.tensor, dummy_slot: tl.tensor, BLOCK_SIZE: tl.constexpr,
            BLOCK: tl.constexpr) -> None:  # fmt: skip
    """Program (i, j): part j of the block table of batch row i, and with j = 0 everything else of it."""
    index, row = tl.program_id(0), tl.load(rows + tl.program_id(0)).to(tl.int64)
    part = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    blocks = tl.load(tables + row * max_blocks + part, mask=(row >= 0) & (part < out_blocks), other=0)
    tl.store(out_tables + index * out_blocks + part, blocks, mask=part < out_blocks)
    if tl.program_id(1) == 0:
        length = tl.load(num_tokens + row, mask=row >= 0, other=0)
        position = length - 1
        live = (position >= 0) & (position < width) & (position // BLOCK_SIZE < max_blocks)
        token = tl.load(token_ids + row * width + position, mask=live, other=0)
        block = tl.load(tables + row * max_blocks + position // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        tl.store(input_ids + index, token.to(tl.int64))
        tl.store(positions + index, tl.where(live, position, 0).to(tl.int64))
        tl.store(slots + index, tl.where(live, block * BLOCK_SIZE + position % BLOCK_SIZE, dummy_slot))
        tl.store(seq_lens + index, tl.where(live, length, 0))


@triton.jit(do_not_specialize=["num_rows"])
def _append(rows: tl.tensor, tokens: tl.tensor, token_ids: tl.tensor, num_tokens: tl.tensor, host: tl.tensor,
            turn: tl.tensor, num_rows: tl.tensor, width: tl.tensor, host_width: tl.tensor, TURNS: tl.constexpr,
            BLOCK: tl.constexpr) -> None:  # fmt: skip
    """One program, since the turn ends when all rows are done."""
    now = tl.load(turn)
    for first in range(0, num_rows, BLOCK):
        index = first + tl.arange(0, BLOCK)
        row = tl.load(rows + index, mask=index < num_rows, other=-1).to(tl.int64)
        token = tl.load(tokens + index, mask=row >= 0, other=-1)
        live = (row >= 0) & (token >= 0)  # a row without a token has failed: it stays as it is until it leaves
        length = tl.load(num_tokens + row, mask=live, other=0)
        tl.store(token_ids + row * width + length, token, mask=live & (length < width))
        tl.store(num_tokens + row, length + 1, mask=live)
        tl.store(host + now * host_width + index, token, mask=index < num_rows)
    tl.debug_barrier()  # every thread has read the turn
    tl.store(turn, (now + 1) % TURNS)


def decode_inputs(
    rows: Tensor, out: DecodeInputs, *,
    token_ids: Tensor, num_tokens: Tensor, block_table: Tensor, block_size: int, dummy_slot: int,
) -> None:  # fmt: skip
    """Fill `out` with the decode step of `rows` [num_rows] int32, each row once, -1 for padding.

    token_ids: [table_rows, max_model_len] int32; num_tokens: [table_rows] int32; block_table: [table_rows, max_blocks]
    int32, where the block that the last token's key goes to is already. Padding, and rows that have no place left, get
    context length 0 and `dummy_slot`.
    """
    out_blocks = out.block_tables.shape[1]
    _inputs[(len(rows), triton.cdiv(out_blocks, BLOCK))](
        rows, token_ids, num_tokens, block_table, out.input_ids, out.positions, out.slots, out.seq_lens,
        out.block_tables, token_ids.shape[1], block_table.shape[1], out_blocks, dummy_slot, BLOCK_SIZE=block_size,
        BLOCK=BLOCK, num_warps=1,
    )  # fmt: skip


def append_tokens(
    rows: Tensor, tokens: Tensor, *, token_ids: Tensor, num_tokens: Tensor, host: Tensor, turn: Tensor
) -> None:
    """Append `tokens` [num_rows] int32, what `sample` returned, to `rows` [num_rows] int32, -1 for padding.

    A negative token is none. A token that has no place left is counted but not written.
    host: [turns, >= num_rows] int32 that the device can write, where the tokens go as well; turn: [1] int32, where
    they go, and one more afterwards.
    """
    _append[(1,)](
        rows, tokens, token_ids, num_tokens, host, turn, rows.shape[0], token_ids.shape[1], host.shape[1],
        TURNS=len(host), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
