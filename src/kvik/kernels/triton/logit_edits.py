"""What requests do to their logits before temperature: penalties, bias, masks, as in `sampling/processors`.

Only rows that edit anything are touched: their logits are written in fp32 to a buffer of their own, from which sampling
reads them. Counts of tokens come from the request table's ids in every step, so there is no state to keep or to lose:

    token ids ──► counts ──► logits: repetition, frequency, presence, allowed ids ──► bias, min_tokens, bad words
                    ▲            │
                    └── zeroed ──┘
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvik.kernels.triton.sampling_table import LISTS, MASK, PENALTIES, SamplingTable, SamplingWorkspace

__all__ = ["edit_logits"]

PROMPT_BIT = tl.constexpr(1 << 30)
_PENALTIES, _MASK, _LISTS = tl.constexpr(PENALTIES), tl.constexpr(MASK), tl.constexpr(LISTS)


@triton.jit
def _flags(rows: tl.tensor, edits: tl.tensor) -> tl.tensor:
    """The table row of this program's first index, and the edits of it; none for padding."""
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    return row, tl.load(edits + row, mask=row >= 0, other=0)


@triton.jit
def _count(rows: tl.tensor, edits: tl.tensor, token_ids: tl.tensor, num_tokens: tl.tensor, num_prompt: tl.tensor,
           counts: tl.tensor, width: tl.tensor, vocab: tl.tensor, BLOCK: tl.constexpr) -> None:  # fmt: skip
    """counts[token] = occurrences in the output, plus PROMPT_BIT if it is in the prompt. counts are zeros before."""
    row, flags = _flags(rows, edits)
    if flags & _PENALTIES:
        place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        held = place < tl.minimum(tl.load(num_tokens + row), width)
        ids = tl.load(token_ids + row * width + place, mask=held, other=0)
        prompt = place < tl.load(num_prompt + row)
        held = held & (ids < vocab)
        counts += tl.program_id(0).to(tl.int64) * vocab
        tl.atomic_or(counts + ids, PROMPT_BIT, mask=held & prompt)
        tl.atomic_add(counts + ids, 1, mask=held & (prompt == 0))


