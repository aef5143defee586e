"""One thread and a fixed seed for every test: small work is ten times slower with more threads."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
