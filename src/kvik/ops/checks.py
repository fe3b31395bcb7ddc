"""Checks of arguments: a ConfigError that names the operator and the argument, says what was given, and what would fit.

Nothing here reads a tensor's elements on a GPU, which would have to wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvik.errors import ConfigError

__all__ = ["DTYPES", "check_alike", "check_below", "check_floating", "check_integers", "check_matrix", "check_shape"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_floating(op: str, name: str, tensor: Tensor, min_dims: int = 1) -> None:
    """`tensor` has one of the types that the kernels compute in, and at least `min_dims` dimensions."""
    if tensor.dtype not in DTYPES:
        raise ConfigError(f"{op}: {name} must be float32, bfloat16 or float16, got {_dtype(tensor)}; convert it first")
    if tensor.dim() < min_dims:
        raise ConfigError(f"{op}: {name} needs at least {min_dims} dimensions, got {list(tensor.shape)}")


def check_integers(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """`tensor` holds int32 or int64, on the device of `like`."""
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ConfigError(f"{op}: {name} must be int64 or int32, got {_dtype(tensor)}; convert it with .long()")
    if tensor.device != like.device:
        raise ConfigError(f"{op}: {name} is on {tensor.device} and the other tensors are on {like.device}; move one")


def check_alike(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """`tensor` has the type and the device of `like`."""
    if tensor.dtype != like.dtype:
        got, want = _dtype(tensor), _dtype(like)
        raise ConfigError(f"{op}: {name} is {got} and {like_name} is {want}; convert one of them with .to")
    if tensor.device != like.device:
        got, want = str(tensor.device), str(like.device)
        raise ConfigError(f"{op}: {name} is on {got} and {like_name} is on {want}; move one of them with .to")


def check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int], why: str) -> None:
    """`tensor` has `shape`; `why` says what follows it, as in "for x [4, 16]"."""
    if tuple(tensor.shape) != tuple(shape):
        raise ConfigError(f"{op}: {name} must be {list(shape)} {why}, got {list(tensor.shape)}")


def check_matrix(op: str, name: str, tensor: Tensor, sides: str) -> None:
    """`tensor` has two dimensions, which `sides` names."""
    if tensor.dim() != 2:
        raise ConfigError(f"{op}: {name} must be {sides}, got {list(tensor.shape)}")


def check_below(op: str, name: str, tensor: Tensor, bound: int, what: str) -> None:
    """On the CPU, where it costs little: every element is in [0, bound)."""
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return
    low, high = (int(value) for value in tensor.aminmax())
    if low < 0 or high >= bound:
        raise ConfigError(f"{op}: {name} holds {low if low < 0 else high}; {what}, so it must lie in [0, {bound})")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
