"""The device sampler against `sampling/`: the same tokens for the same logits and seeds, whatever is asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kvik.core.plan import RowInit
from kvik.kernels.triton.sampler import BROKEN, MASKED, sample
from kvik.kernels.triton.sampling_table import LISTS, MASK, PENALTIES, SamplerTiles, SamplingTable, SamplingWorkspace
from kvik.kernels.triton.token_logprobs import LogprobBuffers, token_logprobs
from kvik.sampling.logprobs import prompt_logprobs
from kvik.sampling.row import RowSampling
from kvik.sampling.sampler import Sampler
from kvik.sampling_params import SamplingParams

TILES = SamplerTiles(slice=256, part=128, tokens=16)
VOCAB = 1100  # five slices, the last of them short
WIDTH = 24


class Case:
    """Rows with their own parameters and tokens, as the reference sampler and as the device sees them."""

    def __init__(self, asked: list[dict[str, Any]], device: torch.device, vocab: int = VOCAB) -> None:
        self.vocab, self.device = vocab, device
        generator = torch.Generator().manual_seed(len(asked))
        self.table = SamplingTable.zeros(len(asked) + 1, WIDTH, vocab, device, max_word_len=4)
        self.rows, self.tokens = list[RowSampling](), list[Tensor]()
        for i, fields in enumerate(asked):
            length = 5 + i % 3
            tokens = torch.randint(0, min(vocab, 40), (length + 8,), generator=generator)
            fields = dict(fields)
            stops, words = fields.pop("stops", ()), fields.pop("words", ())
            words = tuple(tuple(int(tokens[w]) if w < 0 else w for w in word) for word in words)
            params = SamplingParams(**{"temperature": 1.0, "seed": 77 * i + (i << 40)} | fields)
            init = RowInit(i, tuple(tokens.tolist()), length, params, params.seed or 0, stops, words)
            self.rows.append(RowSampling.from_init(init, vocab))
            self.tokens.append(tokens)
            self.fill(len(asked) - i, init)  # table rows in another order than the batch
        self.order = torch.tensor([len(asked) - i for i in range(len(asked))], dtype=torch.int32, device=device)

    def fill(self, row: int, init: RowInit) -> None:
        p, table = init.params, self.table
        values = {
            "num_tokens": len(init.token_ids), "num_prompt": init.num_prompt_tokens, "seed": init.seed,
            "temperature": p.temperature, "top_k": p.top_k, "top_p": p.top_p, "repetition": p.repetition_penalty,
            "log_min_p": math.log(p.min_p) if p.min_p else -math.inf, "presence": p.presence_penalty,
            "frequency": p.frequency_penalty, "min_tokens": p.min_tokens,
        }  # fmt: skip
        for name, value in values.items():
            getattr(table, name)[row] = value
        lists = {"token_ids": init.token_ids, "stop_ids": init.stop_token_ids, "bias_ids": [t for t, _ in p.logit_bias]}
        for name, ids in lists.items():
            getattr(table, name)[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        table.bias[row, : len(p.logit_bias)] = torch.tensor([b for _, b in p.logit_bias])
        for i, word in enumerate(init.bad_words_ids):
            table.bad_words[row, i, -len(word) :] = torch.tensor(word)
        if p.allowed_token_ids is not None:
            bits = torch.zeros(table.allowed.shape[1] * 32, dtype=torch.int64)
            bits[torch.tensor(p.allowed_token_ids)] = 1
            table.allowed[row] = (bits.view(-1, 32) << torch.arange(32)).sum(1).to(torch.int32)
        penalised = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1, 0, 0)
        lists_used = bool(p.logit_bias or init.bad_words_ids or p.min_tokens)
        table.edits[row] = PENALTIES * penalised + MASK * (p.allowed_token_ids is not None) + LISTS * lists_used

    def logits(self, dtype: torch.dtype = torch.float32, spread: float = 2.0) -> Tensor:
        generator = torch.Generator().manual_seed(self.vocab)
        return (torch.randn(len(self.rows), self.vocab, generator=generator) * spread).to(dtype).to(self.device)

    def run(self, logits: Tensor, order: Tensor | None = None, work: SamplingWorkspace | None = None) -> list[int]:
        every = [row.params for row in self.rows]
        found = sample(
            logits, self.order if order is None else order, self.table,
            work or SamplingWorkspace(len(logits), self.vocab, self.device, TILES),
            edits=any(row.edits for row in self.rows), top_k=any(p.top_k for p in every),
            top_p=any(p.top_p < 1 for p in every), min_p=any(p.min_p for p in every),
        )  # fmt: skip
        return found.tolist()

    def check(self, logits: Tensor) -> None:
        want = Sampler(self.vocab).sample(logits.cpu(), self.rows, self.tokens)
        assert self.run(logits) == [row.token_id for row in want]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 7, 123, 255, 256, 257, VOCAB])
def test_greedy_and_plain_draws(dtype: torch.dtype, vocab: int, device: torch.device) -> None:
    case = Case([{"temperature": t} for t in (0, 1, 0.6, 2, 1e-3)], device, vocab)
    case.check(case.logits(dtype))


def test_the_lowest_id_wins_ties(device: torch.device) -> None:
    case = Case([{"temperature": 0}], device)
    logits = case.logits()
    logits[0, [9, 256, 1099, 700]] = 50
    assert case.run(logits) == [9]
    logits[0, 9] = 0
    assert case.run(logits) == [256]


@pytest.mark.parametrize(("dtype", "spread"), [(torch.float32, 2.0), (torch.bfloat16, 0.1)])
def test_filters(dtype: torch.dtype, spread: float, device: torch.device) -> None:
    """Few bits make many ties, which all stay; nearly flat logits leave much to filter."""
    asked = [
        {"top_k": 1}, {"top_k": 2}, {"top_k": 50, "temperature": 1.7}, {"top_k": 1099}, {"top_k": 9999}, {},
        {"top_p": 0.9}, {"top_p": 1e-6}, {"top_p": 0.999999, "temperature": 2}, {"min_p": 0.05}, {"temperature": 0},
        {"top_k": 40, "top_p": 0.5, "min_p": 0.1}, {"top_k": 7, "top_p": 0.95, "temperature": 0.3},
    ]  # fmt: skip
    case = Case(asked, device)
    case.check(case.logits(dtype, spread))


def test_the_sets_that_filters_keep_are_exact(device: torch.device) -> None:
    """Noise hides most errors of a set, so: the floor itself, against a sort."""
    case = Case([{"top_k": k} for k in (1, 3, 64, 1000)] + [{"top_p": p} for p in (0.1, 0.5, 0.99)], device)
    logits, work = case.logits(torch.bfloat16), SamplingWorkspace(7, VOCAB, device, TILES)
    case.run(logits, work=work)
    gaps = (logits.float().amax(1, keepdim=True) - logits.float()).cpu().sort(1).values
    for i, k in enumerate((1, 3, 64, 1000)):
        assert work.limits[i].view(torch.float32).item() == gaps[i, k - 1]
    for i, p in enumerate((0.1, 0.5, 0.99), 4):
        mass = (-gaps[i]).exp().double().cumsum(0)
        assert work.limits[i].view(torch.float32).item() == gaps[i, int((mass < p * mass[-1]).sum())]


def test_edits(device: torch.device) -> None:
    asked = [
        {"repetition_penalty": 1.8}, {"presence_penalty": 2.0, "frequency_penalty": -1.5}, {},
        {"logit_bias": {3: 9.5, 4: -100, 1099: 9.0}}, {"allowed_token_ids": [31, 32, 63, 64, 1098]},
        {"min_tokens": 20, "stops": (5, 6), "logit_bias": {5: 100}},
        {"min_tokens": 3, "stops": (5,), "logit_bias": {5: 100}},
        {"words": [(9,), (-1, 7), (-2, -1, 8), (1, -1, 11)], "logit_bias": {9: 100, 7: 99, 8: 98, 11: 97}},
        {"temperature": 0, "repetition_penalty": 0.2, "frequency_penalty": 0.3, "top_k": 5},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "allowed_token_ids": list(range(50)), "top_p": 0.8},
    ]  # fmt: skip
    case = Case(asked, device)
    logits = case.logits()
    logits[:, :40] += 6  # where the tokens so far are
    kept, work = logits.clone(), SamplingWorkspace(len(asked), VOCAB, device, TILES)
    case.check(logits)
    assert case.run(logits, work=work) == case.run(logits, work=work)
    assert work.counts.abs().max() == 0
    assert torch.equal(logits, kept)


def test_a_row_gives_the_same_token_in_every_batch(device: torch.device) -> None:
    case = Case([{}, {"top_p": 0.7}, {"temperature": 0}, {"top_k": 9}, {"presence_penalty": 1.0}], device)
    logits = case.logits()
    together = case.run(logits)
    for i, row in enumerate(case.rows):
        case.rows = [row]
        assert case.run(logits[i : i + 1], case.order[i : i + 1]) == together[i : i + 1]


def test_rows_without_a_token(device: torch.device) -> None:
    case = Case([{"temperature": 0}, {}, {"top_p": 0.5}, {}, {}, {}], device)
    logits = case.logits()
    logits[0, 700], logits[1, 4], logits[2], logits[3] = math.nan, math.inf, math.nan, -math.inf
    logits[4, :-1] = -math.inf
    order = case.order.clone()
    order[5] = -1
    assert case.run(logits, order) == [BROKEN, BROKEN, BROKEN, MASKED, VOCAB - 1, MASKED]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "num_top"), [(9, 5), (257, 1), (VOCAB, 20), (300, 0)])
def test_logprobs(dtype: torch.dtype, vocab: int, num_top: int, device: torch.device) -> None:
    logits = (torch.randn(4, vocab, generator=torch.Generator().manual_seed(1)) * 3).to(dtype).to(device)
    logits[3, 3:] = -math.inf  # fewer finite entries than are asked for
    tokens = torch.tensor([0, 1, -1, 2], dtype=torch.int32, device=device)
    found = token_logprobs(logits, tokens, LogprobBuffers(4, vocab, num_top, device, TILES))
    for i, want in enumerate(prompt_logprobs(logits.cpu(), tokens.cpu().long().clamp(min=0), num_top)):
        if i != 2:
            assert found.logprobs[i].item() == pytest.approx(want.logprob, abs=2e-5)
            assert found.ranks[i].item() == want.rank
            finite = len(want.top)  # masked entries come after them
            assert found.top_ids[i].tolist()[:finite] == [token for token, _ in want.top]
            assert found.top_logprobs[i].tolist()[:finite] == pytest.approx([value for _, value in want.top], abs=2e-5)
            assert found.top_logprobs[i].tolist()[finite:] == [-math.inf] * (num_top - finite)
