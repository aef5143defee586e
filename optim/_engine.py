"""What all matrix optimizers share: which parameters are matrices, batches of equal shapes, AdamW for the rest, state.

A parameter is one or more *pieces*, each a view of shape `(count, n, m)`: a 2-D weight is one piece of count 1, a
stack of experts one of count E, a fused QKV weight as many as it has different shapes. Pieces of equal shape and dtype in a
parameter group are computed as one batch. State lives per parameter in `self.state[p]`, as views into the batch's stacks,
so that a step copies nothing and a checkpoint does not depend on how parameters were batched.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

import spectral_ops as ops
from spectral_ops.optim._routing import elementwise_name
from spectral_ops.reference import accumulation_dtype, block, raised

Group = dict[str, Any]
ALGORITHMS = (None, "matrix", "adamw")


@dataclass(frozen=True)
class Piece:
    """Rows `start … start + length` of a parameter, as `count` matrices of `n × m`. `lead` is `(count,)` or `()`."""

    parameter: Tensor
    start: int
    length: int
    lead: tuple[int, ...]
    n: int
    m: int
    suffix: str
    index: int  # of the parameter in the optimizer

    @property
    def count(self) -> int:
        return math.prod(self.lead)

    @property
    def grad(self) -> Tensor:
        assert self.parameter.grad is not None  # parameters without one are not in a batch
        return self.parameter.grad

    def rows(self, x: Tensor) -> Tensor:
        """This piece's part of a tensor shaped like the parameter: a view, whatever the strides."""
        return x if self.length == x.shape[0] else x.narrow(0, self.start, self.length)

    def matrices(self, x: Tensor) -> Tensor:
        """The same as `(count, n, m)`: a view if `x` is contiguous, else a copy."""
        return self.rows(x).reshape(-1, self.n, self.m)


@dataclass
class Batch:
    """Pieces of one shape: `grad` is `(b, n, m)`, as the parameters have it; `state` holds stacks of leading size `b`.

    `finite` marks, as `(b,)` bool, the gradients that are finite, and whose squares are: whoever updates the batch sets it.
    """

    pieces: list[Piece]
    grad: Tensor
    state: dict[str, Tensor]
    finite: Tensor

    def check(self) -> Tensor:
        """Set `finite`, and return which gradients are usable: finite and not zero."""
        norm = torch.linalg.vector_norm(self.grad, dim=(-2, -1), dtype=accumulation_dtype(self.grad.dtype))
        self.finite = norm < math.inf
        return self.finite & (norm > 0)

    def clean_grad(self) -> Tensor:
        """The gradient in the accumulation dtype, zero where it is not finite."""
        return torch.where(block(self.finite), raised(self.grad), 0)