@triton.jit
def _edit(logits: tl.tensor, edited: tl.tensor, counts: tl.tensor, rows: tl.tensor, edits: tl.tensor,
          repetition: tl.tensor, presence: tl.tensor, frequency: tl.tensor, allowed: tl.tensor, words: tl.tensor,
          vocab: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr) -> None:  # fmt: skip
    """For tokens seen x / r, or x * r if x < 0; then x - frequency * count - presence; then the mask of allowed ids."""
    row, flags = _flags(rows, edits)
    if flags:
        index = tl.program_id(0).to(tl.int64)
        ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        held = ids < vocab
        x = tl.load(logits + index * stride + ids, mask=held, other=0.0).to(tl.float32)
        if flags & _PENALTIES:
            seen = tl.load(counts + index * vocab + ids, mask=held, other=0)
            tl.store(counts + index * vocab + ids, 0, mask=held & (seen != 0))
            penalty = tl.load(repetition + row)
            x = tl.where(seen != 0, tl.where(x < 0, x * penalty, tl.div_rn(x, penalty + tl.zeros_like(x))), x)
            count = (seen & (PROMPT_BIT - 1)).to(tl.float32)
            reduced = x - count * tl.load(frequency + row) - tl.load(presence + row)
            x = tl.where(count > 0, reduced, x)
        if flags & _MASK:
            word = tl.load(allowed + row * words + ids // 32, mask=held, other=0)
            x = tl.where((word >> (ids % 32)) & 1 != 0, x, float("-inf"))
        tl.store(edited + index * vocab + ids, x, mask=held)


@triton.jit
def _edit_lists(edited: tl.tensor, rows: tl.tensor, edits: tl.tensor, token_ids: tl.tensor, num_tokens: tl.tensor,
                num_prompt: tl.tensor, bias_ids: tl.tensor, bias: tl.tensor, stop_ids: tl.tensor,
                min_tokens: tl.tensor, bad_words: tl.tensor, width: tl.tensor, vocab: tl.tensor,
                NUM_BIASES: tl.constexpr, NUM_STOPS: tl.constexpr, NUM_WORDS: tl.constexpr, WORD: tl.constexpr,
                BIASES: tl.constexpr, STOPS: tl.constexpr, WORDS: tl.constexpr,
                LETTERS: tl.constexpr) -> None:  # fmt: skip
    """Add biases; mask stop ids before min_tokens, and the last ids of bad words whose other ids are the tail."""
    row, flags = _flags(rows, edits)
    if flags & _LISTS:
        edited += tl.program_id(0).to(tl.int64) * vocab
        entry = tl.arange(0, BIASES)
        ids = tl.load(bias_ids + row * NUM_BIASES + entry, mask=entry < NUM_BIASES, other=-1)
        held = (ids >= 0) & (ids < vocab)
        x = tl.load(edited + ids, mask=held, other=0.0)
        tl.store(edited + ids, x + tl.load(bias + row * NUM_BIASES + entry, mask=held, other=0.0), mask=held)
        tl.debug_barrier()  # a biased id may be masked below, by another thread
        length = tl.load(num_tokens + row)
        entry = tl.arange(0, STOPS)
        ids = tl.load(stop_ids + row * NUM_STOPS + entry, mask=entry < NUM_STOPS, other=-1)
        early = length - tl.load(num_prompt + row) < tl.load(min_tokens + row)
        tl.store(edited + ids, float("-inf"), mask=early & (ids >= 0) & (ids < vocab))
        word, letter = tl.arange(0, WORDS)[:, None], tl.arange(0, LETTERS)[None, :]
        held = (word < NUM_WORDS) & (letter < WORD)
        spelled = tl.load(bad_words + (row * NUM_WORDS + word) * WORD + letter, mask=held, other=-1)  # [WORDS, LETTERS]
        place = length - (WORD - 1) + letter
        tail = tl.load(token_ids + row * width + place, mask=(letter < WORD - 1) & (place >= 0) & (place < width),
                       other=-2)  # fmt: skip
        differs = (spelled >= 0) & (spelled != tail) & (letter < WORD - 1)
        last = tl.max(tl.where(letter == WORD - 1, spelled, -1), 1)  # [WORDS]
        completes = tl.sum(differs.to(tl.int32), 1) == 0
        tl.store(edited + last, float("-inf"), mask=completes & (last >= 0) & (last < vocab))


def edit_logits(logits: Tensor, rows: Tensor, table: SamplingTable, work: SamplingWorkspace) -> None:
    """Write the edited logits of the rows that edit theirs to `work.edited`.

    logits: [num_rows, vocab] of any float dtype, which stay as they are; rows: [num_rows] int32 of `table`.
    """
    (num_rows, vocab), width = logits.shape, table.token_ids.shape[1]
    tiles = work.tiles
    options = {"num_warps": tiles.warps, "enable_fp_fusion": False}  # rounded where the reference rounds
    _count[(num_rows, triton.cdiv(width, tiles.tokens))](
        rows, table.edits, table.token_ids, table.num_tokens, table.num_prompt, work.counts, width, vocab,
        BLOCK=tiles.tokens, **options,
    )  # fmt: skip
    _edit[(num_rows, work.slices)](
        logits, work.edited, work.counts, rows, table.edits, table.repetition, table.presence, table.frequency,
        table.allowed, table.allowed.shape[1], vocab, logits.stride(0), BLOCK=tiles.slice, **options,
    )  # fmt: skip
    num_biases, num_stops, (num_words, word) = table.bias.shape[1], table.stop_ids.shape[1], table.bad_words.shape[1:]
    _edit_lists[(num_rows,)](
        work.edited, rows, table.edits, table.token_ids, table.num_tokens, table.num_prompt, table.bias_ids,
        table.bias, table.stop_ids, table.min_tokens, table.bad_words, width, vocab,
        NUM_BIASES=num_biases, NUM_STOPS=num_stops, NUM_WORDS=num_words, WORD=word,
        BIASES=triton.next_power_of_2(num_biases), STOPS=triton.next_power_of_2(num_stops),
        WORDS=triton.next_power_of_2(num_words), LETTERS=triton.next_power_of_2(word), **options,
    )  # fmt: skip
