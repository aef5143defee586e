"""Time SINGD against the package `singd` on models that train: its hooks and its steps, structure by structure, in one process.

python -m spectral_ops.bench layers --structures diagonal,blockdiagonal30

A row has the times of a training step (forward, backward, optimizer) with ours, with `singd`, and with no optimizer, by turns.
What an optimizer takes is the difference to the last.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from spectral_ops.bench import output
from spectral_ops.bench.methods import left_out
from spectral_ops.bench.model import LanguageModel, VisionTransformer
from spectral_ops.bench.training import configure
from spectral_ops.optim import SINGD

LR, FACTOR_LR = 1e-4, 1e-3
WARMUP = 12  # steps, also those in which an interval does not count yet
STRUCTURES = ("diagonal", "blockdiagonal30", "hierarchical15_15", "dense")
INTERVALS = (1, 10)


def _multilayer(width: int) -> nn.Module:
    return nn.Sequential(*(module for _ in range(4) for module in (nn.Linear(width, width), nn.ReLU())))


def _block(width: int) -> nn.Module:
    """The layers of a transformer's block, one after the other."""
    square = [nn.Linear(width, width) for _ in range(4)]
    return nn.Sequential(*square, nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "block": (lambda: _block(768), lambda: torch.randn(128, 768)),
    "mlp": (lambda: _multilayer(768), lambda: torch.randn(128, 768)),
    "text": (lambda: LanguageModel(96, 3, 4, 64), lambda: torch.randint(256, (24, 64))),
    "digits": (lambda: VisionTransformer(64, 4, 4), lambda: torch.randn(64, 8, 8)),
    "tiny": (lambda: _multilayer(6), lambda: torch.randn(8, 6)),
}


@dataclass(frozen=True)
class Row:
    """Milliseconds of a training step; `ratio` is what ours takes of it over what `singd` does, `difference` the largest
    relative one of a parameter between the two after the warm-up."""

    model: str
    structure: str
    interval: int
    ours_ms: float
    singd_ms: float
    plain_ms: float
    ratio: float
    difference: float


def compare(name: str, structure: str, interval: int, rounds: int) -> Row:
    from singd.optim.optimizer import SINGD as Theirs

    torch.manual_seed(0)
    build, data = MODELS[name]
    model = build()
    models = [copy.deepcopy(model) for _ in range(3)]
    layers = [p for module in models[0].modules() if isinstance(module, nn.Linear) for p in module.parameters()]
    ours = SINGD(
        models[0], layers, LR, structures=(structure, structure), update_interval=interval, preconditioner_lr=FACTOR_LR
    )  # fmt: skip
    title = structure.replace("blockdiagonal30", "block30diagonal")
    theirs = Theirs(models[1], lr=LR, structures=(title, title), T=interval, lr_cov=FACTOR_LR, warn_unsupported=False)
    steps: list[Callable[[], object]] = [ours.step, theirs.step, int]

    def train(i: int, batch: Tensor) -> float:
        start = time.perf_counter()
        models[i](batch).square().mean().backward()
        steps[i]()
        elapsed = time.perf_counter() - start
        models[i].zero_grad()
        return elapsed

    for _ in range(WARMUP):
        batch = data()
        for i in range(3):
            train(i, batch)
    pairs = zip(layers, [p for m in models[1].modules() if isinstance(m, nn.Linear) for p in m.parameters()], strict=True)
    difference = max(((p - q).norm() / q.norm()).item() for p, q in pairs)
    times: list[list[float]] = [[], [], []]
    for _ in range(rounds):
        batches = [data() for _ in range(interval)]
        for i in range(3):
            times[i].append(1e3 * statistics.fmean(train(i, batch) for batch in batches))
    a, b, c = map(statistics.median, times)
    return Row(name, structure, interval, a, b, c, (a - c) / (b - c), difference)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m spectral_ops.bench layers", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="block,mlp,text,digits", help=f"of {', '.join(MODELS)}; default: all but the last")
    parser.add_argument("--structures", default=",".join(STRUCTURES), help=f"default: {','.join(STRUCTURES)}")
    parser.add_argument("--rounds", type=int, default=12, metavar="N", help="default: 12")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="for the CSV; default: out")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.models.split(",") if name not in MODELS]:
        parser.error(f"--models: there is no model {unknown[0]!r}, only {', '.join(MODELS)}")
    configure("cpu", None)
    rows = []
    try:
        for name in options.models.split(","):
            for structure in options.structures.split(","):
                for interval in INTERVALS:
                    rows.append(compare(name, structure, interval, options.rounds))
                    print(f"{name}, {structure}, interval {interval}: {rows[-1].ratio:.2f}", flush=True)
    except ModuleNotFoundError as error:
        print(left_out("singd", error))
        return
    source = output.provenance("cpu") | {"command": output.command("layers", argv), "singd": output.installed("singd")}
    cells = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in asdict(row).values()] for row in rows]
    print(f"\n{output.table([[field.name for field in fields(Row)], *cells])}\n\n{output.describe(source)}")
    output.write_rows(options.out / "layers.csv", rows, source)
    print(options.out / "layers.csv")


if __name__ == "__main__":
    main()
