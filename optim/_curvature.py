"""The curvature of a model's layers, from their inputs and the gradients of their outputs, which hooks see pass by.

For a layer with rows `a` of inputs and rows `g` of output gradients, KFAC's factors are `U = mean a aᵀ` and `G = N · sum g gᵀ`,
where the loss is a mean over `N` terms. Where weights are shared over positions (of a sequence, of an image), KFAC-expand takes
each as a row; KFAC-reduce takes the mean input and the summed gradient of each sample (Eschenhagen et al., 2023).
"""

import math
import weakref
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_ops.reference import raised
from spectral_ops.structures import Diagonal, Structure

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer = nn.Linear | Conv
# nn.MultiheadAttention never calls this one: it multiplies with its weight.
NEVER_CALLED = nn.modules.linear.NonDynamicallyQuantizableLinear


# --- Layers -----------------------------------------------------------------------------------------------------------


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers whose curvature is known; but a weight that something else uses too, as a tied embedding, is no layer's."""
    others = {id(p) for m in model.modules() if not _is_layer(m) for p in m.parameters(recurse=False)}
    return [module for module in model.modules() if _is_layer(module) and id(module.weight) not in others]


def _is_layer(module: nn.Module) -> TypeGuard[Layer]:
    if not isinstance(module, Layer) or isinstance(module, NEVER_CALLED):
        return False
    weight = module._parameters.get("weight")  # which it has not where it is computed from others, as weight_norm does
    return weight is not None and not isinstance(weight, nn.UninitializedParameter)


def bias_of(module: Layer) -> nn.Parameter | None:
    """The bias, where it is trained with the weight."""
    bias = module._parameters.get("bias")
    return bias if bias is not None and bias.requires_grad and module.weight.requires_grad else None


def inputs_of(module: Layer, x: Tensor, kfac_approx: str, ones: bool | None = None) -> Tensor:
    """The rows `a`, `(rows, in (+ 1))`; the last column is of ones for a bias, by default where one is trained. A convolution's
    are patches, of each of its groups."""
    rows = _patches(module, x) if isinstance(module, Conv) else _samples(x).unsqueeze(2)
    rows = (rows.mean(1) if kfac_approx == "reduce" else rows).reshape(-1, rows.shape[-1])
    return F.pad(rows, (0, 1), value=1.0) if (bias_of(module) is not None if ones is None else ones) else rows


def grad_outputs_of(module: Layer, g: Tensor, kfac_approx: str) -> Tensor:
    """The rows `g`, `(rows, out)`."""
    rows = _positions(module, g)
    return (rows.sum(1) if kfac_approx == "reduce" else rows).reshape(-1, rows.shape[-1])


def terms_of(module: Layer, g: Tensor, loss_average: str | None) -> int:
    """`N`, the number of terms that the loss is a mean over."""
    samples, positions, _ = _positions(module, g).shape
    return {None: 1, "batch": samples, "batch+sequence": samples * positions}[loss_average]


def _positions(module: Layer, g: Tensor) -> Tensor:
    """Outputs as `(samples, positions, out)`."""
    if isinstance(module, Conv):
        return _batched(module, g).flatten(2).mT
    return _samples(g)


def _samples(x: Tensor) -> Tensor:
    """`(samples, …, features)` as `(samples, positions, features)`; one sample where there is no such dimension."""
    x = x.unsqueeze(0) if x.ndim == 1 else x
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _batched(module: Conv, x: Tensor) -> Tensor:
    return x if x.ndim == len(module.kernel_size) + 2 else x.unsqueeze(0)


