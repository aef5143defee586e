"""What the README and the documentation say is so, beyond that their code runs: `tests/test_docs.py`."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from spectral_ops import optim
from spectral_ops.bench.faults import FAULTS
from spectral_ops.bench.optimizers import OPTIMIZERS
from spectral_ops.bench.tasks import Text
from spectral_ops.optim import param_groups
from spectral_ops.structures import structure

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CHOOSING, CURVATURE, NUMERICS = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("choosing", "curvature", "numerics"))


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.S)


def test_the_drop_in_example_runs():
    class Model(nn.Linear):
        def loss(self, batch):
            return self(batch).square().mean()

    (example,), (_, layers) = examples(README), examples(CURVATURE)
    for code in (example, layers):
        model, data = Model(4, 3), torch.randn(5, 8, 4)
        before = model.loss(data[0]).item()
        exec(code, {"model": model, "data": data})
        assert model.loss(data[0]).item() < before


def test_the_curvature_example_runs():
    example, _ = examples(CURVATURE)
    gradients = torch.randn(200, 6) @ torch.randn(6, 6)
    names = {"gradients": gradients}
    exec(example, names)
    target = gradients.T @ gradients / len(gradients)
    assert (names["factor"].matrix() - target).norm() < 0.8 * target.norm()
    assert names["step"] @ gradients[-1] > 0


def test_the_one_line_examples_run():
    section = CURVATURE.partition("`spectral_ops.optim` are built on it:\n\n")[2].partition("\n\n")[0]
    full, nes, spd = (line.strip() for line in section.splitlines())
    names = {name: getattr(optim, name) for name in optim.__all__} | {"torch": torch, "model": nn.Linear(3, 2)}
    assert "joint: True" in repr(eval(full, names))
    names["function"] = lambda w: (w - 1).square().sum(-1)
    assert (eval(nes, names) - 1).norm() < 1e-3
    names["q"] = torch.diag(torch.linspace(1, 3, 60, dtype=torch.float64))
    assert (eval(spd, names) @ names["q"] - torch.eye(60)).norm() < 1e-6


def test_the_routing_table_is_what_param_groups_prints():
    table = str(param_groups(Text().model()))
    assert "\n".join(f"    {line}" for line in table.splitlines()) in CHOOSING


def test_the_sizes_of_structures():
    section = CURVATURE.partition("| structure of a factor")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`.+?`)(?:: .*?)? \| `(.+)` \|$", section, re.M)
    assert len(rows) == 6
    for names, formula in rows:
        for name in re.findall("`(.+?)`", names):
            made = structure(name.format(k=3, l=2), 11)
            assert made.size == eval(formula, {"n": 11, "k": 3, "l": 2}) == len(made.identity(dtype=torch.float32))


def state_rows() -> list[tuple[str, str, str]]:
    section = CHOOSING.partition("## State\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(.+?)`.* \| (\w+) \| `(.+)` \|$", section, re.M)


@pytest.mark.parametrize("name,dtype,formula", state_rows())
@pytest.mark.parametrize("n,m", [(5, 7), (1, 9), (40, 3)])
def test_the_state_formulas(name, dtype, formula, n, m):
    """A side of one element has no basis, but it has a factor."""
    p = nn.Parameter(torch.randn(n, m, dtype=getattr(torch, dtype)))
    optimizer = OPTIMIZERS[name]([p])
    p.grad = torch.randn_like(p)
    optimizer.step()
    size = sum(v.numel() * v.element_size() for v in optimizer.state[p].values())
    no_basis = n == 1 and name.startswith("SpectralKron")
    assert size == eval(formula.replace("n*n", "0") if no_basis else formula, {"n": n, "m": m})


def test_the_number_of_faults():
    count = f"{len(OPTIMIZERS) * len(FAULTS)} cases: {len(OPTIMIZERS)} kinds of optimizer x {len(FAULTS)} faults"
    assert count in NUMERICS


def test_every_optimizer_has_a_formula():
    assert {type(OPTIMIZERS[name]([nn.Parameter(torch.ones(2, 2))])) for name, _, _ in state_rows()} == {
        type(build([nn.Parameter(torch.ones(2, 2))])) for build in OPTIMIZERS.values()
    }
