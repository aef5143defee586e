"""Checks of a group's options. Each error is a sentence that names the option and what it got."""

import math
from typing import Any

from torch import Tensor

Group = dict[str, Any]


def number(group: Group, name: str, *, positive: bool = False) -> None:
    value = group[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number, got {value!r}")
    if not (0 < value < math.inf if positive else 0 <= value < math.inf):
        raise ValueError(f"`{name}` must be {'positive' if positive else 'at least 0'}, got {value}")


def whole(group: Group, name: str) -> None:
    value = group[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}")


def decays(group: Group, name: str) -> None:
    pair = group[name]
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(b, int | float) and 0 <= b < 1 for b in pair)):
        raise ValueError(f"`{name}` must be two numbers in [0, 1), got {pair!r}")


def decay(group: Group, name: str) -> None:
    value = group[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"`{name}` must be a number in [0, 1), got {value!r}")


def step(group: Group, name: str) -> None:
    value = group[name]
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1):
        raise ValueError(f"`{name}` must be None or a number in (0, 1), got {value!r}")


def batch_size(group: Group) -> None:
    value = group["batch_size"]
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"`batch_size` as a tensor must have one element, got shape {tuple(value.shape)}")
    elif not callable(value):
        number(group, "batch_size", positive=True)


def choice(group: Group, name: str, allowed: tuple[Any, ...]) -> None:
    if group[name] not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(str, allowed))}, got {group[name]!r}")


def learning_rate(group: Group) -> None:
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        number(group, "lr")
    elif lr.numel() != 1 or not lr.is_floating_point():
        raise ValueError(f"`lr` as a tensor must have one element, a real number, got {lr.dtype} of shape {tuple(lr.shape)}")


def parts(group: Group) -> None:
    """How a fused weight is cut."""
    sizes, heads = group["split_sizes"], group["num_heads"]
    for name, value in (("split_sizes", sizes or []), ("num_heads", [heads or 1] if isinstance(heads, int) else heads or [])):
        listed = isinstance(value, tuple | list)
        if not listed or not all(isinstance(x, int) and not isinstance(x, bool) and x >= 1 for x in value):
            raise ValueError(f"`{name}` must be positive integers, got {group[name]!r}")


def per_axis(group: Group) -> None:
    choice(group, "per_axis", (True, False))
    cuts = {name: group[name] for name in ("split_sizes", "num_heads", "conv") if group[name]}
    if group["per_axis"] and cuts:
        raise ValueError(f"`per_axis=True` keeps a factor for each axis of a parameter, and does not cut it: got {cuts}")
