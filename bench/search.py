"""The search that tunes every method equally: the same number of trials, one coordinate after the other, one seed.

    python -m spectral_ops.bench search --task text --method muon

First the learning rates at the method's default options, then each further coordinate around the best value so far. The
seed of the search is not among the seeds of the reported runs. Trials are appended to `--out` (CSV) and not run twice.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from spectral_ops.bench.methods import SPACE, method, space
from spectral_ops.bench.tasks import TASKS
from spectral_ops.bench.training import Run, configure

SEED = 0
HEADER = ["task", "method", "seed", "options", "loss"]


class Trials:
    """Trials by their options, kept in a CSV file: those of earlier calls are not run again."""

    def __init__(self, out: Path):
        self.out = out
        self.losses: dict[tuple[str, ...], float] = {}
        if out.exists():
            with out.open(newline="") as file:
                self.losses = {tuple(trial[:-1]): float(trial[-1]) for trial in list(csv.reader(file))[1:]}
        else:
            self._append(HEADER)

    def loss(self, task: Any, name: str, options: dict[str, Any]) -> float:
        key = (task.name, name, str(SEED), json.dumps({k: v for k, v in options.items() if (k, v) != ("refine", 1.0)}))
        if key not in self.losses:
            run = Run(task, method(name, **options), seed=SEED, evaluations=1)
            for _ in run:
                pass
            self.losses[key] = run.curve.loss[-1]
            self._append([*key, f"{run.curve.loss[-1]:.5f}"])
        return self.losses[key]

    def _append(self, row: list[str]) -> None:
        with self.out.open("a", newline="") as file:
            csv.writer(file).writerow(row)


def search(task: Any, name: str, out: Path) -> dict[str, Any]:
    """Coordinate search over the method's space; every method has the same number of trials."""
    trials, coordinates = Trials(out), space(task.name, name)
    best: dict[str, Any] = {key: values[0] for key, values in coordinates.items()}
    best_loss = trials.loss(task, name, best)
    for key, values in coordinates.items():
        centre = dict(best)
        for value in values:
            options = centre | {key: value}
            loss = trials.loss(task, name, options)
            print(f"{task.name:11s} {name:23s} {json.dumps(options):80s} {loss:.4f}", flush=True)
            if loss < best_loss:
                best, best_loss = options, loss
    return best


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m spectral_ops.bench search", description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument("--method", choices=sorted(SPACE), required=True)
    parser.add_argument("--out", type=Path, default=Path("out/search.csv"))
    options = parser.parse_args(argv)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    configure("cpu", None)
    print("chosen", json.dumps(search(TASKS[options.task](), options.method, options.out)))


if __name__ == "__main__":
    main()
