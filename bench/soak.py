"""Soak SpectralKron: 10,000 steps in bfloat16, beside float32, on curvature that keeps changing. Exit status 1 over a limit.

python -m spectral_ops.bench soak
"""

import argparse
import gc
import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_ops.bench import output
from spectral_ops.bench.training import configure, state_bytes
from spectral_ops.optim import SpectralKron
from spectral_ops.reference import add_diagonal

DEFECT = 0.005  # ‖BᵀB − I‖_F / √n; rounding an orthogonal matrix once gives 0.0033 to 0.0037, the smaller the matrix the more
ERROR = 0.1  # ‖S − S'‖_F / ‖S'‖_F, S' of float32 from the same state, MEMORIES averages ago
MEMORIES = 3  # of 1 / (1 − β) steps: what was before has a weight of 5 %
SHARE = 0.05  # of a run's records in which the error may be larger, after jumps: float32 itself amplifies a rounding then
GROWTH = 8e6  # bytes of resident memory after the warm-up: less than a kilobyte leaked in every step
RECORDS, WARMUP = 100, 0.1  # records in a run, and the share of it before memory must be flat
SHAPES: tuple[tuple[int, ...], ...] = ((48, 32), (33, 64), (3, 24, 32))
DRIFT, JUMP, WIDTH, MEMORY = 0.02, 1 / 500, 0.5, 0.999  # see Curvature


@dataclass(frozen=True)
class Variant:
    """A run of the optimizer, and the name of the one whose estimate its own is told apart from."""

    reference: str
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    noise: float = 0.0  # relative, in the gradients
    judged: bool = True  # by its defect and its error; what it holds must be finite and flat in any case

    @property
    def memory(self) -> int:
        return math.ceil(MEMORIES / (1 - self.options.get("betas", (0.0, 0.5))[1]))


BF16, LONG = {"preconditioner_dtype": torch.bfloat16}, {"betas": (0.9, 0.95)}
# The weights of one side's average are the other's eigenvalues, in bases that lag behind: a chaotic system. The disturbed run
# shows how far two in float32 part whose gradients differ by a last bit: that is what runs of different dtypes part anyway.
# So what bfloat16 does to an estimate is told from a twin in float32 that starts from the same state.
VARIANTS = {
    "fp32": Variant("fp32", judged=False),
    "fp32 disturbed": Variant("fp32", noise=1e-6, judged=False),
    "bf16 factors": Variant("fp32", options=BF16),
    "all bf16": Variant("fp32", torch.bfloat16),
    "fp32 long": Variant("fp32 long", options=LONG, judged=False),
    "bf16 factors, long": Variant("fp32 long", options=BF16 | LONG),
}


@dataclass(frozen=True)
class Record:
    """Of one shape in one variant; memory is that of all variants, or of the process.

    `error` is the estimate's against the twin's in float32, `apart` against the run in float32 from the first step on.
    """

    step: int
    variant: str
    shape: str
    defect: float
    error: float
    apart: float
    finite: bool
    state_bytes: int
    tensors: int
    resident: float


