"""How a parameter is cut into matrices, and how matrices of one shape come together."""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from spectral_ops.reference import accumulation_dtype, block
from spectral_ops.workspace import Workspace, serves

Group = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """Rows `start … start + length` of a parameter, as `count` matrices of `n × m`. `lead` is `(count,)` or `()`.

    `dims` are the axes that have a factor each: `(n, m)`, or those of the whole parameter that are longer than 1, of which `n`
    is then the first.
    """

    parameter: Tensor
    start: int
    length: int
    lead: tuple[int, ...]
    n: int
    m: int
    suffix: str
    index: int  # of the parameter in the optimizer
    dims: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.lead)

    @property
    def alone(self) -> bool:
        """Whether it is one matrix, and the whole parameter."""
        return self.count == 1 and self.length == rows_of(self.parameter)

    @property
    def grad(self) -> Tensor:
        assert self.parameter.grad is not None  # parameters without one are not in a batch
        return self.parameter.grad

    @property
    def has_grad(self) -> bool:
        return self.parameter.grad is not None

    @property
    def grad_dtype(self) -> torch.dtype:
        return self.grad.dtype

    @property
    def holder(self) -> Tensor:
        """The parameter whose state this piece's is."""
        return self.parameter

    @property
    def followers(self) -> tuple[Tensor, ...]:
        """Parameters whose state is in another's."""
        return ()

    @property
    def numbers(self) -> Tensor:
        """Which matrices of the piece these are: all, in order."""
        return torch.arange(self.count, device=self.parameter.device)

    def before(self, number: int) -> int:
        """How many of these come before a matrix of the piece."""
        return min(max(number, 0), self.count)

    def on_meta(self) -> "Piece":
        """The same without data."""
        return replace(self, parameter=on_meta(self.parameter))

    def rows(self, x: Tensor) -> Tensor:
        """This piece's part of a tensor shaped like the parameter: a view, whatever the strides."""
        return x if self.length == rows_of(x) else x.narrow(0, self.start, self.length)

    def matrices(self, x: Tensor) -> Tensor:
        """The same as `(count, n, m)`: a view if `x` is contiguous, else a copy."""
        return self.rows(x).reshape(-1, self.n, self.m)

    def parts(self) -> list[Tensor]:
        """The parameter's matrices, `(count, n, m)`; of several parameters, each one's columns of them."""
        return [self.matrices(self.parameter)]

    def copy_grad(self, target: Tensor) -> None:
        """Write the gradient to `(count, n, m)`."""
        target.copy_(self.matrices(self.grad))

    def store(self, parts: list[Tensor]) -> None:
        """Write them back, where they are a copy."""
        if not self.parameter.is_contiguous():
            rows = self.rows(self.parameter)
            rows.copy_(parts[0].view(rows.shape))


@dataclass(frozen=True)
class Joint(Piece):
    """Several parameters as one vector, of which `parameter` is a copy. The first one holds the state. Those without a gradient
    have one of zeros, and are not changed."""

    parameters: tuple[Tensor, ...]
    gradient: Tensor | None

    @property
    def grad(self) -> Tensor:
        assert self.gradient is not None  # as of a piece of one parameter
        return self.gradient

    @property
    def has_grad(self) -> bool:
        return self.gradient is not None

    @property
    def holder(self) -> Tensor:
        return self.parameters[0]

    @property
    def followers(self) -> tuple[Tensor, ...]:
        return self.parameters[1:]

    def store(self, parts: list[Tensor]) -> None:
        for p, part in zip(self.parameters, parts[0].view(-1).split([p.numel() for p in self.parameters]), strict=True):
            if p.grad is not None:
                p.copy_(part.view_as(p))


