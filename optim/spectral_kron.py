"""SpectralKron: Kronecker-factored curvature in spectral form, without any decomposition.

Lin et al., 2025, "Spectral-factorized Positive-definite Curvature Learning for NN Training", Fig. 1 and Fig. 6, and a
rotation that tracks. `S = α S_C ⊗ S_K`, `S_l = B_l Diag(d_l) B_lᵀ`; `C` is the left (row) side, `K` the right one.
"""

from typing import Any

import torch
from torch import Tensor

import spectral_ops as ops
from spectral_ops import riemannian
from spectral_ops.cayley import LIMITS
from spectral_ops.optim import _options as check
from spectral_ops.optim._engine import Batch, MatrixOptimizer
from spectral_ops.optim._factors import FACTOR_DTYPES, adopt, factor_dtype, first_seeds, seeds
from spectral_ops.optim._pieces import Group, Piece
from spectral_ops.reference import RMS_EPSILON, accumulation_dtype, block, keep, raised, rotate

ROTATIONS = ("tracking", "riemannian")
UPDATE_SCALES = ("rms", "clip", "graft", None)

DEFAULT_ORDER = 3
LAYOUT_OPTIONS = ("rotation", "carry_residual", "update_scale", "max_preconditioner_dim", "preconditioner_dtype")
SIDES = ("left", "right")


