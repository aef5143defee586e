"""SpectralFull: full-matrix AdaGrad and RMSprop with any root, without any decomposition; and their diagonal forms.

Lin et al., 2025, "Spectral-factorized Positive-definite Curvature Learning for NN Training", Fig. 1 and Fig. 5, Sec. 3.2, and a
rotation that tracks. `S = B Diag(d) Bᵀ` is of all parameters of a group, as one vector.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import spectral_ops as ops
from spectral_ops import riemannian
from spectral_ops.cayley import LIMITS
from spectral_ops.optim import _options as check
from spectral_ops.optim._engine import Batch, MatrixOptimizer, moves
from spectral_ops.optim._factors import FACTOR_DTYPES, adopt, factor_dtype, first_seeds, seeds
from spectral_ops.optim._pieces import Group, Piece, joint, whole
from spectral_ops.reference import NEGLIGIBLE, accumulation_dtype, block, column, frobenius, rotate
from spectral_ops.track import full_track

ROTATIONS = ("tracking", "riemannian")
UPDATE_SCALES = ("rms", "clip", None)
LAYOUT_OPTIONS = ("rotation", "carry_residual", "diagonal", "joint", "max_preconditioner_dim", "preconditioner_dtype")
DEFAULT_ORDER = 3


class SpectralFull(MatrixOptimizer):
    r"""Full-matrix AdaGrad (`gamma=0`) and RMSprop (`gamma=1`) with any root, without any decomposition: for small problems.

    For the gradient `g` of all parameters of a group, as one vector of `n` elements, it keeps `S = B Diag(d) Bᵀ`:

        S ← (1 − γβ₂) S + β₂ (g gᵀ + λ I)       as d and B, up to first order in β₂
        m ← μ m + (1 − μ) g,   v = μ m + (1 − μ) g (Nesterov)
        θ ← (1 − lr · weight_decay) θ − lr · scaled(B (d^(1/root) + eps)⁻¹ Bᵀ v)

    `rotation="tracking"` (default) keeps that average whole, `S = B (Diag(d) + R) Bᵀ`, and `B` follows its eigenbasis in
    bounded steps (`spectral_ops.gram_track`). `rotation="riemannian"` is the paper's update; with `update_scale=None, eps=0,
    betas=(0, 1 − β₂)` it is Fig. 1 (`exact=True`) or Fig. 5 of Lin et al., 2025, step for step.

    `diagonal=True` keeps `d` alone (Sec. 3.2). Its denominators are, with `root=2, update_scale=None, nesterov=False`, those of

        torch.optim.Adam        betas as there; AdamW with `weight_decay`
        torch.optim.RMSprop     betas=(0, alpha), bias_correction=False
        torch.optim.Adagrad     betas=(0, 0), gamma=0; `initial_accumulator_value` as there

    and `root=1` gives the root-free forms of those, `root=4` the fractional method of Chen et al., 2021.

    Parameters of one dtype and device in a group share one matrix, which is in the state of the first of them. One without a
    gradient counts as zero and is not changed; where one gradient is not finite all of them skip the step, which counts once.
    Groups with `algorithm="adamw"` take AdamW. A step does not synchronise with the host.

    Args:
        params: parameters, named parameters, or groups.
        lr: learning rate, a float or a tensor of one element. With `update_scale="rms"` it means what AdamW's does.
        betas: `(μ, 1 − β₂)`: decay of the momentum, decay of the curvature average.
        root: `p`: 2 is Adam-like, 1 Newton-like.
        gamma: 1 for a moving average, RMSprop; 0 for a sum, AdaGrad.
        joint: one matrix for all parameters of a group; False: one for each parameter.
        diagonal: keep the diagonal alone.
        rotation: "tracking" or "riemannian".
        carry_residual: keep `R` ("tracking" only): one more matrix of state.
        exact: the exact exponential map in place of the truncated one ("riemannian" only).
        damping: `λ`, in units of squared gradients; of the truncated map.
        eps: added to the denominators.
        bias_correction: divide averages by how much of them there is: `1 − μᵗ`, and, where `gamma=1`, `1 − (1 − β₂)ᵗ`, in which
            a start that is not zero counts as the first gradient. None: but for "riemannian".
        initial_accumulator_value: where `d` starts. None: at 0 with `diagonal`, at 1 with "riemannian", else at the first
            gradient's mean square.
        update_interval: the factors are updated once in so many steps, after the first ten.
        nesterov: Nesterov momentum.
        weight_decay: decoupled, multiplied by `lr`.
        update_scale: "rms": every update of a matrix has root mean square 0.2 before `lr`; "clip": at most 1; None: as it is.
        cayley_order: 2, 3, 4 or 8: truncated map with self-correction, see `spectral_ops.cayley_track`. None: 3 for
            "tracking", the exact map (a linear solve) for "riemannian".
        max_preconditioner_dim: vectors of more elements keep a diagonal; a step costs some ten `n³` operations.
        preconditioner_dtype: of `B` and `R`; None: the parameter's (float32 for float16). bfloat16 is rounded stochastically.
            Eigenvalues are float32 (float64 for float64 parameters) always.
        adamw_betas: of AdamW inside.
        adamw_eps: of AdamW inside.
        seed: of the stochastic rounding.
        maximize: ascend.
        capturable: the step may be captured in a CUDA graph, see `SpectralKron`.
        unknown: `mesh` and `transport_dtype`, see `SpectralKron`, with `joint=False` only; options of other optimizers, as
            long as they are false.

    Raises:
        ValueError, TypeError: options out of range, empty or complex parameters, in a sentence that names them.
        RuntimeError: sparse gradients.

    Lin et al., 2025, "Spectral-factorized Positive-definite Curvature Learning for NN Training", Fig. 1, Fig. 5, Sec. 3.2.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.5e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        *,
        root: float = 2.0,
        gamma: float = 1.0,
        joint: bool = True,
        diagonal: bool = False,
        rotation: str = "tracking",
        carry_residual: bool = True,
        exact: bool = False,
        damping: float = 0.0,
        eps: float = 1e-8,
        bias_correction: bool | None = None,
        initial_accumulator_value: float | None = None,
        update_interval: int = 1,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        update_scale: str | None = "rms",
        cayley_order: int | None = None,
        max_preconditioner_dim: int = 2048,
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
        check.number(group, "root", positive=True)
        check.number(group, "damping")
        check.number(group, "eps")
        check.whole(group, "max_preconditioner_dim")
        check.choice(group, "gamma", (0, 1))
        check.choice(group, "rotation", ROTATIONS)
        check.choice(group, "update_scale", UPDATE_SCALES)
        check.choice(group, "cayley_order", (None, *LIMITS))
        check.choice(group, "bias_correction", (None, True, False))
        check.choice(group, "preconditioner_dtype", (None, *FACTOR_DTYPES))
        for name in ("joint", "diagonal", "exact", "carry_residual"):
            check.choice(group, name, (True, False))
        if group["initial_accumulator_value"] is not None:
            check.number(group, "initial_accumulator_value", positive=not group["diagonal"] or group["exact"])
        if group["exact"] and group["rotation"] == "tracking":
            raise ValueError('`exact=True` is of rotation="riemannian"; "tracking" keeps an average')
        if group["exact"] and group["damping"]:
            raise ValueError(f"`damping` belongs to the truncated map, got {group['damping']} with exact=True")

    def can_share(self, group: Group) -> bool:
        return not group["joint"]

    def layout(self, group: Group) -> tuple[Any, ...]:
        return tuple(group[name] for name in LAYOUT_OPTIONS)

    def cut(self, p: Tensor, group: Group, index: int = 0) -> Iterator[Piece]:
        if not group["joint"]:
            yield whole(p, index, (p.numel(),))
            return
        joined = [q for q in group["params"] if (q.dtype, q.device) == (p.dtype, p.device) and q.numel()]
        if joined and joined[0] is p:
            yield joint(joined, index)

    def _is_matrix(self, group: Group, i: int) -> bool:
        return group["algorithm"] != "adamw"

    def init_state(self, group: Group, piece: Piece) -> dict[str, Tensor]:
        p, lead, n = piece.parameter, piece.lead, piece.n
        number: dict[str, Any] = {"dtype": accumulation_dtype(p.dtype), "device": p.device}
        factor: dict[str, Any] = {"dtype": factor_dtype(group, p), "device": p.device}
        state = {
            "momentum_buffer": torch.zeros(*lead, n, 1, dtype=p.dtype, device=p.device),
            "updates": torch.zeros(lead, **number),
            "eigenvalues": torch.full((*lead, n), _start(group), **number),
        }
        if not group["diagonal"] and 1 < n <= group["max_preconditioner_dim"]:
            state["basis"] = torch.eye(n, **factor).expand(*lead, n, n).clone()
            if group["rotation"] == "tracking" and group["carry_residual"]:
                state["residual"] = torch.zeros(*lead, n, n, **factor)
            if factor["dtype"] == torch.bfloat16:
                state["seed"] = first_seeds(group, piece)
        return state

    def update(self, group: Group, batch: Batch) -> tuple[Tensor, Tensor, str]:
        s, mu = batch.state, group["betas"][0]
        usable = batch.check(NEGLIGIBLE)
        if group["diagonal"]:  # which a gradient of zeros shrinks, as in Adam; but a step of nothing is none
            usable = batch.finite & ((batch.mean_square > 0) | moves(group))
        due, rows = batch.part(), batch.due or slice(None)
        if len(due.grad):
            _learn(group, due, usable[rows], batch.mean_square[rows])
        v = ops.momentum_update(
            s["momentum_buffer"], batch.grad, batch.finite, mu, nesterov=group["nesterov"], maximize=group["maximize"]
        )  # fmt: skip
        x = rotate(v, s.get("basis"), None)
        x = x / (s["eigenvalues"].pow(1 / group["root"]) + group["eps"]).to(x.dtype).unsqueeze(-1)
        u = x if "basis" not in s else s["basis"].to(x.dtype) @ x
        if group["update_scale"] is None and _corrects(group):
            u = u / block(1 - mu ** (s["step"].double() + 1)).to(u.dtype)
        return u, frobenius(u).square().unsqueeze(-1), group["update_scale"] or "none"


def _learn(group: Group, batch: Batch, usable: Tensor, mean_square: Tensor) -> None:
    """`S ← (1 − γβ₂) S + β₂ (g gᵀ + λ I)`, for the usable vectors."""
    s, beta2 = batch.state, 1 - group["betas"][1]
    d, b = s["eigenvalues"], s.get("basis")
    g = torch.where(block(usable), batch.grad, 0)
    if not group["diagonal"] and group["rotation"] == "tracking" and group["initial_accumulator_value"] is None:
        d = torch.where(column(usable & (s["updates"] == 0)), column(mean_square), d)
    s["updates"] += usable
    x = rotate(g, b, None).to(d.dtype)
    share = torch.full_like(s["updates"], beta2)
    if group["gamma"] and _corrects(group):
        seen = s["updates"] + (_start(group) != 0)
        share = beta2 / (1 - (1 - beta2) ** seen.double().clamp(min=1)).to(d.dtype)
    gamma, damping, residual = group["gamma"], group["damping"], s.get("residual")
    if b is not None and group["rotation"] == "tracking":
        order = group["cayley_order"] or DEFAULT_ORDER
        b, d, residual = full_track(
            b, d, residual, x @ x.mT, share, gamma=gamma, damping=damping, limit=LIMITS[order], order=order, seed=seeds(s, 0)
        )  # fmt: skip
    else:
        turn = riemannian.Turn(group["cayley_order"], LIMITS.get(group["cayley_order"]), seeds(s, 0))
        w = riemannian.of_factor(x, d, diagonal=b is None)
        b, d = riemannian.full_update(b, d, w, share, gamma, damping, group["exact"], turn)
    adopt(usable, s, {"eigenvalues": d, "basis": b, "residual": residual})


def _start(group: Group) -> float:
    """Where eigenvalues start, or 1 where the first gradient tells."""
    value = group["initial_accumulator_value"]
    return float(value) if value is not None else float(not group["diagonal"] or group["exact"])


def _corrects(group: Group) -> bool:
    chosen = group["bias_correction"]
    return group["rotation"] == "tracking" if chosen is None else bool(chosen)
