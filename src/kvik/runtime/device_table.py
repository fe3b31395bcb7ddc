"""The request table on a GPU: rows join and grow by small uploads; kernels append to them without the host.

It holds what `RequestTable` holds, and what the sampling kernels read of each row. The host remembers only what decides
which kernels a step needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvik.core.plan import Chunk, RowInit, StepPlan
from kvik.kernels.triton.sampling_table import LISTS, MASK, PENALTIES, SamplingTable
from kvik.kernels.triton.state import DecodeInputs, decode_inputs
from kvik.sampling.row import RowSampling

__all__ = ["DeviceTable", "upload"]

NO_SLOT = -1
"""Where a padding row writes its key and value: nowhere."""

_INTS = ("num_tokens", "num_prompt", "seed", "top_k", "edits", "min_tokens")
_FLOATS = ("temperature", "top_p", "log_min_p", "repetition", "presence", "frequency")


def upload(values: np.ndarray | Sequence[int], device: torch.device) -> Tensor:
    """A copy on `device` that the host does not wait for, int64 unless an array says otherwise.

    Torch keeps the pinned memory until the copy is done, and uses it again after that.
    """
    array = values if isinstance(values, np.ndarray) else np.array(values, dtype=np.int64)
    host = torch.from_numpy(array)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


class DeviceTable:
    """Rows of `max_num_seqs` sequences of up to `max_model_len` tokens."""

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, vocab_size: int, device: torch.device
    ) -> None:
        self.fields = SamplingTable.zeros(max_num_seqs, max_model_len, vocab_size, device)
        max_blocks = -(-max_model_len // block_size)
        self.block_table = torch.zeros((max_num_seqs, max_blocks), dtype=torch.int32, device=device)
        self.device = device
        self._block_size = block_size
        self.num_prompt = [0] * max_num_seqs
        self._num_blocks = [0] * max_num_seqs
        self._sampling: list[RowSampling | None] = [None] * max_num_seqs
        self._vocab_size = vocab_size

    def apply(self, plan: StepPlan) -> None:
        """Take in the rows and blocks that a plan adds."""
        if plan.joined:
            self._join(plan.joined)
        self._add_blocks(plan.chunks)

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

    def advance(self, rows: Tensor, tokens: Tensor | None, out: DecodeInputs) -> None:
        """Fill `out` with the decode step that follows; with `tokens`, what was sampled, append them first."""
        fields = self.fields
        decode_inputs(
            rows, tokens, out, token_ids=fields.token_ids, num_tokens=fields.num_tokens, block_table=self.block_table,
            stop_ids=fields.stop_ids, block_size=self._block_size, dummy_slot=NO_SLOT,
        )  # fmt: skip

    def _join(self, inits: Sequence[RowInit]) -> None:
        for init in inits:
            row, state = init.row, RowSampling.from_init(init, self._vocab_size)
            self._sampling[row], self.num_prompt[row], self._num_blocks[row] = state, init.num_prompt_tokens, 0
            ids = upload(np.array(init.token_ids, dtype=np.int32), self.device)
            self.fields.token_ids[row, : len(ids)] = ids
            if not self.on_host(row):
                self._fill_lists(row, state)
        states = [self.sampling(init.row) for init in inits]
        rows = upload([init.row for init in inits], self.device)
        ints = upload(np.array([_ints(*pair) for pair in zip(inits, states, strict=True)], dtype=np.int64), self.device)
        floats = upload(np.array([_floats(state) for state in states], dtype=np.float64), self.device)
        for names, values in ((_INTS, ints), (_FLOATS, floats)):
            for name, column in zip(names, values.unbind(1), strict=True):
                field: Tensor = getattr(self.fields, name)
                field[rows] = column.to(field.dtype)

    def _fill_lists(self, row: int, state: RowSampling) -> None:
        """The optional lists of a row; kernels read them only where `edits` says so."""
        fields = self.fields
        if _edits(state) & LISTS:
            words = _words(state)
            padded = np.full(fields.bad_words.shape[1:], -1, dtype=np.int32)
            for i, word in enumerate(words):
                padded[i, -len(word) :] = word
            fields.bad_words[row] = upload(padded, self.device)
            for field, ids in ((fields.bias_ids, state.bias_ids), (fields.stop_ids, state.stop_ids)):
                values = np.full(field.shape[1], -1, dtype=np.int32)
                if ids is not None:
                    values[: len(ids)] = ids.numpy()
                field[row] = upload(values, self.device)
            if state.bias is not None:
                fields.bias[row, : len(state.bias)] = upload(state.bias.numpy(), self.device)
        if state.allowed_ids is not None:
            bits = np.zeros(fields.allowed.shape[1] * 32, dtype=np.uint8)
            bits[state.allowed_ids.numpy()] = 1
            words32 = np.packbits(bits, bitorder="little").view(np.int32)
            fields.allowed[row] = upload(words32, self.device)

    def _add_blocks(self, chunks: Sequence[Chunk]) -> None:
        rows: list[int] = []
        places: list[int] = []
        blocks: list[int] = []
        for chunk in chunks:
            if chunk.new_block_ids:
                count, start = len(chunk.new_block_ids), self._num_blocks[chunk.row]
                self._num_blocks[chunk.row] = start + count
                rows += [chunk.row] * count
                places += range(start, start + count)
                blocks += chunk.new_block_ids
        if rows:
            row, place, block = upload(np.array((rows, places, blocks), dtype=np.int64), self.device).unbind(0)
            self.block_table[row, place] = block.int()


def _words(state: RowSampling) -> list[tuple[int, ...]]:
    """All bad words, those of one id too."""
    single = () if state.banned_ids is None else ((int(token_id),) for token_id in state.banned_ids)
    return [*state.bad_words, *single]


def _edits(state: RowSampling) -> int:
    params = state.params
    penalised = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)
    lists = state.bias_ids is not None or params.min_tokens > 0 or bool(_words(state))
    return PENALTIES * penalised + MASK * (state.allowed_ids is not None) + LISTS * lists


def _ints(init: RowInit, state: RowSampling) -> tuple[int, ...]:
    seed = state.seed & (1 << 64) - 1
    signed = seed - (1 << 64) if seed >> 63 else seed
    params = state.params
    return len(init.token_ids), init.num_prompt_tokens, signed, params.top_k, _edits(state), params.min_tokens


def _floats(state: RowSampling) -> tuple[float, ...]:
    params = state.params
    log_min_p = math.log(params.min_p) if params.min_p else -math.inf
    penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
    return params.temperature, params.top_p, log_min_p, *penalties
