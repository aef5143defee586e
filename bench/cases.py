"""Every operation that has kernels, once: its inputs, the launches, its meaning, the plain PyTorch composition, its cost.

What compiles kernels ahead of time, checks them, times them and counts their work all go through `CASES`. `run`, `op` and
`eager` may write into their arguments, as an optimizer's step does: give them a `fresh` copy where those are needed again.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import spectral_ops
from spectral_ops import reference
from spectral_ops._library import KERNELS
from spectral_ops.kernels import average, cayley, diagonal, factor, gram, rotate, rounding, skew, spectrum, track, update
from spectral_ops.kernels.config import Config
from spectral_ops.kernels.launch import Sides, cdiv, pick

Arguments = dict[str, Any]
Results = dict[str, Tensor]
TOL, EPSILON, LIMIT = 1e-6, 0.1, 0.42
BLOCK = 64  # of the tiles that the costs are counted with


@dataclass(frozen=True)
class Operands:
    """Dtypes of the bases and of the gradient, and PyTorch's setting of float32 products."""

    dtype: torch.dtype
    gradient: torch.dtype
    precision: str = "highest"

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of an element of the bases and of the gradient."""
        return self.dtype.itemsize, self.gradient.itemsize

    @contextmanager
    def setting(self) -> Iterator[None]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


OPERANDS = {
    "bf16": Operands(torch.bfloat16, torch.bfloat16),
    "split": Operands(torch.bfloat16, torch.float32),
    "fp32": Operands(torch.float32, torch.float32),
    "fp32 high": Operands(torch.float32, torch.float32, "high"),
    "fp32 medium": Operands(torch.float32, torch.float32, "medium"),
    "fp16": Operands(torch.float16, torch.float16),
}
SINGLE = ("fp32", "fp32 high", "fp32 medium")


class Work(NamedTuple):
    """Floating-point operations in matrix products, and bytes of device memory read and written."""

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: int) -> "Work":
        return Work(self.flops * count, self.bytes * count)


def full(n: int, m: int, k: int) -> int:
    """Operations of a product whose every tile is computed."""
    return 2 * n * m * k


def lower(n: int, k: int) -> int:
    """Operations of a symmetric result: the tiles on and below its diagonal."""
    return n * (n + min(BLOCK, n)) * k


class Inputs:
    """Random arguments, the same ones for the same seed. On the meta device only their shapes count."""

    def __init__(self, device: str, seed: int = 0):
        self.device = device
        self.generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator).to(dtype)

    def uniform(self, *shape: int, low: float = 0.5) -> Tensor:
        return low + torch.rand(shape, device=self.device, generator=self.generator)

    def seeds(self, batch: int) -> Tensor:
        return torch.randint(2**62, (batch,), device=self.device, generator=self.generator)

    def spectrum(self, batch: int, n: int) -> Tensor:
        """Eigenvalues in a random order, each twice: gaps are 0 or far from every threshold."""
        order = self.uniform(batch, n).argsort(-1)
        return 0.5 + (order // 2) / cdiv(n, 2)

    def orthogonal(self, batch: int, n: int, dtype: torch.dtype) -> Tensor:
        """Cosine transforms with random signs, off orthogonality by a little: dense, and cheap for any `n`."""
        i = torch.arange(n, device=self.device, dtype=torch.float64)
        b = math.sqrt(2 / n) * torch.cos(math.pi / n * i[:, None] * (i + 0.5))
        b = b * torch.where(i == 0, math.sqrt(0.5), 1.0)[:, None]
        signs = torch.where(self.normal(2, batch, n) < 0, -1.0, 1.0)
        b = b.float() * signs[0].unsqueeze(-1) * signs[1].unsqueeze(-2)
        return (b + 1e-3 / math.sqrt(n) * self.normal(batch, n, n)).to(dtype)

    def skew(self, batch: int, n: int, dtype: torch.dtype) -> Tensor:
        """Skew, of spectral norm about 0.6."""
        return reference.skew_from_lower(0.3 / math.sqrt(n) * self.normal(batch, n, n)).to(dtype)

    def hollow(self, batch: int, n: int, dtype: torch.dtype) -> Tensor:
        """Symmetric with zeros on the diagonal, of spectral norm about 0.2."""
        lower = (0.1 / math.sqrt(n) * self.normal(batch, n, n)).tril(-1)
        return (lower + lower.mT).to(dtype)


def fresh(arguments: Arguments) -> Arguments:
    """A copy of the tensors, since `run` may write into them."""
    return _mapped(arguments, torch.clone)


def restore(arguments: Any, source: Any) -> None:
    """Copy the tensors of `source` into those of `arguments`."""
    if isinstance(arguments, Tensor):
        arguments.copy_(source)
    elif isinstance(arguments, dict):
        restore(tuple(arguments.values()), tuple(source.values()))
    elif isinstance(arguments, tuple):
        for mine, theirs in zip(arguments, source, strict=True):
            restore(mine, theirs)


def upcast(arguments: Arguments) -> Arguments:
    return _mapped(arguments, lambda x: x.double() if x.is_floating_point() else x)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(x, change) for name, x in value.items()}
    return tuple(_mapped(x, change) for x in value) if isinstance(value, tuple) else value


class Case:
    """An operation. Results are named; those in `symmetric` and `skew` are so bit for bit."""

    name: str
    operands: tuple[str, ...] = ("bf16", *SINGLE)
    symmetric: tuple[str, ...] = ()
    skew: tuple[str, ...] = ()
    roundings: int = 1  # one after the other, where the composition rounds once

    def arguments(self, n: int, m: int, batch: int, operands: Operands, device: str, seed: int = 0) -> Arguments:
        return self.inputs(Inputs(device, seed), n, m, batch, operands)

    def inputs(self, make: Inputs, n: int, m: int, batch: int, operands: Operands) -> Arguments:
        raise NotImplementedError

    def run(self, arguments: Arguments, config: Config | None = None) -> Results:
        """The launches, with the table's tiles or with `config`."""
        raise NotImplementedError

    def op(self, arguments: Arguments) -> Results:
        """The public op of this meaning. An operation that is only a part of one has none."""
        raise NotImplementedError

    @property
    def has_op(self) -> bool:
        return type(self).op is not Case.op

    def eager(self, arguments: Arguments) -> Results:
        """What one writes in PyTorch without this package, in the dtypes of the arguments."""
        raise NotImplementedError

    def reference(self, arguments: Arguments) -> Results:
        """The meaning, in float64. Unless there is a definition in `spectral_ops.reference`: the composition."""
        return self.eager(upcast(arguments))

    def work(self, n: int, m: int, batch: int, operands: Operands) -> Work:
        """What the kernels must do: each input of a launch read once, each result written once."""
        return self.matrix_work(n, m, *operands.sizes).times(batch)

    def matrix_work(self, n: int, m: int, size: int, gradient: int) -> Work:
        """`work` for one matrix, with bytes of an element of the bases and of the gradient."""
        raise NotImplementedError


