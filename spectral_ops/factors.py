"""Curvature as an object, for those who build other preconditioners: an SPD matrix, or a Kronecker product of two, in spectral
form. It learns from any symmetric curvature, without an eigendecomposition, and has every root of itself at hand.

Lin et al., 2025, "Spectral-factorized Positive-definite Curvature Learning for NN Training".
"""

import math
from typing import Any

import torch
from torch import Tensor

from spectral_ops import _checks as check
from spectral_ops import riemannian
from spectral_ops.cayley import LIMITS
from spectral_ops.kron import kron_track
from spectral_ops.reference import STREAM_SIDE, STREAM_STEP, accumulation_dtype, block, column, raised, rotate
from spectral_ops.root import apply_root
from spectral_ops.track import full_track

ROTATIONS = ("riemannian", "tracking")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


class _Factor:
    """What both have in common: named tensors, the map of the rotation, checks that read values."""

    def __init__(
        self, batch: tuple[int, ...], rotation: str, cayley_order: int | None, dtype: torch.dtype, device: Any, seed: int,
        validate: bool,
    ):  # fmt: skip
        self.name = type(self).__name__
        check.choice(rotation, "rotation", self.name, ROTATIONS)
        check.choice(cayley_order, "cayley_order", self.name, (None, *LIMITS))
        check.choice(dtype, "dtype", self.name, DTYPES)
        self.rotation, self.cayley_order, self.seed, self.validate = rotation, cayley_order, seed, validate
        self.batch = torch.Size(batch)
        self._matrix: dict[str, Any] = {"dtype": dtype, "device": device}
        self._number: dict[str, Any] = {"dtype": accumulation_dtype(dtype), "device": device}
        self.updates = torch.zeros(self.batch, **self._number)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that it is made of, by name; copies are the caller's to make."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take over copies of another factor's tensors, in the dtypes and on the device of this one's.

        Args:
            state_dict: what the other's `state_dict()` gave.

        Raises:
            ValueError, TypeError: names or shapes differ; then nothing has changed.
        """
        mine = self.state_dict()
        if state_dict.keys() != mine.keys():
            raise ValueError(f"{self.name}: its state is {sorted(mine)}, got {sorted(state_dict)}")
        for name, value in state_dict.items():
            if not isinstance(value, Tensor) or value.shape != mine[name].shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{self.name}: `{name}` must be a tensor of shape {tuple(mine[name].shape)}, got {got}")
        for name, value in state_dict.items():
            mine[name].copy_(value)

    def _orthogonal(self, basis: Tensor | None, name: str, n: int) -> Tensor:
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"{self.name}: a size must be an integer of at least 0, got {n!r}")
        if basis is None:
            return torch.eye(n, **self._matrix).expand(*self.batch, n, n).clone()
        shape = (*self.batch, n, n)
        if not isinstance(basis, Tensor) or basis.shape != shape:
            raise ValueError(f"{self.name}: `{name}` must be a tensor of shape {shape}, got {getattr(basis, 'shape', basis)}")
        if self.validate:
            defect = (basis.mT.double() @ basis.double() - torch.eye(n, dtype=torch.float64, device=basis.device)).abs()
            if defect.numel() and not defect.amax() <= 8 * torch.finfo(basis.dtype).eps ** 0.5:
                raise ValueError(f"{self.name}: `{name}` must be orthogonal, but BᵀB − I has an entry of {defect.amax():.2g}")
        return basis.detach().to(**self._matrix, copy=True).contiguous()

    def _positive(self, value: float | Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
        x = torch.as_tensor(value, **self._number).detach()
        if x.ndim and x.shape != shape:
            raise ValueError(f"{self.name}: `{name}` must be a number or have shape {shape}, got {tuple(x.shape)}")
        if self.validate and not (x.isfinite() & (x > 0)).all():
            raise ValueError(f"{self.name}: `{name}` must be positive and finite")
        return x.expand(shape).clone()

    def _decay(self, beta2: float | Tensor, gamma: float, damping: float, exact: bool) -> Tensor:
        """The arguments that both updates have; `beta2` as one number for each matrix."""
        like = self.updates
        check.choice(gamma, "gamma", f"{self.name}.update", (0, 1))
        check.not_negative(damping, "damping", f"{self.name}.update")
        if isinstance(beta2, int | float) and not 0 <= beta2 < math.inf:
            raise ValueError(f"{self.name}.update: `beta2` must be at least 0, got {beta2}")
        if exact and damping:
            raise ValueError(f"{self.name}.update: `damping` belongs to the truncated map, got {damping} with exact=True")
        if exact and self.rotation == "tracking":
            raise ValueError(f'{self.name}.update: `exact=True` is of rotation="riemannian"; "tracking" keeps an average')
        return check.scalars(beta2, "beta2", f"{self.name}.update", like, self.batch).to(like.dtype).expand(self.batch)

    def _input(self, value: Any, name: str, *shapes: tuple[int | str, ...]) -> Tensor:
        """A finite tensor of one of these shapes, after the batch's, in float32 (float64)."""
        op = f"{self.name}.update"
        x = check.tensor(value, name, op)
        wanted = [(*self.batch, *shape) for shape in shapes]
        if not any(_fits(x.shape, shape) for shape in wanted):
            said = " or ".join(str(shape).replace("'", "") for shape in wanted)
            raise ValueError(f"{op}: `{name}` must have shape {said}, got {tuple(x.shape)}")
        if x.device != self.updates.device:
            raise ValueError(f"{op}: `{name}` must be on {self.updates.device} like the factor, got {x.device}")
        if self.validate and not x.isfinite().all():
            raise ValueError(f"{op}: `{name}` has a NaN or an infinity")
        return raised(x.detach())

    def _symmetric(self, value: Tensor, n: int) -> Tensor:
        """`h` `(..., n, n)`, symmetric to what its own dtype can tell, made so in every bit."""
        h = self._input(value, "h", (n, n))
        if self.validate and h.numel():
            size, difference = h.abs().amax(), (h - h.mT).abs().amax()
            if difference > size * torch.finfo(value.dtype).eps ** 0.5:
                raise ValueError(
                    f"{self.name}.update: `h` must be symmetric, but h − hᵀ has an entry of {difference:.2g}, "
                    f"where h has {size:.2g}"
                )
        return 0.5 * (h + h.mT)

    def _check_new(self, eigenvalues: Tensor, exact: bool) -> None:
        if self.validate and not (eigenvalues.isfinite() & (eigenvalues > 0)).all():
            raise ValueError(
                f"{self.name}.update: the exponential map left the range of {eigenvalues.dtype}: take a smaller `beta2`"
                if exact
                else f"{self.name}.update: an eigenvalue would not be positive: the truncated map needs curvature ⪰ 0 and "
                "`beta2` < 1; for other curvature pass `exact=True`"
            )

    def _take(self, new: dict[str, Tensor | None]) -> None:
        for name, value in new.items():
            getattr(self, name).copy_(value)
        self.updates += 1

    def _seeds(self, side: int) -> Tensor | None:
        """Of this update's rounding; None where nothing is rounded to bfloat16."""
        if self._matrix["dtype"] != torch.bfloat16:
            return None
        first = torch.arange(self.batch.numel(), device=self.updates.device).view(self.batch) + self.seed
        return first + self.updates.long() * STREAM_STEP + side * STREAM_SIDE

    def _turn(self, side: int = 0) -> riemannian.Turn:
        limit = None if self.cayley_order is None else LIMITS[self.cayley_order]
        return riemannian.Turn(self.cayley_order, limit, self._seeds(side))

    def _tracking_map(self) -> dict[str, Any]:
        order = self.cayley_order or 3
        return {"order": order, "limit": LIMITS[order]}


