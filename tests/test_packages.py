"""The wheel and the source distribution: what they hold and say, and that they work where their dependencies are and no more.

Nothing is downloaded: the dependencies of an environment are links to those that the tests run with.
"""

import email.message
import email.parser
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("installed.py")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAME = f"spectral_ops-{PROJECT['project']['version']}"
MOVED = ("kernels", "optim", "bench")  # folders at the root that are subpackages
# What a person needs to read, build and test the package. `.ci` and `.gitignore` are of the repository.
READ = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md"}
BUILT = {"MANIFEST.in", "Makefile", "constraints.txt", "mkdocs.yml", "pyproject.toml"}
FOLDERS = ("bench", "docs", "examples", "kernels", "optim", "spectral_ops", "tests")
# What pip is told on this machine, such as where wheels are, does not count, nor that tests interpret kernels.
SETTINGS = ("PIP_", "PYTHON", "TRITON_")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS)} | {"PIP_CONFIG_FILE": os.devnull}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--quiet", "--no-index", "--no-build-isolation"]


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git has or would add, and so without what earlier builds left."""
    if not (ROOT / ".git").exists():
        pytest.skip("what belongs to the package is known only in a git repository")
    copy = tmp_path_factory.mktemp("checkout")
    for name in run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")[:-1]:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def packages(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("packages")
    files = {"wheel": out / f"{NAME}-py3-none-any.whl", "sdist": out / f"{NAME}.tar.gz"}
    # The sdist first: it must not take the `build` folder of the wheel.
    run(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})", cwd=checkout)
    run(*PIP, "wheel", *OFFLINE, "--no-deps", "--wheel-dir", out, checkout, cwd=out)
    assert sorted(out.iterdir()) == sorted(files.values())
    return files


@pytest.fixture(scope="module")
def metadata(packages: dict[str, Path]) -> email.message.Message:
    with zipfile.ZipFile(packages["wheel"]) as wheel:
        return email.parser.Parser().parsestr(wheel.read(f"{NAME}.dist-info/METADATA").decode())


# --- What they hold -----------------------------------------------------------------------------------------------------


def sources(checkout: Path) -> set[str]:
    """All files below the folders that a distribution has."""
    paths = (path for folder in FOLDERS for path in (checkout / folder).rglob("*") if path.is_file())
    return {path.relative_to(checkout).as_posix() for path in paths}


def test_the_wheel_holds_the_package_and_nothing_else(packages, checkout):
    packaged = (*MOVED, "spectral_ops")
    modules = {x for x in sources(checkout) if x.startswith(tuple(f"{x}/" for x in packaged)) and x.endswith(".py")}
    tables = {x for x in sources(checkout) if x.startswith("kernels/configs/") and x.endswith(".json")}
    assert tables
    names = {f"spectral_ops/{x}" if x.partition("/")[0] in MOVED else x for x in modules | tables | {"spectral_ops/py.typed"}}
    assert len(names) == len(modules) + len(tables) + 1
    with zipfile.ZipFile(packages["wheel"]) as wheel:
        found = set(wheel.namelist())
    assert {x for x in found if not x.startswith(f"{NAME}.dist-info/")} == names
    assert f"{NAME}.dist-info/licenses/LICENSE" in found


def test_the_sdist_holds_what_is_read_built_and_tested(packages, checkout):
    with tarfile.open(packages["sdist"]) as archive:
        found = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    written = {x for x in found if x.partition("/")[0] in ("PKG-INFO", "setup.cfg", "spectral_ops.egg-info")}
    assert found - written == sources(checkout) | READ | BUILT


def test_the_metadata(metadata):
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    assert (metadata["Name"], metadata["Version"]) == (project["name"], project["version"])
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert set(metadata.get_all("Provides-Extra")) == set(extras)
    declared = [*project["dependencies"], *(f'{x}; extra == "{extra}"' for extra, of in extras.items() for x in of)]
    assert {Requirement(x) for x in metadata.get_all("Requires-Dist")} == {Requirement(x) for x in declared}


# --- That they work -----------------------------------------------------------------------------------------------------


def needed(requirements: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """These and what they need themselves, without extras, on this machine."""
    found: dict[str, importlib.metadata.Distribution] = {}
    open_ = list(requirements)
    while open_:
        requirement = Requirement(open_.pop())
        if requirement.name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found[requirement.name] = importlib.metadata.distribution(requirement.name)
        open_ += found[requirement.name].requires or []
    return found


def link(distributions: dict[str, importlib.metadata.Distribution], folder: Path) -> Path:
    """A folder with what these installed at the top of site-packages."""
    for distribution in distributions.values():
        for top in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    return folder


@pytest.mark.parametrize("triton", [True, False], ids=["with Triton", "without Triton"])
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_an_installation(kind, triton, packages, metadata, tmp_path):
    dependencies = needed(metadata.get_all("Requires-Dist"))
    assert {"torch", "numpy"} <= dependencies.keys()
    if triton and "triton" not in dependencies:
        pytest.skip("Triton is no dependency on this system")
    if not triton:
        dependencies.pop("triton", None)
    for folder in ("dependencies", "build", "elsewhere"):
        (tmp_path / folder).mkdir()
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{link(dependencies, tmp_path / 'dependencies')}\n")
    install = [*PIP, "--python", python, "install", *OFFLINE, "--no-compile", *([] if triton else ["--no-deps"])]
    build = link(needed(PROJECT["build-system"]["requires"]), tmp_path / "build")  # only while it is built
    run(*install, packages[kind], cwd=tmp_path, PYTHONPATH=str(build))
    shutil.rmtree(build)
    run(python, "-I", SCRIPT, ROOT, *([] if triton else ["--without-triton"]), cwd=tmp_path / "elsewhere")
