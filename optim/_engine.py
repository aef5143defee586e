"""What all matrix optimizers share: which parameters are matrices, batches of equal shapes, AdamW for the rest, state.

A parameter is one or more pieces (`_pieces.py`), each a stack of matrices. Pieces of equal shape and dtype in a parameter group
are computed as one batch. State lives per parameter in `self.state[p]`, as views into the batch's stacks, so that a step copies
nothing and a checkpoint does not depend on how parameters were batched.
"""

import math
import operator
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

import spectral_ops as ops
from spectral_ops.optim import _options as check
from spectral_ops.optim._checkpoint import ADDED_LATER, Loading
from spectral_ops.optim._pieces import (
    Group,
    Piece,
    gathered,
    is_sharded,
    local,
    mesh_of,
    name_of,
    on_meta,
    pieces,
    shares,
    spread,
)
from spectral_ops.optim._routing import elementwise_name
from spectral_ops.optim._schedule import Schedule
from spectral_ops.reference import accumulation_dtype, block, raised
from spectral_ops.workspace import serves

if TYPE_CHECKING:
    from spectral_ops.optim._sharing import Sharing

ALGORITHMS = (None, "matrix", "adamw")
TRANSPORT_DTYPES = (None, "bfloat16", "float32")
WARM_STEPS = 10  # the factors are updated in each of the first steps, whatever the interval


@dataclass(frozen=True)
class Rule:
    """An elementwise method, for what is no matrix: options of `spectral_ops.diagonal_update`, and how a checkpoint names the
    two moments, of which the second starts at `start`."""

    options: tuple[tuple[str, Any], ...]
    moments: tuple[str, str] = ("exp_avg", "exp_avg_sq")
    start: float = 0.0

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        first, second = (torch.full_like(p, x, memory_format=torch.preserve_format) for x in (0.0, self.start))
        return counters(p) | dict(zip(self.moments, (first, second), strict=True))


@dataclass
class Batch:
    """Matrices of one shape: `grad` is `(b, n, m)`, as the parameters have it; `state` holds stacks of leading size `b`.

    `dims` are the axes that have a factor: `(n, m)`, or more or fewer, whose product is `n · m`. `due` are the rows whose
    factors are to be updated in this step, None: all. `parameters` are views `(count, n, m)`, together the `b` matrices, of
    `pieces`; where a matrix is of several parameters, there is such a list for the columns of each.
    `finite` marks, as `(b,)` bool, the gradients that are finite, and whose squares are: whoever updates the batch sets it.
    """

    grad: Tensor
    state: dict[str, Tensor]
    due: slice | None
    dims: tuple[int, ...]
    parameters: list[list[Tensor]]
    pieces: list[Piece] = field(default_factory=list)
    finite: Tensor = field(default_factory=lambda: torch.empty(0))
    mean_square: Tensor = field(default_factory=lambda: torch.empty(0))

    def check(self, least: float = 0.0) -> Tensor:
        """Set `finite` and `mean_square`, and return which gradients are usable: not zero and of a mean square over `least`."""
        norm = torch.linalg.vector_norm(self.grad, dim=(-2, -1), dtype=accumulation_dtype(self.grad.dtype))
        square = norm.square()
        self.finite = square < math.inf
        self.mean_square = square / self.grad[0].numel()
        return self.finite & (norm > 0) if least == 0 else self.finite & (self.mean_square >= least)

    def clean_grad(self) -> Tensor:
        """The gradient in the accumulation dtype, zero where it is not finite."""
        return torch.where(block(self.finite), raised(self.grad), 0)

    def part(self) -> "Batch":
        """The rows that are due, as views."""
        if self.due is None:
            return self
        state = {name: x[self.due] for name, x in self.state.items()}
        return Batch(self.grad[self.due], state, None, self.dims, [])