def _fits(shape: torch.Size, wanted: tuple[int | str, ...]) -> bool:
    """A name stands for any size."""
    return len(shape) == len(wanted) and all(isinstance(b, str) or a == b for a, b in zip(shape, wanted, strict=True))


def _power(b: Tensor, d: Tensor, residual: Tensor | None, power: float) -> Tensor:
    """`(B Diag(d) Bᵀ)^power`, with the residual where that is 1."""
    b = raised(b)
    scaled = b * d.pow(power).unsqueeze(-2)
    if residual is not None and power == 1:
        scaled = scaled + b @ raised(residual)
    half = 0.5 * scaled @ b.mT
    return half + half.mT


def _kron(c: Tensor, k: Tensor) -> Tensor:
    """Of each pair of matrices."""
    size = c.shape[-1] * k.shape[-1]
    return (c[..., :, None, :, None] * k[..., None, :, None, :]).reshape(*c.shape[:-2], size, size)


class SpectralFactor(_Factor):
    """An SPD matrix `S = B Diag(d) Bᵀ`, or a batch of them, that learns from curvature; `B` orthogonal, `d > 0`.

    `update` takes `S` towards `(1 − γβ₂) S + β₂ H`, up to first order in `β₂` (Lin et al., 2025, Claim 2) with
    `rotation="riemannian"`, the paper's update (`spectral_ops.riemannian`), for any symmetric `H` if `exact`. With
    `rotation="tracking"` it is that average for `H ⪰ 0`, `S = B (Diag(d) + R) Bᵀ`, to what the truncated map loses, and `B`
    follows its eigenbasis in bounded steps (`spectral_ops.gram_track`): to be preferred for averages of gradients.

    Roots, powers and the log-determinant are read off `d`: no decomposition anywhere.

    Args:
        n: size.
        batch: leading dimensions, `()` for one matrix.
        eigenvalues: where `d` starts, a number or `(..., n)`.
        basis: where `B` starts, `(..., n, n)`; None: the identity.
        rotation: "riemannian" or "tracking".
        cayley_order: 2, 3, 4 or 8: the truncated Cayley map (`cayley_truncated`), which needs products only, with a limited
            step. None: 3 for "tracking", for "riemannian" the exact map, a linear solve.
        dtype: of `B` and `R`: float64, float32 or bfloat16, which is rounded stochastically. Eigenvalues are float32 (float64).
        device: of all tensors.
        seed: of the stochastic rounding.
        validate: read values to raise on flawed curvature, which waits for the device.

    Attributes:
        basis: `(..., n, n)`.
        eigenvalues: `(..., n)`.
        residual: `R` `(..., n, n)`, symmetric with zero diagonal, "tracking" only.
        updates: `(...)`, how many there were.
    """

    def __init__(
        self,
        n: int,
        *,
        batch: tuple[int, ...] = (),
        eigenvalues: float | Tensor = 1.0,
        basis: Tensor | None = None,
        rotation: str = "riemannian",
        cayley_order: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
        seed: int = 0,
        validate: bool = True,
    ):
        super().__init__(batch, rotation, cayley_order, dtype, device, seed, validate)
        self.n = n
        self.basis = self._orthogonal(basis, "basis", n)
        self.eigenvalues = self._positive(eigenvalues, "eigenvalues", (*self.batch, n))
        if rotation == "tracking":
            self.residual = torch.zeros_like(self.basis)

    @torch.no_grad()
    def update(
        self,
        h: Tensor | None = None,
        *,
        x: Tensor | None = None,
        beta2: float | Tensor,
        gamma: float = 1.0,
        damping: float = 0.0,
        exact: bool = False,
        rotated: bool = False,
    ) -> None:
        """Learn from curvature `h`, or from `x` with `h = x xᵀ`.

        Args:
            h: `(..., n, n)`, symmetric; positive semi-definite unless `exact`.
            x: `(..., n, k)` or, for `k = 1`, `(..., n)`.
            beta2: share of the new curvature, a number or one for each matrix.
            gamma: 1 for a moving average, 0 for a sum.
            damping: `λ`, added to the diagonal of `h`; of the truncated map.
            exact: the exact exponential map, which keeps `d` positive for any symmetric `h`; "riemannian" only.
            rotated: `h` or `x` is given in the factor's own basis, as `Bᵀ h B` or `Bᵀ x`.

        Raises:
            TypeError, ValueError: not one of `h` and `x`, a wrong shape, dtype, device or option; with `validate` also
                curvature that is not finite or not symmetric, or that would leave an eigenvalue that is not positive. Then
                nothing has changed.
        """
        beta2, n = self._decay(beta2, gamma, damping, exact), self.n
        if (h is None) == (x is None):
            raise ValueError(f"{self.name}.update takes either `h` or `x`, got {'neither' if h is None else 'both'}")
        d, basis = self.eigenvalues, None if rotated else self.basis
        if x is not None:
            x = self._input(x, "x", (n,), (n, "k"))
            x = rotate(x.unsqueeze(-1) if x.ndim == len(self.batch) + 1 else x, basis, None).to(d.dtype)
        else:
            assert h is not None
            h = rotate(self._symmetric(h, n), basis, basis).to(d.dtype)
        new: dict[str, Tensor | None] = {}
        if self.rotation == "tracking":
            w = h if x is None else x @ x.mT
            assert w is not None
            n_new = column(1 - gamma * beta2) * d + column(beta2) * (w.diagonal(dim1=-2, dim2=-1) + damping)
            self._check_new(n_new, exact)  # before a turn, which would take negative ones for rounding errors
            new["basis"], new["eigenvalues"], new["residual"] = full_track(
                self.basis, d, self.residual, w, beta2, gamma=gamma, damping=damping, seed=self._seeds(0),
                **self._tracking_map(),
            )  # fmt: skip
        else:
            curvature = riemannian.of_factor(x, d) if x is not None else riemannian.of_matrix(h, d)  # type: ignore[arg-type]
            turn = self._turn()
            new["basis"], eigenvalues = riemannian.full_update(self.basis, d, curvature, beta2, gamma, damping, exact, turn)
            self._check_new(eigenvalues, exact)
            new["eigenvalues"] = eigenvalues
        self._take(new)

    def apply(self, v: Tensor, root: float) -> Tensor:
        """`S^(−1/root) v`: `root` 1 solves, 2 is Adam-like, −1 multiplies by `S`.

        Args:
            v: `(..., n)` or `(..., n, k)`.
            root: any number but 0.

        Returns:
            Like `v`, computed in float32 (float64). With "tracking" the residual is left out.

        Raises:
            TypeError, ValueError: a wrong type, shape or device, or a root of 0.
        """
        op = f"{self.name}.apply"
        v = check.tensor(v, "v", op)
        if v.ndim == len(self.batch) + 1:
            return self.apply(v.unsqueeze(-1), root).squeeze(-1)
        check.shaped(v, "v", op, (*self.batch, self.n, v.shape[-1] if v.ndim else 0), self.basis)
        if not root:
            raise ValueError(f"{op}: `root` must not be 0")
        b = raised(self.basis).to(torch.promote_types(accumulation_dtype(v.dtype), self.eigenvalues.dtype))
        return (b @ (self.eigenvalues.pow(-1 / root).unsqueeze(-1) * (b.mT @ v.to(b.dtype)))).to(v.dtype)

    def matrix(self, power: float = 1.0) -> Tensor:
        """`S^power`, as a matrix.

        Args:
            power: any number.

        Returns:
            `(..., n, n)`, in the dtype of the eigenvalues, bitwise symmetric. With "tracking", `S` itself is the whole average;
            its other powers leave the residual out.
        """
        return _power(self.basis, self.eigenvalues, getattr(self, "residual", None), power)

    def inverse(self) -> Tensor:
        """`S⁻¹`, `matrix(-1)`."""
        return self.matrix(-1.0)

    def logdet(self) -> Tensor:
        """`log det S = Σ log d`, `(...)`."""
        return self.eigenvalues.log().sum(-1)

    def __repr__(self) -> str:
        return f"SpectralFactor({self.n}, batch={tuple(self.batch)}, rotation={self.rotation!r}, dtype={self.basis.dtype})"


