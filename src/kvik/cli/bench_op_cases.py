"""What `kvik bench ops` times: every operator of `kvik.ops` at the sizes of a decoder, and the same in torch.

A case takes its inputs from several copies, so that what an engine reads from memory is not found in a cache: weights
and KV blocks are. Activations of a few kilobytes stay in the cache whatever is done, as they do in an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvik import ops
from kvik.kernels.api import KVLayer, LinearWeight
from kvik.models.spec import DecoderSpec

__all__ = ["OPERATORS", "QWEN3_06B", "Bench", "OpCase", "Sizes", "cases"]

CONTEXT = 1024  # cached tokens of each sequence that decodes
BLOCK_SIZE = 64
_EPS = 1e-6
_SWEPT_BYTES = 256 << 20  # several times the last cache of any GPU, and of most processors
_MOST_COPIES = 64


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a decoder that fix the shapes."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @classmethod
    def of(cls, spec: DecoderSpec) -> Sizes:
        return cls(
            spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.intermediate_size, spec.vocab_size
        )

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


QWEN3_06B = Sizes(1024, 16, 8, 128, 3072, 151936)


@dataclass(frozen=True, slots=True)
class OpCase:
    """An operator at one shape: what it must read and write, and compute, at least; and it in Kvik and in torch.

    Both functions take the number of the copy of the inputs to use, below `copies`.
    """

    op: str
    tokens: int
    shape: str
    num_bytes: int
    num_flops: int
    kvik: Callable[[int], object]
    torch: Callable[[int], object]
    copies: int


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and in which type inputs are made."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes

    @property
    def most_sequences(self) -> int:
        """How many tokens of a step may be those of sequences that decode; more are of prompts."""
        return 32 if self.device.type == "cpu" else 256

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).mul_(shape[-1] ** -0.5).to(self.dtype)

    def rotated(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """The tensors and equal copies of them."""
        count = min(_MOST_COPIES, -(-_SWEPT_BYTES // sum(tensor.nbytes for tensor in tensors)))
        return [tensors, *(tuple(tensor.clone() for tensor in tensors) for _ in range(count - 1))]

    def case(
        self,
        op: str,
        tokens: int,
        shape: str,
        inputs: Sequence[Tensor],
        moved: int,
        kvik: Callable[..., object],
        in_torch: Callable[..., object],
        flops: int = 0,
    ) -> OpCase:
        """A case whose two functions take one copy of `inputs`; `moved` elements of the type are read or written."""
        copies = self.rotated(*inputs)
        return OpCase(
            op, tokens, shape, moved * self.dtype.itemsize, flops, lambda i: kvik(*copies[i]),
            lambda i: in_torch(*copies[i]), len(copies),
        )  # fmt: skip


Builder = Callable[[Bench, int], Iterator[OpCase]]


def cases(bench: Bench, names: Sequence[str], tokens: Sequence[int]) -> Iterator[OpCase]:
    """The cases of the operators called `names`, one after the other, so that only one holds memory."""
    for name in names:
        for count in tokens:
            yield from OPERATORS[name](bench, count)


def _add(b: Bench, m: int) -> Iterator[OpCase]:
    h = b.sizes.hidden
    yield b.case("add", m, f"[{m}, {h}]", (b.noise(m, h), b.noise(m, h)), 3 * m * h, ops.add, torch.add)


def _argmax(b: Bench, m: int) -> Iterator[OpCase]:
    if m <= b.most_sequences:
        v = b.sizes.vocab
        yield b.case("argmax", m, f"[{m}, {v}]", (b.noise(m, v),), m * v, ops.argmax, lambda x: x.argmax(-1))


def _embedding(b: Bench, m: int) -> Iterator[OpCase]:
    v, h = b.sizes.vocab, b.sizes.hidden
    ids = torch.randint(v, (m,), device=b.device)
    weight = b.noise(v, h)
    yield b.case("embedding", m, f"{m} of [{v}, {h}]", (ids, weight), 2 * m * h, ops.embedding, F.embedding)


def _rms_norm(b: Bench, m: int) -> Iterator[OpCase]:
    h = b.sizes.hidden
    yield b.case(
        "rms_norm", m, f"[{m}, {h}]", (b.noise(m, h), b.noise(h)), 2 * m * h,
        lambda x, w: ops.rms_norm(x, w, _EPS), lambda x, w: F.rms_norm(x, (h,), w, _EPS),
    )  # fmt: skip


def _add_rms_norm(b: Bench, m: int) -> Iterator[OpCase]:
    h = b.sizes.hidden

    def in_torch(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (h,), w, _EPS), total

    yield b.case(
        "add_rms_norm", m, f"[{m}, {h}]", (b.noise(m, h), b.noise(m, h), b.noise(h)), 4 * m * h,
        lambda x, r, w: ops.add_rms_norm(x, r, w, _EPS), in_torch,
    )  # fmt: skip


def _silu_mul(b: Bench, m: int) -> Iterator[OpCase]:
    i = b.sizes.intermediate

    def in_torch(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    yield b.case("silu_mul", m, f"[{m}, 2x{i}]", (b.noise(m, 2 * i),), 3 * m * i, ops.silu_mul, in_torch)


def _swiglu(b: Bench, m: int) -> Iterator[OpCase]:
    i = b.sizes.intermediate
    yield b.case(
        "swiglu", m, f"2 of [{m}, {i}]", (b.noise(m, i), b.noise(m, i)), 3 * m * i,
        ops.swiglu, lambda gate, up: F.silu(gate) * up,
    )  # fmt: skip


def _weight(b: Bench, tensor: Tensor, swiglu: bool = False) -> Tensor | LinearWeight:
    """As an engine keeps a projection: packed where there are compiled kernels for the CPU and the type."""
    from kvik.kernels.cpu.native import available

    packs = b.device.type == "cpu" and available() and b.dtype != torch.float16
    return ops.pack(tensor, swiglu=swiglu) if packs else tensor


def _projection(
    b: Bench, op: str, m: int, n: int, k: int, kvik: Callable[..., object], in_torch: Callable[..., object],
    more: Sequence[Tensor] = (), moved: int = 0,
) -> OpCase:  # fmt: skip
    """x [m, k] times weight [n, k]; both functions take x, the weight and `more`."""
    copies = b.rotated(b.noise(m, k), b.noise(n, k), *more)
    weights = [_weight(b, tensors[1], op == "norm_linear_swiglu") for tensors in copies]
    elements = (m + n) * k + moved
    return OpCase(
        op, m, f"[{m}, {k}] x [{n}, {k}]", elements * b.dtype.itemsize, 2 * m * n * k,
        lambda i: kvik(copies[i][0], weights[i], *copies[i][2:]), lambda i: in_torch(*copies[i]), len(copies),
    )  # fmt: skip


def _linear(b: Bench, m: int) -> Iterator[OpCase]:
    h, v, qkv = b.sizes.hidden, b.sizes.vocab, b.sizes.qkv_size
    yield _projection(b, "linear", m, qkv, h, ops.linear, F.linear, moved=m * qkv)
    if m <= b.most_sequences:
        yield _projection(b, "linear", m, v, h, ops.linear, F.linear, moved=m * v)


def _norm_linear(b: Bench, m: int) -> Iterator[OpCase]:
    h, n = b.sizes.hidden, b.sizes.qkv_size
    yield _projection(
        b, "norm_linear", m, n, h, lambda x, w, g: ops.norm_linear(x, g, w, eps=_EPS),
        lambda x, w, g: F.linear(F.rms_norm(x, (h,), g, _EPS), w), (b.noise(h),), m * n,
    )  # fmt: skip


def _linear_add(b: Bench, m: int) -> Iterator[OpCase]:
    n, k = b.sizes.hidden, b.sizes.intermediate
    yield _projection(
        b, "linear_add", m, n, k, lambda x, w, r: ops.linear_add(x, w, r),
        lambda x, w, r: r + F.linear(x, w), (b.noise(m, n),), 2 * m * n,
    )  # fmt: skip


def _norm_linear_swiglu(b: Bench, m: int) -> Iterator[OpCase]:
    h, n = b.sizes.hidden, b.sizes.intermediate

    def in_torch(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        gate, up = F.linear(F.rms_norm(x, (h,), g, _EPS), w).chunk(2, -1)
        return F.silu(gate) * up

    yield _projection(
        b, "norm_linear_swiglu", m, 2 * n, h, lambda x, w, g: ops.norm_linear_swiglu(x, g, w, eps=_EPS), in_torch,
        (b.noise(h),), m * n,
    )  # fmt: skip


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As models in torch write it: x [tokens, heads, head_dim], angles in the type of x, over the whole head."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _angles(b: Bench, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cos and sin as Kvik takes them, and as `_rotated` does."""
    cos, sin = ops.rope_angles(torch.arange(m, device=b.device), b.sizes.head_dim)
    wide_cos, wide_sin = (torch.cat((angle, angle), -1).to(b.dtype).unsqueeze(1) for angle in (cos, sin))
    return cos, sin, wide_cos, wide_sin


