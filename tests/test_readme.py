"""What the README shows works as it stands."""

import re
from pathlib import Path

import torch
from torch import nn

from spectral_ops.bench.tasks import Text
from spectral_ops.optim import SpectralKron, param_groups

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_drop_in_example_runs():
    class Model(nn.Linear):
        def loss(self, batch):
            return self(batch).square().mean()

    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    model, data = Model(4, 3), torch.randn(5, 8, 4)
    before = model.loss(data[0]).item()
    exec(example, {"model": model, "data": data})
    assert model.loss(data[0]).item() < before


def test_the_routing_table_is_what_param_groups_prints():
    table = str(param_groups(Text().model()))
    assert "\n".join(f"    {line}" for line in table.splitlines()) in README


def test_the_state_formula():
    """Bytes of state of an `n × m` float32 weight, as the README gives them."""
    n, m = 5, 7
    p = nn.Parameter(torch.randn(n, m))
    optimizer = SpectralKron([p])
    p.grad = torch.randn(n, m)
    optimizer.step()
    size = sum(v.numel() * v.element_size() for v in optimizer.state[p].values())
    assert size == 4 * (n * m + 2 * n * n + 2 * m * m + n + m + 3)
    assert "`4 (n·m + 2n² + 2m² + n + m + 3)`" in README
