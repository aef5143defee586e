"""One thread and a fixed seed for every test, and what the tests of the kernels share.

Kernels run in Triton's interpreter, on the CPU; Triton reads this variable when a kernel is defined.
"""

import importlib.util
import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_ops import reference
from spectral_ops._library import KERNELS

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def frameworks() -> None:
    """timm, Lightning and transformers import torchvision, whose wheel on PyPI is built for GPUs. With PyTorch for a CPU its
    operators do not load, and it cannot be imported where two of them have not even a name. Nothing here calls them."""
    spec = importlib.util.find_spec("torchvision")
    assert spec and spec.submodule_search_locations
    (compiled,) = Path(spec.submodule_search_locations[0]).glob("_C*.so")
    try:
        torch.ops.load_library(compiled)
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` gives NaN, so that an element no program wrote shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-77)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def kernels_on_cpu() -> Iterator[None]:
    """The ops run their kernels, interpreted, also on CPU tensors."""
    library = torch.library.Library("spectral_ops", "IMPL")
    for name, kernel in KERNELS.items():
        library.impl(name, kernel, "CPU")
    yield
    library._destroy()


@pytest.fixture
def mutant(tmp_path: Path) -> Callable[[ModuleType, str, str], ModuleType]:
    """A copy of a kernel's module with one piece of its text replaced, to show that a test notices."""

    def make(module: ModuleType, old: str, new: str) -> ModuleType:
        assert module.__file__
        source = Path(module.__file__).read_text()
        if source.count(old) != 1:  # not an assertion, which is what the tests of mutants expect
            raise LookupError(f"{old!r} stands {source.count(old)} times in {module.__file__}")
        path = tmp_path / f"{module.__name__.rpartition('.')[2]}_mutant.py"
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec and spec.loader
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        return copy

    return make


@pytest.fixture
def composition(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run a function of `spectral_ops.reference` in its arguments' own dtype, as a plain PyTorch program would: nothing is
    raised to float32 first."""

    def run(function: Callable[..., Any], *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(reference, "raised", lambda x: x)
            return function(*args)

    return run


@pytest.fixture
def assert_as_accurate() -> Callable[[Tensor, Tensor, Tensor], None]:
    """At most twice the error of the same-dtype composition, and one rounding of the result on top."""

    def check(got: Tensor, composed: Tensor, exact: Tensor) -> None:
        rounding = torch.finfo(got.dtype).eps * exact.double().norm()
        error, bound = (got.double() - exact).norm(), 2 * (composed.double() - exact).norm() + rounding
        assert got.shape == exact.shape
        assert error <= bound, f"error {error:.3e}, bound {bound:.3e}"

    return check
