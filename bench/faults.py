"""Run every optimizer through every fault: it trains on, it counts a skipped step, or it says clearly what is wrong.

python -m spectral_ops.bench faults
python -m spectral_ops.bench faults --help     # what each fault is
"""

import argparse
import copy
import io
import math
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from spectral_ops.bench import output, train
from spectral_ops.bench.methods import BUILDERS, tuned
from spectral_ops.bench.optimizers import OPTIMIZERS, Build
from spectral_ops.bench.regression import (
    LR,
    NAMES,
    ODD,
    WARM,
    Regression,
    Snapshot,
    Spoil,
    Unexpected,
    attempt,
    fails,
    misses,
    need,
    same,
    start,
    trains,
    undisturbed,
)  # fmt: skip
from spectral_ops.bench.training import Run
from spectral_ops.optim import param_groups


@dataclass(frozen=True)
class Fault:
    group: str
    name: str
    text: str
    expected: str  # "trains", "skipped N" or "error: Type"
    observe: Callable[[Build], str]  # what an optimizer makes of it, in the same words
    unlike: dict[str, str] = field(default_factory=dict)  # optimizers of which something else is expected


@dataclass(frozen=True)
class Case:
    optimizer: str
    fault: Fault
    outcome: str
    verdict: str  # what is wrong with it, or ""

    @property
    def expected(self) -> str:
        return self.fault.unlike.get(self.optimizer, self.fault.expected)


# --- gradients --------------------------------------------------------------------------------------------------------


def put(value: float, element: int = 5) -> Spoil:
    return lambda g: g.flatten().index_fill(0, torch.tensor(element), value).view_as(g)


def fill(value: float) -> Spoil:
    return lambda g: torch.full_like(g, value)


def none(_: Tensor) -> None:
    return None


def orthogonal(g: Tensor) -> Tensor:
    if g.ndim < 2:
        return g.sign()
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    return u @ v


def rank_one(g: Tensor) -> Tensor:
    return g.mean(-1, keepdim=True).expand_as(g)


def decades(g: Tensor) -> Tensor:
    return g * torch.logspace(0, -6, g.shape[-1])


def identity(g: Tensor) -> Tensor:
    return g if g.ndim < 2 else torch.eye(*g.shape[-2:]) * g.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def zero_at_rate_zero(build: Build) -> str:
    regression = Regression(build, lr=0.0)
    regression.step(torch.zeros_like)
    regression.t = 0
    for group in regression.optimizer.param_groups:
        group["lr"] = LR
    return trains(regression, like=undisturbed(build, warm=0))


def missed(name: str, text: str, spoil: Spoil, names: tuple[str, ...], **options: Any) -> Fault:
    expected = "trains" if spoil is none else f"skipped {len(names) * len(options.get('times', (0,)))}"
    return Fault("gradients", name, text, expected, partial(misses, spoil=spoil, names=names, **options))


def trained(name: str, text: str, spoil: Spoil, warm: int = WARM, times: int = 2) -> Fault:
    return Fault("gradients", name, text, "trains", lambda build: trains(start(build, warm), spoil, times))


def spiked(name: str, text: str, spoil: Spoil, warm: int = WARM) -> Fault:
    """An update that nothing scales, a paper's own, overshoots after a spike of 1e7 and more: then its gradients may overflow,
    which skips steps, and it need only stay finite."""

    def observe(build: Build) -> str:
        regression = start(build, warm)
        scaled = all(group.get("update_scale") for group in regression.optimizer.param_groups)
        outcome = trains(regression, spoil, 2, falls=scaled)
        return outcome if scaled else "trains"

    return Fault("gradients", name, text, "trains", observe)


def failed(name: str, text: str, expected: str, spoil: Spoil, culprit: str) -> Fault:
    return Fault("gradients", name, text, expected, lambda build: fails(build, lambda r: r.step(spoil, ("query",)), culprit))


