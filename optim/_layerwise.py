"""What the methods share that precondition layer by layer, with the curvature that hooks see: which layers, structures, mixed
precision, replicas. Each method's own file has what it does with its factors."""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from spectral_ops.optim import _options as check
from spectral_ops.optim._curvature import (
    ForwardHook,
    Layer,
    Moments,
    Side,
    bias_of,
    grad_outputs_of,
    inputs_of,
    layers_of,
    terms_of,
)
from spectral_ops.optim._engine import WARM_STEPS, Batch
from spectral_ops.optim._factors import FACTOR_DTYPES, factor_dtype, first_seeds
from spectral_ops.optim._pieces import Group, Piece, layer, name_of
from spectral_ops.optim._preconditioned import PreconditionedOptimizer
from spectral_ops.optim._routing import ParamGroups
from spectral_ops.optim._schedule import Schedule
from spectral_ops.reference import accumulation_dtype, column, raised
from spectral_ops.structures import Structure, structure

SIDES = "k", "c"
_structure = functools.cache(structure)


class LayerOptimizer(PreconditionedOptimizer):
    """A subclass says what it keeps for a side of a layer, learns from curvature, and preconditions. Side "k" is that of the
    inputs, "c" that of the output gradients."""

    keeps_plain: ClassVar[bool | None] = None  # whether curvature is summed before the products with a factor; None: if cheaper
    _whose: dict[int, Any]  # of a group: a step, who is due in which, and the weights that are in that step
    _step_supports_amp_scaling = True  # so that GradScaler tells the scale, which curvature has too

    def __init__(self, model: nn.Module, params: Any, adamw_lr: float | Tensor, grad_scaler: Any, options: dict[str, Any]):
        if not isinstance(model, nn.Module) or isinstance(model, DataParallel):
            raise TypeError(
                f"{type(self).__name__} takes an nn.Module as `model`, whose layers it watches, or one in "
                f"DistributedDataParallel; got {type(model).__name__}"
            )
        if dist.is_initialized() and dist.get_world_size() > 1 and not isinstance(model, DistributedDataParallel):
            warnings.warn(
                f"{type(self).__name__}: each rank learns from its own curvature, unless `model` is one in "
                "DistributedDataParallel",
                stacklevel=3,
            )
        check.learning_rate({"lr": adamw_lr})
        self.model, self.grad_scaler = model, grad_scaler
        self._hooks: list[RemovableHandle] = []
        self._watch()
        own = ("model", "adamw_lr", "grad_scaler")
        super().__init__(self._split(params, adamw_lr), {name: x for name, x in options.items() if name not in own})

    # What a method provides -------------------------------------------------------------------------------------------

    def init_side(self, group: Group, side: Structure, name: str, **kind: Any) -> dict[str, Tensor]:
        """State of a side, by name, with `factor_k` or `factor_c` among it; `kind` is its dtype and device."""
        raise NotImplementedError

    def curvature(self, side: Structure, factor: Tensor, plain: Tensor) -> Tensor:
        """Of `Π̂(U)`, what `learn` takes."""
        raise NotImplementedError

    def learn(self, group: Group, s: dict[str, Tensor], sides: list[Structure], h: list[Tensor], usable: Tensor) -> None:
        """Advance the state `s` of `usable` matrices, `(b,)`, by curvature `h` `(b, size)` of both sides."""
        raise NotImplementedError

    # Options ----------------------------------------------------------------------------------------------------------

    def check_options(self, group: Group) -> None:
        super().check_options(group)
        check.choice(group, "loss_average", ("batch", "batch+sequence", None))
        check.choice(group, "kfac_approx", ("expand", "reduce"))
        pair = group["structures"]
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"`structures` must be two names, for K and C, got {pair!r}")
        for name in pair:
            structure(name, 1)
        for dtype in _pair(group["preconditioner_dtype"]):
            check.choice({"preconditioner_dtype": dtype}, "preconditioner_dtype", (None, *FACTOR_DTYPES))

    def can_share(self, group: Group) -> bool:
        return False

    def layout(self, group: Group) -> tuple[Any, ...]:
        return tuple(str(group[name]) for name in ("structures", "max_preconditioner_dim", "preconditioner_dtype"))

    # Layers -----------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Install a hook on each layer. Parameters are looked up in every step: frameworks replace them."""
        for hook in self._hooks:
            hook.remove()
        self._modules = layers_of(self.model)
        self._hooks = [module.register_forward_hook(ForwardHook(self), with_kwargs=True) for module in self._modules]

    def _refresh(self) -> None:
        """Which weights are a layer's, in which group, and whether their biases go with them."""
        known = [(module.weight, bias_of(module)) for module in self._modules]
        self._layers: dict[Tensor, tuple[int, Tensor | None] | None] = dict.fromkeys(weight for weight, _ in known)
        self._biases: set[Tensor] = set()
        owners: dict[Tensor, Tensor | None] = {}
        torn = {weight for weight, bias in known if owners.setdefault(weight, bias) is not bias}  # shared, with other biases
        for number, group in enumerate(self.param_groups):
            if group["algorithm"] == "adamw":
                continue
            members = set(group["params"])
            for weight, bias in known:
                if weight not in members or weight in torn:
                    continue
                joined = bias is not None and bias in members and (bias.dtype, bias.device) == (weight.dtype, weight.device)
                self._layers[weight] = number, bias if joined else None
                if joined:
                    self._biases.add(bias)  # type: ignore[arg-type]

    def _split(self, params: Any, adamw_lr: float | Tensor) -> Any:
        """Groups for the layers' weights and biases, and for the rest, but for those that name their `algorithm`."""
        if params is None:
            params = [(name, p) for name, p in _inner(self.model).named_parameters() if p.requires_grad]
        if isinstance(params, Tensor | dict | set):  # of which torch makes an error
            return params
        params = list(params)
        weights = {module.weight: module for module in self._modules}
        groups = []
        for group in params if params and isinstance(params[0], dict) else [{"params": params}]:
            members = group.get("params", [])
            if "algorithm" in group or isinstance(members, set):
                groups.append(group)
                continue
            members = [members] if isinstance(members, Tensor) else list(members)
            named = {p: i for i, p in enumerate(map(_parameter, members)) if isinstance(p, Tensor)}
            mine = {named[p] for w, m in weights.items() if w in named for p in (w, bias_of(m)) if p in named}
            for algorithm, more in (("matrix", {}), ("adamw", {"lr": adamw_lr})):
                part = [x for i, x in enumerate(members) if (i in mine) == (algorithm == "matrix")]
                if part or not members:
                    groups.append(group | {"params": part, "algorithm": algorithm} | more)
        return groups

    @property
    def routing(self) -> ParamGroups:
        """Which parameter takes which method, as a list of groups that prints itself as a table."""
        self._refresh()
        names = {p: name for name, p in _inner(self.model).named_parameters()}
        table = ParamGroups()
        for group in self.param_groups:
            for ours in (True, False):
                part = [p for i, p in enumerate(group["params"]) if self._is_matrix(group, i) == ours]
                if part:
                    label = f"{type(self).__name__} {'/'.join(group['structures'])}" if ours else "AdamW"
                    listed = {"params": part, "param_names": [names.get(p, "(not of the model)") for p in part]}
                    table.append(group | listed | {"algorithm": label})
        return table

    def _is_matrix(self, group: Group, i: int) -> bool:
        p = group["params"][i]
        return group["algorithm"] != "adamw" and (self._layers.get(p) is not None or p in self._biases)

    def cut(self, p: Tensor, group: Group, index: int = 0) -> Iterator[Piece]:
        if found := self._layers.get(p):
            yield layer(p, found[1], index)

    def _check_parameters(self, group: Group) -> None:
        self._refresh()
        for i, p in enumerate(group["params"]):
            if group["algorithm"] == "matrix" and not self._is_matrix(group, i) and p.numel():
                raise ValueError(
                    f"{type(self).__name__}: {name_of(group, i)} is no weight, nor the bias beside one, of a Linear, Conv1d, "
                    'Conv2d or Conv3d layer of the model; give it to a group with algorithm="adamw"'
                )
        super()._check_parameters(group)

    # Curvature --------------------------------------------------------------------------------------------------------

    def watches(self, module: Layer) -> bool:
        """Whether a layer's curvature is wanted in the next step."""
        if module.weight not in self._layers:
            self._refresh()
        found = self._layers.get(module.weight)
        return found is not None and self._due(module.weight, found[0])

    def _due(self, weight: Tensor, number: int) -> bool:
        group = self.param_groups[number]
        step = group["step"] + 1
        if group["update_interval"] == 1 or step <= WARM_STEPS:
            return True
        if self._whose.get(number, (0,))[0] != step:
            pieces = [piece for i, _ in enumerate(group["params"]) for piece in self._pieces(number, group, i)]
            schedule = Schedule(pieces, group["update_interval"])
            turns = [(piece.holder, schedule.rows([piece], step)) for piece in pieces]
            self._whose[number] = step, schedule, {holder for holder, rows in turns if rows.start < rows.stop}
        return weight in self._whose[number][2]

    def _turns(self, number: int, group: Group) -> Schedule:
        step, *known = self._whose.pop(number, (0,))
        return known[0] if step == group["step"] else super()._turns(number, group)

    def see(self, module: Layer, x: Tensor, g: Tensor, task: int) -> None:
        """Take in what passes a layer: its input and its output's gradient. `task` names the backward pass, which is a
        mini-batch's; there may be several."""
        weight = module.weight
        found = self._layers.get(weight)
        if found is None or not x.numel():
            return
        group = self.param_groups[found[0]]
        a = inputs_of(module, x, group["kfac_approx"], ones=False)
        b = grad_outputs_of(module, g, group["kfac_approx"])
        if self.grad_scaler is not None:
            b = raised(b) / self.grad_scaler.scale(torch.ones((), device=b.device))
        self._add(weight, a, b, task, terms_of(module, g, group["loss_average"]))

    def observe(self, weight: Tensor, inputs: Tensor, grad_outputs: Tensor) -> None:
        """Tell a layer's curvature by hand, in place of what its hook saw since the last step.

        Args:
            weight: of the layer.
            inputs: `(rows, in (+ 1))`: `U = inputsᵀ inputs / rows`; the last column is the bias's.
            grad_outputs: `(rows, out)`: `G = grad_outputsᵀ grad_outputs`.

        Raises:
            ValueError: `weight` is of no layer that is trained.
        """
        self._refresh()
        if self._layers.get(weight) is None:
            raise ValueError(f"{type(self).__name__}.observe: `weight` is of no layer that it trains")
        self._moments.pop(weight, None)
        self._add(weight, inputs.detach(), grad_outputs.detach(), 0, 1)

    def _add(self, weight: Tensor, a: Tensor, b: Tensor, task: int, terms: int) -> None:
        moments = self._moments.setdefault(weight, Moments())
        moments.rows += len(a)
        moments.passes.setdefault(task, terms)
        number, bias = self._layers[weight]  # type: ignore[misc]
        group, piece = self.param_groups[number], layer(weight, bias, 0)
        held, dtypes = self.state.get(weight, {}), self._dtypes(group, weight)
        for i, (side, rows) in enumerate(zip(self._sides(group, piece.dims), (a, b), strict=True)):
            factor = held.get(f"factor_{SIDES[i]}")
            if factor is None:
                factor = side.identity(dtype=dtypes[i], device=weight.device)
            moments.sides[i].add(side, factor, rows, self.keeps_plain)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, and the curvature that came with them.

        Args:
            set_to_none: gradients become None, not zeros.
        """
        self._moments.clear()
        super().zero_grad(set_to_none)

    # State ------------------------------------------------------------------------------------------------------------

    def _sides(self, group: Group, dims: tuple[int, ...]) -> list[Structure]:
        """The structures of both sides of a matrix of `dims`, `(out, in)`."""
        names, limit = group["structures"], group["max_preconditioner_dim"]
        return [_structure(name if n <= limit else "diagonal", n) for name, n in zip(names, reversed(dims), strict=True)]

    def _dtypes(self, group: Group, p: Tensor) -> list[torch.dtype]:
        return [factor_dtype({"preconditioner_dtype": dtype}, p) for dtype in _pair(group["preconditioner_dtype"])]

    def init_state(self, group: Group, piece: Piece) -> dict[str, Tensor]:
        p = piece.parameter
        state = {
            "momentum_buffer": torch.zeros(piece.n, piece.m, dtype=p.dtype, device=p.device),
            "updates": torch.zeros((), dtype=accumulation_dtype(p.dtype), device=p.device),
        }
        dtypes = self._dtypes(group, p)
        for name, side, dtype in zip(SIDES, self._sides(group, piece.dims), dtypes, strict=True):
            state |= self.init_side(group, side, name, dtype=dtype, device=p.device)
        if torch.bfloat16 in dtypes:
            state["seed"] = first_seeds(group, piece)
        return state

    def _forget(self) -> None:
        super()._forget()
        self._moments: dict[Tensor, Moments] = {}
        self._whose = {}
        self._unseen = False

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"model": self.model, "grad_scaler": self.grad_scaler}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "model" in state:  # which it is not where torch loads a state
            self._hooks = []
            self._watch()
        self._refresh()

    # The step ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's value, or None.

        Raises:
            RuntimeError: gradients that were unscaled without `grad_scaler`; a sparse gradient.
        """
        self._refresh()
        loss = super().step(closure) if self._unscale() else None
        self._moments.clear()
        return loss

    def _unscale(self) -> bool:
        """Undo a GradScaler's scale, which `GradScaler.step` leaves to the optimizer (`_step_supports_amp_scaling`). Return
        whether a step is to be made, for which it waits, as `GradScaler.step` does for other optimizers."""
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        self._scale = None if self.grad_scaler is not None else scale
        if found_inf is None:
            return True
        if scale is None and self.grad_scaler is None and self._moments:
            raise RuntimeError(
                f"{type(self).__name__}: gradients were unscaled before `GradScaler.step`, and the scale with which the "
                "curvature was seen is not known then. Construct the optimizer with grad_scaler=scaler."
            )
        if scale is not None:
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            for device in {g.device for g in grads}:
                torch._foreach_mul_([g for g in grads if g.device == device], 1 / scale.to(device))
        return not found_inf.item()

    def advance(self, group: Group, batch: Batch, usable: Tensor) -> None:
        rows = batch.due or slice(None)
        pieces = batch.pieces[rows]
        found = [self._moments.get(piece.holder) for piece in pieces]
        replicas = self.model.process_group if isinstance(self.model, DistributedDataParallel) else None
        if not pieces or (not any(found) and replicas is None):
            self._warn_of_unseen(group, pieces)
            return
        s, usable = batch.part().state, usable[rows]
        sides = self._sides(group, batch.dims)
        means = [0.0 if m is None else 1 / m.rows for m in found]
        terms = [0.0 if m is None else float(sum(m.passes.values())) if group["loss_average"] else 1.0 for m in found]
        h = [
            self._curvature(sides[i], s[f"factor_{SIDES[i]}"], [None if m is None else m.sides[i] for m in found], weights)
            for i, weights in enumerate((means, terms))
        ]
        known = torch.stack([h[0].new_full((), m is not None) for m in found])
        if replicas is not None:
            h = _averaged([*h, known.unsqueeze(-1)], replicas)
            known = h.pop().squeeze(-1)
            h[0] = h[0] / column(known.clamp(min=torch.finfo(known.dtype).tiny))
        if self._scale is not None:
            h[1] = h[1] / self._scale.to(h[1].device).square()
        usable = usable & (known > 0)
        s["updates"] += usable
        self.learn(group, s, sides, h, usable)

    def _curvature(self, side: Structure, factor: Tensor, found: list[Side | None], weights: list[float]) -> Tensor:
        """`(b, size)`."""
        h = _stack([None if x is None else x.own for x in found], weights, factor)
        plain = [None if x is None else x.plain for x in found]
        if any(x is not None for x in plain):
            h = h + self.curvature(side, factor, _stack(plain, weights, factor))
        return h

    def _warn_of_unseen(self, group: Group, pieces: list[Piece]) -> None:
        if self._unseen or not pieces or (not isinstance(group["lr"], Tensor) and group["lr"] == 0):
            return
        self._unseen = True
        warnings.warn(
            f"{type(self).__name__}: {len(pieces)} layers have gradients, but nothing passed their hooks since the last step: "
            "their factors stay as they are. Layers must be called as the modules that they are, and not be compiled.",
            stacklevel=5,
        )


def _parameter(x: Any) -> Any:
    """Of an element of `params`, which may have a name."""
    return x[1] if isinstance(x, tuple) and len(x) == 2 else x


def _inner(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _pair(dtype: Any) -> list[Any]:
    """`preconditioner_dtype` of each side, by name."""
    pair = list(dtype) if isinstance(dtype, tuple | list) and len(dtype) == 2 else [dtype, dtype]
    return [str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else x for x in pair]


def _stack(vectors: list[Tensor | None], weights: list[float], like: Tensor) -> Tensor:
    """Vectors times their weights, as `(b, size)`; zeros where there is none."""
    none = torch.zeros_like(raised(like[:1])).squeeze(0)
    return torch.stack(torch._foreach_mul([none if x is None else x for x in vectors], weights))


def _averaged(tensors: list[Tensor], replicas: Any) -> list[Tensor]:
    """Over ranks, in one message."""
    message = torch.cat(tensors, -1)
    dist.all_reduce(message, group=replicas)
    return list((message / dist.get_world_size(replicas)).split([x.shape[-1] for x in tensors], -1))
