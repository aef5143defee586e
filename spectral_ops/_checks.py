"""Argument checks shared by the ops. Each error is a sentence that names the argument and what it got."""

import torch
from torch import Tensor

from spectral_ops.reference import accumulation_dtype

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tensor(value: object, name: str, op: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: `{name}` must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{op}: `{name}` must be float64, float32, bfloat16 or float16, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: `{name}` must be a dense tensor, got layout {value.layout}")
    return value


def matrix(value: object, name: str, op: str) -> Tensor:
    x = tensor(value, name, op)
    if x.ndim < 2:
        raise ValueError(f"{op}: `{name}` must have shape (..., rows, columns), got {tuple(x.shape)}")
    return x


def stack(value: object, name: str, op: str) -> Tensor:
    """Matrices with exactly one batch dimension."""
    x = matrix(value, name, op)
    if x.ndim != 3:
        raise ValueError(f"{op}: `{name}` must have shape (b, n, m), got {tuple(x.shape)}")
    return x


def square(value: object, name: str, op: str) -> Tensor:
    x = matrix(value, name, op)
    if x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{op}: `{name}` must have shape (..., n, n), got {tuple(x.shape)}")
    return x


def shaped(value: object, name: str, op: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A tensor of exactly `shape`, on the device of `like`."""
    x = tensor(value, name, op)
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{op}: `{name}` must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{op}: `{name}` must be on {like.device} like the other arguments, got {x.device}")
    return x


def scalars(value: float | Tensor, name: str, op: str, like: Tensor, batch: torch.Size) -> Tensor:
    """A number, or one for each matrix of the batch, as a tensor in the accumulation dtype of `like`.

    A number becomes a filled tensor, not a copied one: the copy would be a host-to-device transfer.
    """
    dtype = accumulation_dtype(like.dtype)
    if isinstance(value, Tensor):
        x = tensor(value, name, op)
        if x.ndim and x.shape != batch:
            raise ValueError(f"{op}: `{name}` must be a number or have shape {tuple(batch)}, got {tuple(x.shape)}")
        if x.device != like.device:
            raise ValueError(f"{op}: `{name}` must be on {like.device} like the other arguments, got {x.device}")
        return x.to(dtype)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: `{name}` must be a number or a tensor, got {type(value).__name__}")
    return torch.full((), value, dtype=dtype, device=like.device)


def mask(value: object, name: str, op: str, like: Tensor) -> None:
    """A bool for each matrix of `like`, `(b, n, m)`."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.shape != like.shape[:1]:
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{op}: `{name}` must be bool of shape {tuple(like.shape[:1])}, got {got}")


def counter(value: object, name: str, op: str, like: Tensor, dtype: torch.dtype, size: int | None = None) -> None:
    """One number for each matrix of `like`, or `size` of them, on its device."""
    size = len(like) if size is None else size
    if isinstance(value, Tensor) and (value.dtype, value.numel(), value.device) == (dtype, size, like.device):
        return
    got = type(value).__name__
    if isinstance(value, Tensor):
        got = f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
    raise ValueError(f"{op}: `{name}` must hold {size} {dtype} on {like.device}, got {got}")


def choice(value: object, name: str, op: str, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: `{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def not_negative(value: float, name: str, op: str) -> None:
    if not value >= 0:
        raise ValueError(f"{op}: `{name}` must be at least 0, got {value}")


def seeds(value: int | Tensor, op: str, like: Tensor, batch: torch.Size) -> Tensor:
    """One int64 seed for each matrix of the batch; matrix `i` of a batch with one seed gets `seed + i`."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or (value.ndim and value.shape != batch):
            raise ValueError(
                f"{op}: `seed` must be an int or an int64 tensor of shape {tuple(batch)}, "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
        if value.ndim:
            return value
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: `seed` must be an int or an int64 tensor, got {type(value).__name__}")
    return torch.arange(batch.numel(), device=like.device).view(batch) + value