class Judgement(NamedTuple):
    """A result against float64; `verdict` says what is wrong with it, and is empty where nothing is."""

    result: str
    error: float
    eager: float
    bound: float
    verdict: str


def unit(operands: Operands) -> float:
    """The error that no comparison with the composition is needed for."""
    return max(torch.finfo(operands.dtype).eps, 5e-7)


def relative_error(x: Tensor, wanted: Tensor) -> float:
    """In the Frobenius norm; of integers and booleans, 0 or infinite."""
    if not x.is_floating_point():
        return 0.0 if torch.equal(x, wanted) else math.inf
    norm = torch.linalg.vector_norm(wanted).clamp(min=torch.finfo(torch.float64).tiny)
    return float(torch.linalg.vector_norm(x.double() - wanted) / norm)


def judged(case: Case, results: Results, eager: Results, wanted: Results, unit: float) -> Iterator[Judgement]:
    """Each result: its error may be twice the composition's in the same dtypes, and a unit for each rounding."""
    for name, x in results.items():
        error, yardstick = relative_error(x, wanted[name]), relative_error(eager[name], wanted[name])
        bound = 2 * yardstick + case.roundings * unit
        faults = [] if error <= bound else [f"error {error:.1e} over {bound:.1e}"]  # NaN is not under it
        if name in case.symmetric and not torch.equal(x, x.mT):
            faults.append("not symmetric")
        if name in case.skew and not torch.equal(x, -x.mT):
            faults.append("not skew")
        yield Judgement(name, error, yardstick, bound, ", ".join(faults))


