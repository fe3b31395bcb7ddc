"""The recorded decoder against the torch one on tiny models, and the library around it: threads, errors, rest."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from native_cases import ISAS, QuantizedReferenceOps, noise, pack_weights, pool
from torch import Tensor

from kvik.attention.base import AttentionBackend, ForwardBatch
from kvik.attention.reference import ReferenceAttention
from kvik.errors import ConfigError
from kvik.kernels.api import KVLayer, LinearWeight
from kvik.kernels.cpu.native import NativePool, available
from kvik.kernels.cpu.ops import NativeOps
from kvik.kernels.cpu.packing import FORMATS, PackedLinear
from kvik.kernels.reference import ReferenceOps
from kvik.layers.rope import RopeSpec, RopeTable
from kvik.models.decoder import Decoder, DecoderWeights, allocate_layer
from kvik.models.spec import DecoderSpec
from kvik.quantization.loading import QuantizedWeight
from kvik.quantization.reference import quantize
from kvik.runtime.native_decoder import NativeDecoder, native_pack, native_pack_quantized

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels were not compiled")

CPU = torch.device("cpu")
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"qk_norm": True, "head_dim": 80, "num_heads": 6},
    "qwen2": {"qkv_bias": True, "tie_word_embeddings": True},
    "gqa7": {"num_heads": 14, "head_dim": 16, "hidden_size": 112},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "intermediate_size": 100},
    "windowed": {"windows": (12, None), "qk_norm": True},
    "dynamic": {"rope": RopeSpec("dynamic", 16, 10000.0, factor=2.0, original_len=40), "head_dim": 16},
}


def model(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[DecoderSpec, DecoderWeights, RopeTable]:
    fields: dict[str, Any] = {
        "architecture": "tiny", "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 512,
        "windows": (None, None),
    } | changes  # fmt: skip
    fields.setdefault("rope", RopeSpec("default", fields["head_dim"], 10000.0))
    spec = DecoderSpec(**fields)
    embedding, head = (torch.empty(spec.vocab_size, spec.hidden_size, dtype=dtype) for _ in range(2))
    layers = tuple(allocate_layer(spec, dtype, CPU) for _ in range(spec.num_layers))
    lm_head = LinearWeight(embedding if spec.tie_word_embeddings else head)
    weights = DecoderWeights(embedding, layers, torch.empty(spec.hidden_size, dtype=dtype), lm_head)
    for i, tensor in enumerate(weights.tensors()):
        values = noise(*tensor.shape, seed=i)
        if tensor.ndim == 2:
            tensor.copy_(values if tensor is weights.embedding else values * 1.2 / tensor.shape[1] ** 0.5)
        else:
            tensor.copy_(1.0 + 0.2 * values)
    return spec, weights, RopeTable(spec.rope, 512, CPU)


class Paged:
    """Steps of several sequences over one cache, NaN where nothing was written."""

    def __init__(self, decoder: Decoder | NativeDecoder, dtype: torch.dtype, block_size: int = 16) -> None:
        spec = decoder.spec
        shape = (64, spec.num_kv_heads, block_size, spec.head_dim)
        self.kv = [KVLayer.zeros(shape, dtype, CPU) for _ in spec.windows]
        for layer in self.kv:
            for tensor in (layer.k, layer.v) if layer.k_scale is None else (layer.k_scale, layer.v_scale):
                assert tensor is not None
                tensor.fill_(float("nan"))
        self.decoder, self.block_size = decoder, block_size
        self.lens: dict[int, int] = {}

    def step(self, work: dict[int, list[int]]) -> Tensor:
        """Logits of the last token of each sequence; sequence i owns the blocks 7 i, 7 i + 1, ..."""
        positions, slots, starts, lens = [], [], [0], []
        for i, tokens in work.items():
            begin = self.lens.get(i, 0)
            self.lens[i] = begin + len(tokens)
            positions += range(begin, self.lens[i])
            slots += [7 * i * self.block_size + p for p in range(begin, self.lens[i])]
            starts.append(starts[-1] + len(tokens))
            lens.append(self.lens[i])
        batch = ForwardBatch(
            input_ids=torch.tensor([token for tokens in work.values() for token in tokens]),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            block_tables=torch.tensor([range(7 * i, 7 * i + 7) for i in work], dtype=torch.int32),
            logit_indices=None if starts[-1] == len(work) else torch.tensor(starts[1:]) - 1,
            query_starts_host=tuple(starts),
            seq_lens_host=tuple(lens),
            rope_lens=torch.tensor(positions) + 1,
        )
        return self.decoder.logits(self.decoder.forward(batch, self.kv)).clone()

    def follow(self, prompts: dict[int, list[int]], tokens: list[list[int]]) -> list[Tensor]:
        """The logits of each step when the tokens of each step are given, as `greedy` returns them."""
        rows = [self.step(prompts)]
        for step in tokens[:-1]:
            rows.append(self.step({i: [token] for i, token in zip(prompts, step, strict=True)}))
        return rows

    def greedy(self, prompts: dict[int, list[int]], count: int) -> tuple[list[Tensor], list[list[int]]]:
        rows, tokens, work = [], [], prompts
        for _ in range(count):
            rows.append(self.step(work))
            tokens.append(rows[-1].argmax(1).tolist())
            work = {i: [token] for i, token in zip(prompts, tokens[-1], strict=True)}
        return rows, tokens


def prompts(*lens: int) -> dict[int, list[int]]:
    return {i: [(7 * i + 31 * j) % 384 for j in range(n)] for i, n in enumerate(lens)}


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


class EagerAttention:
    """`AttentionBackend` of single native operations."""

    def __init__(self, ops: NativeOps) -> None:
        self._ops = ops

    def forward(self, q: Tensor, kv: KVLayer, batch: ForwardBatch, *, scale: float, window: int | None) -> Tensor:
        tables, starts = batch.block_tables, batch.query_starts
        return self._ops.attention(q, kv, starts, batch.seq_lens, tables, scale=scale, window=window)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SHAPES)
def test_fp32_agrees_with_torch(name: str, isa: str) -> None:
    spec, weights, rope = model(**SHAPES[name])
    native = NativeDecoder(spec, pack_weights(weights, "fp32", pool(isa)), rope, pool(isa), 128)
    plain = Decoder(spec, weights, rope, ReferenceOps(), ReferenceAttention())
    work = prompts(1, 70, 33)
    got, got_tokens = Paged(native, torch.float32).greedy(work, 24)
    want, want_tokens = Paged(plain, torch.float32).greedy(work, 24)
    assert got_tokens == want_tokens
    assert max(map(error, got, want)) < 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SHAPES)
def test_an_int8_cache_agrees_with_torch(name: str, isa: str) -> None:
    spec, weights, rope = model(**SHAPES[name])
    native = NativeDecoder(spec, pack_weights(weights, "fp32", pool(isa)), rope, pool(isa), 128)
    plain = Decoder(spec, weights, rope, ReferenceOps(), ReferenceAttention())
    work = prompts(1, 70, 33)
    got, got_tokens = Paged(native, torch.int8).greedy(work, 12)
    want, want_tokens = Paged(plain, torch.int8).greedy(work, 12)
    assert got_tokens == want_tokens
    # a rounding that is a near tie in one element of one key is 1/254 of it, but few are
    assert max(map(error, got, want)) < 2e-3
    exact, _ = Paged(plain, torch.float32).greedy(work, 1)
    assert 1e-5 < error(want[0], exact[0]) < 0.05


@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_is_at_least_as_close_to_fp32_as_torch_is(name: str) -> None:
    spec, weights, rope = model(torch.bfloat16, **SHAPES[name])
    wide = model(**SHAPES[name])[1]
    for tensor, source in zip(wide.tensors(), weights.tensors(), strict=True):
        tensor.copy_(source)
    work = prompts(1, 70, 33)
    decoders: dict[str, tuple[Decoder | NativeDecoder, torch.dtype]] = {
        "native": (NativeDecoder(spec, pack_weights(weights, "bf16", pool()), rope, pool(), 128), torch.bfloat16),
        "torch": (Decoder(spec, weights, rope, ReferenceOps(), ReferenceAttention()), torch.bfloat16),
        "exact": (Decoder(spec, wide, rope, ReferenceOps(), ReferenceAttention()), torch.float32),
    }
    logits = {key: Paged(decoder, dtype).step(work) for key, (decoder, dtype) in decoders.items()}
    exact = logits["exact"]
    assert error(logits["native"], exact) < 1.2 * error(logits["torch"], exact) + 0.002


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("fmt", FORMATS)
def test_tape_equals_single_operations(fmt: str, cache: torch.dtype) -> None:
    for name in ("qwen3", "biases", "windowed"):
        spec, weights, rope = model(**SHAPES[name])
        packed, ops = pack_weights(weights, fmt, pool()), NativeOps(pool())
        attention: AttentionBackend = EagerAttention(ops)
        work = prompts(5, 70, 33)
        got, _ = Paged(NativeDecoder(spec, packed, rope, pool(), 128), cache).greedy(work, 3)
        want, _ = Paged(Decoder(spec, packed, rope, ops, attention), cache).greedy(work, 3)
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("fmt", ["int8", "int4g32", "int4g128"])
@pytest.mark.parametrize("name", ["qwen3", "biases", "gqa7"])
def test_quantised_greedy_equals_a_plain_integer_reference(name: str, fmt: str) -> None:
    spec, weights, rope = model(**SHAPES[name])
    packed = pack_weights(weights, fmt, pool())
    plain = Decoder(spec, packed, rope, QuantizedReferenceOps(pool()), ReferenceAttention())
    native = NativeDecoder(spec, packed, rope, pool(), 128)
    want, tokens = Paged(plain, torch.float32).greedy(prompts(20), 64)
    got = Paged(native, torch.float32).follow(prompts(20), tokens)
    differing = [i for i, row in enumerate(got) if row.argmax(1).tolist() != tokens[i]]
    # Whether an activation that is a near tie is rounded up depends on the last bit, hence on the machine's torch. It
    # moves the logits by a few hundredths, which decides between two tokens where the reference nearly ties too.
    assert len(differing) <= 2
    for i in differing:
        first, second = want[i][0].topk(2).values.tolist()
        assert first - second < 0.05 and error(got[i], want[i]) < 0.05


def test_down_and_the_head_take_fine_activations_where_they_are_int8() -> None:
    weights = model()[1]
    for fmt in FORMATS:
        pack, stored = native_pack(fmt, "int8", pool()), native_pack_quantized(pool())
        fine = {role for role in ("qkv", "o", "gate_up", "down", "lm_head") if is_fine(pack(role, weights.lm_head))}
        assert fine == ({"down", "lm_head"} if fmt == "int8" else {"lm_head"})
        if fmt.startswith("int"):
            q, scales = quantize(weights.lm_head.weight, fmt)
            assert is_fine(stored("down", QuantizedWeight(fmt, q, scales))) == (fmt == "int8")


def is_fine(weight: LinearWeight) -> bool:
    assert isinstance(weight, PackedLinear)
    return weight.fine


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_tied_embedding_is_read_from_the_packed_lm_head(fmt: str) -> None:
    spec, weights, rope = model(tie_word_embeddings=True)
    packed = pack_weights(weights, fmt, pool())
    assert packed.embedding is packed.lm_head.weight
    table = packed.lm_head.dequantize(pool())  # type: ignore[attr-defined]
    untied = DecoderWeights(table, packed.layers, packed.final_norm, packed.lm_head)
    two_tables = replace(spec, tie_word_embeddings=False)
    work = prompts(9, 30)
    got = Paged(NativeDecoder(spec, packed, rope, pool(), 128), torch.float32).step(work)
    assert torch.equal(got, Paged(NativeDecoder(two_tables, untied, rope, pool(), 128), torch.float32).step(work))


def test_bits_depend_on_neither_threads_nor_company() -> None:
    spec, weights, rope = model()
    for fmt in ("fp32", "bf16", "int8", "int4g32"):
        results = []
        for threads in (1, 2, 4):
            workers = pool(threads=threads)
            decoder = NativeDecoder(spec, pack_weights(weights, fmt, workers), rope, workers, 128)
            results.append(Paged(decoder, torch.float32).greedy(prompts(40, 40, 40), 8)[0])
        alone = Paged(decoder, torch.float32).greedy(prompts(40), 8)[0]
        for got in results[1:]:
            assert all(map(torch.equal, got, results[0]))
        assert all(torch.equal(row[0], whole[0]) for row, whole in zip(alone, results[0], strict=True))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are moved on Linux only")
def test_a_busy_neighbour_changes_neither_bits_nor_where_threads_may_run() -> None:
    """Workers that it suspends are pulled from processor to processor."""
    spec, weights, rope = model(hidden_size=256, intermediate_size=512)
    allowed, workers = os.sched_getaffinity(0), NativePool(len(os.sched_getaffinity(0)))
    decoder = NativeDecoder(spec, pack_weights(weights, "fp32", workers), rope, workers, 128)
    want = Paged(decoder, torch.float32).greedy(prompts(40), 30)[0]
    command = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{min(allowed)}}})\nwhile True: pass"]
    neighbour = subprocess.Popen(command)
    try:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            got = Paged(decoder, torch.float32).greedy(prompts(40), 30)[0]
            assert all(map(torch.equal, got, want))
            assert os.sched_getaffinity(0) == allowed
    finally:
        neighbour.kill()
        neighbour.wait()
    workers.close()


def test_threads_sleep_when_nothing_runs() -> None:
    workers = NativePool(4, pin=False)
    NativeOps(workers).rms_norm(noise(64, 64), noise(64), 1e-6)
    time.sleep(0.05)
    process = psutil.Process()
    before = sum(process.cpu_times()[:2])
    time.sleep(0.5)
    used = sum(process.cpu_times()[:2]) - before
    assert used < 0.05
    workers.close()
    workers.close()


def test_many_pools_come_and_go() -> None:
    x, norm = noise(40, 64), noise(64)
    for threads in range(1, 9):
        workers = NativePool(threads)
        assert NativeOps(workers).rms_norm(x, norm, 1e-6).shape == x.shape
        workers.close()
    with pytest.raises(ConfigError, match="threads must be at least 1"):
        NativePool(-1)


def test_a_forked_process_does_not_wait_for_threads_that_it_has_not() -> None:
    code = """
