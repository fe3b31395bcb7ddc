"""The request table on a GPU: rows join and grow by small uploads; kernels append to them without the host.

It holds what `RequestTable` holds, and what the sampling kernels read of each row. The host remembers how long the rows
are and what decides which kernels a step needs. All that join in a step take a few copies together, however many they
are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvik.core.plan import RowInit, StepPlan
from kvik.kernels.triton.sampling_table import LISTS, MASK, PENALTIES, SamplingTable
from kvik.kernels.triton.state import DecodeInputs, append_tokens, decode_inputs
from kvik.runtime.token_ring import TokenRing
from kvik.sampling.row import RowSampling
from kvik.structured.grammars import Grammars

__all__ = ["NO_SLOT", "DeviceTable", "upload", "upload_parts"]

NO_SLOT = -1
"""Where a padding row writes its key and value: nowhere."""

_INTS = ("seed", "num_tokens", "num_prompt", "top_k", "edits", "min_tokens")
_FLOATS = ("top_p", "temperature", "log_min_p", "repetition", "presence", "frequency")


def upload(values: np.ndarray | Sequence[int], device: torch.device) -> Tensor:
    """A copy on `device` that the host does not wait for, int64 unless an array says otherwise.

    Torch keeps the pinned memory until the copy is done, and uses it again after that.
    """
    array = values if isinstance(values, np.ndarray) else np.array(values, dtype=np.int64)
    host = torch.from_numpy(array)
    return host.to(device) if device.type in ("cpu", "meta") else host.pin_memory().to(device, non_blocking=True)


def upload_parts(parts: Sequence[np.ndarray | Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """int64 copies on `device` of one-dimensional integers, in one transfer."""
    packed = upload(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]), device)
    return packed.split_with_sizes([len(part) for part in parts])


class DeviceTable:
    """Rows of `max_num_seqs` sequences of up to `max_model_len` tokens."""

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, vocab_size: int, device: torch.device,
        grammars: Grammars | None = None,
    ) -> None:  # fmt: skip
        self.fields = SamplingTable.zeros(max_num_seqs, max_model_len, vocab_size, device)
        max_blocks = -(-max_model_len // block_size)
        self.block_table = torch.zeros((max_num_seqs, max_blocks), dtype=torch.int32, device=device)
        self.results = TokenRing(max_num_seqs, device)
        self.device = device
        self._block_size = block_size
        self.num_prompt = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_blocks = [0] * max_num_seqs
        self._sampling: list[RowSampling | None] = [None] * max_num_seqs
        self._vocab_size = vocab_size
        self.grammars = grammars

    def apply(self, plan: StepPlan) -> None:
        """Take in the rows and blocks that a plan adds."""
        if plan.joined:
            self._join(plan.joined)
        if plan.new_blocks:
            self._add_blocks(plan.new_blocks)

    def sampling(self, row: int) -> RowSampling:
        """What a row's request asks of the sampler."""
        state = self._sampling[row]
        assert state is not None, f"row {row} was never joined"
        return state

    def tokens(self, row: int, num_tokens: int) -> Tensor:
        """The first token ids of a row, int64 [num_tokens]."""
        return self.fields.token_ids[row, :num_tokens].long()

    def on_host(self, row: int) -> bool:
        """Whether a row is sampled by the host: it has functions to call, or longer lists than the table."""
        state, fields = self.sampling(row), self.fields
        num_words, word_len = fields.bad_words.shape[1:]
        lists = (
            (len(state.params.logit_bias), fields.bias_ids.shape[1]),
            (0 if state.stop_ids is None else len(state.stop_ids), fields.stop_ids.shape[1]),
            (len(_words(state)), num_words),
            (max(map(len, _words(state)), default=0), word_len),
        )
        return bool(state.params.logits_processors) or any(asked > given for asked, given in lists)

    def decode_inputs(self, rows: Tensor, out: DecodeInputs) -> None:
        """Fill `out` with the decode step of `rows` [num_rows] int32, -1 for padding."""
        decode_inputs(
            rows, out, token_ids=self.fields.token_ids, num_tokens=self.fields.num_tokens,
            block_table=self.block_table, block_size=self._block_size, dummy_slot=NO_SLOT,
        )  # fmt: skip

    def append(self, rows: Tensor, tokens: Tensor) -> None:
        """Append what was sampled to `rows` [num_rows] int32, -1 for padding, and send it to the host."""
        append_tokens(
            rows, tokens, token_ids=self.fields.token_ids, num_tokens=self.fields.num_tokens,
            host=self.results.host, turn=self.results.turn,
        )  # fmt: skip

    def _join(self, inits: Sequence[RowInit]) -> None:
        states = [RowSampling.from_init(init, self._vocab_size, grammars=self.grammars) for init in inits]
        for init, state in zip(inits, states, strict=True):
            self._sampling[init.row], self._num_blocks[init.row] = state, 0
            self.num_prompt[init.row], self.num_tokens[init.row] = init.num_prompt_tokens, len(init.token_ids)
        width = self.fields.token_ids.shape[1]
        ints = np.array([_ints(*pair) for pair in zip(inits, states, strict=True)], dtype=np.int64)
        floats = np.array([_floats(state) for state in states], dtype=np.float64)
        places = [np.arange(len(init.token_ids)) + init.row * width for init in inits]
        ids = [np.array(init.token_ids) for init in inits]
        parts = [np.array([init.row for init in inits]), ints.ravel("F"), floats.ravel("F").view(np.int64)]
        rows, ints_, floats_, place, id_ = upload_parts(
            [*parts, np.concatenate(places), np.concatenate(ids)], self.device
        )
        self.fields.token_ids.view(-1).index_copy_(0, place, id_.int())
        self._set(rows, _INTS, ints_.view(len(_INTS), -1), torch.int32)
        self._set(rows, _FLOATS, floats_.view(torch.float64).view(len(_FLOATS), -1), torch.float32)
        self._fill_lists([pair for pair in zip(inits, states, strict=True) if not self.on_host(pair[0].row)])

    def _set(self, rows: Tensor, names: Sequence[str], values: Tensor, narrow: torch.dtype) -> None:
        """Write values [len(names), len(rows)] to the fields of these names, the first of which is wide."""
        narrowed = values.to(narrow)
        for i, name in enumerate(names):
            field: Tensor = getattr(self.fields, name)
            field.index_copy_(0, rows, narrowed[i] if i else values[i])

    def _fill_lists(self, joined: Sequence[tuple[RowInit, RowSampling]]) -> None:
        """The optional lists of rows; kernels read them only where `edits` says so."""
        fields = self.fields
        listed = [(init.row, state) for init, state in joined if _edits(state) & LISTS]
        if listed:
            rows = upload([row for row, _ in listed], self.device)
            for field, values in (
                (fields.bad_words, [_padded_words(state, fields.bad_words.shape[1:]) for _, state in listed]),
                (fields.bias_ids, [_padded(state.bias_ids, fields.bias_ids) for _, state in listed]),
                (fields.stop_ids, [_padded(state.stop_ids, fields.stop_ids) for _, state in listed]),
                (fields.bias, [_padded(state.bias, fields.bias) for _, state in listed]),
            ):
                field.index_copy_(0, rows, upload(np.stack(values), self.device))
        masked = [(init.row, state.allowed_ids) for init, state in joined if state.allowed_ids is not None]
        if masked:
            self.allow([row for row, _ in masked], np.stack([_bits(ids, self.num_words) for _, ids in masked]))

    @property
    def num_words(self) -> int:
        """Words of 32 bits in a mask of allowed tokens."""
        return self.fields.allowed.shape[1]

    def constrain(self, rows: Sequence[int]) -> None:
        """Let rows with a matcher draw what it allows next."""
        assert self.grammars is not None
        states = [self.sampling(row) for row in rows]
        words = self.grammars.masks([state.matcher for state in states if state.matcher is not None])
        for i, state in enumerate(states):
            if state.allowed_ids is not None:
                words[i] &= _bits(state.allowed_ids, self.num_words)
        self.allow(rows, words)

    def allow(self, rows: Sequence[int], words: np.ndarray) -> None:
        """Set which tokens rows may draw: `words` [len(rows), num_words] int32, as `SamplingTable.allowed`."""
        self.fields.allowed.index_copy_(0, upload(rows, self.device), upload(words, self.device))

    def _add_blocks(self, new_blocks: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        width = self.block_table.shape[1]
        places: list[int] = []
        blocks: list[int] = []
        for row, block_ids in new_blocks:
            start = self._num_blocks[row]
            self._num_blocks[row] = end = start + len(block_ids)
            places += range(row * width + start, row * width + end)
            blocks += block_ids
        place, block = upload_parts([places, blocks], self.device)
        self.block_table.view(-1).index_copy_(0, place, block.int())


def _padded(values: Tensor | None, field: Tensor) -> np.ndarray:
    """A row of `field` that begins with `values`; -1 follows."""
    padded = torch.full(field.shape[1:], -1, dtype=field.dtype)
    if values is not None:
        padded[: len(values)] = values
    return padded.numpy()


def _padded_words(state: RowSampling, shape: Sequence[int]) -> np.ndarray:
    padded = np.full(shape, -1, dtype=np.int32)
    for i, word in enumerate(_words(state)):
        padded[i, -len(word) :] = word
    return padded


def _bits(ids: Tensor, num_words: int) -> np.ndarray:
    """A mask of int32 words with the bits of `ids` set."""
    bits = np.zeros(num_words * 32, dtype=np.uint8)
    bits[ids.numpy()] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def _words(state: RowSampling) -> list[tuple[int, ...]]:
    """All bad words, those of one id too."""
    single = () if state.banned_ids is None else ((int(token_id),) for token_id in state.banned_ids)
    return [*state.bad_words, *single]


def _edits(state: RowSampling) -> int:
    params = state.params
    penalised = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)
    lists = state.bias_ids is not None or params.min_tokens > 0 or bool(_words(state))
    masked = state.allowed_ids is not None or state.matcher is not None
    return PENALTIES * penalised + MASK * masked + LISTS * lists


def _ints(init: RowInit, state: RowSampling) -> tuple[int, ...]:
    seed = state.seed & (1 << 64) - 1
    signed = seed - (1 << 64) if seed >> 63 else seed
    params = state.params
    return signed, len(init.token_ids), init.num_prompt_tokens, params.top_k, _edits(state), params.min_tokens


def _floats(state: RowSampling) -> tuple[float, ...]:
    params = state.params
    log_min_p = math.log(params.min_p) if params.min_p else -math.inf
    penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
    return params.top_p, params.temperature, log_min_p, *penalties