class Curvature:
    """Gradients `Q_C Diag(s_C) N Diag(s_K) Q_Kᵀ` with normal `N`. In every step each column of the bases turns by about
    `DRIFT`, and the logarithms of the scales, normal with a deviation of `WIDTH` decades, are renewed by a little; with
    probability `JUMP` everything is drawn anew."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        self._jump()

    def _jump(self) -> None:
        *lead, n, m = self.shape
        self.bases = [torch.linalg.qr(torch.randn(*lead, k, k)).Q for k in (n, m)]
        self.logs = [torch.randn(*lead, 1, k) for k in (n, m)]

    def gradient(self) -> Tensor:
        if torch.rand(()) < JUMP:
            self._jump()
        self.bases = [_turned(q) for q in self.bases]
        self.logs = [MEMORY * z + math.sqrt(1 - MEMORY**2) * torch.randn_like(z) for z in self.logs]
        left, right = (q * 10 ** (WIDTH * z) for q, z in zip(self.bases, self.logs, strict=True))
        return left @ torch.randn(self.shape) @ right.mT


def _turned(q: Tensor) -> Tensor:
    new, r = torch.linalg.qr(q + DRIFT / math.sqrt(q.shape[-1]) * torch.randn_like(q))
    return new * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # QR leaves the signs of the columns open


class Trial:
    """One variant on matrices of every shape."""

    def __init__(self, variant: Variant):
        self.variant, self.seconds = variant, 0.0
        self.parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=variant.dtype)) for shape in SHAPES]
        self.optimizer = SpectralKron(self.parameters, **variant.options)
        self.twin: Trial | None = None

    def part(self) -> None:
        """Let a twin go on from here in float32."""
        state = self.optimizer.state_dict()
        options = {"preconditioner_dtype": "float32"}
        self.twin = Trial(replace(self.variant, dtype=torch.float32, options=self.variant.options | options, judged=False))
        # A checkpoint takes the dtypes of the optimizer that its groups describe.
        state["param_groups"] = [group | options for group in state["param_groups"]]
        self.twin.optimizer.load_state_dict(state)

    def step(self, gradients: list[Tensor]) -> None:
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = (g * (1 + self.variant.noise * torch.randn_like(g)) if self.variant.noise else g).to(p.dtype)
        start = time.perf_counter()
        self.optimizer.step()
        self.seconds += time.perf_counter() - start
        if self.twin:  # on the same gradients, rounded to the same dtype
            self.twin.step([p.grad.float() for p in self.parameters if p.grad is not None])


def orthogonality_defect(state: dict[str, Tensor]) -> float:
    """`‖BᵀB − I‖_F / √n`, the largest of both sides and all matrices."""
    bases = [state[f"basis_{side}"].double() for side in ("left", "right")]
    return max(float(torch.linalg.matrix_norm(add_diagonal(b.mT @ b, -1)).max()) / math.sqrt(b.shape[-1]) for b in bases)


def estimate(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`α S_C` and `S_K`, with `S_l = B_l T_l B_lᵀ`, whose Kronecker product is the estimate of the curvature."""
    factors = []
    for side in ("left", "right"):
        b, d, r = (state[f"{name}_{side}"].double() for name in ("basis", "eigenvalues", "residual"))
        factors.append(b @ (r + torch.diag_embed(d)) @ b.mT)
    return factors[0] * state["scale"].double()[..., None, None], factors[1]