@dataclass(frozen=True)
class Columns(Piece):
    """A layer's weight with its bias as the last column. The weight holds the state. What has no gradient has one of zeros, and
    is not changed."""

    bias: Tensor

    @property
    def grad(self) -> Tensor:
        g = torch.empty(1, self.n, self.m, dtype=self.grad_dtype, device=self.parameter.device)
        self.copy_grad(g)
        return g[0]

    def copy_grad(self, target: Tensor) -> None:
        for columns, p in zip(target[0].split([self.m - 1, 1], 1), (self.parameter, self.bias), strict=True):
            if p.grad is None:
                columns.zero_()
            else:
                columns.copy_(p.grad.reshape(columns.shape))

    @property
    def has_grad(self) -> bool:
        return any(p.grad is not None for p in (self.parameter, self.bias))

    @property
    def grad_dtype(self) -> torch.dtype:
        return next(p.grad.dtype for p in (self.parameter, self.bias) if p.grad is not None)

    @property
    def followers(self) -> tuple[Tensor, ...]:
        return (self.bias,)

    def parts(self) -> list[Tensor]:
        both = self.parameter, self.bias
        return [p.reshape(1, self.n, -1) if p.grad is not None else p.clone().view(1, self.n, -1) for p in both]

    def store(self, parts: list[Tensor]) -> None:
        if self.parameter.grad is not None and not self.parameter.is_contiguous():
            self.parameter.copy_(parts[0].view(self.parameter.shape))


@dataclass(frozen=True)
class Owned(Piece):
    """Those matrices of a piece, by their numbers in it, that this rank computes, of a parameter that other ranks have, too."""

    own: tuple[int, ...]

    @property
    def numbers(self) -> Tensor:
        return torch.tensor(self.own, dtype=torch.int64, device=self.parameter.device)

    def before(self, number: int) -> int:
        return bisect_left(self.own, number)


def owned(piece: Piece, own: tuple[int, ...]) -> Owned:
    given = {each.name: getattr(piece, each.name) for each in fields(piece)}
    return Owned(**given | {"lead": (len(own),), "own": own})


def pieces(p: Tensor, group: Group, index: int = 0) -> Iterator[Piece]:
    """Cut a parameter into pieces by the group's `conv`, `split_sizes`, `num_heads` and `per_axis`."""
    shape = tuple(p.shape)
    if group.get("per_axis"):
        yield whole(p, index, tuple(size for size in shape if size != 1) or (1,))
        return
    is_conv = group["conv"] if group["conv"] is not None else p.ndim > 3
    if p.ndim > 2 and not is_conv:
        n, m = shape[-2:]
        yield Piece(p, 0, shape[0], (math.prod(shape[:-2]),), n, m, "", index, (n, m))
        return
    rows, m = shape[0], math.prod(shape[1:])
    sizes = group["split_sizes"] or [rows]
    heads = group["num_heads"] or 1
    heads = [heads] * len(sizes) if isinstance(heads, int) else list(heads)
    if sum(sizes) != rows or len(heads) != len(sizes) or any(s % h for s, h in zip(sizes, heads, strict=False)):
        raise ValueError(
            f"split_sizes={group['split_sizes']} and num_heads={group['num_heads']} do not divide the {rows} rows "
            f"of a parameter of shape {shape}"
        )
    if len(set(zip(sizes, heads, strict=True))) == 1:  # equal parts: one piece
        count = len(sizes) * heads[0]
        n = rows // count
        yield Piece(p, 0, rows, (count,) if count > 1 else (), n, m, "", index, (n, m))
        return
    start = 0
    for i, (size, h) in enumerate(zip(sizes, heads, strict=True)):
        n = size // h
        yield Piece(p, start, size, (h,) if h > 1 else (), n, m, f"_{i}", index, (n, m))
        start += size


def whole(p: Tensor, index: int, dims: tuple[int, ...]) -> Piece:
    """A parameter as one tensor of `dims`."""
    return Piece(p, 0, rows_of(p), (), dims[0], math.prod(dims[1:]), "", index, dims)


def joint(parameters: list[Tensor], index: int) -> Joint:
    """Parameters as one vector; `index` is that of the first."""
    vector = torch.cat([p.detach().reshape(-1) for p in parameters])
    gradient = None
    if any(p.grad is not None for p in parameters):
        gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
    n = len(vector)
    return Joint(vector, 0, n, (), n, 1, "", index, (n,), tuple(parameters), gradient)


