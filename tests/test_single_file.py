"""examples/spectral_kron.py: it is what the generator writes, needs torch alone and is SpectralKron of the package."""

import ast
import copy
import importlib.util
import io
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_ops import reference
from spectral_ops.bench import single_file
from spectral_ops.bench.methods import Method
from spectral_ops.bench.tasks import Text
from spectral_ops.bench.training import Run
from spectral_ops.optim import SpectralKron, param_groups

pytestmark = pytest.mark.filterwarnings("ignore:SpectralKron got a matrix")

FILE = Path(__file__).parents[1] / "examples" / "spectral_kron.py"
STEPS = 24
ONE_BF16_ROUNDING = 2**-7


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Copied: Any = _module(FILE).SpectralKron
BOTH = (SpectralKron, Copied)


# --- Problems ---------------------------------------------------------------------------------------------------------


def groups(dtype: torch.dtype) -> list[dict[str, Any]]:
    """All kinds of parameters; those of the first group that are matrices of 6 × 8 are one batch."""
    torch.manual_seed(0)

    def new(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape).to(dtype))

    def turned(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape).to(dtype).mT)

    conv = nn.Parameter(torch.randn(6, 3, 3, 3).to(dtype).to(memory_format=torch.channels_last))
    return [
        {"params": [new(6, 8), new(2, 6, 8), new(6, 2, 2, 2), turned(8, 6), new(7), new(8, 5), new(1, 12), new(3, 1, 8)]},
        {"params": [conv, new(12, 1), new(1, 1), new(), new(6, 8), new(40, 33)], "lr": 5e-3, "weight_decay": 0.1},
        {"params": [new(10, 6), turned(4, 9), new(5)], "algorithm": "adamw", "lr": 1e-2, "weight_decay": 0.1},
    ]


