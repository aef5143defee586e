"""Time a newcomer's way to a first result: clone the repository, `make train` there, the first training curve.

python -m spectral_ops.bench newcomer     # fails where the first curve takes more than ten minutes

What is committed is cloned, and nothing of this environment helps: an empty home, no cache, no virtual environment.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spectral_ops.bench import output

COMMAND = "python -m spectral_ops.bench newcomer"
LIMIT = 600.0  # seconds from the beginning of the clone to the first curve
CORES = 2
POLL = 0.2  # seconds
CURVE = "first curve"
MARKS = {"environment": ".venv/.ready", CURVE: "out/train-*.csv"}  # what is there, in the clone, once a part is done
# What reaches the commands: where programs are, where files go, and how pip gets to its index.
PASSED = re.compile(r"PATH|LANG|TMPDIR|PIP_\w+|SSL_CERT\w+|\w+_proxy", re.IGNORECASE)
TAIL = 20  # lines of the log that are shown of a command that failed


@dataclass(frozen=True)
class Milestone:
    milestone: str
    seconds: float  # since the clone began


def environment(given: Mapping[str, str], home: Path) -> dict[str, str]:
    """Of the variables that are `given`, those that a new login on a machine like this one has."""
    kept = {name: value for name, value in given.items() if PASSED.fullmatch(name)}
    active = {str(Path(x) / "bin") for x in (sys.prefix, given.get("VIRTUAL_ENV")) if x and x != sys.base_prefix}
    path = os.pathsep.join(folder for folder in kept.get("PATH", os.defpath).split(os.pathsep) if folder not in active)
    return kept | {"PATH": path, "HOME": str(home), "PIP_NO_CACHE_DIR": "1"}


@contextmanager
def on_cores(count: int) -> Iterator[int]:
    """What is started here runs on so many cores at most, where the system can say so; on how many it does."""
    if not hasattr(os, "sched_setaffinity"):
        yield os.cpu_count() or 0
        return
    before = os.sched_getaffinity(0)
    cores = sorted(before)[:count]
    os.sched_setaffinity(0, cores)
    try:
        yield len(cores)
    finally:
        os.sched_setaffinity(0, before)


def follow(process: subprocess.Popen[bytes], folder: Path, begun: float) -> dict[str, float]:
    """When, in seconds since `begun`, each mark was there, and when the process ended."""
    seen: dict[str, float] = {}
    while "end" not in seen:
        ended = process.poll() is not None  # asked first, so that what it wrote at the end is seen
        found = [name for name, pattern in MARKS.items() if name not in seen and any(folder.glob(pattern))]
        seen |= dict.fromkeys([*found, *(["end"] if ended else [])], time.monotonic() - begun)
        if not ended:
            time.sleep(POLL)
    return seen


def walk(repository: Path, folder: Path, log: Path) -> tuple[list[Milestone], dict[str, str]]:
    """The way, in an empty `folder`; and where the curve says that it comes from."""
    home, clone = folder / "home", folder / "clone"
    home.mkdir()
    variables = environment(os.environ, home)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file, on_cores(CORES) as cores:
        begun = time.monotonic()
        process = subprocess.Popen(["git", "clone", repository, clone], env=variables, stdout=file, stderr=file)
        _finished(process, "git clone", log)
        seen = {"clone": time.monotonic() - begun}
        process = subprocess.Popen(["make", "train"], cwd=clone, env=variables, stdout=file, stderr=file)
        seen |= follow(process, clone, begun)
        _finished(process, "make train", log)
    if missing := MARKS.keys() - seen:
        raise SystemExit(f"make train ended without {' and '.join(MARKS[name] for name in sorted(missing))}")
    (curve,) = clone.glob(MARKS[CURVE])
    row = output.read_csv(curve)[0]
    source = {name: row[name] for name in output.PROVENANCE} | {"cores": str(cores)}
    return [Milestone(name, seconds) for name, seconds in seen.items()], source


def _finished(process: subprocess.Popen[bytes], command: str, log: Path) -> None:
    if process.wait():
        last = log.read_text(errors="replace").splitlines()[-TAIL:]
        raise SystemExit("\n".join([*last, f"{command} ended with {process.returncode}; all of it: {log}"]))


def commit(repository: Path) -> str:
    """What a clone will hold, in short."""
    asked = ["git", "-C", str(repository), "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--repository {repository}: {done.stderr.strip()}")
    return done.stdout.strip()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--repository", type=Path, default=here, metavar="DIR", help="what is cloned; default: this one")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="for the CSV and a log; default: out")
    options = parser.parse_args(argv)
    try:
        cloned = commit(options.repository)
    except (OSError, ValueError) as error:  # no git, or no repository
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        way, source = walk(options.repository.resolve(), Path(folder), options.out / "newcomer.log")
    source |= {"commit": cloned, "command": output.command("newcomer", argv)}
    print(output.table([["milestone", "seconds"], *([x.milestone, f"{x.seconds:.1f}"] for x in way)]))
    print(f"\n{output.describe(source)}, {source['cores']} cores, commit {cloned}")
    output.write_rows(options.out / "newcomer.csv", way, source)
    print(options.out / "newcomer.csv")
    first = next(x.seconds for x in way if x.milestone == CURVE)
    if first > LIMIT:
        raise SystemExit(f"the first curve took {first:.0f} s, more than {LIMIT:.0f}")