import os, torch
from kvik.kernels.cpu.native import NativePool
from kvik.kernels.cpu.ops import NativeOps
pool = NativePool(2)
pid = os.fork()
print(NativeOps(pool).rms_norm(torch.ones(64, 64), torch.ones(64), 0.0).sum().item(), flush=True)
pool.close()
if pid:
    assert os.waitpid(pid, 0)[1] == 0
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert run.stdout == "4096.0\n" * 2, run.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_threads_that_the_system_does_not_give_are_an_error() -> None:
    code = """
import resource, psutil
from kvik.errors import CapacityError
from kvik.kernels.cpu.native import NativePool
limit = psutil.Process().memory_info().vms + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    NativePool(4000)
except CapacityError as error:
    print(error)
NativePool(2).close()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "does not let this process start 4000 threads" in run.stdout, run.stderr
    assert run.returncode == 0


@pytest.mark.parametrize(
    ("isa", "outcome"), [("generic", "generic"), ("avx3", "did you mean 'avx2'"), ("", "".join(ISAS[-1:]))]
)
def test_the_instruction_set_can_be_forced(isa: str, outcome: str) -> None:
    code = "from kvik.kernels.cpu.native import load_library; print(load_library().isa)"
    environment = {**os.environ, "KVIK_CPU_ISA": isa}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert outcome in run.stdout + run.stderr


def test_without_a_library_the_reason_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import kvik.kernels.cpu.native as module

    monkeypatch.setattr(module, "__file__", str(tmp_path / "native.py"))
    assert not module.available()
    with pytest.raises(ConfigError, match="without its native CPU kernels"):
        module.load_library()