def layer(weight: Tensor, bias: Tensor | None, index: int) -> Piece:
    """A layer's parameters as one matrix `(out, in)`; `index` is that of the weight."""
    n, m = weight.shape[0], math.prod(weight.shape[1:])
    if bias is None:
        return Piece(weight, 0, n, (), n, m, "", index, (n, m))
    return Columns(weight, 0, n, (), n, m + 1, "", index, (n, m + 1), bias)


def rows_of(p: Tensor) -> int:
    return p.shape[0] if p.ndim else 1


def on_meta(p: Tensor) -> Tensor:
    """A parameter's shape and dtype, without data; of one that is sharded the whole."""
    return torch.empty(p.shape, dtype=p.dtype, device="meta")


def is_sharded(p: Tensor) -> bool:
    """Whether it is a DTensor; asking for the class would import what most programs have no use for."""
    return hasattr(p, "placements")


def mesh_of(p: Tensor) -> Any:
    return p.device_mesh if is_sharded(p) else None  # type: ignore[attr-defined]


def local(p: Tensor) -> Tensor:
    """What this rank has of it."""
    return p.to_local() if is_sharded(p) else p  # type: ignore[attr-defined]


workspace = Workspace()


def gathered(classes: dict[Any, list[Piece]]) -> Iterator[tuple[Any, list[Piece], Tensor]]:
    """Each class with a copy of its gradients `(b, n, m)`, to be used before the next. Those of one dtype and device are copied
    together, in one launch."""
    kinds: dict[Any, list[Any]] = {}
    for key, members in classes.items():
        if isinstance(members[0], Columns) or serves(members[0].parameter.detach()):
            yield key, members, _copied(members)
        else:
            kinds.setdefault((members[0].grad_dtype, members[0].parameter.device), []).append(key)
    for keys in kinds.values():
        flat = torch.cat([piece.rows(piece.grad).reshape(-1) for key in keys for piece in classes[key]])
        sizes = [sum(piece.count * piece.n * piece.m for piece in classes[key]) for key in keys]
        for key, g in zip(keys, flat.split(sizes), strict=True):
            yield key, classes[key], g.view(-1, classes[key][0].n, classes[key][0].m)


def _copied(members: list[Piece]) -> Tensor:
    """The gradients of a class, one after the other."""
    first, shape = members[0], (sum(piece.count for piece in members), members[0].n, members[0].m)
    if serves(first.parameter.detach()):
        (g,) = workspace.tensors(1, shape, first.grad_dtype)
    else:
        g = torch.empty(shape, dtype=first.grad_dtype, device=first.parameter.device)
    for piece, part in zip(members, g.split([piece.count for piece in members]), strict=True):
        piece.copy_grad(part)
    return g


def shares(classes: dict[Any, list[Piece]]) -> dict[int, Tensor]:
    """For each parameter of several matrices, by its index, a number to add to its gradient: 0, or NaN where the gradient or
    its square is not finite, so that all its matrices skip a step together."""
    several = {piece.index: piece.grad for members in classes.values() for piece in members if not piece.alone}
    numbers: dict[int, Tensor] = {}
    for dtype in {g.dtype for g in several.values()}:
        mine = [(index, g) for index, g in several.items() if g.dtype == dtype]
        norms = torch._foreach_norm([g for _, g in mine], 2, accumulation_dtype(dtype))
        numbers |= {index: norm.square() * 0 for (index, _), norm in zip(mine, norms, strict=True)}
    return numbers


def spread(numbers: dict[int, Tensor], members: list[Piece], g: Tensor) -> None:
    """Add them to the gradients `(b, n, m)` of a class, in place."""
    if any(piece.index in numbers for piece in members):
        none = g.new_zeros(())
        g += block(torch.cat([numbers.get(piece.index, none).to(g.dtype).expand(piece.count) for piece in members]))


def name_of(group: Group, i: int) -> str:
    """How errors call a parameter."""
    if "param_names" in group:
        return f"parameter {group['param_names'][i]!r}"
    return f"parameter {i} of shape {tuple(group['params'][i].shape)}"
