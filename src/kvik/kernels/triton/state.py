"""The request table on the device, from one decode step to the next: append what was sampled, and say what comes then.

    rows [num_rows]      table row of each batch row, -1 for padding
    token_ids[row, n] = token; num_tokens[row] = n + 1 ──► input id, position n, its slot, context length n + 1

With this a step needs nothing from the host while the batch stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["DecodeInputs", "decode_inputs"]

BLOCK = 128  # rows per program


@dataclass(frozen=True, slots=True, eq=False)
class DecodeInputs:
    """Where the inputs of the next decode step go: the fields of `ForwardBatch`, and which rows drew a stop id."""

    input_ids: Tensor  # [num_rows] int64
    positions: Tensor  # [num_rows] int64
    slots: Tensor  # [num_rows] int64
    seq_lens: Tensor  # [num_rows] int32
    block_tables: Tensor  # [num_rows, max_blocks] int32
    stopped: Tensor  # [num_rows] bool

    @classmethod
    def empty(cls, num_rows: int, max_blocks: int, device: torch.device) -> DecodeInputs:
        """Uninitialised tensors for `num_rows` rows."""
        return cls(
            input_ids=torch.empty(num_rows, dtype=torch.int64, device=device),
            positions=torch.empty(num_rows, dtype=torch.int64, device=device),
            slots=torch.empty(num_rows, dtype=torch.int64, device=device),
            seq_lens=torch.empty(num_rows, dtype=torch.int32, device=device),
            block_tables=torch.empty((num_rows, max_blocks), dtype=torch.int32, device=device),
            stopped=torch.empty(num_rows, dtype=torch.bool, device=device),
        )

    def first(self, num_rows: int) -> DecodeInputs:
        """Views of the first rows."""
        return DecodeInputs(*(getattr(self, field.name)[:num_rows] for field in fields(self)))


@triton.jit(do_not_specialize=["num_rows"])
def _advance(rows: tl.tensor, tokens: tl.tensor, token_ids: tl.tensor, num_tokens: tl.tensor, tables: tl.tensor,
             stop_ids: tl.tensor, input_ids: tl.tensor, positions: tl.tensor, slots: tl.tensor, seq_lens: tl.tensor,
             stopped: tl.tensor, num_rows: tl.tensor, width: tl.tensor, max_blocks: tl.tensor, dummy_slot: tl.tensor,
             APPEND: tl.constexpr, BLOCK_SIZE: tl.constexpr, NUM_STOPS: tl.constexpr,
             BLOCK: tl.constexpr) -> None:  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + index, mask=index < num_rows, other=-1).to(tl.int64)
    live = row >= 0
    length = tl.load(num_tokens + row, mask=live, other=0)
    if APPEND:
        token = tl.load(tokens + index, mask=live, other=-1)
        live = live & (token >= 0)  # a row without a token has failed: it is padding until it leaves
        tl.store(token_ids + row * width + length, token, mask=live & (length < width))
        length += 1
        tl.store(num_tokens + row, length, mask=live)
        hit = tl.zeros([BLOCK], tl.int32)
        for i in range(NUM_STOPS):
            stop = tl.load(stop_ids + row * NUM_STOPS + i, mask=live, other=-1)
            hit = hit | (stop == token).to(tl.int32)
        tl.store(stopped + index, (hit != 0) & live, mask=index < num_rows)
    else:
        token = tl.load(token_ids + row * width + length - 1, mask=live & (length > 0) & (length <= width), other=0)
    position = length - 1
    live = live & (position >= 0) & (position < width) & (position // BLOCK_SIZE < max_blocks)
    block = tl.load(tables + row * max_blocks + position // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    held = index < num_rows
    tl.store(input_ids + index, tl.where(live, token, 0).to(tl.int64), mask=held)
    tl.store(positions + index, tl.where(live, position, 0).to(tl.int64), mask=held)
    tl.store(slots + index, tl.where(live, block * BLOCK_SIZE + position % BLOCK_SIZE, dummy_slot), mask=held)
    tl.store(seq_lens + index, tl.where(live, length, 0), mask=held)


@triton.jit(do_not_specialize=["out_blocks"])
def _copy_tables(rows: tl.tensor, tables: tl.tensor, out: tl.tensor, max_blocks: tl.tensor, out_blocks: tl.tensor,
                 BLOCK: tl.constexpr) -> None:  # fmt: skip
    index, row = tl.program_id(0), tl.load(rows + tl.program_id(0)).to(tl.int64)
    part = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    blocks = tl.load(tables + row * max_blocks + part, mask=(row >= 0) & (part < out_blocks), other=0)
    tl.store(out + index * out_blocks + part, blocks, mask=part < out_blocks)


def decode_inputs(
    rows: Tensor, tokens: Tensor | None, out: DecodeInputs, *,
    token_ids: Tensor, num_tokens: Tensor, block_table: Tensor, stop_ids: Tensor, block_size: int, dummy_slot: int,
) -> None:  # fmt: skip
    """Fill `out` with the decode step that follows; with `tokens`, what `sample` returned, append them first.

    rows: [num_rows] int32, each row once, -1 for padding. token_ids: [table_rows, max_model_len] int32; num_tokens:
    [table_rows] int32; block_table: [table_rows, max_blocks] int32; stop_ids: [table_rows, max_stops] int32, -1 where
    there are fewer. The block that the new token's key goes to is in the table already. Padding, and rows whose token
    is negative, get context length 0 and `dummy_slot`. A token that has no place left is counted but not written.
    """
    num_rows = rows.shape[0]
    _advance[(triton.cdiv(num_rows, BLOCK),)](
        rows, rows if tokens is None else tokens, token_ids, num_tokens, block_table, stop_ids, out.input_ids,
        out.positions, out.slots, out.seq_lens, out.stopped, num_rows, token_ids.shape[1], block_table.shape[1],
        dummy_slot, APPEND=tokens is not None, BLOCK_SIZE=block_size, NUM_STOPS=stop_ids.shape[1], BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip
    out_blocks = out.block_tables.shape[1]
    _copy_tables[(num_rows, triton.cdiv(out_blocks, BLOCK))](
        rows, block_table, out.block_tables, block_table.shape[1], out_blocks, BLOCK=BLOCK, num_warps=1
    )
