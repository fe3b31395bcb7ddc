"""`TritonOps`: the operations of a decoder block on a GPU, each by the kernel that the table names for its shape.

Outputs and partial sums are allocated by torch, from a CUDA graph's own pool while one is captured; sizes that change
between replays of a graph are only ever contents of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvik.kernels.api import KVLayer, LinearWeight
from kvik.kernels.triton import embedding, gemv, qk_norm_rope_store, rms_norm, silu_mul, skinny, sum_parts
from kvik.kernels.triton.dispatch import BUCKETS, Case, Norm, Plan, RowPlan, Table, load_table
from kvik.kernels.triton.features import Features

__all__ = ["Parts", "TritonOps"]

_ROWS_WHEN_DETERMINISTIC = BUCKETS[0]


@dataclass(slots=True, eq=False)
class Parts:
    """The result of a projection that split K, before it is added up: by the kernel that reads it next.

    The result is `parts` [split_k, num_tokens, n] fp32 in that order, plus `bias` [n], rounded, plus `residual`,
    rounded again.
    """

    parts: Tensor | None  # until they have been added up
    dtype: torch.dtype  # of the result
    bias: Tensor | None
    residual: Tensor | None = None
    total: Tensor | None = None  # from then on

    def held(self) -> Tensor:
        assert self.parts is not None, "parts are read once"
        return self.parts


class TritonOps:
    """`kvik.kernels.api.Ops` in Triton, rounding where `ReferenceOps` does; results of rows also into `out`.

    Where a projection goes to the vendor's library, a residual is added before the result is rounded, not after.

    deterministic: a row's result does not depend on the rows beside it. Every projection then takes the path and the
    split of K that the table's deterministic rules name for (n, k, dtype), whatever the number of tokens is; wgmma adds
    up a row in the same order in every tile that the rules name.
    defer: `norm_linear` and `linear_add` may return `Parts`, for which their neighbours in a decoder block have a use:
    `qk_norm_rope_store`, and the norms and `linear_add`'s residual. Otherwise every result is a tensor.
    features: what the GPU has; None: what `device` has.
    """

    def __init__(
        self, device: torch.device, *, table: Table | None = None, deterministic: bool = False,
        defer: bool = False, features: Features | None = None,
    ) -> None:  # fmt: skip
        self._table = table or load_table(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
        self._deterministic, self._defer = deterministic, defer
        self._pdl, self._hopper, self._shared_bytes = Features.of(device) if features is None else features
        # What the table said, because asking it takes longer than some kernels run.
        self._plans: dict[tuple[str, int, int, int, torch.dtype], Plan] = {}
        self._row_plans: dict[tuple[str, int, int, torch.dtype], RowPlan] = {}

    def embedding(self, input_ids: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        size = weight.shape[1]
        out = weight.new_empty((len(input_ids), size)) if out is None else out
        if len(out):
            embedding.embedding(input_ids, weight, self._row_plan("embedding", out, size), out, pdl=self._pdl)
        return out

    def rms_norm(self, x: Tensor | Parts, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
        if isinstance(x, Parts):
            return self._sum_norm(x, weight, eps)
        out = torch.empty_like(x) if out is None else out
        if x.numel():
            plan = self._row_plan("rms_norm", x, x.shape[-1])
            rms_norm.rms_norm(x, weight, eps, plan, out, pdl=self._pdl)
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float,
        *, out: Tensor | None = None, total: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(rms_norm(x + residual), x + residual): what follows a sum that no projection made, as an all-reduce does."""
        out, total = (torch.empty_like(x) if buffer is None else buffer for buffer in (out, total))
        if x.numel():
            plan = self._row_plan("rms_norm", x, x.shape[-1])
            rms_norm.add_rms_norm(x, residual, weight, eps, plan, out, total, pdl=self._pdl)
        return out, total

    def silu_mul(self, gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
        """silu(gate) * up of [gate | up] [num_tokens, 2 * size] -> [num_tokens, size]."""
        size = gate_up.shape[1] // 2
        out = gate_up.new_empty((len(gate_up), size)) if out is None else out
        if len(out):
            silu_mul.silu_mul(gate_up, self._row_plan("silu_mul", out, size), out, pdl=self._pdl)
        return out

    def linear(self, x: Tensor, w: LinearWeight) -> Tensor:
        return self._summed(self._project("linear", x, w))

    def norm_linear(self, x: Tensor | Parts, norm_weight: Tensor, eps: float, w: LinearWeight) -> Tensor | Parts:
        result = self._project("norm_linear", x, w, norm=Norm(norm_weight, eps))
        return result if self._defer else self._summed(result)

    def linear_add(self, x: Tensor, w: LinearWeight, residual: Tensor | Parts) -> Tensor | Parts:
        if isinstance(residual, Parts):
            assert residual.total is not None, "a residual has been normalised before it is added"
            residual = residual.total
        result = self._project("linear_add", x, w, residual=residual)
        return result if self._defer else self._summed(result)

    def norm_linear_swiglu(self, x: Tensor | Parts, norm_weight: Tensor, eps: float, w: LinearWeight) -> Tensor:
        return self._summed(self._project("norm_linear_swiglu", x, w, norm=Norm(norm_weight, eps)))

    def qk_norm_rope_store(
        self,
        qkv: Tensor | Parts,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        kv: KVLayer,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """As the protocol says; and a token whose slot is negative writes nothing (padding rows of a CUDA graph)."""
        assert kv.k_scale is None, "an int8 cache has no Triton kernel yet"
        dtype, bias = qkv.dtype, qkv.bias if isinstance(qkv, Parts) else None
        qkv = qkv.held() if isinstance(qkv, Parts) else qkv
        num_kv_heads, _, head_dim = kv.k.shape[1:]
        num_heads = qkv.shape[-1] // head_dim - 2 * num_kv_heads
        out = qkv.new_empty((qkv.shape[-2], num_heads, head_dim), dtype=dtype) if out is None else out
        if len(out):
            plan = self._row_plan("qk_norm_rope_store", out, head_dim)
            qk_norm_rope_store.qk_norm_rope_store(
                qkv, cos, sin, slots, kv.k, kv.v, q_norm, k_norm, eps, plan, out, bias=bias, pdl=self._pdl
            )
        return out

    def _sum_norm(self, x: Parts, weight: Tensor, eps: float) -> Tensor:
        """The norm of what `x` adds up to, which is kept in `x.total`."""
        parts = x.held()
        out, total = (torch.empty(parts.shape[1:], dtype=x.dtype, device=parts.device) for _ in range(2))
        plan = self._row_plan("rms_norm", out, out.shape[1])
        rms_norm.sum_rms_norm(parts, x.bias, x.residual, weight, eps, plan, out, total, pdl=self._pdl)
        x.parts, x.total = None, total
        return out

    def _summed(self, x: Tensor | Parts) -> Tensor:
        if isinstance(x, Tensor):
            return x
        parts = x.held()
        out = torch.empty(parts.shape[1:], dtype=x.dtype, device=parts.device)
        plan = self._row_plan("sum_parts", out, out.shape[1])
        return sum_parts.sum_parts(parts, x.bias, x.residual, plan, out, pdl=self._pdl)

    def _row_plan(self, op: str, x: Tensor, size: int) -> RowPlan:
        key = op, _ROWS_WHEN_DETERMINISTIC if self._deterministic else len(x), size, x.dtype
        plan = self._row_plans.get(key)
        if plan is None:
            case = Case(op, key[1], size, size, str(x.dtype).removeprefix("torch."))
            plan = self._row_plans[key] = self._table.row_plan(case)
        return plan

    def _plan(self, op: str, m: int, n: int, k: int, dtype: torch.dtype) -> Plan:
        key = op, m, n, k, dtype
        plan = self._plans.get(key)
        if plan is None:
            case = Case(op, m, n, k, str(dtype).removeprefix("torch."))
            # What TMA can address; and gates and ups lie in turns of 8 rows.
            hopper = self._hopper and dtype.itemsize == 2 and n % 8 == k % 8 == 0
            plan = self._table.plan(case, deterministic=self._deterministic, hopper=hopper)
            rows = plan.block_n * (2 if op == "norm_linear_swiglu" else 1) + plan.block_t
            step_bytes = rows * plan.block_k * dtype.itemsize
            plan = self._plans[key] = plan.fitting(self._shared_bytes, step_bytes, tma=self._pdl)
        return plan

    def _project(
        self, op: str, x: Tensor | Parts, w: LinearWeight, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor | Parts:
        swiglu = op == "norm_linear_swiglu"
        m, k = x.shape if isinstance(x, Tensor) else x.held().shape[1:]
        n = w.weight.shape[0] // (2 if swiglu else 1)
        if m == 0:
            return w.weight.new_empty((m, n))
        plan = self._plan(op, m, n, k, w.weight.dtype)
        if norm is not None and (plan.path != "gemv" or isinstance(x, Parts)):
            x, norm = self.rms_norm(x, norm.weight, norm.eps), None
        assert isinstance(x, Tensor), "only a norm reads parts"
        path = plan.path
        if path == "hopper" and (x.data_ptr() | w.weight.data_ptr()) % 16:
            path = "blas"  # TMA has no address for it
        if path == "blas":
            if residual is not None:
                return _blas_add(x, w, residual)
            result = F.linear(x, w.weight, w.bias)
            return self.silu_mul(result) if swiglu else result
        if path == "gemv":
            out = x.new_empty((m, n))
            return gemv.gemv(x, w, plan, out, norm=norm, residual=residual, swiglu=swiglu, pdl=self._pdl)
        if path == "hopper":
            from kvik.kernels.triton.linear_hopper import linear_hopper  # needs a Triton that has Gluon

            result = linear_hopper(x, w, plan, residual=residual, swiglu=swiglu, pdl=self._pdl)
        else:
            result = skinny.skinny(x, w, plan, residual=residual, swiglu=swiglu, pdl=self._pdl, tma=self._pdl)
        return result if result.dim() == 2 else Parts(result, x.dtype, w.bias, residual)


def _blas_add(x: Tensor, w: LinearWeight, residual: Tensor) -> Tensor:
    """residual += x @ weight.T + bias. In place, because torch copies a residual that is to stay."""
    residual.addmm_(x, w.weight.t())
    return residual if w.bias is None else residual.add_(w.bias)
