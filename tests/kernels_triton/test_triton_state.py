"""The step from one decode to the next on the device, against the request table's own rules."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kvik.kernels.triton.block_copy import BlockCopier
from kvik.kernels.triton.state import DecodeInputs, append_tokens, decode_inputs
from kvik.runtime.token_ring import TURNS, TokenRing

BLOCK_SIZE, DUMMY = 16, 5


class Table:
    """Six rows of up to 40 tokens, and the inputs of a batch of any size."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def ints(*shape: int) -> torch.Tensor:
            return torch.randint(100, 900, shape, generator=generator, dtype=torch.int32).to(device)

        self.state = {"token_ids": ints(6, 40), "block_table": ints(6, 3)}
        self.state["num_tokens"] = torch.tensor([1, 15, 16, 17, 39, 40], dtype=torch.int32, device=device)
        self.host = torch.full((2, 300), -7, dtype=torch.int32, device=device)
        self.turn = torch.zeros(1, dtype=torch.int32, device=device)
        self.device = device

    def inputs(self, rows: list[int], num_blocks: int = 3) -> DecodeInputs:
        n = len(rows)
        long = [torch.full((n,), -7, device=self.device) for _ in range(3)]
        tables = torch.full((n, num_blocks), -7, dtype=torch.int32, device=self.device)
        out = DecodeInputs(*long, long[0].int(), tables)
        on_device = torch.tensor(rows, dtype=torch.int32, device=self.device)
        decode_inputs(on_device, out, block_size=BLOCK_SIZE, dummy_slot=DUMMY, **self.state)
        return out

    def append(self, rows: list[int], tokens: list[int]) -> None:
        on_device = (torch.tensor(v, dtype=torch.int32, device=self.device) for v in (rows, tokens))
        append_tokens(
            *on_device, token_ids=self.state["token_ids"], num_tokens=self.state["num_tokens"],
            host=self.host, turn=self.turn,
        )  # fmt: skip


def check(table: Table, out: DecodeInputs, rows: list[int]) -> None:
    """Inputs follow from the state, for rows that have a place."""
    state = {name: tensor.cpu() for name, tensor in table.state.items()}
    for i, row in enumerate(rows):
        position = int(state["num_tokens"][row]) - 1
        block = int(state["block_table"][row, position // BLOCK_SIZE])
        assert out.input_ids[i] == state["token_ids"][row, position]
        assert (out.positions[i], out.seq_lens[i]) == (position, position + 1)
        assert out.slots[i] == block * BLOCK_SIZE + position % BLOCK_SIZE
        assert out.block_tables[i].tolist() == state["block_table"][row, : out.block_tables.shape[1]].tolist()


def test_what_is_appended_is_the_next_input(device: torch.device) -> None:
    table, rows = Table(device), [3, 0, 2, 1]
    before = table.state["token_ids"].clone()
    for tokens in ([7, 8, 9, 7], [1, 2, 3, 4]):
        table.append(rows, tokens)
        out = table.inputs(rows)
        check(table, out, rows)
        assert out.input_ids.tolist() == tokens
    assert table.state["num_tokens"].tolist() == [3, 17, 18, 19, 39, 40]
    changed = (table.state["token_ids"] != before).nonzero().tolist()
    assert changed == [[0, 1], [0, 2], [1, 15], [1, 16], [2, 16], [2, 17], [3, 17], [3, 18]]


def test_inputs_change_nothing(device: torch.device) -> None:
    table = Table(device)
    before = table.state["num_tokens"].clone()
    check(table, table.inputs([5, 1, 4]), [5, 1, 4])
    check(table, table.inputs([0, 1], num_blocks=1), [0, 1])
    assert torch.equal(table.state["num_tokens"], before)


def test_padding_failed_rows_and_full_rows(device: torch.device) -> None:
    table = Table(device)
    before = table.state["token_ids"].clone()
    table.append([-1, 0, 4, 5], [3, -2, 4, 6])
    assert table.state["num_tokens"].tolist() == [1, 15, 16, 17, 40, 41]  # row 4 takes its last place, 5 has none left
    assert table.state["token_ids"][4, 39] == 4
    assert torch.equal(table.state["token_ids"][5], before[5])
    out = table.inputs([-1, -1, 4, 5])
    assert out.slots[[0, 1, 3]].tolist() == [DUMMY] * 3
    assert out.seq_lens.tolist() == [0, 0, 40, 0]
    assert out.block_tables[:2].tolist() == [[0, 0, 0]] * 2
    check(table, table.inputs([4]), [4])


def test_tokens_go_to_the_host_turn_by_turn(device: torch.device) -> None:
    table = Table(device)
    table.append([-1, 0, 4], [3, -2, 4])
    assert table.host[:, :6].tolist() == [[-1, -2, 4, -7, -7, -7], [-7] * 6]
    table.append([3], [8])
    assert (table.host[1, :6].tolist(), table.turn.item()) == ([8] + [-7] * 5, 0)
    table.append([1], [9])
    assert (table.host[:, 0].tolist(), table.turn.item()) == ([9, 8], 1)


def test_steps_in_flight_keep_their_tokens(device: torch.device) -> None:
    table, ring = Table(device), TokenRing(6, device)
    table.host, table.turn = ring.host, ring.turn
    waiting = []
    for step in range(3 * TURNS):
        table.append([step % 3], [step])
        waiting.append(ring.take(1))
        if step >= 16:  # as far as an engine may run ahead
            assert waiting[step - 16]() == [step - 16]
    with pytest.raises(AssertionError, match="too late"):
        waiting[0]()
    ring.reset()
    table.append([4, -1], [7, 8])
    assert ring.take(2)() == [7, -1]


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
def test_batches_around_a_program(rows: int, device: torch.device) -> None:
    table = Table(device)
    table.append([-1] * (rows - 1) + [2], [0] * (rows - 1) + [4])
    assert table.inputs([-1] * (rows - 1) + [2]).seq_lens.tolist() == [0] * (rows - 1) + [17]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 2, 16, 16), (6, 3, 16, 80)], ids=str)
def test_block_copy(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    caches = [torch.randn(shape).to(dtype).to(device) for _ in range(6)]
    want = [cache.clone() for cache in caches]
    for cache in want:
        cache[4], cache[0] = cache[1], cache[5]
    pairs = torch.tensor([[1, 4], [-1, 3], [5, 0]], dtype=torch.int32, device=device)
    BlockCopier(caches).copy(pairs)
    assert all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))