class KroneckerFactor(_Factor):
    """An SPD matrix `S = α S_C ⊗ S_K` of size `n m`, `S_l = B_l Diag(d_l) B_lᵀ`, `det S_C = det S_K = 1`, or a batch of them.

    It acts on `n × m` matrices: `S vec(G)` is `α S_C G S_K`. The factorization is unique (Lin et al., 2025, Claim 5).
    `rotation="riemannian"` is the paper's update (Fig. 1 and Fig. 6), `rotation="tracking"` that of
    `spectral_ops.kron_track`, which `SpectralKron` has by default: its average is warm, so that the first gradient counts
    as much as the start, and it starts at that gradient's scale, whatever `scale` is.

    Args:
        n: size of `S_C`.
        m: size of `S_K`.
        batch: leading dimensions, `()` for one matrix.
        scale: where `α` starts, a number or `(...)`.
        eigenvalues: where `d_C` and `d_K` start, numbers or `(..., n)` and `(..., m)`; they are divided by their geometric
            means, which go to `α`.
        bases: where `B_C` and `B_K` start; None: the identity.
        rotation: "riemannian" or "tracking".
        cayley_order: as of `SpectralFactor`.
        dtype: of bases and residuals, as of `SpectralFactor`.
        device: of all tensors.
        seed: of the stochastic rounding.
        validate: read values to raise on flawed curvature, which waits for the device.

    Attributes:
        basis_c: `B_C`, `(..., n, n)`.
        basis_k: `B_K`, `(..., m, m)`.
        eigenvalues_c: `d_C`, `(..., n)`.
        eigenvalues_k: `d_K`, `(..., m)`.
        scale: `α`, `(...)`.
        residual_c: off-diagonal part of `S_C` in its basis, "tracking" only.
        residual_k: that of `S_K`.
        updates: `(...)`, how many there were.
    """

    def __init__(
        self,
        n: int,
        m: int,
        *,
        batch: tuple[int, ...] = (),
        scale: float | Tensor = 1.0,
        eigenvalues: tuple[float | Tensor, float | Tensor] = (1.0, 1.0),
        bases: tuple[Tensor | None, Tensor | None] = (None, None),
        rotation: str = "riemannian",
        cayley_order: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
        seed: int = 0,
        validate: bool = True,
    ):
        super().__init__(batch, rotation, cayley_order, dtype, device, seed, validate)
        self.n, self.m = n, m
        self.basis_c, self.basis_k = (
            self._orthogonal(b, f"bases[{i}]", size) for i, (b, size) in enumerate(zip(bases, (n, m), strict=True))
        )
        d_c, d_k = (
            self._positive(d, f"eigenvalues[{i}]", (*self.batch, size))
            for i, (d, size) in enumerate(zip(eigenvalues, (n, m), strict=True))
        )
        log_c, log_k = (d.log().sum(-1) / max(d.shape[-1], 1) for d in (d_c, d_k))
        self.eigenvalues_c, self.eigenvalues_k = d_c * column((-log_c).exp()), d_k * column((-log_k).exp())
        self.scale = self._positive(scale, "scale", tuple(self.batch)) * (log_c + log_k).exp()
        if rotation == "tracking":
            self.residual_c, self.residual_k = torch.zeros_like(self.basis_c), torch.zeros_like(self.basis_k)

    @torch.no_grad()
    def update(
        self,
        g: Tensor | None = None,
        beta2: float | Tensor = 0.05,
        *,
        h: Tensor | None = None,
        gamma: float = 1.0,
        damping: float = 0.0,
        exact: bool = False,
    ) -> None:
        """Learn from a gradient `g`, whose curvature is `vec(g) vec(g)ᵀ`, or from any symmetric curvature `h`.

        Args:
            g: `(..., n, m)`.
            beta2: share of the new curvature, a number or one for each matrix. "tracking" takes a number, and averages warmly.
            h: `(..., n·m, n·m)`, symmetric, rows of `g` one after the other; "riemannian" only. Positive semi-definite unless
                `exact`.
            gamma: 1 for a moving average, 0 for a sum ("riemannian" only).
            damping: `λ` of the adaptive damping of Fig. 6, in units of squared gradients; of the truncated map.
            exact: the exact exponential map; "riemannian" only.

        Raises:
            TypeError, ValueError: as `SpectralFactor.update`.
        """
        op, n, m = f"{self.name}.update", self.n, self.m
        share = self._decay(beta2, gamma, damping, exact)
        if (g is None) == (h is None):
            raise ValueError(f"{op} takes either `g` or `h`, got {'neither' if g is None else 'both'}")
        if self.rotation == "tracking":
            if h is not None or gamma != 1 or isinstance(beta2, Tensor):
                raise ValueError(f'{op}: `h`, `gamma=0` and a tensor for `beta2` are of rotation="riemannian"')
            self._track(self._input(g, "g", (n, m)), beta2, damping)
            return
        bases, d = (self.basis_c, self.basis_k), (self.eigenvalues_c, self.eigenvalues_k)
        if g is not None:
            w = riemannian.kron_curvature(rotate(self._input(g, "g", (n, m)), *bases).to(d[0].dtype), bases, d)
        else:
            assert h is not None
            w = self._traces(self._symmetric(h, n * m).to(d[0].dtype))
        (b_c, b_k), (d_c, d_k), scale = riemannian.kron_update(
            bases, d, self.scale, w, share, gamma, damping, exact, (self._turn(0), self._turn(1))
        )
        for x in (d_c, d_k, scale):
            self._check_new(x, exact)
        self._take({"basis_c": b_c, "basis_k": b_k, "eigenvalues_c": d_c, "eigenvalues_k": d_k, "scale": scale})

    def _track(self, g: Tensor, beta2: float, damping: float) -> None:
        if not beta2 <= 1:
            raise ValueError(f"{self.name}.update: `beta2` must be at most 1 for an average, got {beta2}")
        count, numbers, seed = self.batch.numel(), (self.scale, self.updates), self._seeds(0)

        def flat(x: Tensor) -> Tensor:
            return x.view(count, *x.shape[len(self.batch) :])

        kron_track(
            flat(g.to(self.updates.dtype).contiguous()),
            (flat(self.basis_c), flat(self.basis_k)),
            (flat(self.residual_c), flat(self.residual_k)),
            (flat(self.eigenvalues_c), flat(self.eigenvalues_k)),
            *map(flat, numbers),
            seed=None if seed is None else flat(torch.zeros_like(seed) + self.seed),
            beta=beta2,
            damping=damping,
            **self._tracking_map(),
        )

    def _traces(self, h: Tensor) -> tuple[riemannian.Curvature, riemannian.Curvature]:
        """Both sides of any curvature: contracted with the other side's inverse, as `vec(g) vec(g)ᵀ` is to `G S_K⁻¹ Gᵀ`."""
        n, m = self.n, self.m
        b_c, b_k = raised(self.basis_c), raised(self.basis_k)
        both = _kron(b_c, b_k)
        x = rotate(h, both, both).view(*self.batch, n, m, n, m)
        w_c = torch.einsum("...ijkj,...j->...ik", x, self.eigenvalues_k.reciprocal())
        w_k = torch.einsum("...ijil,...i->...jl", x, self.eigenvalues_c.reciprocal())
        return riemannian.of_matrix(w_c, self.eigenvalues_c), riemannian.of_matrix(w_k, self.eigenvalues_k)

    def apply(self, g: Tensor, root: float) -> Tensor:
        """`α^(−1/root) S_C^(−1/root) g S_K^(−1/root)`.

        Args:
            g: `(..., n, m)`.
            root: any number but 0; 1 is `S⁻¹ vec(g)`, −1 `S vec(g)`.

        Returns:
            Like `g`, see `spectral_ops.apply_root`. With "tracking" the residuals are left out.

        Raises:
            TypeError, ValueError: a wrong type, shape or device, or a root of 0.
        """
        op = f"{self.name}.apply"
        g = check.tensor(g, "g", op)
        check.shaped(g, "g", op, (*self.batch, self.n, self.m), self.basis_c)
        if not root:
            raise ValueError(f"{op}: `root` must not be 0")
        sign = math.copysign(1, root)
        d_c, d_k, scale = (x.pow(sign) for x in (self.eigenvalues_c, self.eigenvalues_k, self.scale))
        result: Tensor = apply_root(g, self.basis_c, d_c, self.basis_k, d_k, scale, abs(root))
        return result

    def matrix(self, power: float = 1.0) -> Tensor:
        """`S^power`, as a matrix.

        Args:
            power: any number.

        Returns:
            `(..., n·m, n·m)`, in the dtype of the eigenvalues. With "tracking", `S` itself is of whole averages.
        """
        s_c = _power(self.basis_c, self.eigenvalues_c, getattr(self, "residual_c", None), power)
        s_k = _power(self.basis_k, self.eigenvalues_k, getattr(self, "residual_k", None), power)
        return block(self.scale.pow(power)) * _kron(s_c, s_k)

    def inverse(self) -> Tensor:
        """`S⁻¹`, `matrix(-1)`."""
        return self.matrix(-1.0)

    def logdet(self) -> Tensor:
        """`log det S`, `(...)`."""
        sides = self.m * self.eigenvalues_c.log().sum(-1) + self.n * self.eigenvalues_k.log().sum(-1)
        return self.n * self.m * self.scale.log() + sides

    def __repr__(self) -> str:
        return (
            f"KroneckerFactor({self.n}, {self.m}, batch={tuple(self.batch)}, rotation={self.rotation!r}, "
            f"dtype={self.basis_c.dtype})"
        )