@contextmanager
def poisoned() -> Iterator[None]:
    """`torch.empty` gives NaN, so that an element no program wrote shows."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-77 if x.dtype != torch.bool else 1)

    torch.empty = filled
    try:
        yield
    finally:
        torch.empty = empty


def judge(case: Case, ours: Callable[[Arguments], Results], arguments: Arguments, operands: Operands) -> list[Judgement]:
    """The results of `ours`, its outputs poisoned beforehand, against float64. The arguments stay as they are."""
    wanted, eager = case.reference(arguments), case.eager(fresh(arguments))
    with poisoned():
        results = ours(fresh(arguments))
    return list(judged(case, results, eager, wanted, unit(operands)))


# --- Gram matrices and generators ---------------------------------------------------------------------------------------


class Gram(Case):
    name, operands, symmetric = "gram", ("bf16", "fp16", *SINGLE), ("w",)

    def inputs(self, make: Inputs, n: int, m: int, batch: int, operands: Operands) -> Arguments:
        return {"x": make.normal(batch, n, m, dtype=operands.dtype), "scale": make.uniform(batch, m)}

    def run(self, arguments: Arguments, config: Config | None = None) -> Results:
        return {"w": gram.gram(arguments["x"], arguments["scale"], 1.0, 0.0, None, _tile("gram", arguments["x"], config))}

    def op(self, arguments: Arguments) -> Results:
        return {"w": spectral_ops.gram(**arguments)}

    def eager(self, arguments: Arguments) -> Results:
        w = _weighted(arguments["x"], arguments["scale"])
        return {"w": 0.5 * (w + w.mT)}

    def reference(self, arguments: Arguments) -> Results:
        a = upcast(arguments)
        return {"w": reference.gram(a["x"], a["scale"], 1.0, 0.0, None)}

    def matrix_work(self, n: int, m: int, size: int, gradient: int) -> Work:
        return Work(lower(n, m), size * (n * m + n * n) + 4 * m)


class GramSkew(Case):
    """The U build."""

    name, operands, skew = "gram_skew", ("bf16", "fp16", *SINGLE), ("u",)

    def inputs(self, make: Inputs, n: int, m: int, batch: int, operands: Operands) -> Arguments:
        x = make.normal(batch, n, m, dtype=operands.dtype) / math.sqrt(m)
        return {"x": x, "d": make.spectrum(batch, n), "scale": make.uniform(batch, m)}

    def run(self, arguments: Arguments, config: Config | None = None) -> Results:
        x, d, scale = arguments.values()
        u, diag_w, squares = skew.gram_skew(x, d, scale, TOL, _tile("gram_skew", x, config))
        return {"u": u, "diag_w": diag_w, "squares": squares}

    def op(self, arguments: Arguments) -> Results:
        return dict(zip(("u", "diag_w", "squares"), spectral_ops.gram_skew(**arguments, tol=TOL), strict=True))

    def eager(self, arguments: Arguments) -> Results:
        x, d, scale = arguments.values()
        w = _weighted(x, scale)
        u = _divided(w, d)
        return {"u": u, "diag_w": w.diagonal(dim1=-2, dim2=-1).clone(), "squares": u.square().sum((-2, -1))}

    def reference(self, arguments: Arguments) -> Results:
        return dict(zip(("u", "diag_w", "squares"), reference.gram_skew(**upcast(arguments), tol=TOL), strict=True))

    def matrix_work(self, n: int, m: int, size: int, gradient: int) -> Work:
        return Work(lower(n, m), size * (n * m + n * n) + 4 * (m + 2 * n))


class SkewGenerator(Case):
    name, operands, skew = "skew_generator", ("bf16", "fp16", "fp32"), ("u",)

    def inputs(self, make: Inputs, n: int, m: int, batch: int, operands: Operands) -> Arguments:
        return {"w": make.normal(batch, n, n, dtype=operands.dtype), "d": make.spectrum(batch, n)}

    def run(self, arguments: Arguments, config: Config | None = None) -> Results:
        return {"u": skew.skew_generator(**arguments, tol=TOL)}

    def op(self, arguments: Arguments) -> Results:
        return {"u": spectral_ops.skew_generator(**arguments, tol=TOL)}

    def eager(self, arguments: Arguments) -> Results:
        return {"u": _divided(**arguments)}

    def reference(self, arguments: Arguments) -> Results:
        return {"u": reference.skew_generator(**upcast(arguments), tol=TOL)}

    def matrix_work(self, n: int, m: int, size: int, gradient: int) -> Work:
        return Work(0, size * 2 * n * n + 4 * n)


class Track(Case):
    """The U build of the tracking rotation: new curvature is averaged into the residual, which gives the generator."""

    def __init__(self, both: bool):
        self.both = both
        self.name = "gram_track_both" if both else "gram_track"
        self.count = 1 + both
        self.skew = tuple(f"x{side}" for side in range(self.count))
        self.symmetric = tuple(f"r{side}" for side in range(self.count))

    def inputs(self, make: Inputs, n: int, m: int, batch: int, operands: Operands) -> Arguments:
        return {
            "x": make.normal(batch, n, m, dtype=operands.dtype),
            "weight": self._pair(make.uniform(batch, m) / m, make.uniform(batch, n) / n),
            "diag": self._pair(make.spectrum(batch, n), make.spectrum(batch, m)),
            "old": self._pair(make.hollow(batch, n, operands.dtype), make.hollow(batch, m, operands.dtype)),
            "keep": make.uniform(batch, 2),
        }

    def _pair(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor | None]:
        return left, right if self.both else None

    def run(self, arguments: Arguments, config: Config | None = None) -> Results:
        x, weight, diag, old, keep = arguments.values()
        new = _empty(old)
        tile = _tile("track", x.mT if self.both and x.shape[1] < x.shape[2] else x, config)
        out = track.track(x, weight, diag, old, new, keep, None, EPSILON, x.dtype, tile)
        return _sided(x=out, r=new)

    def eager(self, arguments: Arguments) -> Results:
        x, weight, diag, old, keep = arguments.values()
        results = {}
        for side in range(self.count):
            t = _weighted(x if side == 0 else x.mT, weight[side]) + keep[:, side, None, None].to(x.dtype) * old[side]
            d = diag[side]
            gap = d.unsqueeze(-1) - d.unsqueeze(-2)
            width = EPSILON * (d.unsqueeze(-1) + d.unsqueeze(-2))
            generator = (-0.5 * t * gap / (gap.square() + width.square())).tril(-1)
            results[f"x{side}"] = (generator - generator.mT).to(x.dtype)
            t = t.tril(-1)
            results[f"r{side}"] = t + t.mT
        return results

    def matrix_work(self, n: int, m: int, size: int, gradient: int) -> Work:
        sides = [(n, m), (m, n)][: self.count]
        squares = sum(3 * a * a for a, _ in sides)
        return Work(sum(lower(a, k) for a, k in sides), size * (n * m + squares) + 4 * sum(a + k for a, k in sides))


# --- The Cayley chain ---------------------------------------------------------------------------------------------------


class CayleyUpdate(Case):
    """`B ← B P(step · X) − ½ B (BᵀB − I)` in order 8."""

    name = "cayley_update"

    def inputs(self, make: Inputs, n: int, m: int, batch: int, operands: Operands) -> Arguments:
        b, x = make.orthogonal(batch, n, operands.dtype), make.skew(batch, n, operands.dtype)
        return {"b": b, "x": x, "step": make.uniform(batch), "seed": make.seeds(batch)}

    def run(self, arguments: Arguments, config: Config | None = None) -> Results:
        b, x, step, seed = arguments.values()
        seeds = (seed, None) if b.dtype == torch.bfloat16 else (None, None)
        f = cayley.generator_map((b, None), (x, None), 8, step=step, config=config)
        (out, _), _ = cayley.turn((b, None), f, seed=seeds, config=config)
        assert out is not None
        return {"b": out}

    def op(self, arguments: Arguments) -> Results:
        return {"b": spectral_ops.cayley_update(**arguments, order=8, correct=True, rounding="stochastic")}

    def eager(self, arguments: Arguments) -> Results:
        b, x, step, _ = arguments.values()
        x = step[:, None, None].to(x.dtype) * x
        x2 = x @ x
        y = b
        for power in (x, x, x2, x2 @ x2):
            y = y + y @ power
        return {"b": y - 0.5 * (b @ (b.mT @ b) - b)}

    def reference(self, arguments: Arguments) -> Results:
        b, x, step, _ = upcast(arguments).values()
        return {"b": reference.cayley_update(b, x, step, 8, True, None)}

    def matrix_work(self, n: int, m: int, size: int, gradient: int) -> Work:
        return _map_work(n, 8, size) + Work(full(n, n, n), size * 3 * n * n)


class CayleyTrack(Case):
    """Limited generators turn both bases and their residuals."""

    symmetric = ("r0", "r1")

    def __init__(self, order: int):
        self.order = order
        self.name = f"cayley_track_{order}"

    def inputs(self, make: Inputs, n: int, m: int, batch: int, operands: Operands) -> Arguments:
        return {
            "b": tuple(make.orthogonal(batch, size, operands.dtype) for size in (n, m)),
            "x": tuple(make.skew(batch, size, operands.dtype) for size in (n, m)),
            "diag": tuple(make.spectrum(batch, size) for size in (n, m)),
            "residual": tuple(make.hollow(batch, size, operands.dtype) for size in (n, m)),
            "seed": tuple(make.seeds(batch) for _ in (n, m)),
        }

    def run(self, arguments: Arguments, config: Config | None = None) -> Results:
        b, x, diag, residual, seed = arguments.values()
        if b[0].dtype != torch.bfloat16:
            seed = (None, None)
        f = cayley.generator_map(b, x, self.order, limit=LIMIT, config=config)
        turned, v = cayley.turn(b, f, residual=residual, diag=diag, seed=seed, config=config)
        d, r = _empty(diag), _empty(residual)
        cayley.conjugate(f, v, diag, d, r, seed=seed, config=config)
        return _sided(b=turned, d=d, r=r)

    def op(self, arguments: Arguments) -> Results:
        results: Results = {}
        for side, (b, x, d, residual, seed) in enumerate(zip(*arguments.values(), strict=True)):
            turned = spectral_ops.cayley_track(b, x, d, residual=residual, limit=LIMIT, order=self.order, seed=seed)
            results |= _named(side, turned)
        return results

    def eager(self, arguments: Arguments) -> Results:
        results = {}
        for side, (b, x, d, residual, _) in enumerate(zip(*arguments.values(), strict=True)):
            x2 = x @ x
            sigma = (torch.linalg.vector_norm(x2, dim=(-2, -1)) / math.sqrt(2)).sqrt()
            step = (LIMIT / sigma).clamp(max=1)
            s = step[:, None, None]
            x, x2 = (s * x).to(x.dtype), (s * s * x2).to(x.dtype)
            if self.order == 2:
                c = 4 / (1 + torch.sqrt(1 - 4 * (step * sigma).square()))
                f = (2 * x + c[:, None, None] * x2).to(x.dtype)
            elif self.order == 3:
                f = 2 * x + 2 * x2 + (1 + (step * sigma).square() / 4)[:, None, None].to(x.dtype) * (x2 @ x)
            elif self.order == 4:
                f = 2 * x + 2 * x2 + x2 @ (reference.QUARTIC_A * x + reference.QUARTIC_B * x2)
            else:
                f = 2 * x + x2
                for power in (x2, x2 @ x2):
                    f = f + power + f @ power
            f = f - 0.5 * reference.add_diagonal(b.mT @ b, -1)
            t = residual + torch.diag_embed(d).to(x.dtype)
            t = t + t @ f
            t = t + f.mT @ t
            t = 0.5 * (t + t.mT)
            results[f"b{side}"] = b + b @ f
            results[f"d{side}"] = t.diagonal(dim1=-2, dim2=-1).to(d.dtype)
            results[f"r{side}"] = t - torch.diag_embed(t.diagonal(dim1=-2, dim2=-1))
        return results

    def reference(self, arguments: Arguments) -> Results:
        results: Results = {}
        for side, (b, x, d, residual, _) in enumerate(zip(*upcast(arguments).values(), strict=True)):
            turned = reference.cayley_track(b, x, d, residual, LIMIT, self.order, None)
            results |= _named(side, turned)
        return results

    def matrix_work(self, n: int, m: int, size: int, gradient: int) -> Work:
        return self._side_work(n, size) + self._side_work(m, size)

    def _side_work(self, n: int, size: int) -> Work:
        turn = Work(2 * full(n, n, n), size * 5 * n * n)
        conjugate = Work(lower(n, n), size * 3 * n * n + 8 * n)
        return _map_work(n, self.order, size) + turn + conjugate


def _named(side: int, turned: tuple[Tensor, Tensor, Tensor | None]) -> Results:
    return {f"{name}{side}": x for name, x in zip("bdr", turned, strict=True) if x is not None}


def _map_work(n: int, order: int, size: int) -> Work:
    """Of `generator_map` with its correction, for one matrix."""
    matrix, products = size * n * n, lower(n, n)
    square, even, finish = Work(products, 2 * matrix), Work(products, 3 * matrix), Work(full(n, n, n), 4 * matrix)
    if order == 2:
        return square + Work(products, 4 * matrix)
    if order in (3, 4):
        return square + Work((order - 1) * products, 4 * matrix)
    return square.times(2) + even + Work(products, 6 * matrix) + finish


# --- Into the bases and back --------------------------------------------------------------------------------------------


class Rotate(Case):
    """`B_Cᵀ G B_K` and its weighted sums of squares."""

    name, operands = "rotate", ("bf16", "split", *SINGLE)

    def inputs(self, make: Inputs, n: int, m: int, batch: int, operands: Operands) -> Arguments:
        return {
            "g": make.normal(batch, n, m, dtype=operands.gradient),
            "b_c": make.orthogonal(batch, n, operands.dtype),
            "d_c": make.spectrum(batch, n),
            "b_k": make.orthogonal(batch, m, operands.dtype),
            "d_k": make.spectrum(batch, m),
        }

    def run(self, arguments: Arguments, config: Config | None = None) -> Results:
        x, rows, cols, squares = rotate.rotate(**arguments, config=config)
        # As `average` reads them: the parts are added up there.
        return {"x": x, "rows": rows.sum(1), "cols": cols.sum(1), "squares": squares.sum(1)}

    def eager(self, arguments: Arguments) -> Results:
        g, b_c, d_c, b_k, d_k = arguments.values()
        x = b_c.mT @ g.to(b_c.dtype) @ b_k
        square = x.to(reference.accumulation_dtype(x.dtype)).square()
        rows, cols = square / d_k.unsqueeze(-2), square / d_c.unsqueeze(-1)
        return {"x": x, "rows": rows.sum(-1), "cols": cols.sum(-2), "squares": square.sum((-2, -1))}

    def matrix_work(self, n: int, m: int, size: int, gradient: int) -> Work:
        return _both_products(n, m, size, gradient, size)


class ApplyRoot(Case):
    name, operands = "apply_root", ("bf16", "split", *SINGLE)

    def inputs(self, make: Inputs, n: int, m: int, batch: int, operands: Operands) -> Arguments:
        return ROTATE.inputs(make, n, m, batch, operands) | {"alpha": make.uniform(batch)}

    def run(self, arguments: Arguments, config: Config | None = None) -> Results:
        out, squares = rotate.apply_root(**arguments, root=2.0, config=config)
        return {"out": out, "squares": squares.sum(1)}

    def op(self, arguments: Arguments) -> Results:
        out, squares = spectral_ops.apply_root(**arguments, root=2.0, return_squares=True)
        return {"out": out, "squares": squares.sum(-1)}

    def eager(self, arguments: Arguments) -> Results:
        g, b_c, d_c, b_k, d_k, alpha = arguments.values()
        x = b_c.mT @ g.to(b_c.dtype) @ b_k
        weight = (alpha[:, None, None] * d_c.unsqueeze(-1) * d_k.unsqueeze(-2)).rsqrt()
        out = (b_c @ (x * weight).to(b_c.dtype) @ b_k.mT).to(g.dtype)
        return {"out": out, "squares": out.to(reference.accumulation_dtype(out.dtype)).square().sum((-2, -1))}

    def reference(self, arguments: Arguments) -> Results:
        out, _ = reference.apply_root(**upcast(arguments), root=2.0)
        return {"out": out, "squares": out.square().sum((-2, -1))}

    def matrix_work(self, n: int, m: int, size: int, gradient: int) -> Work:
        there = _both_products(n, m, size, gradient, size)
        back = Work(there.flops, size * (n * n + m * m + 3 * n * m) + gradient * n * m)
        return there + back


def _both_products(n: int, m: int, size: int, gradient: int, out: int) -> Work:
    """Of `B_Cᵀ G B_K`, with float32 between the two products."""
    bytes_ = size * (n * n + m * m) + (gradient + 4 + 4 + out) * n * m + 8 * (n + m)
    return Work(full(n, m, n) + full(n, m, m), bytes_)


class Average(Case):
    """The eigenvalues of both sides. Advances its arguments in place."""

    name, operands = "average", ("fp32",)
    beta, damping, relative_floor, streams = 0.5, 1e-3, 1e-6, (2**60 + 1, 2**61 + 1)

    def inputs(self, make: Inputs, n: int, m: int, batch: int, operands: Operands) -> Arguments:
        down, across = cdiv(n, BLOCK), cdiv(m, BLOCK)
        updates = torch.arange(batch, device=make.device, dtype=torch.float32) % 4
        return {
            "rows": make.uniform(batch, across, n) * m / across,
            "cols": make.uniform(batch, down, m) * n / down,
            "squares": make.uniform(batch, down * across) * n * m / down / across,
            "d_c": make.spectrum(batch, n), "d_k": make.spectrum(batch, m), "scale": make.uniform(batch),
            "updates": updates, "seed": make.seeds(batch),
        }  # fmt: skip

    def run(self, arguments: Arguments, config: Config | None = None) -> Results:
        rows, cols, squares, *state = arguments.values()
        result = average.average(
            (rows, cols, squares), *state,
            beta=self.beta, damping=self.damping, relative_floor=self.relative_floor, streams=self.streams,
            negligible=reference.NEGLIGIBLE,
        )  # fmt: skip
        changed = {name: arguments[name] for name in ("d_c", "d_k", "scale", "updates")}
        return changed | {name: value for name, value in result._asdict().items() if value is not None}

    def eager(self, arguments: Arguments) -> Results:
        rows, cols, squares, d_c, d_k, scale, updates, seed = arguments.values()
        n, m = d_c.shape[-1], d_k.shape[-1]
        square = squares.sum(-1)
        finite = square.isfinite()
        usable = finite & (square > 0)
        updates = updates + usable
        alpha = torch.where(usable & (updates <= 1), square / (n * m), scale)
        beta = (1 / (updates + 1)).clamp(min=self.beta)
        diag, keep, floor, logs = [], [], [], []
        for parts, d, other in ((rows, d_c, d_k), (cols, d_k, d_c)):
            new = parts.sum(1) / (alpha * other.shape[-1])[:, None]
            new = new + (self.damping * other.reciprocal().mean(-1) / alpha)[:, None]
            new = torch.where(usable[:, None], torch.lerp(d, new, beta[:, None]), d)
            log = new.log().mean(-1)
            shrink = torch.where(usable, torch.exp(-log), 1)
            diag.append(new * shrink[:, None])
            keep.append((1 - beta) * shrink)
            floor.append(torch.where(usable, self.relative_floor * diag[-1].amax(-1), 0))
            logs.append(log)
        shrinks = [k / (1 - beta) for k in keep]
        first = seed + updates.long() * self.streams[0]
        return {
            "d_c": diag[0].maximum(floor[0][:, None]), "d_k": diag[1].maximum(floor[1][:, None]),
            "scale": torch.where(usable, alpha * torch.exp(0.5 * (logs[0] + logs[1])), alpha),
            "updates": updates, "diag_c": diag[0], "diag_k": diag[1],
            "weight_c": (beta * shrinks[0] / (alpha * m))[:, None] / d_k,
            "weight_k": (beta * shrinks[1] / (alpha * n))[:, None] / d_c,
            "keep": torch.stack(keep, -1), "floor": torch.stack(floor, -1), "usable": usable, "finite": finite,
            "seeds": torch.stack((first, first + self.streams[1])),
        }  # fmt: skip

    def matrix_work(self, n: int, m: int, size: int, gradient: int) -> Work:
        down, across = cdiv(n, BLOCK), cdiv(m, BLOCK)
        read, written = across * n + down * m + down * across + n + m, 3 * (n + m)
        return Work(0, 4 * (read + written))


class KronTrack(Case):
    """A gradient enters the curvature and turns both bases: the launches of one optimizer step, in place."""

    name, operands, symmetric = "kron_track", ("bf16", "split", "fp32"), ("residual_c", "residual_k")
    settings: tuple[float, float, float, float, int] = (0.5, 0.0, EPSILON, LIMIT, 3)
    roundings = 4

    def inputs(self, make: Inputs, n: int, m: int, batch: int, operands: Operands) -> Arguments:
        updates = 3 + torch.arange(batch, device=make.device, dtype=torch.float32)
        return {
            "g": make.normal(batch, n, m, dtype=operands.gradient),
            "basis_c": make.orthogonal(batch, n, operands.dtype), "basis_k": make.orthogonal(batch, m, operands.dtype),
            "residual_c": make.hollow(batch, n, operands.dtype), "residual_k": make.hollow(batch, m, operands.dtype),
            "d_c": make.spectrum(batch, n), "d_k": make.spectrum(batch, m), "scale": make.uniform(batch),
            "updates": updates, "seed": make.seeds(batch),
        }  # fmt: skip

    def run(self, arguments: Arguments, config: Config | None = None) -> Results:
        return self._results(KERNELS["kron_track"], arguments)

    def op(self, arguments: Arguments) -> Results:
        g, basis_c, basis_k, residual_c, residual_k, d_c, d_k, scale, updates, seed = arguments.values()
        beta, damping, epsilon, limit, order = self.settings
        finite = spectral_ops.kron_track(
            g, (basis_c, basis_k), (residual_c, residual_k), (d_c, d_k), scale, updates, seed=seed,
            beta=beta, damping=damping, epsilon=epsilon, limit=limit, order=order,
        )  # fmt: skip
        return self._changed(arguments, finite)

    def eager(self, arguments: Arguments) -> Results:
        return self._results(reference.kron_track, arguments)

    def _results(self, op: Callable[..., Tensor], arguments: Arguments) -> Results:
        if arguments["basis_c"].dtype != torch.bfloat16:
            arguments = arguments | {"seed": None}
        return self._changed(arguments, op(*arguments.values(), *self.settings))

    def _changed(self, arguments: Arguments, finite: Tensor) -> Results:
        return {name: x for name, x in arguments.items() if name not in ("g", "seed")} | {"finite": finite}

    def matrix_work(self, n: int, m: int, size: int, gradient: int) -> Work:
        move = Work(0, size * 2 * (n * n + m * m))  # of the turned bases to their place
        pieces = (ROTATE, AVERAGE, CASES["gram_track_both"], CASES["cayley_track_3"])
        return sum((case.matrix_work(n, m, size, gradient) for case in pieces), move)


# --- Factors, eigenvalues, parameters -----------------------------------------------------------------------------------


class FactorUpdate(Case):
    name = "factor_update"

    def inputs(self, make: Inputs, n: int, m: int, batch: int, operands: Operands) -> Arguments:
        k, momentum = (make.normal(batch, n, n) / math.sqrt(n) for _ in range(2))
        k, momentum = k.to(operands.dtype), momentum.to(operands.dtype)
        return {"k": k, "m": momentum, "step": make.uniform(batch), "seed": make.seeds(batch)}

    def run(self, arguments: Arguments, config: Config | None = None) -> Results:
        k, m, step, seed = arguments.values()
        seeds = seed if k.dtype == torch.bfloat16 else None
        return {"k": factor.factor_update(k, m, step, _tile("factor", k, config), seeds)}

    def op(self, arguments: Arguments) -> Results:
        return {"k": spectral_ops.factor_update(**arguments, rounding="stochastic")}

    def eager(self, arguments: Arguments) -> Results:
        k, m, step, _ = arguments.values()
        bounded = step / torch.linalg.vector_norm(m, dim=(-2, -1)).clamp(min=1)
        return {"k": k - bounded[:, None, None].to(k.dtype) * (k @ m)}

    def reference(self, arguments: Arguments) -> Results:
        return {"k": reference.factor_update(**upcast(arguments))}

    def matrix_work(self, n: int, m: int, size: int, gradient: int) -> Work:
        return Work(full(n, n, n), size * 4 * n * n)


class InverseFreeUpdate(Case):
    """One side of IF-Shampoo, of which each matrix has momentum and factor changed in place."""

    name, roundings = "inverse_free_update", 2  # the momentum, then the factor from it
    settings: tuple[float, ...] = (0.9, 0.5, 0.25, 1.0)  # step, decay, gain, gamma

    def inputs(self, make: Inputs, n: int, m: int, batch: int, operands: Operands) -> Arguments:
        k, momentum = (make.normal(batch, n, n) / math.sqrt(n) for _ in range(2))
        momentum = momentum + momentum.mT
        x = make.normal(batch, n, m).to(operands.dtype)
        k, momentum = k.to(operands.dtype), momentum.to(operands.dtype)
        share, usable = make.uniform(batch) / m, make.uniform(batch) > 0
        return {
            "k": k, "m": momentum, "x": x, "share": share, "damping": make.uniform(batch), "usable": usable,
            "seed": make.seeds(batch),
        }  # fmt: skip

    def run(self, arguments: Arguments, config: Config | None = None) -> Results:
        seed = arguments["seed"] if arguments["k"].dtype == torch.bfloat16 else None
        KERNELS["inverse_free_update"](*(arguments | {"seed": seed}).values(), *self.settings)
        return self._changed(arguments)

    def op(self, arguments: Arguments) -> Results:
        step, decay, gain, gamma = self.settings
        spectral_ops.inverse_free_update(**arguments, step=step, decay=decay, gain=gain, gamma=gamma)
        return self._changed(arguments)

    def eager(self, arguments: Arguments) -> Results:
        k, m, x, share, damping, *_ = arguments.values()
        step, decay, gain, gamma = self.settings
        share, damping = (s[:, None, None].to(k.dtype) for s in (share, damping))
        eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
        m.mul_(decay).add_(share * (x @ x.mT) + damping * (k.mT @ k) - gamma * eye, alpha=gain)
        bounded = step / torch.linalg.vector_norm(m, dim=(-2, -1)).clamp(min=1)
        k.sub_(bounded[:, None, None].to(k.dtype) * (k @ m))
        return self._changed(arguments)

    def reference(self, arguments: Arguments) -> Results:
        arguments = upcast(arguments) | {"seed": None}
        reference.inverse_free_update(*arguments.values(), *self.settings)
        return self._changed(arguments)

    def _changed(self, arguments: Arguments) -> Results:
        return {name: arguments[name] for name in ("k", "m")}

    def matrix_work(self, n: int, m: int, size: int, gradient: int) -> Work:
        root = m + n  # columns of what the curvature is the product of
        return Work(lower(n, root) + full(n, n, n), size * (n * root + 5 * n * n))


class SpectrumUpdate(Case):
    """The paper's eigenvalues, by its exact map."""

    name, operands = "spectrum_update", ("fp32",)

    def inputs(self, make: Inputs, n: int, m: int, batch: int, operands: Operands) -> Arguments:
        return {
            "d_c": make.spectrum(batch, n), "d_k": make.spectrum(batch, m), "alpha": make.uniform(batch),
            "w_c": m * make.uniform(batch, n), "w_k": n * make.uniform(batch, m), "beta2": 0.1 * make.uniform(batch),
        }  # fmt: skip

    def run(self, arguments: Arguments, config: Config | None = None) -> Results:
        return self._results(spectrum.spectrum_update, arguments)

    def op(self, arguments: Arguments) -> Results:
        new = spectral_ops.spectrum_update(*arguments.values(), exact=True)
        return dict(zip(("d_c", "d_k", "alpha"), new, strict=True))

    def eager(self, arguments: Arguments) -> Results:
        return self._results(reference.spectrum_update, arguments)

    def _results(self, op: Callable[..., Any], arguments: Arguments) -> Results:
        return dict(zip(("d_c", "d_k", "alpha"), op(**arguments, gamma=1.0, damping=0.0, exact=True), strict=True))

    def matrix_work(self, n: int, m: int, size: int, gradient: int) -> Work:
        return Work(0, 4 * 3 * (n + m))


