"""`python -m spectral_ops.bench layers`, on a model of some numbers."""

import pytest
import torch

from spectral_ops.bench import layers
from spectral_ops.bench.output import read_csv


@pytest.fixture(autouse=True)
def denormals():
    yield
    torch.set_flush_denormal(False)  # the program sets it for its process, which here is everyone's


def test_the_rows(tmp_path, capsys):
    """Two structures, two intervals; both optimizers train the same model the same way, but where `singd` waits."""
    layers.main(["--models", "tiny", "--structures", "diagonal,dense", "--rounds", "2", "--out", str(tmp_path)])
    rows = read_csv(tmp_path / "layers.csv")
    assert [(r["structure"], r["interval"]) for r in rows] == [(s, i) for s in ("diagonal", "dense") for i in ("1", "10")]
    assert all(float(r["difference"]) < (1e-6 if r["interval"] == "1" else 1e-2) for r in rows)
    assert all(float(r[name]) > 0 for r in rows for name in ("ours_ms", "singd_ms", "plain_ms"))
    assert "singd" in rows[0] and "bench layers --models tiny" in rows[0]["command"]
    assert "ours_ms" in capsys.readouterr().out


def test_the_ratio_is_of_what_the_optimizers_take(monkeypatch):
    """Of training steps of 7, 9 and 5 ticks it is a half."""
    ticks = iter(range(10**9))
    count = iter(range(10**9))
    lengths = (7, 9, 5)

    def clock() -> float:
        n = next(count)
        if n % 2:
            for _ in range(lengths[n // 2 % 3] - 1):
                next(ticks)
        return float(next(ticks))

    monkeypatch.setattr(layers.time, "perf_counter", clock)
    monkeypatch.setattr(layers, "WARMUP", 0)
    with torch.random.fork_rng():
        row = layers.compare("tiny", "diagonal", 1, rounds=3)
    assert (row.ours_ms, row.singd_ms, row.plain_ms) == (7e3, 9e3, 5e3) and row.ratio == pytest.approx(0.5)


def test_unknown_models_are_named(capsys):
    with pytest.raises(SystemExit):
        layers.main(["--models", "huge"])
    assert "there is no model 'huge'" in capsys.readouterr().err
