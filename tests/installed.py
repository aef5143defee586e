"""What `tests/test_packages.py` runs where the installed package and its dependencies are and nothing else.

    python -I tests/installed.py REPOSITORY [--without-triton]
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import pkgutil
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import spectral_ops as ops
import spectral_ops.optim
import spectral_ops.structures
from spectral_ops._library import HAS_TRITON
from spectral_ops.bench import __main__ as bench

UNDECLARED = ("heavyball", "matplotlib", "packaging", "pip", "pytest", "pytorch_optimizer", "scipy", "sklearn", "tqdm")
FOREIGN = ("bench", "examples", "kernels", "optim", "structures", "tests")  # folders of the repository, not of the package
EXTRA = "pip install 'spectral-ops[bench]'"
N, M, BATCH = 6, 4, 2


# --- What is there ------------------------------------------------------------------------------------------------------


def check_files(repository: Path) -> None:
    installed = importlib.metadata.distribution("spectral-ops")
    assert installed.version == ops.__version__
    folder = Path(ops.__file__).parent
    assert folder.is_relative_to(sys.prefix) and not folder.is_relative_to(repository)
    top = {Path(path).parts[0] for path in installed.files or ()}
    assert top == {"spectral_ops", f"spectral_ops-{ops.__version__}.dist-info"}
    assert [name for name in (*UNDECLARED, *FOREIGN) if importlib.util.find_spec(name)] == []
    assert (folder / "py.typed").is_file()
    tables = {path.name: path.read_bytes() for path in (folder / "kernels" / "configs").iterdir() if path.suffix == ".json"}
    assert tables == {path.name: path.read_bytes() for path in (repository / "kernels" / "configs").glob("*.json")} != {}


def check_modules(has_triton: bool) -> None:
    """Each imports, but those that need Triton or pytest, where these are not."""
    assert has_triton == HAS_TRITON == (importlib.util.find_spec("triton") is not None)
    failed: dict[str, str | None] = {}
    for module in pkgutil.walk_packages(ops.__path__, "spectral_ops."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            failed[module.name] = error.name
    of_triton = {name for name, missing in failed.items() if missing == "triton"}
    assert failed.keys() - of_triton == {"spectral_ops.bench.test_host"}, failed  # a test, of pytest
    assert ("spectral_ops.kernels.gram" in of_triton) == bool(of_triton) == (not has_triton)
    assert all(name.startswith(("spectral_ops.kernels.", "spectral_ops.bench.")) for name in of_triton)


# --- That it works ------------------------------------------------------------------------------------------------------


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(shape) + 0.5


def eye(n: int) -> torch.Tensor:
    return torch.eye(n).repeat(BATCH, 1, 1)


def near(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> torch.Tensor:
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0)
    return got


def kron_track() -> torch.Tensor:
    bases = eye(N), eye(M)
    scale, updates = torch.ones(BATCH), torch.zeros(BATCH)
    ops.kron_track(rand(BATCH, N, M), bases, (None, None), (rand(BATCH, N), rand(BATCH, M)), scale, updates, beta=0.1)
    assert updates.tolist() == [1.0] * BATCH
    return near(bases[0] @ bases[0].mT, eye(N), 1e-2)  # a truncated map


def inverse_free_update() -> torch.Tensor:
    k, usable = eye(N), torch.ones(BATCH, dtype=torch.bool)
    share, damping = rand(BATCH), rand(BATCH)
    ops.inverse_free_update(k, 0 * k, rand(BATCH, N, M), share, damping, usable, step=0.1, decay=0.9, gain=0.1)
    assert not torch.equal(k, eye(N))
    return k


def momentum(call: Callable[..., object]) -> torch.Tensor:
    buffer = torch.zeros(BATCH, N, M)
    call(buffer, rand(BATCH, N, M), torch.ones(BATCH, dtype=torch.bool), 0.9)
    assert buffer.min() > 0
    return buffer


def parameter_update() -> torch.Tensor:
    p, u = torch.zeros(BATCH, N, M), rand(BATCH, N, M)
    squares, usable = u.square().sum((-2, -1)).unsqueeze(-1), torch.ones(BATCH, dtype=torch.bool)
    counts = torch.zeros(BATCH), torch.zeros(BATCH, dtype=torch.int64)
    ops.parameter_update([p], u, squares, usable, *counts, 0.1)
    assert p.max() < 0
    return p


def diagonal_update() -> torch.Tensor:
    p, g, m, s = torch.zeros(N), rand(N), torch.zeros(N), torch.ones(N)
    counts = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    ops.diagonal_update([p], [g], [m], [s], *([x] for x in counts), 0.1, rule="rf", betas=(0.9, 0.99), eps=1e-8)
    assert p.max() < 0
    return p


def factor(f: ops.SpectralFactor | ops.KroneckerFactor, *given: torch.Tensor, **options: torch.Tensor | float) -> torch.Tensor:
    f.update(*given, **options, beta2=0.1)
    return f.matrix()


CALLS: dict[str, Callable[[], object]] = {
    "KroneckerFactor": lambda: factor(ops.KroneckerFactor(N, M), rand(N, M)),
    "SpectralFactor": lambda: factor(ops.SpectralFactor(N), x=rand(N)),
    "apply_root": lambda: ops.apply_root(rand(BATCH, N, M), eye(N), rand(BATCH, N), eye(M), rand(BATCH, M), 1.0, 2.0),
    "cayley": lambda: near(ops.cayley(0 * eye(N)), eye(N)),
    "cayley_track": lambda: ops.cayley_track(eye(N), 0.1 * eye(N), rand(BATCH, N))[:2],
    "cayley_truncated": lambda: near(ops.cayley_truncated(0 * eye(N)), eye(N)),
    "cayley_update": lambda: near(ops.cayley_update(eye(N), 0 * eye(N)), eye(N)),
    "diagonal_update": diagonal_update,
    "factor_update": lambda: near(ops.factor_update(eye(N), 0.1 * eye(N), 0.1), 0.99 * eye(N)),
    "gram": lambda: near(ops.gram(eye(N)), eye(N)),
    "gram_skew": lambda: ops.gram_skew(rand(BATCH, N, M), rand(BATCH, N)),
    "gram_track": lambda: [x for x in ops.gram_track(rand(BATCH, N, M), rand(BATCH, N), rand(BATCH, M), 0.1) if x is not None],
    "inverse_free_update": inverse_free_update,
    "kron_track": kron_track,
    "momentum_sum": lambda: momentum(ops.momentum_sum),
    "momentum_update": lambda: momentum(ops.momentum_update),
    "parameter_update": parameter_update,
    "skew_generator": lambda: ops.skew_generator(eye(N), rand(BATCH, N)),
    "spectrum_update": lambda: ops.spectrum_update(
        rand(BATCH, N), rand(BATCH, M), rand(BATCH), rand(BATCH, N), rand(BATCH, M), 0.1
    ),
    "stochastic_round": lambda: ops.stochastic_round(rand(BATCH, N), 0),
}


def check_ops() -> None:
    assert CALLS.keys() == set(ops.__all__)
    for name, call in CALLS.items():
        result = call()
        tensors = [result] if isinstance(result, torch.Tensor) else result
        assert all(x.isfinite().all() for x in tensors), name


def check_optimizers() -> None:
    for cls in (spectral_ops.optim.SpectralKron, spectral_ops.optim.RFRMSprop):
        model = nn.Sequential(nn.Linear(M, N), nn.Tanh(), nn.Linear(N, 1))
        x = torch.randn(64, M)
        optimizer, losses = cls(spectral_ops.optim.param_groups(model, lr=0.1)), []
        for _ in range(20):
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0], (cls, losses)


def check_structures() -> None:
    for name in ("dense", "diagonal"):
        made = spectral_ops.structures.structure(name, N)
        assert len(made.identity(dtype=torch.float32)) == made.size


# --- Programs -----------------------------------------------------------------------------------------------------------


def ended(call: Callable[[], object]) -> str:
    """What a program that ends early says."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            call()
        except SystemExit as stop:
            assert stop.code
            return said.getvalue() + (stop.code if isinstance(stop.code, str) else "")
    raise AssertionError("it did not end early")


def check_programs(has_triton: bool) -> None:
    sys.argv[1:] = []
    assert "usage: python -m spectral_ops.bench" in ended(lambda: runpy.run_module("spectral_ops.bench", run_name="__main__"))
    assert f"sklearn is not installed ({EXTRA})" in ended(lambda: bench.main(["train", "--task", "digits"]))
    if not has_triton:
        assert "triton is not installed (pip install triton)" in ended(lambda: bench.main(["aot"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("repository", type=Path)
    parser.add_argument("--without-triton", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    check_files(options.repository)
    check_ops()  # before Triton is imported with the modules
    check_optimizers()
    check_structures()
    check_modules(not options.without_triton)
    check_programs(not options.without_triton)
