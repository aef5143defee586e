"""`python -m spectral_ops.bench newcomer`, on a repository whose `make train` only touches files."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from spectral_ops.bench import newcomer, output

ROOT = Path(__file__).parents[1]
SOURCE = dict.fromkeys(output.PROVENANCE, "as the clone has it")
CURVE = ",".join(SOURCE) + "\\n" + ",".join(SOURCE.values()) + "\\n"
TRAINS = f"mkdir .venv out; touch .venv/.ready; printf '{CURVE}' > out/train-text-default.csv"


def repository(folder: Path, recipe: str) -> Path:
    """One commit: a Makefile whose target `train` runs `recipe`."""
    folder.mkdir()
    (folder / "Makefile").write_text(f"train:\n\t@{recipe}\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder)]
    for command in (["init", "--quiet"], ["add", "Makefile"], ["commit", "--quiet", "--message", "One"]):
        subprocess.run([*git, *command], check=True)
    return folder


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newcomer, "POLL", 0.01)


def test_the_way_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub = repository(tmp_path / "stub", TRAINS)
    (stub / "Makefile").write_text("what is not committed is not cloned")
    newcomer.main(["--repository", str(stub), "--out", str(tmp_path / "out")])
    rows = output.read_csv(tmp_path / "out" / "newcomer.csv")
    assert [row["milestone"] for row in rows] == ["clone", "environment", "first curve", "end"]
    clone, ready, curve, end = (float(row["seconds"]) for row in rows)
    assert 0 < clone <= ready <= curve <= end < 60
    assert all(row.items() >= SOURCE.items() and row["commit"] == newcomer.commit(stub) for row in rows)
    assert rows[0]["command"] == f"python -m spectral_ops.bench newcomer --repository {stub}"
    printed = capsys.readouterr().out
    assert all(f"\n{row['milestone']} " in printed for row in rows)


def test_each_part_has_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that goes on by one thing in each second, and writes the curve as it ends."""

    class Process:
        done: ClassVar = [".venv", ".venv/.ready", "out", "out/train-text-default.csv"]

        def poll(self) -> int | None:
            (tmp_path / self.done.pop(0)).mkdir()
            return None if self.done else 0

    seconds = iter(range(10))
    monkeypatch.setattr(newcomer, "time", SimpleNamespace(monotonic=lambda: next(seconds), sleep=lambda _: None))
    assert newcomer.follow(Process(), tmp_path, -1) == {"environment": 2, "first curve": 4, "end": 4}


def test_a_curve_that_comes_late_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newcomer, "LIMIT", 0.0)
    stub = repository(tmp_path / "stub", TRAINS)
    with pytest.raises(SystemExit, match=r"^the first curve took \d+ s, more than 0$"):
        newcomer.main(["--repository", str(stub), "--out", str(tmp_path)])
    assert (tmp_path / "newcomer.csv").exists()


@pytest.mark.parametrize(
    "recipe,said",
    [
        ("echo no compiler; false", r"no compiler\n(.*\n)*make train ended with 2; all of it: .*newcomer.log"),
        ("mkdir .venv; touch .venv/.ready", r"make train ended without out/train-\*.csv"),
    ],
)
def test_what_fails_is_said(recipe: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=said):
        newcomer.main(["--repository", str(repository(tmp_path / "stub", recipe)), "--out", str(tmp_path)])
    assert not (tmp_path / "newcomer.csv").exists()


def test_a_folder_without_a_repository_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        newcomer.main(["--repository", str(tmp_path)])
    assert f"--repository {tmp_path}: " in capsys.readouterr().err


def test_the_environment_has_nothing_of_this_one(tmp_path: Path) -> None:
    active = str(tmp_path / "bin")
    given = {"PATH": os.pathsep.join([active, str(Path(sys.prefix) / "bin"), "/usr/bin"]), "VIRTUAL_ENV": str(tmp_path)}
    kept = {"LANG": "C", "PIP_CERT": "x", "SSL_CERT_FILE": "x", "https_proxy": "x", "HTTP_PROXY": "x", "TMPDIR": "x"}
    lost = dict.fromkeys(("HOME", "MAKEFLAGS", "OMP_NUM_THREADS", "PYTHONPATH", "PYTHONSAFEPATH", "XDG_CACHE_HOME"), "x")
    made = {"PATH": "/usr/bin", "HOME": str(tmp_path), "PIP_NO_CACHE_DIR": "1"}
    assert newcomer.environment(given | kept | lost, tmp_path) == kept | made


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_it_has_some_cores() -> None:
    before = os.sched_getaffinity(0)
    with newcomer.on_cores(1) as cores:
        assert len(os.sched_getaffinity(0)) == cores == 1
    assert os.sched_getaffinity(0) == before


def test_the_readme_says_what_was_measured() -> None:
    rows = {row["milestone"]: row for row in output.read_csv(ROOT / "bench" / "results" / "newcomer.csv")}
    said = " ".join((ROOT / "README.md").read_text().split())
    told = r"curve of `make train` it took (\d+) s, (\d+) of them to install, and (\d+) s to its end \((\d) .*?, ([\d-]{10});"
    found = re.search(told, said)
    seconds = [f"{float(rows[name]['seconds']):.0f}" for name in (newcomer.CURVE, "environment", "end")]
    assert found and [*found.groups()] == [*seconds, rows["end"]["cores"], rows["end"]["date"]]
    assert float(rows[newcomer.CURVE]["seconds"]) < newcomer.LIMIT