VALUES = {"NaN": math.nan, "Inf": math.inf, "-Inf": -math.inf, "1e30": 1e30}  # whose square overflows
PLACES = (
    ("a matrix", "in one element, once", "query", 5),
    ("one expert", "of a stack, all of which skips the step", "experts", 30),
    ("one part", "of a fused weight, all of which skips the step", "fused", 30),
    ("a bias", "which takes AdamW", "bias", 1),
)
GRADIENTS = [
    *(
        missed(f"{label} in {place}", text, put(value, element), (name,))
        for place, text, name, element in PLACES
        for label, value in VALUES.items()
    ),
    missed("NaN in bfloat16", "in a matrix of that dtype", put(math.nan), ("odd",), odd="bfloat16"),
    missed("Inf in float16", "in a matrix of that dtype: the loss overflowed", put(math.inf), ("odd",), odd="float16"),
    missed("NaN in the first step", "of a matrix, when there is no state yet", put(math.nan), ("query",), warm=0),
    missed("all 1e30, first step", "in all parameters, when there is no state yet", fill(1e30), NAMES, warm=0),
    missed("all NaN", "in all parameters, once", fill(math.nan), NAMES),
    missed("all NaN, 20 steps", "in all parameters", fill(math.nan), NAMES, times=tuple(range(20))),
    missed("None now and then", "for a matrix and a stack of experts", none, ("query", "experts"), times=(0, 2)),
    missed("all None", "for all parameters, once", none, NAMES),
    trained("1e-30", "gradients times 1e-30: squares underflow", lambda g: g * 1e-30),
    trained("1e-30, first steps", "gradients times 1e-30: squares underflow", lambda g: g * 1e-30, warm=0),
    trained("1e-20", "gradients times 1e-20: squares are denormal", lambda g: g * 1e-20),
    trained("1e-20, first steps", "gradients times 1e-20: squares are denormal", lambda g: g * 1e-20, warm=0),
    spiked("1e15", "gradients times 1e15: squares do not overflow yet", lambda g: g * 1e15),
    spiked("1e15, first steps", "gradients times 1e15: squares do not overflow yet", lambda g: g * 1e15, warm=0),
    trained("zero", "gradients of zeros", torch.zeros_like),
    trained("zero, first steps", "gradients of zeros", torch.zeros_like, warm=0),
    Fault("gradients", "zero at lr=0", "in the first step: the state must stay a fresh one", "trains", zero_at_rate_zero),
    trained("rank 1", "all columns are equal", rank_one, warm=0, times=20),
    trained("equal singular values", "orthogonal gradients: the eigenvalues of G Gᵀ coincide", orthogonal, warm=0, times=20),
    trained("identity", "multiples of the identity: every basis is an eigenbasis", identity, warm=0, times=20),
    trained("12 decades", "between the eigenvalues of Gᵀ G", decades, warm=0, times=20),
    failed("sparse", "the gradient of a matrix", "error: RuntimeError", Tensor.to_sparse, "'query'"),
    failed("wrong shape", "of a matrix's gradient: PyTorch refuses it", "error: RuntimeError", lambda g: g[1:], "size"),
    failed("wrong dtype", "of a matrix's gradient: PyTorch refuses it", "error: RuntimeError", Tensor.double, "dtype"),
]

# --- parameters and options -------------------------------------------------------------------------------------------


def beside(odd: str, text: str) -> Fault:
    def observe(build: Build) -> str:
        return trains(start(build, 0, odd), like=undisturbed(build, 0, "contiguous") if odd == "transposed" else None)

    return Fault("parameters", odd, text, "trains", observe)


def refused(
    group: str, name: str, text: str, expected: str, culprit: str, params: Sequence[Any] = (("fine", torch.ones(6, 4)),),
    split_sizes: list[int] | None = None, unlike: dict[str, str] | None = None, **options: Any,
) -> Fault:  # fmt: skip
    """A parameter group, or an option, that is refused: at construction, and when it is added to a trained optimizer."""

    def observe(build: Build) -> str:
        def add(r: Regression) -> None:
            algorithm = r.optimizer.param_groups[0].get("algorithm")
            r.optimizer.add_param_group({"algorithm": algorithm, "params": [*params], "split_sizes": split_sizes} | options)

        made = attempt(lambda: build([{"params": [*params], "split_sizes": split_sizes}], **options), culprit)
        outcome = fails(build, add, culprit)
        need(outcome == made, f"{made} at construction, {outcome} from add_param_group")
        return outcome

    return Fault(group, name, text, expected, observe, unlike or {})


