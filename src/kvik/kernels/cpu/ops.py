"""The decoder's operations on the native kernels: how each becomes an entry of a tape, and `NativeOps`, which runs them
one at a time on torch tensors.

The kernels compute in fp32 between operations: what a tape passes on is never rounded to 16 bits, except the query
(to the type of a float KV cache), the keys and values, and what a projection multiplies (to the format of its weights).
`NativeOps` converts to fp32 and back, so that any single operation compares with `kvik.kernels.reference`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvik.errors import ConfigError
from kvik.kernels.api import KVLayer, LinearWeight
from kvik.kernels.cpu.native import OP_CODES, NativePool, OpStruct, StepStruct, data_pointer
from kvik.kernels.cpu.packing import TYPE_CODES, PackedLinear, pack_linear

__all__ = [
    "MAX_HEAD_DIM",
    "NativeOps",
    "attention_entry",
    "embed_entry",
    "linear_entry",
    "norm_entry",
    "query_dtype",
    "rope_entry",
]

MAX_HEAD_DIM = 512
ALL_TOKENS, LOGIT_ROWS = 0, -1
"""Values of an entry's `rows` that mean the step's counts; a positive one is the count itself."""


def embed_entry(y: Tensor, weight: Tensor | PackedLinear, rows: int) -> OpStruct:
    """y [rows, hidden_size] fp32 = rows of `weight` at the step's input_ids."""
    op = OpStruct(code=OP_CODES["embed"], y=data_pointer(y), width=y.shape[1], rows=rows)
    if isinstance(weight, PackedLinear):
        op.linear = _struct(weight)
    else:
        op.x, op.type = data_pointer(weight), _type_code(weight)
    return op


def norm_entry(x: Tensor, norm: Tensor, eps: float, y: Tensor | None, rows: int, *, gather: bool = False) -> OpStruct:
    """y [rows, features] = rms_norm of x, or with `gather` of its rows at the step's logit_indices."""
    code = OP_CODES["gather_norm" if gather else "norm"]
    return OpStruct(
        code=code, x=data_pointer(x), y=data_pointer(y), norm=data_pointer(norm), width=x.shape[1], eps=eps, rows=rows
    )