class MatrixOptimizer(Optimizer):
    """Base of the matrix optimizers. A subclass makes the state of a matrix and computes the update of a batch."""

    mesh: Any = None
    # Every parameter group carries these; a group of its own may override them.
    shared_defaults: ClassVar[dict[str, Any]] = {
        "algorithm": None,
        "conv": None,
        "split_sizes": None,
        "num_heads": None,
        "adamw_betas": (0.9, 0.95),
        "adamw_eps": 1e-8,
        "transport_dtype": None,
        "update_interval": 1,
        "maximize": False,
        "capturable": False,
        "step": 0,  # only where the interval is not 1: whose turn it is
    }

    def __init__(self, params: Any, given: dict[str, Any]):
        """`given` are the local variables of a subclass's constructor: its options, and in `unknown` those it does not list.
        They are refused, but for what every group has, and what says no: frameworks pass `fused=False` to any optimizer."""
        unknown = dict(given["unknown"])
        self._set_mesh(unknown.pop("mesh", None))
        shared = {name: value for name, value in unknown.items() if name in self.shared_defaults}
        for name, value in unknown.items():
            if value and name not in shared:
                raise TypeError(f"{type(self).__name__} has no option `{name}`, got {value!r}")
        self._forget()
        own = {name: value for name, value in given.items() if name not in ("self", "params", "unknown", "__class__")}
        options = own | shared
        super().__init__(params, plain(self.shared_defaults | options))

    def _set_mesh(self, mesh: Any) -> None:
        """The mesh whose ranks share the work on parameters that each of them has."""
        if mesh is not None:
            from torch.distributed.device_mesh import DeviceMesh

            if not isinstance(mesh, DeviceMesh):
                raise TypeError(f"`mesh` must be a torch.distributed.device_mesh.DeviceMesh, got {type(mesh).__name__}")
        self.mesh = mesh

    def _forget(self) -> None:
        """Drop what is not state: stacks whose parts may have been replaced, buffers, what was warned of."""
        self._sharings: dict[Any, Sharing] = {}
        self._stacks: dict[Any, tuple[dict[str, Tensor], list[dict[str, Tensor]]]] = {}
        self._buffers: dict[Tensor, Tensor] = {}
        self._warned = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            group.update(plain(self.defaults | group))

    def add_param_group(self, param_group: Group) -> None:
        if not isinstance(param_group, dict):
            raise TypeError(f"a parameter group must be a dict, got {type(param_group).__name__}")
        param_group = plain(param_group)
        if param_group.get("use_fallback") and param_group.get("algorithm") is None:  # as timm says it
            param_group["algorithm"] = "adamw"
        params = param_group["params"]
        if not isinstance(params, Tensor | set):  # of which torch makes a list, and an error
            param_group = param_group | {"params": list(params)}
            if not param_group["params"]:
                raise ValueError(f"parameter group {len(self.param_groups)} is empty")
        self._check_group(self.defaults | param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        once = {id(p): i for i, p in reversed(list(enumerate(group["params"])))}  # of a tied one, of which torch has warned
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [group[key][i] for i in sorted(once.values())]
        try:
            self._check_parameters(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: Group) -> None:
        check.choice(group, "algorithm", ALGORITHMS)
        check.learning_rate(group)
        check.number(group, "weight_decay")
        check.decays(group, "adamw_betas")
        check.number(group, "adamw_eps")
        check.choice(group, "transport_dtype", TRANSPORT_DTYPES)
        check.whole(group, "update_interval")
        check.parts(group)
        if group["capturable"] and group["update_interval"] != 1:
            raise ValueError(
                "`capturable=True` needs `update_interval=1`, since a captured graph does the same work in every replay; "
                f"got {group['update_interval']}"
            )
        self.check_options(group)

    def _check_parameters(self, group: Group) -> None:
        for i, p in enumerate(group["params"]):
            if (self.mesh is not None or is_sharded(p)) and not self.can_share(group):
                raise TypeError(
                    f"{type(self).__name__} with these options does not share work between ranks: it takes no DTensor, as "
                    f"{name_of(group, i)} may be, and no `mesh`"
                )
            if not p.is_floating_point():
                raise TypeError(f"{type(self).__name__}: {name_of(group, i)} is {p.dtype}; only real floating-point works")
            if group["capturable"] and isinstance(group["lr"], Tensor) and group["lr"].device != p.device:
                raise ValueError(
                    f"{type(self).__name__}: with `capturable=True` a tensor `lr` must be on {p.device} as {name_of(group, i)} "
                    f"is, got {group['lr'].device}: a graph would keep its value"
                )
            if self._is_matrix(group, i):
                list(self.cut(p, group))  # raises where the group's split does not fit

    # What a subclass provides -----------------------------------------------------------------------------------------

    def check_options(self, group: Group) -> None:
        """Raise on options outside their range."""

    def layout(self, group: Group) -> tuple[Any, ...]:
        """The options that decide which tensors `init_state` makes."""
        return ()

    def cut(self, p: Tensor, group: Group, index: int = 0) -> Iterator[Piece]:
        """The pieces of a parameter."""
        return pieces(p, group, index)

    def elementwise(self, group: Group) -> Rule:
        """The method for what is no matrix."""
        return adamw(group)

    def init_state(self, group: Group, piece: Piece) -> dict[str, Tensor]:
        """State of one piece, beside its counters; every tensor has the leading dimensions `piece.lead`."""
        raise NotImplementedError

    def can_share(self, group: Group) -> bool:
        """Whether the matrices of a parameter can be with ranks that have no more of it than its gradient."""
        return True

    def reads_parameters(self, group: Group) -> bool:
        """Whether `update` reads `batch.parameters`."""
        return False

    def update(self, group: Group, batch: Batch) -> tuple[Tensor, Tensor, str]:
        """Advance `batch.state`, but for the counters. Return the update `(b, n, m)`, to be multiplied by `−lr`, its sums of
        squares `(b, parts)` and how `parameter_update` normalises it."""
        raise NotImplementedError

    def decoupled_decay(self, group: Group) -> float:
        """The weight decay that is not in the update."""
        decay: float = group["weight_decay"]
        return decay

    # The step ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's value, or None.

        Raises:
            RuntimeError: a sparse gradient; a capture in a CUDA graph without `capturable=True`.
        """
        self._check_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sharings = self._share()
        # All gradients are checked before anything changes.
        found = [self._collect(number, group) for number, group in enumerate(self.param_groups)]
        for sharing in sharings:
            sharing.send()
        schedules = [self._schedule(number, group) for number, group in enumerate(self.param_groups)]
        work = list(zip(map(called, self.param_groups), schedules, strict=True))
        for (group, schedule), (classes, _) in zip(work, found, strict=True):
            joint = shares(classes)
            for key, members, g in gathered(classes):
                due = schedule.rows(members, group["step"]) if schedule else None
                spread(joint, members, g)
                self._step_batch(group, key, members, g, due)
        for sharing in sharings:
            sharing.listen()
        self._step_elementwise([(group, params) for (group, _), (_, params) in zip(work, found, strict=True) if params])
        for sharing in sharings:
            sharing.compute(work)
        for sharing in sharings:
            sharing.apply(work)
        return loss

    def _check_capture(self) -> None:
        if torch.compiler.is_compiling() or all(group["capturable"] for group in self.param_groups):
            return
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"a CUDA graph captures a step of {type(self).__name__}, which needs capturable=True for that")

    def skipped_steps(self) -> Tensor:
        """How many times a parameter was left untouched because its gradient, or the square of it, was not finite: an int64
        tensor of no dimension, where the parameters are. Reading its value waits for them, calling this does not. Each
        parameter's own count is `optimizer.state[p]["skipped"]`."""
        counts = [sharing.skipped_matrices() for sharing in self._sharings.values()]
        for p, state in self.state.items():
            if self._sharing_of_matrix(p) is not None:  # its state is with owners
                continue
            own = [value for name, value in state.items() if name.startswith("skipped")]
            counts += [x.flatten()[0] for x in own[:1]]  # all matrices of a parameter skip together
        device = counts[0].device if counts else None
        return sum((count.to(device) for count in counts), torch.zeros((), dtype=torch.int64, device=device))

    def _collect(self, number: int, group: Group) -> tuple[dict[Any, list[Piece]], list[Tensor]]:
        """The parameters of a group that have a gradient: pieces by class, and what takes AdamW."""
        classes: dict[Any, list[Piece]] = {}
        elementwise = []
        layout = self.layout(group)
        for i, p in enumerate(group["params"]):
            if p.numel() == 0:
                continue
            if p.grad is not None:
                self._check_gradient(group, i, p.grad)
            if self._sharing_of(p) is not None:  # whether this rank has a gradient or not
                if not self._is_matrix(group, i):
                    elementwise.append(p)
            elif self._is_matrix(group, i):
                for piece in self._pieces(number, group, i):
                    if piece.has_grad:
                        alone = i if serves(p.detach()) else None  # a stack of such would not stay in the caches
                        key = (number, layout, piece.dims, p.dtype, piece.grad_dtype, p.device, type(piece), alone)
                        classes.setdefault(key, []).append(piece)
            elif p.grad is not None:
                elementwise.append(p)
        return classes, elementwise

    def _pieces(self, number: int, group: Group, i: int) -> Iterator[Piece]:
        before = sum(len(earlier["params"]) for earlier in self.param_groups[:number])
        return self.cut(group["params"][i], group, before + i)

    def _share(self) -> list["Sharing"]:
        """What ranks share in this step, mesh by mesh. It is found out anew where parameters have come or were replaced."""
        places: dict[Any, list[tuple[int, int]]] = {}
        for number, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                mesh = mesh_of(p)
                if mesh is None and self.mesh is not None and self._is_matrix(group, i):
                    mesh = self.mesh
                if mesh is None or not p.numel():
                    continue
                if p.requires_grad or p.grad is not None or self._sharing_of(p) is not None:
                    places.setdefault(mesh, []).append((number, i))
        if not places:
            return []
        from spectral_ops.optim._sharing import Sharing

        for mesh, mine in places.items():
            before = self._sharings.get(mesh)
            params = [self.param_groups[number]["params"][i] for number, i in mine]
            if before is None or [id(p) for p in params] != list(before.numbers):
                self._sharings[mesh] = Sharing(self, mesh, mine, before)
        return [self._sharings[mesh] for mesh in places]

    def _sharing_of(self, p: Tensor) -> "Sharing | None":
        return next((sharing for sharing in self._sharings.values() if id(p) in sharing.numbers), None)

    def _sharing_of_matrix(self, p: Tensor) -> "Sharing | None":
        sharing = self._sharing_of(p)
        return sharing if sharing is not None and sharing.members[sharing.numbers[id(p)]].is_matrix else None

    def _restored(self, p: Tensor, name: str, value: Tensor) -> Tensor:
        """What is kept of a tensor of a checkpoint."""
        from spectral_ops.optim import _sharded_state

        if (sharing := self._sharing_of_matrix(p)) is not None:
            return _sharded_state.load(sharing, p, name, value)
        return _sharded_state.like(p, value) if is_sharded(p) else value

    def _schedule(self, number: int, group: Group) -> Schedule | None:
        """Whose turn it is in this step; None: everybody's."""
        if group["update_interval"] == 1:
            return None
        if isinstance(group["lr"], Tensor) or group["lr"] != 0:  # distributed checkpointing steps with 0 to make the state
            group["step"] += 1
        if group["step"] <= WARM_STEPS:
            return None
        return self._turns(number, group)

    def _turns(self, number: int, group: Group) -> Schedule:
        matrices = (i for i, p in enumerate(group["params"]) if p.numel() and self._is_matrix(group, i))
        return Schedule((piece for i in matrices for piece in self._pieces(number, group, i)), group["update_interval"])

    def _step_batch(self, group: Group, key: Any, members: list[Piece], g: Tensor, due: slice | None) -> None:
        state = self._stack(group, key, members)
        parts = [piece.parts() for piece in members]
        columns = [list(each) for each in zip(*parts, strict=True)]
        batch = Batch(g, state, due, members[0].dims, columns, members)
        self.write(group, batch, *self.update(group, batch))
        for piece, mine in zip(members, parts, strict=True):
            piece.store(mine)

    def write(self, group: Group, batch: Batch, u: Tensor, squares: Tensor, normalize: str) -> None:
        """Change the parameters of a batch, and count."""
        counters = [batch.state[name] for name in ("step", "skipped")]
        columns = u.split([part[0].shape[-1] for part in batch.parameters], -1)
        for i, (part, mine) in enumerate(zip(batch.parameters, columns, strict=True)):
            step, skipped = counters if i == 0 else map(torch.zeros_like, counters)  # which count once
            ops.parameter_update(
                part, mine, squares, batch.finite, step, skipped, group["lr"],
                weight_decay=self.decoupled_decay(group), normalize=normalize,
            )  # fmt: skip

    def _step_elementwise(self, work: list[tuple[Group, list[Tensor]]]) -> None:
        """What is no matrix, all groups of one learning rate together."""
        calls: dict[Any, tuple[Group, Rule, list[Tensor], list[float]]] = {}
        for number, (group, params) in enumerate(work):
            lr = id(group["lr"]) if isinstance(group["lr"], Tensor) else group["lr"]
            if torch.compiler.is_compiling():
                lr = number  # comparing a number would compile the step anew for each of its values
            rule = self._rule(group)
            options = (lr, rule.options, group["maximize"], group["capturable"])
            for p in params:
                mesh = mesh_of(p)
                _, _, mine, decays = calls.setdefault((options, p.device, p.dtype, mesh), (group, rule, [], []))
                mine.append(p)
                decays.append(group["weight_decay"])
        for group, rule, params, decays in calls.values():
            states = [self._elementwise_state(rule, p) for p in params]
            steps, skipped = [s["step"] for s in states], [s["skipped"] for s in states]
            sharing = self._sharing_of(params[0])
            if sharing is None:
                grads = self._fixed(params) if group["capturable"] else [p.grad for p in params]
                counters = steps, skipped
            else:
                grads = sharing.flagged(params)
                counters = [x.clone() for x in steps], [x.clone() for x in skipped]
            first, second = rule.moments
            ops.diagonal_update(
                list(map(local, params)), grads, [local(s[first]) for s in states],  # type: ignore[arg-type]
                [local(s[second]) for s in states], *counters, lr=group["lr"], weight_decay=decays,
                maximize=group["maximize"], **dict(rule.options),
            )  # fmt: skip
            if sharing is not None:
                sharing.count(params, steps, skipped, moves(group))

    def _rule(self, group: Group) -> Rule:
        return adamw(group) if group["algorithm"] == "adamw" else self.elementwise(group)

    def _fixed(self, params: list[Tensor]) -> list[Tensor]:
        """Copies of the gradients, always at the same addresses: a kernel that is captured in a graph finds tensors through a
        table that was made before, and gradients may move."""
        for p in params:
            if p not in self._buffers:
                self._buffers[p] = torch.empty_like(p, memory_format=torch.contiguous_format)
        buffers = [self._buffers[p] for p in params]
        torch._foreach_copy_(buffers, [p.grad for p in params])  # type: ignore[misc]
        return buffers

    # Routing and state ------------------------------------------------------------------------------------------------

    def _is_matrix(self, group: Group, i: int) -> bool:
        p = group["params"][i]
        if group["algorithm"] == "adamw":
            return False
        if p.ndim < 2:
            return bool(group.get("per_axis") and group["algorithm"] == "matrix")
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
            all(map(operator.is_, map(self.state[piece.holder].get, mine), mine.values()))
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
                view = part if piece.lead else part.squeeze(0)
                mine[name + piece.suffix] = self.state[piece.holder][name + piece.suffix] = view
        for piece, mine in zip(members, views, strict=True):
            for p in piece.followers:  # a checkpoint wants something of each
                self.state[p]["step"] = mine["step"]
        self._stacks[key] = stacks, views
        return stacks

    def _state_of(self, group: Group, piece: Piece) -> dict[str, Tensor]:
        """A piece's state, without the suffix in its names; new if it has none."""
        held = self.state[piece.holder]
        wanted = self._fresh(group, piece.on_meta())
        missing = [name for name in wanted if name + piece.suffix not in held]
        if len(missing) == len(wanted):
            self._warn_if_large(group, piece)
            return self._fresh(group, piece)
        shape = tuple(piece.parameter.shape)
        _require_none(missing, shape)
        mine = counters(piece.parameter, piece.lead)
        mine |= {name: held[name + piece.suffix] for name in wanted if name not in missing}
        if any(mine[name].shape != x.shape for name, x in wanted.items()):
            raise RuntimeError(f"a parameter has shape {shape} now, and its state is of another: start with a new optimizer")
        return {name: x.to(device=piece.parameter.device, dtype=wanted[name].dtype) for name, x in mine.items()}

    def _fresh(self, group: Group, piece: Piece) -> dict[str, Tensor]:
        return counters(piece.parameter, piece.lead) | self.init_state(group, piece)

    def _elementwise_state(self, rule: Rule, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        names = "step", "skipped", *rule.moments
        if missing := [name for name in names if name not in state]:
            if len(missing) < len(names):
                _require_none(missing, tuple(p.shape))
            fresh = rule.init_state(p)
            state.update({name: fresh[name] for name in missing})
        return state

    def _expected_state(self, number: int, group: Group, i: int) -> dict[str, Tensor]:
        """What the state of a parameter is made of, as tensors without data."""
        p = group["params"][i]
        if not self._is_matrix(group, i):
            return self._rule(group).init_state(on_meta(p))
        return {
            name + piece.suffix: value
            for piece in self._pieces(number, group, i)
            for name, value in self._fresh(group, piece.on_meta()).items()
        }

    def _warn_if_large(self, group: Group, piece: Piece) -> None:
        limit = group.get("max_preconditioner_dim")
        if limit is None or max(piece.dims) <= limit or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{type(self).__name__} got a {'matrix' if len(piece.dims) == 2 else 'tensor'} of "
            f"{' x '.join(map(str, piece.dims))}: the side over max_preconditioner_dim={limit} "
            "keeps a diagonal factor. If it is an embedding or an output head, give it to AdamW: a group with "
            'algorithm="adamw", or spectral_ops.optim.param_groups(model).',
            stacklevel=4,
        )

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's optimizers give it; options that are functions are not in it, and stay when it is loaded.

        Where ranks share the work, each has the state of its own matrices: all ranks of the mesh must call this together.
        Tensors are DTensors then, evenly sharded over the mesh, and numbers are equal on all ranks.
        """
        state: dict[str, Any] = super().state_dict()
        if self.state and self._share():
            from spectral_ops.optim import _sharded_state

            for number, p in enumerate(p for group in self.param_groups for p in group["params"]):
                if self.state.get(p) and (sharing := self._sharing_of_matrix(p)) is not None:
                    state["state"][number] = _sharded_state.save(sharing, p)
            state["state"] = dict(sorted(state["state"].items()))  # as on the other ranks
        for group in state["param_groups"]:
            for name in [name for name, value in group.items() if callable(value)]:
                del group[name]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state made by `state_dict()`. It is checked as a whole first: where it does not fit, nothing is changed.

        Unlike torch's own, this keeps dtypes: eigenvalues stay float32 under bfloat16 parameters.

        Args:
            state_dict: of the same optimizer with parameters of the same shapes.

        Raises:
            TypeError, ValueError: what does not fit, in a sentence that names the parameter.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"{type(self).__name__}.load_state_dict takes a dict, got {type(state_dict).__name__}")
        loading = Loading(self)
        # Between the hooks of others: what they make of a checkpoint is what is checked, and they see what was restored.
        hooks = (
            self.register_load_state_dict_pre_hook(loading.check),
            self.register_load_state_dict_post_hook(loading.restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


def plain(group: Group) -> Group:
    """Options as any checkpoint can hold them: dtypes by name, which distributed checkpointing needs."""
    return {name: _plain(x) for name, x in group.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and any(isinstance(x, torch.dtype) for x in value):
        return tuple(map(_plain, value))
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _require_none(missing: list[str], shape: tuple[int, ...]) -> None:
    """Of a state; but earlier versions did not count what was skipped."""
    if any(name != ADDED_LATER for name in missing):
        raise RuntimeError(
            f"the state of a parameter of shape {shape} lacks {missing}: it was made by other options. Set the group's "
            "options as they were when it was made, or start with a new optimizer."
        )


def counters(p: Tensor, lead: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """State that every optimizer keeps: how many steps were made, how many skipped for a gradient that is not finite."""
    return {
        "step": torch.zeros(lead, dtype=torch.float32, device=p.device),
        "skipped": torch.zeros(lead, dtype=torch.int64, device=p.device),
    }


def adamw(group: Group) -> Rule:
    return Rule((("rule", "adamw"), ("betas", tuple(group["adamw_betas"])), ("eps", group["adamw_eps"])))


def moves(group: Group) -> Tensor | bool:
    """Whether the learning rate is not 0, without reading a tensor."""
    lr = group["lr"]
    return lr.reshape(()) != 0 if isinstance(lr, Tensor) else bool(lr != 0)


def called(group: Group) -> Group:
    """The options of one step: what is given as a function is called."""
    return {name: value() if callable(value) else value for name, value in group.items()}