class StochasticRound(Case):
    """To the reference's bits; the composition draws its own."""

    name, operands = "stochastic_round", ("fp32",)

    def inputs(self, make: Inputs, n: int, m: int, batch: int, operands: Operands) -> Arguments:
        return {"x": make.normal(batch, n, m), "seed": make.seeds(batch)}

    def run(self, arguments: Arguments, config: Config | None = None) -> Results:
        return {"x": rounding.stochastic_round(**arguments)}

    def op(self, arguments: Arguments) -> Results:
        return {"x": spectral_ops.stochastic_round(**arguments)}

    def eager(self, arguments: Arguments) -> Results:
        bits = arguments["x"].view(torch.int32)
        return {"x": ((bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)).view(torch.float32).bfloat16()}

    def reference(self, arguments: Arguments) -> Results:
        return {"x": reference.stochastic_round(**arguments).double()}

    def matrix_work(self, n: int, m: int, size: int, gradient: int) -> Work:
        return Work(0, 6 * n * m)


class Momentum(Case):
    """Nesterov's, in place."""

    name, operands = "momentum", ("bf16", "split", "fp32")
    decay = 0.9

    def inputs(self, make: Inputs, n: int, m: int, batch: int, operands: Operands) -> Arguments:
        return {
            "buffer": make.normal(batch, n, m, dtype=operands.dtype),
            "g": make.normal(batch, n, m, dtype=operands.gradient),
            "finite": make.uniform(batch) > 0,
        }

    def run(self, arguments: Arguments, config: Config | None = None) -> Results:
        direction = update.momentum(**arguments, decay=self.decay, nesterov=True, maximize=False)
        return {"buffer": arguments["buffer"], "direction": direction}

    def op(self, arguments: Arguments) -> Results:
        return {"direction": spectral_ops.momentum_update(**arguments, decay=self.decay), "buffer": arguments["buffer"]}

    def eager(self, arguments: Arguments) -> Results:
        buffer, g, finite = arguments.values()
        g, finite = reference.raised(g), finite[:, None, None]
        buffer.copy_(torch.where(finite, torch.lerp(reference.raised(buffer), g, 1 - self.decay), buffer))
        return {"buffer": buffer, "direction": torch.where(finite, torch.lerp(g, reference.raised(buffer), self.decay), 0)}

    def matrix_work(self, n: int, m: int, size: int, gradient: int) -> Work:
        return Work(0, (2 * size + gradient + 4) * n * m)


