"""Train a benchmark task with each method, then compare: a table, curves as CSV and PNG.

python -m spectral_ops.bench train --task digits --seed 0,1,2
python -m spectral_ops.bench train --checkpoint out/run.pt     # Ctrl-C, and later:
python -m spectral_ops.bench train --resume out/run.pt
"""

import argparse
import os
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_ops.bench import curves, output
from spectral_ops.bench.methods import BUILDERS, Method, left_out, tuned
from spectral_ops.bench.tasks import DIGITS_PRESETS, TASKS, TEXT_PRESETS
from spectral_ops.bench.training import Curve, Run, configure

PRESETS = {"text": TEXT_PRESETS, "digits": DIGITS_PRESETS, "digits-conv": DIGITS_PRESETS}
# What results depend on. A checkpoint holds these options, and a run that continues from it cannot change them.
DEFAULTS: dict[str, Any] = {
    "task": "text",
    "preset": "default",
    "data": None,
    "device": "cpu",
    "threads": None,
    "methods": ["spectral_kron", "muon", "soap", "adamw"],
    "steps": None,
    "seed": [0],
}


class Experiment:
    """Every method from every seed, one run after the other; can be saved after any step, and reported at any time."""

    def __init__(self, options: dict[str, Any]):
        self.options = options
        self.task = TASKS[options["task"]](options["preset"], options["data"], options["device"])
        self.methods: dict[str, Method] = {}
        self.finished: list[Curve] = []
        self.run: Run | None = None

    def prepare(self) -> None:
        """Find which methods are installed, by two steps of each, which also keeps their compilation out of the timings."""
        for name in self.options["methods"]:
            candidate = tuned(self.task.name, name)
            try:
                for _ in Run(self.task, candidate, steps=2, evaluations=1):
                    pass
                self.methods[name] = candidate
            except ModuleNotFoundError as error:
                print(left_out(name, error))

    def runs(self) -> Iterator[Run]:
        """The runs that remain, first the one that was loaded; a run joins `finished` when the next one is asked for."""
        if self.run is not None:
            yield from self._finish(self.run)
        done = {(curve.method, curve.seed) for curve in self.finished}
        for seed in self.options["seed"]:
            for name in self.methods:
                if (name, seed) not in done:
                    yield from self._finish(Run(self.task, self.methods[name], seed, self.options["steps"]))

    def _finish(self, run: Run) -> Iterator[Run]:
        self.run = run
        yield run
        self.run = None
        self.finished.append(run.curve)

    def save(self, path: Path) -> None:
        """Replace the file in one move, so that an interruption leaves either the old checkpoint or the new one."""
        state = {
            "options": self.options,
            "finished": [asdict(curve) for curve in self.finished],
            "run": self.run and self.run.state_dict(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, state: dict[str, Any]) -> None:
        self.finished = [Curve(**curve) for curve in state["finished"]]
        if state["run"]:
            curve = Curve(**state["run"]["curve"])
            self.run = Run(self.task, tuned(self.task.name, curve.method), curve.seed, self.options["steps"])
            self.run.load_state_dict(state["run"])

    def arguments(self) -> list[str]:
        """What makes these runs, as typed on a command line."""
        changed = {name: value for name, value in self.options.items() if value != DEFAULTS[name]}
        texts = {name: ",".join(map(str, v)) if isinstance(v, list) else str(v) for name, v in changed.items()}
        return [word for name, text in texts.items() for word in (f"--{name}", text)]

    def write(self, out: Path) -> list[Path]:
        """The curves so far; no picture where there is nothing to draw with."""
        runs = self.finished + ([self.run.curve] if self.run else [])
        source = output.provenance(self.options["device"]) | {"command": output.command("train", self.arguments())}
        path = out / f"train-{self.options['task']}-{self.options['preset']}.csv"
        curves.write_curves(path, runs, source)
        try:
            curves.plot_curves(path.with_suffix(".png"), runs, f"{self.options['task']}, {source['hardware']}")
        except ModuleNotFoundError:
            return [path]
        return [path, path.with_suffix(".png")]

    def report(self, out: Path) -> None:
        table = curves.training_table(self.finished, self.run.curve if self.run else None)
        print(f"\n{table}\n\n{output.describe(output.provenance(self.options['device']))}")
        paths = self.write(out)
        print(*paths, sep="\n")
        if len(paths) == 1:
            print("no PNG: matplotlib is not installed (pip install 'spectral-ops[bench]')")


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        saved = _load(options.resume) if options.resume else None
        experiment = Experiment(_experiment_options(options, saved and saved["options"]))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    experiment.prepare()
    if saved:
        experiment.load(saved)
    checkpoint = options.checkpoint or options.resume
    try:
        _train(experiment, options.out, checkpoint, options.checkpoint_every)
    except KeyboardInterrupt:
        experiment.report(options.out)
        print(f"interrupted; to continue: --resume {checkpoint}" if checkpoint else "interrupted")
        raise SystemExit(130) from None
    experiment.report(options.out)


def _load(path: Path) -> dict[str, Any]:
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise
    except Exception as error:  # of many types: the file may be cut off, or anything else
        raise ValueError(f"{path} is no checkpoint, or a damaged one: {type(error).__name__}") from error
    if not isinstance(saved, dict) or not {"options", "finished", "run"} <= saved.keys():
        raise ValueError(f"{path} is no checkpoint of this command")
    return saved


def _train(experiment: Experiment, out: Path, checkpoint: Path | None, every: int) -> None:
    with _interruption_noted() as interrupted:
        for run in experiment.runs():
            with closing(_with_progress(run)) as steps:
                for _ in steps:
                    if checkpoint and (run.step % every == 0 or run.step == run.steps or interrupted()):
                        experiment.save(checkpoint)
                    if interrupted():
                        raise KeyboardInterrupt
            c = run.curve
            experiment.write(out)
            print(f"{c.method}, seed {c.seed}: evaluation loss {c.loss[-1]:.4f} after {run.step} steps, {run.seconds:.1f} s")


@contextmanager
def _interruption_noted() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted, to be asked for after each step, so that no step is torn; a second one interrupts at once."""
    noted = False

    def note(*_: Any) -> None:
        nonlocal noted
        noted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def _with_progress(run: Run) -> Generator[Tensor, None, None]:
    """The steps of a run under a progress bar, which shows only on a terminal and if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield from run
        return
    label = f"{run.curve.method}, seed {run.curve.seed}"
    with tqdm(run, label, total=run.steps, initial=run.step, leave=False, disable=None) as bar:
        for value in bar:
            if not bar.disable and run.step % 10 == 0:
                bar.set_postfix_str(f"loss {value.item():.3f}", refresh=False)
            yield value


def _experiment_options(given: argparse.Namespace, saved: dict[str, Any] | None) -> dict[str, Any]:
    """The options of the checkpoint, or else the given and default ones."""
    options = dict(saved or DEFAULTS)
    for name in DEFAULTS:
        value = getattr(given, name)
        if value is None:
            continue
        if saved and value != saved[name]:
            raise ValueError(f"--{name} cannot change on resuming: the checkpoint was made with {saved[name]}, got {value}")
        options[name] = value
    presets = PRESETS[options["task"]]
    if options["preset"] not in presets:
        raise ValueError(f"--preset {options['preset']}: the {options['task']} task has {', '.join(presets)}")
    configure(options["device"], options["threads"])
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m spectral_ops.bench train", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--task", choices=TASKS, help="default: text")
    add("--preset", choices=list(dict.fromkeys([*TEXT_PRESETS, *DIGITS_PRESETS])), help="size of the model and the run")
    add("--data", metavar="PATH", help="a text file, or a folder of them; default: English text that comes with Python")
    add("--device", choices=["cpu", "cuda"], help="default: cpu")
    add("--threads", type=_positive, metavar="N", help="default on a CPU: 1")
    add("--methods", "--optimizers", type=_methods, metavar="A,B", help=f"default: {','.join(DEFAULTS['methods'])}")
    add("--steps", type=_positive, metavar="N", help="default: the preset's")
    add("--seed", type=_seeds, action="extend", metavar="A,B", help="one or several, also repeated; default: 0")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="for the CSV and the PNG; default: out")
    add("--checkpoint", type=Path, metavar="FILE", help="save here every --checkpoint-every steps and on Ctrl-C")
    add("--checkpoint-every", type=_positive, default=50, metavar="N", help="default: 50")
    add("--resume", type=Path, metavar="FILE", help="continue from a checkpoint, with its options, and save there again")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a positive integer is needed, got {text!r}")
    return int(text)


def _seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _methods(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in BUILDERS:
            raise argparse.ArgumentTypeError(f"no method is called {name!r}; there are {', '.join(sorted(BUILDERS))}")
    return names