PARAMETERS = [
    *(beside(name, text) for name, (text, _) in ODD.items()),
    refused("parameters", "complex", "a matrix of that dtype", "error: TypeError", "'odd'", [("odd", torch.ones(6, 4) * 1j)]),
    refused("parameters", "integer", "a matrix of that dtype", "error: TypeError", "'odd'", [("odd", torch.ones(6, 4).int())]),
    refused("parameters", "no tensor", "a number among the parameters", "error: TypeError", "float", [("odd", 1.0)]),
    refused("parameters", "empty group", "a parameter group without parameters", "error: ValueError", "empty", []),
    Fault("parameters", "twice", "a parameter in two groups", "error: ValueError", lambda build: fails(
        build, lambda r: r.optimizer.add_param_group({"params": [("again", r.parameters["query"])]}), "more than one")),
]  # fmt: skip
# Kinds of optimizers that have no use for parts of a weight.
FULL = [name for name in OPTIMIZERS if name.startswith("SpectralFull")]
LAYERS = [name for name in OPTIMIZERS if name.partition(" ")[0] in ("INGD", "IKFAC", "KFAC", "SINGD")]
UNCUT = ["AdamW inside", "RFFullAdaGrad", "RFRMSprop", "RFAdaGrad", *FULL, *LAYERS]
OPTIONS = [
    refused("options", "lr=-1", "a learning rate under 0", "error: ValueError", "`lr`", lr=-1.0),
    refused("options", "lr=nan", "a learning rate that is not a number", "error: ValueError", "`lr`", lr=math.nan),
    refused("options", "lr='fast'", "a learning rate of another type", "error: TypeError", "`lr`", lr="fast"),
    refused("options", "lr of two elements", "a tensor as learning rate", "error: ValueError", "`lr`", lr=torch.ones(2)),
    refused("options", "adamw_betas=(0.9, 1)", "a decay of 1", "error: ValueError", "`adamw_betas`", adamw_betas=(0.9, 1.0)),
    refused("options", "adamw_betas=0.9", "one number for two", "error: ValueError", "`adamw_betas`", adamw_betas=0.9),
    refused("options", "weight_decay=-0.1", "a decay under 0", "error: ValueError", "`weight_decay`", weight_decay=-0.1),
    refused("options", "weight_decay=None", "a decay of another type", "error: TypeError", "`weight_decay`", weight_decay=None),
    refused("options", "update_interval=0", "an interval under 1", "error: ValueError", "`update_interval`", update_interval=0),
    refused("options", "capturable, interval 2", "a graph repeats one of two steps", "error: ValueError", "`update_interval",
            capturable=True, update_interval=2),
    refused("options", "split_sizes=[4, 4]", "for a matrix of 6 rows", "error: ValueError", "split_sizes", split_sizes=[4, 4],
            unlike=dict.fromkeys(UNCUT, "trains")),
    Fault("options", "fused=True", "an unknown option that asks for something", "error: TypeError",
          lambda build: fails(build, lambda _: Regression(build, fused=True), "`fused`")),
    Fault("options", "fused=False", "an unknown option that asks for nothing", "trains",
          lambda build: trains(Regression(build, fused=False, foreach=None), like=undisturbed(build, warm=0))),
]  # fmt: skip

# --- checkpoints ------------------------------------------------------------------------------------------------------