def pieces(p: Tensor, group: Group, index: int = 0) -> Iterator[Piece]:
    """Cut a parameter into pieces by the group's `conv`, `split_sizes` and `num_heads`."""
    shape = tuple(p.shape)
    is_conv = group["conv"] if group["conv"] is not None else p.ndim > 3
    if p.ndim > 2 and not is_conv:
        yield Piece(p, 0, shape[0], (math.prod(shape[:-2]),), shape[-2], shape[-1], "", index)
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
        yield Piece(p, 0, rows, (count,) if count > 1 else (), rows // count, m, "", index)
        return
    start = 0
    for i, (size, h) in enumerate(zip(sizes, heads, strict=True)):
        yield Piece(p, start, size, (h,) if h > 1 else (), size // h, m, f"_{i}", index)
        start += size


def gathered(classes: dict[Any, list[Piece]]) -> Iterator[tuple[Any, list[Piece], Tensor]]:
    """Each class with its gradients `(b, n, m)`. All gradients of one dtype and device are copied together, in one launch."""
    kinds: dict[Any, list[Any]] = {}
    for key, members in classes.items():
        kinds.setdefault((members[0].grad.dtype, members[0].grad.device), []).append(key)
    for keys in kinds.values():
        flat = torch.cat([piece.rows(piece.grad).reshape(-1) for key in keys for piece in classes[key]])
        sizes = [sum(piece.count * piece.n * piece.m for piece in classes[key]) for key in keys]
        for key, g in zip(keys, flat.split(sizes), strict=True):
            yield key, classes[key], g.view(-1, classes[key][0].n, classes[key][0].m)


class MatrixOptimizer(Optimizer):
    """Base of the matrix optimizers. A subclass makes the state of a matrix and computes the update of a batch."""

    # Every parameter group carries these; a group of its own may override them.
    shared_defaults: ClassVar[dict[str, Any]] = {
        "algorithm": None,
        "conv": None,
        "split_sizes": None,
        "num_heads": None,
        "adamw_betas": (0.9, 0.95),
        "adamw_eps": 1e-8,
        "maximize": False,
        "step": 0,
    }

    def __init__(self, params: Any, defaults: dict[str, Any]):
        self._stacks: dict[Any, tuple[dict[str, Tensor], list[dict[str, Tensor]]]] = {}
        self._warned = False
        super().__init__(params, self.shared_defaults | defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stacks, self._warned = {}, False
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def add_param_group(self, param_group: Group) -> None:
        merged = self.defaults | param_group
        if merged["algorithm"] not in ALGORITHMS:
            raise ValueError(f"`algorithm` must be one of {ALGORITHMS}, got {merged['algorithm']!r}")
        self.check_options(merged)
        super().add_param_group(param_group)
        try:
            self._check_parameters(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_parameters(self, group: Group) -> None:
        if not group["params"]:
            raise ValueError(f"parameter group {len(self.param_groups) - 1} is empty")
        for i, p in enumerate(group["params"]):
            if not p.is_floating_point():
                raise TypeError(f"{type(self).__name__}: {name_of(group, i)} is {p.dtype}; only real floating-point works")
            if self._is_matrix(group, i):
                list(pieces(p, group))  # raises where the group's split does not fit

    # What a subclass provides -----------------------------------------------------------------------------------------

    def check_options(self, group: Group) -> None:
        """Raise on options outside their range."""

    def layout(self, group: Group) -> tuple[Any, ...]:
        """The options that decide which tensors `init_state` makes."""
        return ()

    def init_state(self, group: Group, piece: Piece) -> dict[str, Tensor]:
        """State of one piece; every tensor has the leading dimensions `piece.lead`."""
        raise NotImplementedError

    def update(self, group: Group, batch: Batch) -> tuple[Tensor, Tensor, str]:
        """Advance `batch.state`. Return the update `(b, n, m)`, to be multiplied by `−lr`, its sums of squares `(b, parts)` and
        how `parameter_update` normalises it."""
        raise NotImplementedError

    # The step ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: re-evaluates the model and returns the loss; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # All gradients are checked before anything changes.
        work = [(group, *self._collect(number, group)) for number, group in enumerate(self.param_groups)]
        for group, classes, _ in work:
            group["step"] += 1
            for key, members, g in gathered(classes):
                self._step_batch(group, key, members, g)
        self._step_adamw([(group, params) for group, _, params in work])
        return loss

    def _collect(self, number: int, group: Group) -> tuple[dict[Any, list[Piece]], list[Tensor]]:
        """The parameters of a group that have a gradient: pieces by class, and what takes AdamW."""
        first = sum(len(earlier["params"]) for earlier in self.param_groups[:number])
        classes: dict[Any, list[Piece]] = {}
        elementwise = []
        layout = self.layout(group)
        for i, p in enumerate(group["params"]):
            if p.grad is None or p.numel() == 0:
                continue
            self._check_gradient(group, i, p.grad)
            if not self._is_matrix(group, i):
                elementwise.append(p)
                continue
            for piece in pieces(p, group, first + i):
                key = (number, layout, piece.n, piece.m, p.dtype, p.grad.dtype, p.device)
                classes.setdefault(key, []).append(piece)
        return classes, elementwise

    def _step_batch(self, group: Group, key: Any, members: list[Piece], g: Tensor) -> None:
        batch = Batch(members, g, self._stack(group, key, members), torch.empty(0))
        u, squares, normalize = self.update(group, batch)
        views = [piece.matrices(piece.parameter) for piece in members]
        ops.parameter_update(
            views, u, squares, batch.finite, group["lr"], weight_decay=group["weight_decay"], normalize=normalize
        )
        for piece, view in zip(members, views, strict=True):
            if not piece.parameter.is_contiguous():  # then the view was a copy
                rows = piece.rows(piece.parameter)
                rows.copy_(view.view(rows.shape))

    def _step_adamw(self, work: list[tuple[Group, list[Tensor]]]) -> None:
        """`torch.optim.AdamW(fused=True)` for the rest of each group; its kernel is called directly, so that the counters of
        all groups advance in one launch."""
        kinds: dict[Any, tuple[Group, list[Tensor]]] = {}
        for number, (group, params) in enumerate(work):
            for p in params:
                state = self.state[p]
                if "exp_avg" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                kinds.setdefault((number, p.device, p.dtype), (group, []))[1].append(p)
        steps: dict[torch.device, list[Tensor]] = {}
        for _, params in kinds.values():
            steps.setdefault(params[0].device, []).extend(self.state[p]["step"] for p in params)
        for counters in steps.values():
            torch._foreach_add_(counters, 1)
        for group, params in kinds.values():
            states, lr, (beta1, beta2) = [self.state[p] for p in params], group["lr"], group["adamw_betas"]
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                lr = lr.to(params[0].device, non_blocking=True)
            torch._fused_adamw_(
                params,
                [p.grad for p in params],  # type: ignore[misc]
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                [s["step"] for s in states],
                amsgrad=False,
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["adamw_eps"],
                maximize=group["maximize"],
            )

    # Routing and state ------------------------------------------------------------------------------------------------

    def _is_matrix(self, group: Group, i: int) -> bool:
        p = group["params"][i]
        if p.ndim < 2 or group["algorithm"] == "adamw":
            return False
        if group["algorithm"] is None and "param_names" in group:
            return not elementwise_name(group["param_names"][i])
        return True

    def _check_gradient(self, group: Group, i: int, grad: Tensor) -> None:
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"{type(self).__name__} does not take sparse gradients; {name_of(group, i)} has one. Give that parameter "
                "to torch.optim.SparseAdam, or build its embedding with sparse=False."
            )

    def _stack(self, group: Group, key: Any, members: list[Piece]) -> dict[str, Tensor]:
        """The state of a batch as stacks, whose parts are what `self.state` holds."""
        stacks, views = self._stacks.get(key, ({}, []))
        # By identity: a loaded, copied or replaced state does not hold the views that were handed out.
        if len(views) == len(members) and all(
            all(self.state[piece.parameter].get(name) is view for name, view in mine.items())
            for piece, mine in zip(members, views, strict=True)
        ):
            return stacks
        states = [self._state_of(group, piece) for piece in members]
        stacks = {
            name: torch.cat(
                [
                    s[name].reshape(piece.count, *s[name].shape[len(piece.lead) :])
                    for s, piece in zip(states, members, strict=True)
                ]
            )
            for name in states[0]
        }
        views = [{} for _ in members]
        for name, stack in stacks.items():
            parts = stack.split([piece.count for piece in members])
            for piece, part, mine in zip(members, parts, views, strict=True):
                view = part if piece.lead else part[0]
                mine[name + piece.suffix] = self.state[piece.parameter][name + piece.suffix] = view
        self._stacks[key] = stacks, views
        return stacks

    def _state_of(self, group: Group, piece: Piece) -> dict[str, Tensor]:
        """A piece's state, without the suffix in its names; new if it has none."""
        held = self.state[piece.parameter]
        fresh = self.init_state(group, piece)
        missing = [name for name in fresh if name + piece.suffix not in held]
        if missing and len(missing) < len(fresh):
            raise RuntimeError(
                f"the state of a parameter of shape {tuple(piece.parameter.shape)} lacks {missing}: it was made by other "
                "options. Set the group's options as they were when it was saved, or start with a new optimizer."
            )
        if missing:
            self._warn_if_large(group, piece)
            return fresh
        return {name: held[name + piece.suffix] for name in fresh}

    def _warn_if_large(self, group: Group, piece: Piece) -> None:
        limit = group.get("max_preconditioner_dim")
        if limit is None or max(piece.n, piece.m) <= limit or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{type(self).__name__} got a matrix of {piece.n} x {piece.m}: the side over max_preconditioner_dim={limit} "
            "keeps a diagonal factor. If it is an embedding or an output head, give it to AdamW: a group with "
            'algorithm="adamw", or spectral_ops.optim.param_groups(model).',
            stacklevel=4,
        )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state made by `state_dict()`. Unlike torch's own, it keeps the saved dtypes: eigenvalues stay float32
        under bfloat16 parameters."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(device=p.device, copy=True)


def name_of(group: Group, i: int) -> str:
    if "param_names" in group:
        return f"parameter {group['param_names'][i]!r}"
    return f"parameter {i} of shape {tuple(group['params'][i].shape)}"