def linear_entry(
    x: Tensor,
    y: Tensor,
    w: PackedLinear,
    rows: int,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> OpStruct:
    """y [rows, out] = w(norm(x)) + residual; `y` may be `residual`. With a swiglu weight, out is half its features."""
    assert x.shape[1] == w.in_features, f"{w.in_features} features wanted, {x.shape[1]} given"
    op = OpStruct(code=OP_CODES["linear"], x=data_pointer(x), y=data_pointer(y), width=x.shape[1], eps=eps, rows=rows)
    op.linear, op.norm, op.residual = _struct(w), data_pointer(norm), data_pointer(residual)
    return op


def rope_entry(
    qkv: Tensor, q: Tensor, kv: KVLayer, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, rows: int
) -> OpStruct:
    """q [rows, num_heads * head_dim] of `query_dtype` from qkv fp32; stores k and v at the step's slots."""
    op = _cache_entry("rope_store", kv, q, q.shape[1] // kv.k.shape[3])
    op.x, op.y, op.width, op.eps, op.rows = data_pointer(qkv), data_pointer(q), qkv.shape[1], eps, rows
    op.norm, op.norm2 = data_pointer(q_norm), data_pointer(k_norm)
    return op


def attention_entry(q: Tensor, y: Tensor, kv: KVLayer, scale: float, window: int | None, num_heads: int) -> OpStruct:
    """y [tokens, num_heads * head_dim] fp32 from q of `query_dtype`, for the step's sequences."""
    op = _cache_entry("attention", kv, q, num_heads)
    op.x, op.y, op.scale, op.window = data_pointer(q), data_pointer(y), scale, window or 0
    return op


def query_dtype(kv: KVLayer, dtype: torch.dtype) -> torch.dtype:
    """The type of queries beside a cache, in a model of `dtype`: that of a float cache."""
    return dtype if kv.k.dtype is torch.int8 else kv.k.dtype


def _cache_entry(name: str, kv: KVLayer, q: Tensor, num_heads: int) -> OpStruct:
    num_kv_heads, block_size, head_dim = kv.k.shape[1:]
    if block_size % 16:
        raise ConfigError(f"kvcache_block_size must be a multiple of 16 for the native kernels, got {block_size}")
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise ConfigError(f"the native kernels need an even head_dim of at most {MAX_HEAD_DIM}, got {head_dim}")
    if kv.k.dtype not in (torch.float32, torch.bfloat16, torch.int8):
        raise ConfigError(f"the native kernels keep keys and values in float32, bfloat16 or int8, not {kv.k.dtype}")
    if q.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"the native kernels take queries in float32 or bfloat16, not {q.dtype}")
    assert q.dtype == query_dtype(kv, q.dtype)
    assert (kv.k.dtype is torch.int8) == (kv.k_scale is not None) == (kv.v_scale is not None)
    block_rows = kv.k.stride(0) // head_dim
    op = OpStruct(code=OP_CODES[name], type=_type_code(q), num_heads=num_heads, num_kv_heads=num_kv_heads)
    op.head_dim, op.block_size, op.block_rows = head_dim, block_size, block_rows
    op.k_cache, op.v_cache = (_cache_pointer(cache, block_rows * head_dim) for cache in (kv.k, kv.v))
    op.k_scales, op.v_scales = (_cache_pointer(scale, block_rows) for scale in (kv.k_scale, kv.v_scale))
    return op


def _cache_pointer(cache: Tensor | None, stride: int) -> int | None:
    """The address of a cache whose blocks are contiguous and `stride` elements apart; None for None."""
    if cache is None:
        return None
    assert cache.stride(0) == stride and cache[0].is_contiguous(), "a block must be contiguous, and k as far from v"
    return cache.data_ptr()


def _struct(w: PackedLinear) -> ctypes._Pointer:  # type: ignore[type-arg]
    assert w.struct is not None
    return ctypes.pointer(w.struct)


def _type_code(tensor: Tensor) -> int:
    if tensor.dtype not in TYPE_CODES:
        raise ConfigError(f"the native kernels take float32, bfloat16 and float16, not {tensor.dtype}")
    return TYPE_CODES[tensor.dtype]


class NativeOps:
    """`kvik.kernels.api.Ops` on the native kernels, one call each. Weights that are not packed are packed per call."""

    def __init__(self, pool: NativePool) -> None:
        self.pool = pool

    def embedding(self, input_ids: Tensor, weight: Tensor) -> Tensor:
        y = torch.empty((len(input_ids), weight.shape[1]))
        ids = input_ids.long().contiguous()
        self._run(embed_entry(y, weight.contiguous(), len(ids)), len(ids), StepStruct(input_ids=data_pointer(ids)))
        return y.to(weight.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide, norm = _rows(x), weight.float()
        y = torch.empty_like(wide)
        self._run(norm_entry(wide, norm, eps, y, len(wide)), len(wide))
        return y.view(x.shape).to(x.dtype)

    def linear(self, x: Tensor, w: LinearWeight) -> Tensor:
        return self._linear(x, w)

    def norm_linear(self, x: Tensor, norm_weight: Tensor, eps: float, w: LinearWeight) -> Tensor:
        return self._linear(x, w, norm=norm_weight, eps=eps)

    def linear_add(self, x: Tensor, w: LinearWeight, residual: Tensor) -> Tensor:
        return self._linear(x, w, residual=residual)

    def norm_linear_swiglu(self, x: Tensor, norm_weight: Tensor, eps: float, w: LinearWeight) -> Tensor:
        return self._linear(x, w, norm=norm_weight, eps=eps, swiglu=True)

    def qk_norm_rope_store(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        kv: KVLayer,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        num_kv_heads, _, head_dim = kv.k.shape[1:]
        wide = _rows(qkv)
        width = wide.shape[1] - 2 * num_kv_heads * head_dim
        q = torch.empty((len(wide), width), dtype=query_dtype(kv, qkv.dtype))
        angles = cos.float().contiguous(), sin.float().contiguous()
        norms = tuple(None if norm is None else norm.float() for norm in (q_norm, k_norm))
        places = slots.long().contiguous()
        step = StepStruct(cos=data_pointer(angles[0]), sin=data_pointer(angles[1]), slots=data_pointer(places))
        if len(wide):
            self._run(rope_entry(wide, q, kv, norms[0], norms[1], eps, len(wide)), len(wide), step)
        return q.view(len(wide), -1, head_dim).to(qkv.dtype)

    def attention(
        self,
        q: Tensor,
        kv: KVLayer,
        query_starts: Tensor,
        seq_lens: Tensor,
        block_tables: Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """`AttentionBackend.forward` on the tensors of a batch: q [num_tokens, num_heads, head_dim] -> the same."""
        queries = q.to(query_dtype(kv, q.dtype)).contiguous()
        y = torch.empty(q.shape)
        starts, lens, tables = (t.to(torch.int32).contiguous() for t in (query_starts, seq_lens, block_tables))
        step = StepStruct(num_tokens=len(q), num_seqs=len(lens), table_stride=tables.shape[1])
        step.query_starts, step.seq_lens, step.block_tables = map(data_pointer, (starts, lens, tables))
        self.pool.run_one(attention_entry(queries, y, kv, scale, window, q.shape[1]), step)
        return y.to(q.dtype)

    def argmax(self, x: Tensor) -> Tensor:
        """The first index of the maximum of each row of x [rows, features] -> [rows] int64."""
        wide = _rows(x)
        y = torch.empty(len(wide), dtype=torch.int64)
        op = OpStruct(code=OP_CODES["argmax"], x=data_pointer(wide), y=data_pointer(y), width=wide.shape[1])
        op.rows = len(wide)
        self._run(op, len(wide))
        return y

    def _linear(
        self,
        x: Tensor,
        w: LinearWeight,
        *,
        norm: Tensor | None = None,
        eps: float = 0.0,
        residual: Tensor | None = None,
        swiglu: bool = False,
    ) -> Tensor:
        packed = self._packed(w, swiglu)
        wide, added = _rows(x), None if residual is None else _rows(residual)
        y = torch.empty((len(wide), packed.out_features // (2 if swiglu else 1)))
        weight = None if norm is None else norm.float()
        self._run(linear_entry(wide, y, packed, len(wide), norm=weight, eps=eps, residual=added), len(wide))
        return y.to(x.dtype)

    def _packed(self, w: LinearWeight, swiglu: bool) -> PackedLinear:
        if isinstance(w, PackedLinear):
            assert w.swiglu == swiglu, "a weight is packed for SwiGLU or for a plain projection, not both"
            return w
        fmt = "bf16" if w.weight.dtype == torch.bfloat16 else "fp32"
        return pack_linear(w.weight, w.bias, fmt, pool=self.pool, swiglu=swiglu)

    def _run(self, op: OpStruct, rows: int, step: StepStruct | None = None) -> None:
        if rows:
            self.pool.run_one(op, step)


def _rows(x: Tensor) -> Tensor:
    return x.float().reshape(-1, x.shape[-1]).contiguous()