def optimizer_of(kind: Any, dtype: torch.dtype = torch.float32, **options: Any) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = kind(groups(dtype), **options)
    return made


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def run(optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    """Steps with a schedule, with gradients that depend on nothing but the step, and with all that gradients can be."""
    for t in range(start, stop):
        generator = torch.Generator().manual_seed(t)
        for i, p in enumerate(parameters(optimizer)):
            p.grad = torch.empty_like(p) if t % 2 else torch.empty(p.shape, dtype=p.dtype)  # of its strides, or not
            p.grad.copy_(torch.randn(p.shape, generator=generator) * 10 ** (i % 5 - 2))
            if (t + i) % 7 == 3:
                p.grad = None
            elif (t + i) % 11 == 5:
                p.grad[(-1,) * p.ndim] = (math.nan, math.inf, 1e30)[t % 3]
            elif (t + i) % 13 == 6:
                p.grad.zero_()
        for group in optimizer.param_groups:
            scale = 1.0 if t == 0 else (1 + math.cos(math.pi * t / STEPS)) / (1 + math.cos(math.pi * (t - 1) / STEPS))
            group["lr"] = group["lr"] * scale
        optimizer.step()


def ran(kind: Any, dtype: torch.dtype = torch.float32, **options: Any) -> torch.optim.Optimizer:
    optimizer = optimizer_of(kind, dtype, **options)
    run(optimizer, 0, STEPS)
    return optimizer


def compare(one: torch.optim.Optimizer, other: torch.optim.Optimizer, elementwise: float = 0.0) -> None:
    """To the bit; what takes AdamW to a relative difference."""
    for p, q in zip(parameters(one), parameters(other), strict=True):
        is_matrix = "momentum_buffer" in one.state[p]
        assert one.state[p].keys() == other.state[q].keys()
        for x, y in [(p, q), *((x, other.state[q][name]) for name, x in one.state[p].items())]:
            rtol = 0.0 if is_matrix else elementwise
            torch.testing.assert_close(x, y, rtol=rtol, atol=rtol)
            assert x.isfinite().all()


# --- The file ---------------------------------------------------------------------------------------------------------


def test_it_is_what_the_generator_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single_file.main(["--check"])
    out = tmp_path / "file.py"
    single_file.main(["--out", str(out)])
    assert out.read_text() == FILE.read_text() and capsys.readouterr().out == f"{out}\n"
    out.write_text(out.read_text() + "\n")
    with pytest.raises(SystemExit, match="not what the code says; write anew with: python -m"):
        single_file.main(["--check", "--out", str(out)])
    assert out.read_text() != FILE.read_text(), "--check writes nothing"


def test_it_imports_torch_and_the_standard_library_alone() -> None:
    imported = set()
    for node in ast.walk(ast.parse(FILE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"collections.abc", "hashlib", "math", "torch", "torch.optim", "typing"}


def test_it_runs_where_the_package_is_not_and_as_its_header_says() -> None:
    docstring = ast.get_docstring(ast.parse(FILE.read_text()), clean=False)
    assert docstring
    usage = [line.strip() for line in docstring.splitlines() if line.startswith("    ")]
    setup, step = "\n".join(usage[:3]), "\n    ".join(usage[3:])
    program = f"""
import runpy, sys
sys.modules["spectral_ops"] = None
import torch
from torch import nn
SpectralKron = runpy.run_path({str(FILE)!r})["SpectralKron"]
torch.set_num_threads(1)
torch.manual_seed(0)
model, x, losses = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(32, 4), []
{setup}
for _ in range(20):
    loss = (model(x) - x.flip(1)).square().mean()
    losses.append(loss.item())
    model.zero_grad()
    {step}
assert losses[-1] < 0.8 * losses[0], losses
assert not any(name.startswith("spectral_ops.") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-I", "-c", program], check=True, timeout=120)


def test_every_function_stands_as_in_the_reference() -> None:
    source = {
        node.name: node for node in ast.parse(Path(reference.__file__).read_text()).body if isinstance(node, ast.FunctionDef)
    }
    copied = {node.name: node for node in ast.parse(FILE.read_text()).body if isinstance(node, ast.FunctionDef)}
    shared = source.keys() & copied.keys()
    assert {"kron_track", "cayley_track", "apply_root", "philox", "momentum_update"} <= shared
    assert "skew_generator" not in copied
    for name in shared:
        assert ast.dump(source[name]) == ast.dump(copied[name]), name


# --- Its generator ----------------------------------------------------------------------------------------------------

LIBRARY = '''"""A docstring."""
import math
from torch import Tensor

# Of a circle.
TURN, HALF = 2 * math.pi, math.pi

# --- a section ---


def unused(x):
    return x


def turned(x: Tensor) -> Tensor:
    """Uses what stands below it."""
    return later(x) * TURN  # a comment


def later(x):
    return x
'''
PROGRAM = (
    "from torch import Tensor\n\nfrom spectral_ops.reference import turned\n\n\ndef main(x: Tensor):\n    return turned(x)\n"
)
INLINED = '''import math

from torch import Tensor


# Of a circle.
TURN, HALF = 2 * math.pi, math.pi


def turned(x: Tensor) -> Tensor:
    """Uses what stands below it."""
    return later(x) * TURN  # a comment


def later(x):
    return x


def main(x: Tensor):
    return turned(x)
'''


def inlined(program: str) -> str:
    sources = single_file.parse(program, "program"), single_file.parse(LIBRARY, "library")
    return single_file.inlined(*sources, single_file.LIBRARY)


def test_what_is_used_is_taken_with_its_comments_in_its_order() -> None:
    assert inlined(PROGRAM) == INLINED


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (PROGRAM + "\n\ndef later():\n    pass\n", "library and program both have later"),
        (PROGRAM + "\n\nmath = 3\n", "library and program both have math"),
        ("from cmath import pi as math\n" + PROGRAM, "has another name here than there"),
        (PROGRAM.replace("import turned", "import turned, missing"), "library has no missing"),
        ("import numpy\n" + PROGRAM + "\n\nx = numpy.pi\n", "`numpy` is of numpy, which is neither torch nor in"),
        ("from spectral_ops import gram\n" + PROGRAM + "\n\nx = gram\n", "`gram` is of spectral_ops, which is neither"),
        ("from math import tau as Tensor\n" + PROGRAM, "has another name"),
        ("from torch.nn import Tensor\n" + PROGRAM.partition("\n")[2], "`Tensor` is imported from torch and from torch.nn"),
        (PROGRAM + "\n\nif True:\n    pass\n", "only functions, classes and constants are provided for"),
    ],
)  # fmt: skip
def test_the_generator_refuses_what_would_not_run(program: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inlined(program)


# --- The same steps ---------------------------------------------------------------------------------------------------

OPTIONS = (
    {},
    {"lr": 3e-2, "betas": (0.95, 0.9), "root": 2.5, "weight_decay": 0.02, "adamw_betas": (0.8, 0.99), "adamw_eps": 1e-6},
    {"max_preconditioner_dim": 7},
    {"preconditioner_dtype": torch.bfloat16, "seed": 5},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float32_is_the_packages_to_the_bit(options: dict[str, Any]) -> None:
    one, other = (ran(kind, **options) for kind in BOTH)
    compare(one, other)
    skipped = [int(one.state[p]["skipped"].max()) for p in parameters(one)]
    assert min(skipped) >= 1, "every parameter has met a gradient that is not finite"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bfloat16_matrices_are_the_packages_to_the_bit_and_vectors_to_one_rounding(options: dict[str, Any]) -> None:
    # For vectors the package has formulas of its own in this dtype; here it is torch's fused AdamW in every one.
    compare(*(ran(kind, torch.bfloat16, **options) for kind in BOTH), elementwise=ONE_BF16_ROUNDING)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2**-10), (torch.float64, 0.0)])
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    compare(*(ran(kind, dtype) for kind in BOTH), elementwise=tolerance)


def test_a_tensor_as_learning_rate() -> None:
    one, other = (optimizer_of(kind, lr=torch.tensor(1e-2)) for kind in BOTH)
    for optimizer in (one, other):
        run(optimizer, 0, 5)
    compare(one, other)


# There the package computes half of what is symmetric, in blocks.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("shape", [(300, 40), (257, 256)])
def test_sides_of_256_and_more_are_the_packages_to_rounding(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    ends = []
    for kind in BOTH:
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(shape, dtype=dtype))
        optimizer = kind([p], lr=1e-2)
        for _ in range(STEPS):
            p.grad = torch.randn(shape, dtype=dtype)
            optimizer.step()
        ends.append(p.detach())
    difference = (ends[0] - ends[1]).norm() / ends[0].norm()
    assert 0 < difference < tolerance, f"{difference:.1e}"


def test_a_side_over_the_limit_keeps_a_diagonal() -> None:
    optimizers = []
    for kind in BOTH:
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(8193, 3))
        optimizers.append(kind([p]))
        p.grad = torch.randn(8193, 3)
        optimizers[-1].step()
    assert "basis_left" not in optimizers[1].state[p] and "basis_right" in optimizers[1].state[p]
    compare(*optimizers)


def test_it_trains_the_text_task_to_the_same_losses() -> None:
    task = Text("tiny")
    runs = []
    for kind in BOTH:
        method = Method("same", lambda model, kind=kind: [kind(param_groups(model, weight_decay=0.1))])
        runs.append(Run(task, method))
        list(runs[-1])
    assert runs[0].curve.loss == runs[1].curve.loss
    compare(runs[0].optimizers[0], runs[1].optimizers[0])


# --- What torch's optimizers promise ----------------------------------------------------------------------------------


def test_closure_is_evaluated_with_gradients() -> None:
    p = nn.Parameter(torch.ones(3, 4))
    optimizer = Copied([p])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 12 and p.square().sum() < 12


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_a_step_of_nothing_changes_nothing(lr: float | Tensor) -> None:
    """As distributed checkpointing makes one for the state: what is learned afterwards is as if it had not been."""
    options: dict[str, Any] = {"preconditioner_dtype": torch.bfloat16}
    first, second = (optimizer_of(Copied, **options) for _ in range(2))
    rates = [group["lr"] for group in first.param_groups]
    before = copy.deepcopy(parameters(first))
    for p in parameters(first):
        p.grad = torch.zeros_like(p)
    for group in first.param_groups:
        group["lr"] = lr
    first.step()
    assert all(map(torch.equal, before, parameters(first)))
    for group, rate in zip(first.param_groups, rates, strict=True):
        group["lr"] = rate
    for optimizer in (first, second):
        run(optimizer, 0, STEPS)
    compare(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_reads_a_value(dtype: torch.dtype) -> None:
    """For which it would wait; tensors without data have none."""
    shapes = ((6, 8), (2, 6, 8), (6, 2, 2, 2), (1, 5), (7,), ())
    params = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes]
    optimizer = Copied(params, weight_decay=0.1)
    for _ in range(2):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert all(x.is_meta for p in params for x in optimizer.state[p].values())


def test_unknown_algorithm() -> None:
    with pytest.raises(ValueError, match='`algorithm` must be None, "matrix" or "adamw", got \'muon\''):
        Copied([{"params": [nn.Parameter(torch.ones(2, 2))], "algorithm": "muon"}])


# --- Checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("saves", "loads"), [BOTH, BOTH[::-1], (Copied, Copied)], ids=["in", "out", "own"])
def test_checkpoints_go_both_ways_and_resume_to_the_bit(saves: Any, loads: Any, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"preconditioner_dtype": torch.bfloat16, "seed": 3, "root": 2.0}
    first = optimizer_of(saves, dtype, **options)
    run(first, 0, 9)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = optimizer_of(loads, dtype)
    for p, q in zip(parameters(first), parameters(second), strict=True):
        q.data.copy_(p)
    second.load_state_dict(torch.load(file, weights_only=True))
    compare(first, second)
    for optimizer in (first, second):
        run(optimizer, 9, STEPS)
    compare(first, second, elementwise=0.0 if dtype == torch.float32 or saves is loads else ONE_BF16_ROUNDING)


def test_copies_are_independent() -> None:
    first = optimizer_of(Copied)
    run(first, 0, 5)
    second = copy.deepcopy(first)
    compare(first, second)
    run(first, 5, 9)
    run(second, 5, 9)
    compare(first, second)
