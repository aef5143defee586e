"""The figure of the structures: the patterns that it draws, and the sizes that it prints."""

import sys
from pathlib import Path

import pytest
import torch

from spectral_ops.bench import structures
from spectral_ops.bench.__main__ import main
from spectral_ops.bench.structures import FORMULAS, PANELS, matrices, named, pattern

N, K = 12, 3


def drawn(name: str) -> tuple[torch.Tensor, ...]:
    found = matrices(named(name, K, N))
    return tuple(pattern(found[title]) for title in PANELS)


def test_patterns_of_the_factors() -> None:
    ones = torch.ones(N, N, dtype=torch.bool)
    head, tail = torch.zeros(2, N, dtype=torch.bool)
    head[:K] = tail[-K:] = True
    diagonal = ones.tril() & ones.triu()
    wide = head.unsqueeze(1) | tail.unsqueeze(1) & ~head
    expected = {
        "dense": ones,
        "diagonal": diagonal,
        "blockdiagonal{k}": torch.block_diag(*[torch.ones(K, K)] * (N // K)).bool(),
        "tril": ones.tril(),
        "triu": ones.triu(),
        "rank{k}tril": diagonal | head,
        "rank{k}triu": diagonal | head.unsqueeze(1),
        "rank{k}tril_bottomright": diagonal | tail.unsqueeze(1),
        "rank{k}triu_bottomright": diagonal | tail,
        "hierarchical{k}_{k}": diagonal | wide,
        "triltoeplitz": ones.tril(),
        "triutoeplitz": ones.triu(),
    }
    assert expected.keys() == FORMULAS.keys()
    for name, wanted in expected.items():
        assert torch.equal(drawn(name)[0], wanted), name


def test_patterns_of_the_products() -> None:
    head = torch.arange(N) < K
    bordered = head | head.unsqueeze(1) | torch.eye(N, dtype=torch.bool)
    for name in ("diagonal", "blockdiagonal{k}"):
        k, square, inverse = drawn(name)
        assert torch.equal(square, k) and torch.equal(inverse, k)
    # A diagonal matrix plus one of rank k on one side of the inverse has zeros on the other.
    _, square, inverse = drawn("rank{k}triu")
    assert torch.equal(square, bordered) and inverse.all()
    _, square, inverse = drawn("rank{k}tril")
    assert torch.equal(inverse, bordered) and square.all()
    middle = slice(K, N - K)
    _, square, inverse = drawn("hierarchical{k}_{k}")
    assert torch.equal(square[middle, middle], torch.eye(N - 2 * K, dtype=torch.bool)) and inverse.all()
    for name in ("dense", "tril", "triu", "triltoeplitz", "triutoeplitz"):
        assert all(x.all() for x in drawn(name)[1:]), name


def test_matrices_are_inverses_and_toeplitz_ones_constant_on_diagonals() -> None:
    for name in FORMULAS:
        k, square, inverse = (matrices(named(name, K, N))[title] for title in PANELS)
        torch.testing.assert_close(square, k @ k.T)
        torch.testing.assert_close(square @ inverse, torch.eye(N, dtype=torch.float64))
    for name in ("triltoeplitz", "triutoeplitz"):
        k = matrices(named(name, K, N))["K"]
        assert torch.equal(k[1:, 1:], k[:-1, :-1])


@pytest.mark.parametrize("n", [2 * K, N, 17])
def test_formulas(n: int) -> None:
    for name, formula in FORMULAS.items():
        if n % K and name.startswith("block"):
            continue  # "less where k does not divide n"
        text = formula.partition(",")[0].replace("²", " ** 2").replace("−", "-")
        for before, after in (("2 k", "2 * k"), (") n", ") * n"), ("k n", "k * n"), ("k (", "k * ("), ("n (", "n * (")):
            text = text.replace(before, after)
        assert named(name, K, n).size == eval(text, {"n": n, "k": K}), name


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    main(["structures", "--n", "8", "--k", "2", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "structures.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "out" / "structures.png") in printed
    assert all(name in printed for name in FORMULAS) and "23,553" in printed


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    structures.main(["--out", str(tmp_path)])
    assert "no PNG: " in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("n", "k"), [("8", "5"), ("8", "0")])
def test_wrong_sizes(n: str, k: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        structures.main(["--n", n, "--k", k])
    assert "--k must be at least 1 and at most half of --n" in capsys.readouterr().err