class ParameterUpdate(Case):
    """Norm limit, decoupled decay and learning rate, in place, wherever the parameters lie."""

    name, operands = "parameter_update", ("bf16", "split", "fp32")
    weight_decay, target = 0.1, 0.2

    def inputs(self, make: Inputs, n: int, m: int, batch: int, operands: Operands) -> Arguments:
        u = make.normal(batch, n, m, dtype=operands.gradient)
        return {
            "params": tuple(make.normal(n, m, dtype=operands.dtype) for _ in range(batch)), "u": u,
            "squares": u.float().square().sum((-2, -1))[:, None], "finite": make.uniform(batch) > 0,
            "step": torch.ones(batch, device=make.device), "skipped": torch.ones(batch, device=make.device).long(),
            "lr": make.uniform(1),
        }  # fmt: skip

    def run(self, arguments: Arguments, config: Config | None = None) -> Results:
        update.parameter_update(**arguments, weight_decay=self.weight_decay, normalize="rms", target=self.target)
        return self._changed(arguments)

    def _changed(self, arguments: Arguments) -> Results:
        return _numbered(p=arguments["params"]) | {name: arguments[name] for name in ("step", "skipped")}

    def op(self, arguments: Arguments) -> Results:
        params = [p.unsqueeze(0) for p in arguments["params"]]
        spectral_ops.parameter_update(**arguments | {"params": params}, weight_decay=self.weight_decay, target=self.target)
        return self._changed(arguments)

    def eager(self, arguments: Arguments) -> Results:
        params, u, squares, finite, step, skipped, lr = arguments.values()
        rms = (squares.sum(-1) / u[0].numel()).sqrt() + 1e-8
        u = u * torch.where(finite, self.target / rms, 0)[:, None, None]
        for p, x in zip(params, u, strict=True):
            p.sub_(lr * (x + self.weight_decay * p))
        return _numbered(p=params) | {"step": step + finite, "skipped": skipped + ~finite}

    def matrix_work(self, n: int, m: int, size: int, gradient: int) -> Work:
        return Work(0, (2 * size + gradient) * n * m)