def file_of(state: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def loaded(name: str, text: str, expected: str, culprit: str, saved: Callable[[Regression], Any]) -> Fault:
    observe = partial(fails, action=lambda r: r.optimizer.load_state_dict(saved(r)), culprit=culprit)
    return Fault("checkpoints", name, text, expected, observe)


def edited(name: str, text: str, culprit: str, change: Callable[[dict[str, Any]], Any]) -> Fault:
    """`change` sees the saved state, and spoils it."""

    def saved(regression: Regression) -> dict[str, Any]:
        state: dict[str, Any] = copy.deepcopy(regression.optimizer.state_dict())
        change(state)
        return state

    return loaded(name, text, "error: ValueError", culprit, saved)


def largest(state: dict[str, Tensor]) -> str:
    return max(state, key=lambda name: state[name].numel())


def foreign(optimizer: type[torch.optim.Optimizer], **options: Any) -> Callable[[Regression], dict[str, Any]]:
    def saved(regression: Regression) -> dict[str, Any]:
        other = copy.deepcopy(regression)
        other.optimizer = optimizer([{"params": group["params"]} for group in other.optimizer.param_groups], **options)
        other.step()
        state: dict[str, Any] = other.optimizer.state_dict()
        return state

    return saved


def cut(regression: Regression) -> Any:
    content = file_of(regression.optimizer.state_dict()).getvalue()
    return torch.load(io.BytesIO(content[:1000]), weights_only=True)


def resumes(build: Build, change: Callable[[str, Tensor], Tensor | None] = lambda _, x: x, spoil: Spoil | None = None) -> str:
    """A new optimizer that loads the file continues bit for bit."""
    regression, other = start(build), start(build, warm=0)
    regression.step(spoil, ("query",))
    saved = regression.optimizer.state_dict()
    for i, held in saved["state"].items():
        changed = {name: change(name, x) for name, x in held.items()}
        saved["state"][i] = {name: x for name, x in changed.items() if x is not None}
    for name, p in other.parameters.items():
        p.data.copy_(regression.parameters[name])
    other.t = regression.t
    other.optimizer.load_state_dict(torch.load(file_of(saved), weights_only=True))
    same(other.snapshot(), regression.snapshot(), "after loading", counts=True)
    trains(regression)
    return trains(other, like=regression.snapshot())


def killed(build: Build, during: str) -> str:
    """The training command is killed in its second save: it continues exactly from the first one, and saves again."""
    options = train.DEFAULTS | {"preset": "tiny", "methods": ["faults"], "steps": 4}
    with TemporaryDirectory() as folder, patch.dict(BUILDERS, faults=lambda model: [build(param_groups(model))]):
        path, experiment, resumed = Path(folder) / "run.pt", train.Experiment(options), train.Experiment(options)
        whole, run = (Run(experiment.task, tuned("text", "faults"), steps=4) for _ in range(2))
        experiment.run, steps = run, iter(run)
        next(steps), next(steps)
        experiment.save(path)
        next(steps)
        kill(lambda: experiment.save(path), during)
        resumed.load(torch.load(path, weights_only=True))
        assert resumed.run
        need(resumed.run.step == 2, f"the checkpoint is of step {resumed.run.step}, not 2")
        list(resumed.run), list(whole)
        resumed.save(path)  # what the killed one left is not in the way
        same(_comparable(torch.load(path, weights_only=True)["run"]), _comparable(whole.state_dict()), "after resuming")
    return "trains"


def _comparable(run: dict[str, Any]) -> Snapshot:
    """Without times."""
    states = {f"parameter {i}": held for i, held in run["optimizers"][0]["state"].items()}
    return states | {"model": run["model"], "run": {"loss": run["curve"]["loss"], "batches": run["batches"]}}


def kill(save: Callable[[], None], during: str) -> None:
    """kill -9 of a copy of this process when it is about to rename, or in the middle of writing."""
    write = torch.save

    def die(state: Any, file: Path) -> None:
        if during == "torch.save":
            write(state, file)
            os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            with patch(during, die):
                save()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    need(os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"it saves without {during}")


CHECKPOINTS = [
    Fault("checkpoints", "saved and loaded", "after a skipped step: it continues exactly, with its count", "skipped 1",
          partial(resumes, spoil=fill(math.nan))),
    Fault("checkpoints", "as float64", "a checkpoint in a wider dtype: it continues exactly, in its own", "trains",
          partial(resumes, change=lambda _, x: x.double() if x.is_floating_point() else x)),
    Fault("checkpoints", "without counts", "a checkpoint from before skipped steps were counted", "trains",
          partial(resumes, change=lambda name, x: None if name.startswith("skipped") else x)),
    loaded("truncated file", "all but 1000 bytes are missing: torch.load refuses it", "error: RuntimeError", "archive", cut),
    loaded("of AdamW", "the state of torch.optim.AdamW", "error: ValueError", "'query'", foreign(torch.optim.AdamW)),
    loaded("of SGD", "the state of torch.optim.SGD", "error: ValueError", "'query'", foreign(torch.optim.SGD, momentum=0.9)),
    loaded("of a model", "a model's state for an optimizer's", "error: ValueError", "'weight'", lambda _: {"weight": 1.0}),
    loaded("no dict", "a list for a state", "error: TypeError", "list", lambda _: [1, 2]),
    edited("missing entry", "in the state of a matrix", "'query'", lambda s: s["state"][0].pop(largest(s["state"][0]))),
    edited("wrong shape", "of an entry in the state of the experts", "'experts'",
           lambda s: s["state"][1].update({(x := largest(s["state"][1])): s["state"][1][x][1:]})),
    edited("text for a tensor", "in the state of a matrix", "'query'",
           lambda s: s["state"][0].update({largest(s["state"][0]): "text"})),
    edited("number for a state", "of a matrix", "'query'", lambda s: s["state"].update({0: 1.0})),
    edited("wrong option", "a learning rate under 0", "`lr`", lambda s: s["param_groups"][0].update(lr=-1.0)),
    edited("fewer parameters", "than the optimizer has", "parameters", lambda s: s["param_groups"][0]["params"].pop()),
    edited("fewer groups", "than the optimizer has", "groups", lambda s: s["param_groups"].pop()),
    edited("no parameters", "in a parameter group", "params", lambda s: s["param_groups"][0].pop("params")),
    Fault("checkpoints", "kill while writing", "kill -9 of the training command in the middle of a checkpoint", "trains",
          partial(killed, during="torch.save")),
    Fault("checkpoints", "kill before rename", "kill -9 of the training command when a checkpoint is written", "trains",
          partial(killed, during="os.replace")),
]  # fmt: skip
FAULTS = [*GRADIENTS, *PARAMETERS, *OPTIONS, *CHECKPOINTS]

# --- the table --------------------------------------------------------------------------------------------------------


def run(optimizer: str, build: Build, fault: Fault) -> Case:
    try:
        case = Case(optimizer, fault, fault.observe(build), "")
    except Unexpected as error:
        return Case(optimizer, fault, "failed", str(error))
    except Exception as error:
        return Case(optimizer, fault, "failed", f"{type(error).__name__}: {error}")
    verdict = "" if case.outcome == case.expected else f"expected {case.expected}, got {case.outcome}"
    return replace(case, verdict=verdict)


def table(cases: list[Case]) -> str:
    """A table for each group of faults, how many cases there are, and what is wrong with those that failed."""
    optimizers = dict.fromkeys(case.optimizer for case in cases)
    parts = []
    for group in dict.fromkeys(case.fault.group for case in cases):
        rows: dict[str, list[str]] = {group: [*optimizers]}
        for case in cases:
            if case.fault.group == group:
                rows.setdefault(case.fault.name, []).append("FAILED" if case.verdict else case.outcome.removeprefix("error: "))
        parts.append(output.table([[name, *cells] for name, cells in rows.items()]))
    failed = [f"{case.optimizer}, {case.fault.name} ({case.fault.text}): {case.verdict}" for case in cases if case.verdict]
    return "\n\n".join([*parts, "\n".join([f"{len(cases)} cases, {len(failed)} failed", *failed])])


def main(argv: list[str] | None = None) -> None:
    listing = "\n".join(f"  {fault.group:12s}{fault.name:24s}{fault.text}" for fault in FAULTS)
    parser = argparse.ArgumentParser(
        prog="python -m spectral_ops.bench faults", description=__doc__.splitlines()[0],
        epilog=f"the faults:\n{listing}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="for the CSV; default: out")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # at these sizes more are slower
    cases = [run(name, build, fault) for fault in FAULTS for name, build in OPTIMIZERS.items()]
    source = output.provenance("cpu")
    print(f"{table(cases)}\n\n{output.describe(source)}")
    path = options.out / "faults.csv"
    header = ["optimizer", "group", "fault", "description", "expected", "outcome", "verdict", *source]
    rows = ([c.optimizer, c.fault.group, c.fault.name, c.fault.text, c.expected, c.outcome, c.verdict] for c in cases)
    output.write_csv(path, header, ([*row, *source.values()] for row in rows))
    print(path)
    if any(case.verdict for case in cases):
        raise SystemExit(1)