def _rope(b: Bench, m: int) -> Iterator[OpCase]:
    heads, d = b.sizes.num_heads, b.sizes.head_dim
    cos, sin, wide_cos, wide_sin = _angles(b, m)
    yield b.case(
        "rope", m, f"[{m}, {heads}, {d}]", (b.noise(m, heads, d),), 2 * m * heads * d,
        lambda x: ops.rope(x, cos, sin), lambda x: _rotated(x, wide_cos, wide_sin),
    )  # fmt: skip


def _cache(b: Bench, num_tokens: int) -> tuple[Tensor, Tensor]:
    shape = (-(-num_tokens // BLOCK_SIZE), b.sizes.num_kv_heads, BLOCK_SIZE, b.sizes.head_dim)
    return b.noise(*shape), b.noise(*shape)


def _qk_norm_rope_store(b: Bench, m: int) -> Iterator[OpCase]:
    s = b.sizes
    cos, sin, wide_cos, wide_sin = _angles(b, m)
    slots = torch.arange(m, device=b.device)
    block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE

    def kvik(qkv: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
        return ops.qk_norm_rope_store(qkv, cos, sin, slots, KVLayer(k, v), q_norm, k_norm, eps=_EPS)

    def in_torch(qkv: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
        heads = qkv.view(m, -1, s.head_dim).split_with_sizes([s.num_heads, s.num_kv_heads, s.num_kv_heads], 1)
        shape = (s.head_dim,)
        k[block, :, offset] = _rotated(F.rms_norm(heads[1], shape, k_norm, _EPS), wide_cos, wide_sin)
        v[block, :, offset] = heads[2]
        return _rotated(F.rms_norm(heads[0], shape, q_norm, _EPS), wide_cos, wide_sin)

    inputs = (b.noise(m, s.qkv_size), *_cache(b, m), b.noise(s.head_dim), b.noise(s.head_dim))
    shape = f"[{m}, {s.num_heads}+2x{s.num_kv_heads}, {s.head_dim}]"
    yield b.case("qk_norm_rope_store", m, shape, inputs, 2 * m * s.qkv_size, kvik, in_torch)


def _paged_attention(b: Bench, m: int) -> Iterator[OpCase]:
    """m sequences that decode, CONTEXT tokens each. torch has to gather the blocks first."""
    s = b.sizes
    if m > b.most_sequences:
        return
    blocks = CONTEXT // BLOCK_SIZE
    tables = torch.randperm(m * blocks, device=b.device).view(m, blocks)
    batch = ops.PagedBatch([1] * m, [CONTEXT] * m, tables)

    def in_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (cache[tables].transpose(1, 2).reshape(m, s.num_kv_heads, CONTEXT, s.head_dim) for cache in (k, v))
        return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True)

    inputs = (b.noise(m, s.num_heads, s.head_dim), *_cache(b, m * CONTEXT))
    moved = 2 * m * CONTEXT * s.num_kv_heads * s.head_dim + 2 * m * s.q_size
    yield b.case(
        "paged_attention", m, f"{m} x 1 of {CONTEXT}, {s.num_heads}/{s.num_kv_heads} heads of {s.head_dim}", inputs,
        moved, lambda q, k, v: ops.paged_attention(q, KVLayer(k, v), batch), in_torch, 4 * m * CONTEXT * s.q_size,
    )  # fmt: skip


def _self_attention(b: Bench, m: int) -> Iterator[OpCase]:
    """One sequence: all of its m tokens; of one token, a query over CONTEXT keys."""
    s = b.sizes
    keys = m if m > 1 else CONTEXT
    causal = m > 1

    def in_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    inputs = (b.noise(m, s.num_heads, s.head_dim), *(b.noise(keys, s.num_kv_heads, s.head_dim) for _ in "kv"))
    pairs = m * (m + 1) // 2 if causal else keys
    yield b.case(
        "self_attention", m, f"{m} of {keys}, {s.num_heads}/{s.num_kv_heads} heads of {s.head_dim}", inputs,
        2 * m * s.q_size + 2 * keys * s.num_kv_heads * s.head_dim, ops.self_attention, in_torch, 4 * pairs * s.q_size,
    )  # fmt: skip


def _sample(b: Bench, m: int) -> Iterator[OpCase]:
    """Temperature and top-p. torch sorts; its multinomial would wait for the GPU."""
    if m > b.most_sequences:
        return
    v = b.sizes.vocab

    def in_torch(logits: Tensor) -> Tensor:
        probs, ids = torch.softmax(logits.float() / 0.7, -1).sort(-1, descending=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= 0.9, 0)
        best = (probs / torch.empty_like(probs).exponential_()).argmax(-1, keepdim=True)
        return ids.gather(1, best)

    yield b.case(
        "sample", m, f"[{m}, {v}], top_p 0.9", (b.noise(m, v) * v**0.5,), m * v,
        lambda logits: ops.sample(logits, temperature=0.7, top_p=0.9, seed=1), in_torch,
    )  # fmt: skip


OPERATORS: dict[str, Builder] = {
    "add": _add,
    "argmax": _argmax,
    "embedding": _embedding,
    "linear": _linear,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "self_attention": _self_attention,
    "swiglu": _swiglu,
    "add_rms_norm": _add_rms_norm,
    "silu_mul": _silu_mul,
    "norm_linear": _norm_linear,
    "linear_add": _linear_add,
    "norm_linear_swiglu": _norm_linear_swiglu,
    "qk_norm_rope_store": _qk_norm_rope_store,
    "paged_attention": _paged_attention,
    "sample": _sample,
}
"""In the order in which they are shown: the classical ones, then what an engine fuses and needs beside them."""