class DiagonalStep(Case):
    """AdamW on many tensors, in place."""

    name, operands = "diagonal_step", ("bf16", "split", "fp32")
    beta1, beta2, eps, weight_decay = 0.9, 0.95, 1e-8, 0.1

    def inputs(self, make: Inputs, n: int, m: int, batch: int, operands: Operands) -> Arguments:
        def tensors(dtype: torch.dtype) -> tuple[Tensor, ...]:
            return tuple(make.normal(n, m, dtype=dtype) for _ in range(batch))

        return {
            "params": tensors(operands.dtype), "grads": tensors(operands.gradient), "momenta": tensors(torch.float32),
            "seconds": tuple(x.square() for x in tensors(torch.float32)),
            "steps": tuple(torch.full((), 4.0, device=make.device) for _ in range(batch)),
            "skipped": tuple(torch.zeros((), dtype=torch.int64, device=make.device) for _ in range(batch)),
            "lr": torch.full((), 1e-2, device=make.device),
        }  # fmt: skip

    def run(self, arguments: Arguments, config: Config | None = None) -> Results:
        diagonal.diagonal_step(
            **arguments, weight_decay=[self.weight_decay] * len(arguments["params"]), beta1=self.beta1, beta2=self.beta2,
            gamma=1.0, eps=self.eps, batch_size=1.0, rule="adamw", maximize=False,
        )  # fmt: skip
        return self._changed(arguments)

    def _changed(self, arguments: Arguments) -> Results:
        return _numbered(p=arguments["params"], m=arguments["momenta"], s=arguments["seconds"], step=arguments["steps"])

    def op(self, arguments: Arguments) -> Results:
        spectral_ops.diagonal_update(
            **arguments, rule="adamw", betas=(self.beta1, self.beta2), eps=self.eps, weight_decay=self.weight_decay
        )
        return self._changed(arguments)

    def eager(self, arguments: Arguments) -> Results:
        params, grads, momenta, seconds, steps, _, lr = arguments.values()
        torch._foreach_add_(steps, 1)
        step = steps[0]
        grads = [reference.raised(g) for g in grads]
        torch._foreach_lerp_(momenta, grads, 1 - self.beta1)
        torch._foreach_mul_(seconds, self.beta2)
        torch._foreach_addcmul_(seconds, grads, grads, value=1 - self.beta2)
        roots = torch._foreach_sqrt(seconds)
        torch._foreach_div_(roots, (1 - self.beta2**step).sqrt())
        torch._foreach_add_(roots, self.eps)
        updates = torch._foreach_div(momenta, roots)
        torch._foreach_mul_(updates, -lr / (1 - self.beta1**step))
        torch._foreach_mul_(params, 1 - lr * self.weight_decay)
        torch._foreach_add_(params, updates)
        return _numbered(p=params, m=momenta, s=seconds, step=steps)

    def matrix_work(self, n: int, m: int, size: int, gradient: int) -> Work:
        return Work(0, (2 * size + 2 * gradient + 16) * n * m)  # the gradient is read twice