class SpectralKron(MatrixOptimizer):
    r"""Kronecker-factored curvature in spectral form, learned without any decomposition.

    For a weight `n × m` with gradient `G` it keeps `S = α S_C ⊗ S_K`, `S_l = B_l Diag(d_l) B_lᵀ`, an average of gradient outer
    products, and steps along its inverse root. With `G̃ = B_Cᵀ G B_K`, `k_C = m`, `k_K = n`, for each side `l`:

        W_C = G̃ Diag(1/d_K) G̃ᵀ,   W_K = G̃ᵀ Diag(1/d_C) G̃
        d_l from diag(W_l),   B_l ← B_l · Cayley(X_l),   X_l a skew matrix from W_l and the gaps of d_l
        M ← μ M + (1 − μ) G,   N = μ M + (1 − μ) G (Nesterov)
        θ ← (1 − lr · weight_decay) θ − lr · scaled(α^(−1/root) S_C^(−1/root) N S_K^(−1/root))

    `rotation="tracking"` (default) keeps the averages whole, `S_l = B_l T_l B_lᵀ`, and turns `B_l` towards their eigenbasis
    by a bounded step in every update (`spectral_ops.gram_track`, `spectral_ops.cayley_track`).
    `rotation="riemannian"` is the paper's update; with `update_scale=None, betas=(0, 1 − β₂)` it is Fig. 1 (`exact=True`) or
    Fig. 6 of Lin et al., 2025, step for step.

    Parameters of fewer than two dimensions, groups with `algorithm="adamw"` and, where the groups carry `param_names`,
    embeddings and heads by their names, take AdamW in the same optimizer. `param_groups(model, lr)` splits a model.
    Convolutions are matrices `(out, in·kh·kw)`; other leading dimensions are a batch of matrices (experts). All
    parameters of one shape in a group are computed as one batch. A step does not synchronise with the host.

    Args:
        params: parameters, named parameters, or groups. A group may also set `algorithm` ("matrix", "adamw" or None: by
            its parameters' names), `conv` (True for Conv1d weights), `split_sizes` (rows of each part of a fused weight) and
            `num_heads` (an int, or one for each part: that part is cut into so many equal matrices).
        lr: learning rate, a float or a tensor of one element. With `update_scale="rms"` it means what AdamW's does.
        betas: `(μ, 1 − β₂)`: decay of the momentum, decay of the curvature average. The tracking rotation wants a short
            average, the paper's a long one (0.95 and more).
        root: `p`. 2 is Adam-like, 1 Newton-like, 4 Shampoo's outer root. None: 1.7 where `update_scale` is "rms" or "graft",
            which trained better than 2 on two small tasks; else 2, whose updates do not depend on the scale of the loss.
        rotation: "tracking" or "riemannian".
        carry_residual: keep the off-diagonal part of `T_l` ("tracking" only): one more matrix of state a side.
        update_interval: every matrix updates its factors once in so many steps, in each step another share of the matrices,
            so that all steps cost the same; in the first ten steps all do.
        damping: `λ` of the adaptive damping `Λ_C = λ k_C mean(1/d_K)`, in units of squared gradients.
        gamma: 1 for a moving average, 0 for a sum ("riemannian" only).
        exact: the exact exponential map in place of the truncated one ("riemannian" only).
        nesterov: Nesterov momentum.
        weight_decay: decoupled, multiplied by `lr`.
        update_scale: "rms": every update has root mean square 0.2 before `lr`; "clip": at most 1; "graft": that of Adam's
            update; None: as it is.
        cayley_order: 2, 3, 4 or 8: truncated map with self-correction, see `spectral_ops.cayley_track`. None: 3 for
            "tracking", the exact map (a linear solve) for "riemannian".
        rotation_limit: bound on the generator's norm (spectral for "tracking", Frobenius for "riemannian"). None: the
            largest that is stable, 0.42, 0.48, 0.5 or 0.55 for order 2, 3, 4 or 8: turns of under 60°; none for the exact map.
        rotation_epsilon: relative eigenvalue gap under which rotations are damped ("tracking" only).
        max_preconditioner_dim: larger sides keep a diagonal factor.
        preconditioner_dtype: of `B_l` and the residuals; None: the parameter's (float32 for float16). bfloat16 factors are
            rounded stochastically. Eigenvalues and scales are float32 (float64 for float64 parameters) always.
        adamw_betas: of AdamW inside; the second one also of grafting.
        adamw_eps: of AdamW inside, and of grafting.
        seed: of the stochastic rounding.
        maximize: ascend.
        capturable: the step may be captured in a CUDA graph, once one was made without. It needs `update_interval=1`; a
            tensor `lr` must be on the device. No step waits for the device, captured or not.
        unknown: `mesh`, a DeviceMesh of ranks that share the work on parameters which each of them has, as under
            DistributedDataParallel (for DTensors it is their own; all its ranks must call `step` and `state_dict` together);
            `transport_dtype`, torch.bfloat16 or torch.float32, in which gradients and updates travel (None: the
            parameter's); options of other optimizers, as long as they are false.

    A parameter whose gradient has a NaN or an infinity, or whose square overflows, is left untouched with its state;
    `skipped_steps()` counts that.

    Raises:
        ValueError, TypeError: options out of range, empty or complex parameters, in a sentence that names them.
        RuntimeError: sparse gradients.

    Lin et al., 2025, "Spectral-factorized Positive-definite Curvature Learning for NN Training", Fig. 1, Fig. 6, Sec. 3.4.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-2,
        betas: tuple[float, float] = (0.9, 0.5),
        *,
        root: float | None = None,
        rotation: str = "tracking",
        carry_residual: bool = True,
        update_interval: int = 1,
        damping: float = 0.0,
        gamma: float = 1.0,
        exact: bool = False,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        update_scale: str | None = "rms",
        cayley_order: int | None = None,
        rotation_limit: float | None = None,
        rotation_epsilon: float = 0.1,
        max_preconditioner_dim: int = 8192,
        preconditioner_dtype: torch.dtype | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        seed: int = 0,
        maximize: bool = False,
        capturable: bool = False,
        **unknown: Any,
    ):
        super().__init__(params, locals())

    def check_options(self, group: Group) -> None:
        check.decays(group, "betas")
        check.number(group, "damping")
        if group["root"] is not None:
            check.number(group, "root", positive=True)
        check.number(group, "rotation_epsilon", positive=True)
        check.whole(group, "max_preconditioner_dim")
        check.choice(group, "rotation", ROTATIONS)
        check.choice(group, "update_scale", UPDATE_SCALES)
        check.choice(group, "cayley_order", (None, *LIMITS))
        check.choice(group, "gamma", (0, 1))
        check.choice(group, "preconditioner_dtype", (None, *FACTOR_DTYPES))
        largest = LIMITS[_map(group)[0]]
        if group["rotation_limit"] is not None and not 0 < group["rotation_limit"] <= largest:
            raise ValueError(f"`rotation_limit` must be in (0, {largest}] at this Cayley order, got {group['rotation_limit']}")
        if group["rotation"] == "tracking" and (group["gamma"] != 1 or group["exact"]):
            raise ValueError('`gamma=0` and `exact=True` are of rotation="riemannian"; "tracking" keeps a moving average')
        if group["exact"] and group["damping"]:
            raise ValueError(f"`damping` belongs to the truncated map, got {group['damping']} with exact=True")

    def layout(self, group: Group) -> tuple[Any, ...]:
        return tuple(group[name] for name in LAYOUT_OPTIONS)

    def init_state(self, group: Group, piece: Piece) -> dict[str, Tensor]:
        p, lead = piece.parameter, piece.lead
        number: dict[str, Any] = {"dtype": accumulation_dtype(p.dtype), "device": p.device}
        factor: dict[str, Any] = {"dtype": factor_dtype(group, p), "device": p.device}
        state = {
            "momentum_buffer": torch.zeros(*lead, piece.n, piece.m, dtype=p.dtype, device=p.device),
            "updates": torch.zeros(lead, **number),
            "scale": torch.ones(lead, **number),
        }
        for side, size in zip(SIDES, (piece.n, piece.m), strict=True):
            state[f"eigenvalues_{side}"] = torch.ones(*lead, size, **number)
            if 1 < size <= group["max_preconditioner_dim"]:
                state[f"basis_{side}"] = torch.eye(size, **factor).expand(*lead, size, size).clone()
                if _carries(group):
                    state[f"residual_{side}"] = torch.zeros(*lead, size, size, **factor)
        if factor["dtype"] == torch.bfloat16:
            state["seed"] = first_seeds(group, piece)
        if group["update_scale"] == "graft":
            state["exp_avg_sq"] = torch.zeros_like(state["momentum_buffer"])
        return state

    def update(self, group: Group, batch: Batch) -> tuple[Tensor, Tensor, str]:
        s, due = batch.state, batch.part()
        if due is not batch:
            batch.check()
        if len(due.grad):
            (_track if group["rotation"] == "tracking" else _paper)(group, due)
        direction = ops.momentum_update(
            s["momentum_buffer"],
            batch.grad,
            batch.finite,
            group["betas"][0],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        u, squares = ops.apply_root(
            direction,
            s.get("basis_left"),
            s["eigenvalues_left"],
            s.get("basis_right"),
            s["eigenvalues_right"],
            s["scale"],
            _root(group),
            return_squares=True,
        )
        if group["update_scale"] == "graft":
            rms = (squares.sum(-1) / u[0].numel()).sqrt() + RMS_EPSILON
            return u * block(_adam_rms(group, batch) / rms), squares, "none"
        return u, squares, group["update_scale"] or "none"


def _track(group: Group, batch: Batch) -> None:
    """Moving averages `S_l = B_l T_l B_lᵀ`, `T_l = Diag(d_l) + R_l`, whose bases follow their eigenbases; the formulas are at
    `spectral_ops.kron_track`."""
    s = batch.state
    order, limit = _map(group)
    batch.finite = ops.kron_track(
        batch.grad,
        (s.get("basis_left"), s.get("basis_right")),
        (s.get("residual_left"), s.get("residual_right")),
        (s["eigenvalues_left"], s["eigenvalues_right"]),
        s["scale"],
        s["updates"],
        seed=s.get("seed"),
        beta=1 - group["betas"][1],
        damping=group["damping"],
        epsilon=group["rotation_epsilon"],
        limit=limit,
        order=order,
    )


def _paper(group: Group, batch: Batch) -> None:
    """Lin et al., 2025: Fig. 1 (`exact`) or Fig. 6, with the exact or, by `cayley_order`, the truncated Cayley map; the
    formulas are at `spectral_ops.riemannian`."""
    s = batch.state
    usable = batch.check()
    s["updates"] += usable
    bases = s.get("basis_left"), s.get("basis_right")
    eigenvalues = s["eigenvalues_left"], s["eigenvalues_right"]
    order = group["cayley_order"]
    limit = group["rotation_limit"] if order is None else _map(group)[1]
    left, right = (riemannian.Turn(order, limit, seeds(s, axis)) for axis in range(2))
    (b_c, b_k), (d_c, d_k), alpha = riemannian.kron_update(
        bases,
        eigenvalues,
        s["scale"],
        riemannian.kron_curvature(rotate(batch.clean_grad(), *bases), bases, eigenvalues),
        torch.full_like(s["scale"], 1 - group["betas"][1]),
        gamma=group["gamma"],
        damping=group["damping"],
        exact=group["exact"],
        turns=(left, right),
    )
    new = {"basis_left": b_c, "basis_right": b_k, "eigenvalues_left": d_c, "eigenvalues_right": d_k, "scale": alpha}
    adopt(usable, s, new)


def _adam_rms(group: Group, batch: Batch) -> Tensor:
    """Root mean square, for each matrix, of the update that Adam would make: what grafting takes from it."""
    s, mu, beta = batch.state, group["betas"][0], group["adamw_betas"][1]
    second, square = s["exp_avg_sq"], raised(batch.grad).square()
    keep(batch.finite, second, second.lerp(square.to(second.dtype), 1 - beta))
    step = block(s["step"] + 1)
    first, second = s["momentum_buffer"] / (1 - mu**step), second / (1 - beta**step)
    return (first / (second.sqrt() + group["adamw_eps"])).square().mean((-2, -1)).sqrt()


def _map(group: Group) -> tuple[int, float]:
    """Order of the truncated Cayley map and the limit of its generator."""
    order = group["cayley_order"] or DEFAULT_ORDER
    return order, group["rotation_limit"] or LIMITS[order]


def _root(group: Group) -> float:
    return float(group["root"] or (1.7 if group["update_scale"] in ("rms", "graft") else 2))


def _carries(group: Group) -> bool:
    return bool(group["rotation"] == "tracking" and group["carry_residual"])
