"""`TritonOps`: the operations of a decoder block on a GPU, each by the kernel that the table names for its shape.

Outputs and partial sums are allocated by torch, from a CUDA graph's own pool while one is captured; sizes that change
between replays of a graph are only ever contents of tensors. The only tensor held is a row of counters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvik.kernels.api import KVLayer, LinearWeight
from kvik.kernels.triton import embedding, gemv, qk_norm_rope_store, rms_norm, silu_mul, skinny
from kvik.kernels.triton.dispatch import BUCKETS, Case, Norm, Plan, RowPlan, Table, load_table

__all__ = ["TritonOps", "supports_pdl"]

_HOPPER = (9, 0)
_ROWS_WHEN_DETERMINISTIC = BUCKETS[0]
_COUNTERS = 1 << 14  # output tiles of one projection whose K is split


def supports_pdl(device: torch.device) -> bool:
    """Whether kernels can overlap their predecessors there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HOPPER


class TritonOps:
    """`kvik.kernels.api.Ops` in Triton, rounding where `ReferenceOps` does; results of rows also into `out`.

    Where a projection goes to the vendor's library, a residual is added before the result is rounded, not after.

    deterministic: a row's result does not depend on the rows beside it. Every projection then takes the path and the
    split of K that the table's deterministic rules name for (n, k, dtype), whatever the number of tokens is; wgmma adds
    up a row in the same order in every tile that the rules name.
    pdl: kernels overlap their predecessors (`kernels/triton/pdl.py`); None: where the GPU can, Hopper and newer.
    """

    def __init__(
        self, device: torch.device, *, table: Table | None = None, deterministic: bool = False, pdl: bool | None = None
    ) -> None:
        self._table = table or load_table(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
        self._deterministic = deterministic
        self._pdl = supports_pdl(device) if pdl is None else pdl
        # What the table said, because asking it takes longer than some kernels run.
        self._plans: dict[tuple[str, int, int, int, torch.dtype], Plan] = {}
        self._row_plans: dict[tuple[str, int, int, torch.dtype], RowPlan] = {}
        self._arrivals = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)

    def embedding(self, input_ids: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        size = weight.shape[1]
        out = weight.new_empty((len(input_ids), size)) if out is None else out
        if len(out):
            embedding.embedding(input_ids, weight, self._row_plan("embedding", out, size), out, pdl=self._pdl)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
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
        return self._project("linear", x, w)

    def norm_linear(self, x: Tensor, norm_weight: Tensor, eps: float, w: LinearWeight) -> Tensor:
        return self._project("norm_linear", x, w, norm=Norm(norm_weight, eps))

    def linear_add(self, x: Tensor, w: LinearWeight, residual: Tensor) -> Tensor:
        return self._project("linear_add", x, w, residual=residual)

    def norm_linear_swiglu(self, x: Tensor, norm_weight: Tensor, eps: float, w: LinearWeight) -> Tensor:
        return self._project("norm_linear_swiglu", x, w, norm=Norm(norm_weight, eps))

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
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """As the protocol says; and a token whose slot is negative writes nothing (padding rows of a CUDA graph)."""
        assert kv.k_scale is None, "an int8 cache has no Triton kernel yet"
        num_kv_heads, _, head_dim = kv.k.shape[1:]
        num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
        out = qkv.new_empty((len(qkv), num_heads, head_dim)) if out is None else out
        if len(qkv):
            plan = self._row_plan("qk_norm_rope_store", out, head_dim)
            qk_norm_rope_store.qk_norm_rope_store(
                qkv, cos, sin, slots, kv.k, kv.v, q_norm, k_norm, eps, plan, out, pdl=self._pdl
            )
        return out

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
            plan = self._plans[key] = self._table.plan(case, deterministic=self._deterministic)
        return plan

    def _project(
        self, op: str, x: Tensor, w: LinearWeight, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        swiglu = op == "norm_linear_swiglu"
        m, k = x.shape
        n = w.weight.shape[0] // (2 if swiglu else 1)
        if m == 0:
            return x.new_empty((m, n))
        plan = self._plan(op, m, n, k, x.dtype)
        if norm is not None and plan.path != "gemv":
            x = self.rms_norm(x, norm.weight, norm.eps)
        if plan.path == "blas":
            if residual is not None:
                return _blas_add(x, w, residual)
            result = F.linear(x, w.weight, w.bias)
            return self.silu_mul(result) if swiglu else result
        out = x.new_empty((m, n))
        if plan.path == "gemv":
            return gemv.gemv(x, w, plan, out, norm=norm, residual=residual, swiglu=swiglu, pdl=self._pdl)
        return skinny.skinny(x, w, plan, out, self._arrivals, residual=residual, swiglu=swiglu, pdl=self._pdl)


def _blas_add(x: Tensor, w: LinearWeight, residual: Tensor) -> Tensor:
    """residual += x @ weight.T + bias. In place, because torch copies a residual that is to stay."""
    residual.addmm_(x, w.weight.t())
    return residual if w.bias is None else residual.add_(w.bias)