# --- Shared --------------------------------------------------------------------------------------------------------------


def _tile(op: str, x: Tensor, config: Config | None) -> Config:
    """The table's tile for a Gram matrix of `x`, as the op layer asks for it."""
    batch, n, k = x.shape
    tile = config or pick(op, n, k, batch, x)
    assert tile is not None, f"the table leaves {op} to PyTorch"
    return tile


def _empty(pair: Sides) -> Sides:
    left, right = (None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in pair)
    return left, right


def _sided(**pairs: Any) -> Results:
    return {f"{name}{side}": x for name, pair in pairs.items() for side, x in enumerate(pair) if x is not None}


def _numbered(**lists: tuple[Tensor, ...]) -> Results:
    return {f"{name}{i}": x for name, tensors in lists.items() for i, x in enumerate(tensors)}


def _weighted(x: Tensor, scale: Tensor) -> Tensor:
    return (x * scale.unsqueeze(-2).to(x.dtype)) @ x.mT


def _divided(w: Tensor, d: Tensor) -> Tensor:
    gap = d.unsqueeze(-1) - d.unsqueeze(-2)
    near = gap.abs() <= TOL * torch.maximum(d.unsqueeze(-1), d.unsqueeze(-2))
    u = (-w / gap).masked_fill(near, 0).tril(-1)
    return (u - u.mT).to(w.dtype)


ROTATE, AVERAGE = Rotate(), Average()
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Gram(), GramSkew(), SkewGenerator(), Track(both=False), Track(both=True), CayleyUpdate(),
        *(CayleyTrack(order) for order in (2, 3, 4, 8)), ROTATE, ApplyRoot(), AVERAGE, KronTrack(), FactorUpdate(),
        InverseFreeUpdate(),
        SpectrumUpdate(), StochasticRound(), Momentum(), ParameterUpdate(), DiagonalStep(),
    )
}  # fmt: skip