def _patches(module: Conv, x: Tensor) -> Tensor:
    """`(samples, channels, …)` as `(samples, positions, groups, channels / groups · kernel)`, in the order of the weight."""
    x = _batched(module, x)
    sides = list(zip(module.kernel_size, module.stride, module.dilation, strict=True))
    if isinstance(module.padding, str):
        total = [(k - 1) * d if module.padding == "same" else 0 for k, _, d in sides]
        padding = [(t // 2, t - t // 2) for t in total]
    else:
        padding = [(p, p) for p in module.padding]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, [side for pair in reversed(padding) for side in pair], mode=mode)
    x = x.unflatten(1, (module.groups, -1))
    for dim, (k, stride, dilation) in enumerate(sides):
        x = x.unfold(3 + dim, (k - 1) * dilation + 1, stride)[..., ::dilation]  # a view
    n = len(sides)
    # (samples, groups, channels, positions …, kernel …)
    order = (0, *range(3, 3 + n), 1, 2, *range(3 + n, 3 + 2 * n))
    return x.permute(order).flatten(1 + n + 1).flatten(1, n)


# --- Moments ----------------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """Sums of second moments of one side of a layer, in its structure: `plain` of the rows themselves, `own` in the coordinates
    of the factor."""

    plain: Tensor | None = None
    own: Tensor | None = None

    def add(self, structure: Structure, factor: Tensor, rows: Tensor, keep_plain: bool | None) -> None:
        """`rows` is `(rows, n)`, or without a last column of ones. A structure that is closed under transposition can wait with
        the products with its factor, which is cheaper from some number of rows on."""
        if keep_plain is None:
            keep_plain = len(rows) > 2 * structure.size / structure.n
        keep_plain = structure.symmetric and keep_plain
        missing = structure.n - rows.shape[1]
        rows = rows.to(factor.dtype)
        if keep_plain and missing and isinstance(structure, Diagonal):  # which needs no such column
            self.plain = _sum(self.plain, F.pad(Diagonal(rows.shape[1]).project(rows.mT), (0, 1), value=float(len(rows))))
            return
        x = (F.pad(rows, (0, missing), value=1.0) if missing else rows).mT
        if keep_plain:
            self.plain = _sum(self.plain, structure.project(x))
        else:
            self.own = _sum(self.own, structure.project(structure.apply(factor, x, transpose=True)))


def _sum(total: Tensor | None, x: Tensor) -> Tensor:
    return raised(x) if total is None else total.add_(x)


@dataclass
class Moments:
    """Of inputs and output gradients, since the last step; `passes` has the terms of the loss of each backward pass."""

    sides: tuple[Side, Side] = field(default_factory=lambda: (Side(), Side()))
    rows: int = 0
    passes: dict[int, int] = field(default_factory=dict)


# --- Hooks ------------------------------------------------------------------------------------------------------------


class Keep(torch.autograd.Function):
    """Keeps a tensor as autograd keeps what it saves: activation checkpointing drops it, and makes it anew."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise AssertionError("nothing depends on it")


class ForwardHook:
    """Calls `optimizer.see(module, inputs, grad_outputs, backward pass)` once the gradient of a layer's output is known.

    Copies and pickles of a model carry hooks that do nothing: they are not the model that is trained.
    """

    def __init__(self, optimizer: Any = None):
        self.optimizer = None if optimizer is None else weakref.ref(optimizer)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        reference = self.optimizer
        if reference is None or (optimizer := reference()) is None:
            return
        if not torch.is_grad_enabled() or not output.requires_grad or not optimizer.watches(module):
            return
        x = args[0] if args else kwargs["input"]
        kept = Keep.apply(torch.empty(0, requires_grad=True), x.detach())  # type: ignore[no-untyped-call]
        outer = torch._C._current_graph_task_id()  # of the backward pass in which a reentrant checkpoint makes this one; or -1

        def see(g: Tensor) -> None:
            if (optimizer := reference()) is not None:
                task = torch._C._current_graph_task_id() if outer == -1 else outer
                with torch.no_grad():
                    optimizer.see(module, kept.grad_fn.saved_tensors[0], g, task)

        # On the output, not on the module: an activation may change that in place. Where the output is a view, such a change
        # goes past it, to what it is a view of.
        base, shape = output._base, output.shape
        if base is None or base.grad_fn is None or base.numel() != output.numel():
            output.register_hook(see)
        else:
            base.grad_fn.register_prehook(lambda grads: see(grads[0].reshape(shape)) if grads[0] is not None else None)

    def __reduce__(self) -> Any:
        return ForwardHook, ()