def estimate_error(state: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """`‖S − S'‖_F / ‖S'‖_F`, the largest of all matrices; no Kronecker product is formed: `<A ⊗ B, C ⊗ D> = <A, C> <B, D>`."""
    (a, b), (c, d) = estimate(state), estimate(reference)
    norm, mixed, known = (
        (x * y).sum((-2, -1)) * (z * w).sum((-2, -1)) for x, y, z, w in ((a, a, b, b), (a, c, b, d), (c, c, d, d))
    )
    return float(((norm - 2 * mixed + known).clamp(min=0) / known).max().sqrt())


def process_memory() -> tuple[int, float]:
    """Live tensors, and resident bytes (NaN where /proc does not tell)."""
    gc.collect()
    tensors = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
    statm = Path("/proc/self/statm")
    return tensors, int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else math.nan


def soak(trials: dict[str, Trial], steps: int) -> Iterator[Record]:
    sources = [Curvature(shape) for shape in SHAPES]
    every = max(10, steps // RECORDS)
    for step in range(1, steps + 1):
        gradients = [source.gradient() for source in sources]
        for trial in trials.values():
            trial.step(gradients)
            if trial.variant.judged and (step + min(trial.variant.memory, every - 1)) % every == 0:
                trial.part()
        if step % every == 0:
            yield from measure(trials, step)


def measure(trials: dict[str, Trial], step: int) -> Iterator[Record]:
    held = sum(state_bytes(trial.optimizer) for trial in trials.values())
    tensors, resident = process_memory()
    for name, trial in trials.items():
        others = [trial.twin or trial, trials[trial.variant.reference]]
        for i, p in enumerate(trial.parameters):
            state = trial.optimizer.state[p]
            error, apart = (estimate_error(state, other.optimizer.state[other.parameters[i]]) for other in others)
            finite = all(bool(x.isfinite().all()) for x in (p, *state.values()))
            shape = "x".join(map(str, p.shape))
            yield Record(step, name, shape, orthogonality_defect(state), error, apart, finite, held, tensors, resident)
        trial.twin = None


def broken(records: list[Record]) -> list[str]:
    """A sentence for each limit that does not hold."""
    sentences = []
    for name, words, limit, share in (
        ("defect", "orthogonality defect", DEFECT, 0.0),
        ("error", "error of the estimate", ERROR, SHARE),
    ):
        for variant, shape in {(r.variant, r.shape): None for r in records if VARIANTS[r.variant].judged}:
            judged = [r for r in records if (r.variant, r.shape) == (variant, shape)]
            over = [r for r in judged if not getattr(r, name) <= limit]  # NaN is over it
            if len(over) > share * len(judged):
                worst = max(over, key=lambda r: (math.isnan(getattr(r, name)), getattr(r, name)))
                reached = f"{getattr(worst, name):.4f} ({variant}, {shape}, step {worst.step})"
                sentences.append(f"The {words} reached {reached}: over {limit:g} in {len(over)} of {len(judged)} records.")
    if poisoned := [r for r in records if not r.finite]:
        first = poisoned[0]
        sentences.append(f"Not finite: a parameter or its state ({first.variant}, {first.shape}, step {first.step}).")
    warm, *later = _after_warmup(records)
    for name, words, slack in (("tensors", "tensors", 0), ("state_bytes", "bytes of state", 0), ("resident", "bytes", GROWTH)):
        top = max(later, key=lambda r: getattr(r, name), default=warm)
        if getattr(top, name) > getattr(warm, name) + slack:
            before, after = (f"{getattr(r, name):,.0f} {words} in step {r.step}" for r in (warm, top))
            sentences.append(f"Memory grows: {before}, {after}.")
    return sentences


def _after_warmup(records: list[Record]) -> list[Record]:
    return [r for r in records if r.step >= WARMUP * records[-1].step]


def summary(records: list[Record], speeds: dict[str, float]) -> str:
    rows = [["variant", "shape", "defect", "worst", "error", "worst", "apart", "worst", "steps/s"]]  # all shapes make a step
    for name, shape in {(r.variant, r.shape): None for r in records}:
        mine = [r for r in records if (r.variant, r.shape) == (name, shape)]
        cells = [f(getattr(r, key) for r in mine) for key in ("defect", "error", "apart") for f in (statistics.median, max)]
        rows.append([name, shape, *(f"{x:.4f}" for x in cells), f"{speeds[name]:.0f}"])
    memory = [
        f"step {r.step}: {r.resident / 1e6:.1f} MB resident, {r.tensors} tensors, {r.state_bytes / 1e3:.1f} kB of state"
        for r in (records[0], _after_warmup(records)[0], records[-1])
    ]
    words = "defect, error (from a twin in float32), apart (from the run in float32): median over the run, and worst"
    return "\n".join([output.table(rows), words, *memory])


def plot(path: Path, records: list[Record], title: str) -> None:
    """Defect and errors against steps, a column for each shape and a line for each variant."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = list({r.shape: None for r in records})
    figure = Figure(figsize=(4.5 * len(shapes), 10), layout="constrained")
    panels = figure.subplots(3, len(shapes), sharex=True, sharey="row", squeeze=False)
    for i, (key, limit) in enumerate((("defect", DEFECT), ("error", ERROR), ("apart", ERROR))):
        for panel, shape in zip(panels[i], shapes, strict=True):
            for name in VARIANTS:
                points = [(r.step, getattr(r, key) or math.nan) for r in records if (r.variant, r.shape) == (name, shape)]
                panel.plot(*zip(*points, strict=True), linewidth=1, label=name)
            panel.axhline(limit, color="black", linestyle="--", linewidth=1)
            panel.set(yscale="log", title=f"{key}, {shape}")
            panel.grid(alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m spectral_ops.bench soak", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000, metavar="N", help="default: 10000")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="for the CSV and the PNG; default: out")
    options = parser.parse_args(argv)
    if options.steps < 10:
        parser.error(f"--steps must be at least 10, got {options.steps}")
    configure("cpu", None)
    torch.manual_seed(options.seed)
    trials = {name: Trial(variant) for name, variant in VARIANTS.items()}
    records = list(soak(trials, options.steps))
    source = output.provenance("cpu") | {"seed": str(options.seed)}
    print(f"{summary(records, {name: options.steps / t.seconds for name, t in trials.items()})}\n\n{output.describe(source)}")
    header = [*(f.name for f in fields(Record)), *source]
    output.write_csv(options.out / "soak.csv", header, [[*asdict(r).values(), *source.values()] for r in records])
    print(options.out / "soak.csv")
    try:
        plot(options.out / "soak.png", records, f"{options.steps} steps, {source['hardware']}")
        print(options.out / "soak.png")
    except ModuleNotFoundError as error:
        print(f"no PNG: {error.name} is not installed (pip install 'spectral-ops[bench]')")
    if sentences := broken(records):
        raise SystemExit("\n".join(sentences))
    print("Every limit holds.")
