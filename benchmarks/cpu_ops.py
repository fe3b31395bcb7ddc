"""Speed of the native CPU kernels, operation by operation, and of whole steps of a Qwen3-0.6B-shaped decoder.

    python benchmarks/cpu_ops.py [--threads N] [--formats bf16,int8,int4g32] [--ops] [--steps] [--seconds 0.5]

Every line has what the machine gave in the same second: read bandwidth of all threads (for what streams weights or the
KV cache) or arithmetic in registers (for large products), and the share of it that was reached. `torch` is the time of
torch's best operation for the same product divided by the kernel's. Times are medians; on a shared machine only shares
and ratios compare. Weights are random and cycle through more memory than the caches hold.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvik.attention.base import ForwardBatch
from kvik.kernels.api import KVLayer, LinearWeight
from kvik.kernels.cpu.native import OP_CODES, NativePool, OpStruct, StepStruct
from kvik.kernels.cpu.ops import attention_entry, linear_entry
from kvik.kernels.cpu.packing import FORMATS, PackedLinear, pack_linear
from kvik.kernels.memory import allocate_bytes
from kvik.layers.rope import RopeSpec, RopeTable
from kvik.models.decoder import DecoderWeights, LayerWeights
from kvik.models.spec import DecoderSpec
from kvik.runtime.native_decoder import NativeDecoder, native_pack

SHAPES = ((3072, 1024), (1024, 3072), (151936, 1024))
CYCLED_BYTES = 400 << 20
OPS_PER_PRODUCT = {"fp32": 2, "bf16": 4, "int8": 8, "int4g32": 8, "int4g128": 8}  # of two 32-bit words
BLOCK_SIZE = 64


class Machine:
    """The two limits, measured anew whenever asked."""

    def __init__(self, pool: NativePool) -> None:
        self.pool = pool
        self._buffer = allocate_bytes(512 << 20)
        self._buffer.fill_(1)

    def bandwidth(self) -> float:
        """GB/s of reading with all threads, the best of three."""
        op = OpStruct(code=OP_CODES["read"], x=self._buffer.data_ptr(), width=self._buffer.numel())
        return self._buffer.numel() / min(seconds(lambda: self.pool.run_one(op)) for _ in range(3)) / 1e9

    def peak(self, fmt: str) -> float:
        """GOP/s of products in registers with all threads, the best of three."""
        items, products = 8 * self.pool.threads, 1 << 22
        op = OpStruct(code=OP_CODES["peak"], type=FORMATS[fmt][0], rows=items, width=products)
        work = items * products * OPS_PER_PRODUCT[fmt]
        return work / min(seconds(lambda: self.pool.run_one(op)) for _ in range(3)) / 1e9


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def median(run: Callable[[], object], budget: float) -> float:
    """Median seconds of `run` over about `budget` seconds, after one unmeasured call."""
    run()
    times, end = [seconds(run)], time.perf_counter() + budget
    while time.perf_counter() < end:
        times.append(seconds(run))
    return statistics.median(times)


def report(name: str, time_s: float, amount: str, share: float, ratio: float | None = None) -> None:
    beside = "" if ratio is None else f"  torch {ratio:5.2f}x"
    print(f"{name:<34} {time_s * 1e6:10.1f} us  {amount:>12}  {share:5.0%}{beside}", flush=True)


def torch_linear(weight: Tensor, fmt: str, rows: int) -> Callable[[Tensor], Tensor] | None:
    """torch's best operation for `rows` rows of a weight [out, in], or None where it has none."""
    if fmt in ("bf16", "fp32"):
        dtype = torch.bfloat16 if fmt == "bf16" else torch.float32
        if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # AVX2: nothing to pack for
            return lambda x: torch.nn.functional.linear(x, weight)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype))
        return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, None, "none", [], "")
    if fmt == "int8":
        return torch_int8(weight)
    if fmt == "int4g32" and weight.shape[0] % 64 == 0 and rows <= 64:
        values = torch.randint(0, 16, weight.shape, dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
        zeros = torch.ones(weight.shape[1] // 32, weight.shape[0], 2, dtype=torch.bfloat16)
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, 32, zeros)
    return None


def torch_int8(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """oneDNN's int8 product with unsigned activations, quantised per call (one scale for all rows: the cheapest)."""
    scale = weight.float().abs().amax(1) / 127
    packed = torch.ops.onednn.qlinear_prepack(torch.round(weight.float() / scale[:, None]).to(torch.int8), None)
    zeros = torch.zeros(len(scale), dtype=torch.int64)

    def run(x: Tensor) -> Tensor:
        step = float(x.abs().amax()) / 127
        q = torch.quantize_per_tensor(x, step, 128, torch.quint8).int_repr()
        product = torch.ops.onednn.qlinear_pointwise
        return product(q, step, 128, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")

    return run


def linears(machine: Machine, fmt: str, budget: float) -> None:
    """Projections: few rows against the bandwidth, many against the arithmetic."""
    pool = machine.pool
    for n, k in SHAPES:
        weight = torch.randn(n, k, dtype=torch.bfloat16) * 0.03
        first = pack_linear(weight, None, fmt, pool=pool)
        copies = [first, *(pack_linear(weight, None, fmt, pool=pool) for _ in range(CYCLED_BYTES // first.nbytes))]
        for rows in (1, 2, 8, 32, 512):
            if rows > 8 and n > 100000:
                continue
            x, y = torch.randn(rows, k), torch.empty(rows, n)
            ops = (OpStruct * len(copies))(*(linear_entry(x, y, w, rows) for w in copies))
            count = len(copies) if rows <= 32 else 2
            before = machine.bandwidth() if rows <= 8 else machine.peak(fmt)
            taken = median(lambda: pool.run(ops, count, StepStruct()), budget) / count  # noqa: B023
            after = machine.bandwidth() if rows <= 8 else machine.peak(fmt)
            rate = first.nbytes / taken / 1e9 if rows <= 8 else 2 * rows * n * k / taken / 1e9
            unit = "GB/s" if rows <= 8 else "GOP/s"
            ratio = compare(weight, fmt, rows, x, len(copies), budget) / taken if n < 100000 or rows == 1 else None
            ratio = ratio if ratio and ratio > 0 else None
            name = f"linear {fmt} M={rows} [{n}, {k}]"
            report(name, taken, f"{rate:.1f} {unit}", 2 * rate / (before + after), ratio)


def compare(weight: Tensor, fmt: str, rows: int, x: Tensor, copies: int, budget: float) -> float:
    """Median seconds of torch's operation over as many distinct weights; 0 where it has none."""
    runs = [torch_linear(weight, fmt, rows) for _ in range(copies if rows <= 32 else 1)]
    if runs[0] is None:
        return 0.0
    x = x.float() if fmt in ("fp32", "int8") else x.bfloat16()
    return median(lambda: [run(x) for run in runs if run], budget) / len(runs)


def decode_attention(machine: Machine, dtype: torch.dtype, budget: float) -> None:
    """One query per sequence over a cache of 16 query and 8 key/value heads of 128."""
    spec = qwen3_shape()
    for num_seqs, context in ((1, 128), (1, 4096), (8, 128), (8, 1024), (8, 4096)):
        blocks = num_seqs * -(-context // BLOCK_SIZE)
        size = num_seqs * context * spec.kv_bytes_per_token(dtype) // spec.num_layers
        layers = max(1, min(spec.num_layers, CYCLED_BYTES // size))
        kv = list(itertools.islice(caches(spec, blocks, dtype), layers))
        q, y = torch.randn(num_seqs, 2048).bfloat16(), torch.empty(num_seqs, 2048)
        ops = (OpStruct * layers)(*(attention_entry(q, y, layer, 128**-0.5, None, 16) for layer in kv))
        starts, lens = (
            torch.arange(num_seqs + 1, dtype=torch.int32),
            torch.full((num_seqs,), context, dtype=torch.int32),
        )
        tables = torch.randperm(blocks).to(torch.int32)
        step = StepStruct(num_tokens=num_seqs, num_seqs=num_seqs, table_stride=blocks // num_seqs)
        step.query_starts, step.seq_lens, step.block_tables = (t.data_ptr() for t in (starts, lens, tables))
        before = machine.bandwidth()
        taken = median(lambda: machine.pool.run(ops, layers, step), budget) / layers  # noqa: B023
        rate = size / taken / 1e9
        share = 2 * rate / (before + machine.bandwidth())
        name = f"decode attention {str(dtype).removeprefix('torch.')} {num_seqs} x {context}"
        report(name, taken, f"{rate:.1f} GB/s", share)


def prefill_attention(machine: Machine, budget: float) -> None:
    """A prompt over a bf16 cache: half of the square of its length counts."""
    for context in (512, 2048):
        blocks = context // BLOCK_SIZE
        (kv,) = itertools.islice(caches(qwen3_shape(), blocks, torch.bfloat16), 1)
        q, y = torch.randn(context, 2048).bfloat16(), torch.empty(context, 2048)
        starts, lens = torch.tensor([0, context], dtype=torch.int32), torch.tensor([context], dtype=torch.int32)
        tables = torch.arange(blocks, dtype=torch.int32)
        step = StepStruct(num_tokens=context, num_seqs=1, table_stride=blocks)
        step.query_starts, step.seq_lens, step.block_tables = (t.data_ptr() for t in (starts, lens, tables))
        op = attention_entry(q, y, kv, 128**-0.5, None, 16)
        taken = median(lambda: machine.pool.run_one(op, step), budget)  # noqa: B023
        rate = 2 * 16 * 128 * context * context / taken / 1e9
        heads = [torch.randn(1, 16, context, 128).bfloat16() for _ in range(3)]
        sdpa = torch.nn.functional.scaled_dot_product_attention
        torch_time = median(lambda: sdpa(*heads, is_causal=True), budget)  # noqa: B023
        share = rate / machine.peak("bf16")
        report(f"prefill attention {context}", taken, f"{rate:.0f} GF/s", share, torch_time / taken)


def qwen3_shape() -> DecoderSpec:
    return DecoderSpec(
        architecture="Qwen3ForCausalLM", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_layers=28,
        num_heads=16, num_kv_heads=8, head_dim=128, rms_norm_eps=1e-6, max_position_embeddings=40960,
        rope=RopeSpec("default", 128, 1e6), windows=(None,) * 28, tie_word_embeddings=True, qk_norm=True,
    )  # fmt: skip


def random_weights(spec: DecoderSpec, fmt: str, pool: NativePool) -> DecoderWeights:
    pack = native_pack(fmt, fmt, pool)

    def linear(role: str, n: int, k: int) -> LinearWeight:
        return pack(role, LinearWeight(torch.randn(n, k, dtype=torch.bfloat16) * 0.02))

    def layer() -> LayerWeights:
        hidden, inner, head = torch.ones(spec.hidden_size), spec.intermediate_size, torch.ones(spec.head_dim)
        qkv = linear("qkv", spec.q_size + 2 * spec.kv_size, spec.hidden_size)
        o, down = linear("o", spec.hidden_size, spec.q_size), linear("down", spec.hidden_size, inner)
        gate_up = linear("gate_up", 2 * inner, spec.hidden_size)
        return LayerWeights(hidden, qkv, head, head, o, hidden, gate_up, down)

    layers = tuple(layer() for _ in range(spec.num_layers))
    lm_head = linear("lm_head", spec.vocab_size, spec.hidden_size)
    return DecoderWeights(lm_head.weight, layers, torch.ones(spec.hidden_size), lm_head)


def step_batch(num_seqs: int, queries: int, context: int, num_blocks: int) -> ForwardBatch:
    """Sequences of `context` tokens that compute their last `queries` ones, blocks in random order."""
    per_seq = -(-context // BLOCK_SIZE)
    tables = torch.randperm(num_blocks)[: num_seqs * per_seq].to(torch.int32).view(num_seqs, per_seq)
    positions = torch.arange(context - queries, context)
    slots = tables[:, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    starts = torch.arange(num_seqs + 1, dtype=torch.int32) * queries
    return ForwardBatch(
        torch.randint(3, 10000, (num_seqs * queries,)), positions.repeat(num_seqs), slots.flatten(), starts,
        torch.full((num_seqs,), context, dtype=torch.int32), tables, starts[1:].long() - 1,
        tuple(starts.tolist()), (context,) * num_seqs,
    )  # fmt: skip


def caches(spec: DecoderSpec, num_blocks: int, dtype: torch.dtype) -> Iterator[KVLayer]:
    """Random keys and values of every layer."""
    shape = (num_blocks, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
    for _ in range(spec.num_layers):
        kv = KVLayer.zeros(shape, dtype, torch.device("cpu"))
        for values, scales in ((kv.k, kv.k_scale), (kv.v, kv.v_scale)):
            if scales is None:
                values.normal_()
            else:
                values.random_(-127, 128), scales.fill_(3 / 127)
        yield kv


def steps(machine: Machine, fmt: str, kv: tuple[KVLayer, ...], budget: float) -> None:
    """Whole steps: hidden states, logits and argmax of every sequence."""
    spec, pool = qwen3_shape(), machine.pool
    weights = random_weights(spec, fmt, pool)
    decoder = NativeDecoder(spec, weights, RopeTable(spec.rope, 8192, torch.device("cpu")), pool, 2048)
    packed = [(w.qkv, w.o, w.gate_up, w.down) for w in weights.layers]
    size = sum(w.nbytes for w in (*itertools.chain(*packed), weights.lm_head) if isinstance(w, PackedLinear))
    for num_seqs, queries, context in ((1, 1, 128), (8, 1, 128), (1, 1, 4096), (8, 1, 4096), (1, 512, 512)):
        batch = step_batch(num_seqs, queries, context, len(kv[0].k))
        before = machine.bandwidth()
        pool.profile()
        taken = median(lambda: decoder.logits(decoder.forward(batch, kv)).argmax(1), budget)  # noqa: B023
        kernels = sum(pool.profile().values())
        after = machine.bandwidth()
        name = f"step {fmt} {num_seqs} x {queries} at {context}"
        tokens = f"{num_seqs * queries / taken:.1f} tok/s"
        if queries == 1:
            moved = size + num_seqs * context * spec.kv_bytes_per_token(torch.bfloat16)
            report(name, taken, tokens, 2 * moved / taken / 1e9 / (before + after))
        else:
            work = 2 * (spec.num_parameters - spec.vocab_size * spec.hidden_size) * queries
            report(name, taken, tokens, work / taken / 1e9 / machine.peak(fmt))
        assert kernels > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--formats", default="bf16,int8,int4g32")
    parser.add_argument("--seconds", type=float, default=0.5, help="time per measurement")
    parser.add_argument("--ops", action="store_true", help="operations only")
    parser.add_argument("--steps", action="store_true", help="whole steps only")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*quantize.*deprecated")
    pool = NativePool(options.threads)
    torch.set_num_threads(pool.threads)
    torch.manual_seed(0)
    machine = Machine(pool)
    peaks = ", ".join(f"{fmt} {machine.peak(fmt):.0f}" for fmt in ("fp32", "bf16", "int8"))
    print(
        f"{pool.isa}, {pool.threads} threads, pinned {pool.pinned}: read {machine.bandwidth():.1f} GB/s, GOP/s {peaks}"
    )
    formats = options.formats.split(",")
    if not options.steps:
        for fmt in formats:
            linears(machine, fmt, options.seconds)
        for dtype in (torch.bfloat16, torch.int8):
            decode_attention(machine, dtype, options.seconds)
        prefill_attention(machine, options.seconds)
    if not options.ops:
        kv = tuple(caches(qwen3_shape(), 8 * 4096 // BLOCK_SIZE + 8, torch.bfloat16))
        for fmt in formats:
            steps(machine, fmt, kv, options.seconds)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
