"""Draw each structure of SINGD's factors as in Fig. 5 of its paper: a random member `K`, `K Kᵀ` and `(K Kᵀ)⁻¹`.

python -m spectral_ops.bench structures --n 16

Printed beside it: how many numbers a factor stores, as a formula and at some sizes.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_ops.bench import output
from spectral_ops.structures import Structure, structure

SIZE, RANK = 16, 3
WIDTHS = 768, 3072  # at which numbers are printed; of a small transformer
LARGE_RANK = 15  # there
PANELS = "K", "K Kᵀ", "(K Kᵀ)⁻¹"
ZERO = 1e-12  # of the largest entry: smaller ones are rounding

# A structure's name with `{k}` for its number, and its size where `n` has room for `2 k`.
FORMULAS = {
    "dense": "n²",
    "diagonal": "n",
    "blockdiagonal{k}": "k n, less where k does not divide n",
    "tril": "n (n + 1) / 2",
    "triu": "n (n + 1) / 2",
    "rank{k}tril": "(k + 1) n − k",
    "rank{k}triu": "(k + 1) n − k",
    "rank{k}tril_bottomright": "(k + 1) n − k",
    "rank{k}triu_bottomright": "(k + 1) n − k",
    "hierarchical{k}_{k}": "(2 k + 1) n − k (k + 2)",
    "triltoeplitz": "n",
    "triutoeplitz": "n",
}


def named(name: str, k: int, n: int) -> Structure:
    return structure(name.replace("{k}", str(k)), n)


def member(kind: Structure, seed: int = 0) -> Tensor:
    """A random one in float64: near the identity, so that nothing but the structure makes an entry of an inverse small."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(kind.size, generator=generator, dtype=torch.float64) / (2 * math.sqrt(kind.n))
    return kind.dense(kind.add_identity(a, 1.0))


def matrices(kind: Structure, seed: int = 0) -> dict[str, Tensor]:
    """`K`, `K Kᵀ` and its inverse, by the titles of their panels."""
    k = member(kind, seed)
    square = k @ k.mT
    inverse = torch.linalg.inv(k)
    return dict(zip(PANELS, (k, square, inverse.mT @ inverse), strict=True))


def pattern(x: Tensor) -> Tensor:
    """Which entries are not zero."""
    return x.abs() > ZERO * x.abs().max()


def table() -> str:
    rows = [["structure", "numbers", *(f"n = {n}, k = {LARGE_RANK}" for n in WIDTHS)]]
    for name, formula in FORMULAS.items():
        rows.append([name, formula, *(f"{named(name, LARGE_RANK, n).size:,}" for n in WIDTHS)])
    return output.table(rows)


def plot(path: Path, n: int, k: int, seed: int) -> None:
    """A row for each structure; shades are magnitudes, and white is zero."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2  # of rows of panels: one below the other they are too tall to look at
    lines = -(-len(FORMULAS) // columns)
    figure = Figure(figsize=(1.7 * columns * len(PANELS), 1.9 * lines + 0.4), layout="constrained")
    found: Any = figure.subplots(lines, columns * len(PANELS), squeeze=False)
    for i, name in enumerate(FORMULAS):
        kind = named(name, k, n)
        column, line = divmod(i, lines)
        for j, (title, x) in enumerate(matrices(kind, seed).items()):
            panel = found[line][column * len(PANELS) + j]
            # Roots, from a quarter on: the diagonal would outshine the rest, and white is for zeros alone.
            shade = torch.where(pattern(x), 0.25 + 0.75 * (x.abs() / x.abs().max()).sqrt(), 0.0)
            panel.imshow(shade.numpy(), cmap="Blues", vmin=0, vmax=1)
            panel.set_xticks([])
            panel.set_yticks([])
            panel.set_xlabel(title, fontsize=8)
        found[line][column * len(PANELS) + 1].set_title(f"{kind.name} ({kind.size})", fontsize=9)
    for panel in found.flat:
        if not panel.images:
            panel.remove()
    figure.suptitle(f"{n} × {n}, in brackets the numbers that are stored; white is zero")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m spectral_ops.bench structures", description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=SIZE, metavar="N", help=f"rows and columns; default: {SIZE}")
    parser.add_argument("--k", type=int, default=RANK, metavar="K", help=f"blocks and ranks; default: {RANK}")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="for the PNG; default: out")
    options = parser.parse_args(argv)
    if not 0 < 2 * options.k <= options.n:
        parser.error(f"--k must be at least 1 and at most half of --n, got {options.k} and {options.n}")
    print(table())
    try:
        plot(options.out / "structures.png", options.n, options.k, options.seed)
        print(options.out / "structures.png")
    except ModuleNotFoundError as error:
        print(f"no PNG: {error.name} is not installed (pip install 'spectral-ops[bench]')")
