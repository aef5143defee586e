"""The documentation: its code runs, its commands and files exist, it builds without a warning and has every public name."""

import argparse
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

import spectral_ops
from spectral_ops import optim, structures
from spectral_ops._library import KERNELS
from spectral_ops.bench import __main__ as bench

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
BENCH = "python -m spectral_ops.bench "
CHEAP = ("report --check", "sharing", "model")  # run, not only parsed
WIDTH = 128


# --- Code -------------------------------------------------------------------------------------------------------------


class Model(nn.Linear):
    def loss(self, batch: Tensor) -> Tensor:
        return self(batch).square().mean()


def preamble() -> dict[str, object]:
    """What blocks need and do not make."""
    gradients = torch.randn(200, 6) @ torch.randn(6, 6)
    return {"__name__": "page", "model": Model(4, 3), "data": torch.randn(5, 8, 4), "gradients": gradients}


def code(page: str) -> str:
    """The python blocks of a page, each on the lines where it stands there. Examples that are shown from their files are `py`
    blocks, and have tests of their own."""
    lines, inside = [], False
    for line in (ROOT / page).read_text().splitlines():
        inside = inside and not line.startswith("```")
        lines.append(line if inside else "")
        inside = inside or line == "```python"
    return "\n".join(lines)


@pytest.fixture
def registered():
    """Ops that a page defines have kernels only as long as it runs."""
    before = dict(KERNELS)
    yield
    KERNELS.clear()
    KERNELS.update(before)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("page", [page for page in PAGES if code(page).strip()])
def test_the_python_blocks_run(page, tmp_path):
    path = tmp_path / f"{Path(page).stem.replace('-', '_')}.py"  # Triton reads a kernel's text from its file
    path.write_text(code(page))
    exec(compile(path.read_text(), str(path), "exec"), preamble())


def test_the_python_blocks_are_as_ruff_has_them(tmp_path):
    """But that a page imports where it needs to, and takes names from the preamble."""
    for page in PAGES:
        (tmp_path / page.replace("/", "_").replace("-", "_").removesuffix(".md")).with_suffix(".py").write_text(code(page))
    ruff = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--ignore", "E402,F821,B018"]
    done = subprocess.run([*ruff, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- Commands and files -----------------------------------------------------------------------------------------------


def commands(page: str) -> list[str]:
    """From shell blocks, indented lines and inline code, without comments."""
    text = (ROOT / page).read_text()
    shell = "".join(re.findall(r"```sh\n(.*?)```", text, re.S)).splitlines()
    outside = re.sub(r"```.*?```", "", text, flags=re.S)
    indented = re.findall(r"^    (\S.*)$", outside, re.M)
    inline = [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", outside)]
    found = (shlex.join(shlex.split(line, comments=True)) for line in [*shell, *indented, *inline] if starts(line))
    return list(dict.fromkeys(line for line in found if "…" not in line))


def starts(line: str) -> bool:
    return re.match(r"(make|python -m|python \w+/|torchrun|accelerate launch|pip install) ?", line) is not None


def named(start: str) -> list[tuple[str, str]]:
    return [(page, line) for page in PAGES for line in commands(page) if line.startswith(start)]


@pytest.mark.parametrize("page,line", named("make "))
def test_the_targets_of_make_exist(page, line):
    done = subprocess.run(["make", "--dry-run", *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Parsed(Exception):
    """Arguments are right; nothing is run."""


def parses(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = argparse.ArgumentParser.parse_args

    def parse(parser, *args, **kwargs):
        whole(parser, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed):
        bench.main(arguments)


@pytest.mark.parametrize("page,line", named(BENCH))
def test_the_programs_take_the_arguments(page, line, monkeypatch):
    parses(shlex.split(line.removeprefix(BENCH)), monkeypatch)


def test_the_programs_behind_make_take_the_arguments(monkeypatch):
    """ARGS of `make train` and `make gpu COMMAND=…`."""
    lines = [dict(word.split("=", 1) for word in shlex.split(line)[2:]) | {"target": shlex.split(line)[1]}
             for _, line in named("make ") if "ARGS=" in line]  # fmt: skip
    lines = [x for x in lines if x["target"] in ("train", "gpu") and x["ARGS"] != "--help"]
    assert lines
    for x in lines:
        with monkeypatch.context() as patch:
            parses([x.get("COMMAND", x["target"]), *shlex.split(x["ARGS"])], patch)


@pytest.mark.parametrize("line", [line for line in CHEAP if named(BENCH + line)])
def test_cheap_programs_run(line, capsys):
    bench.main(shlex.split(line))
    assert "report" in line or capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    text = (ROOT / page).read_text()
    top = r"(?:bench|docs|examples|kernels|optim|spectral_ops|tests)/[\w./*-]*\w"
    scripts = re.findall(rf"^    (?:python|torchrun|accelerate launch)\b[^#\n]*? ({top})", text, re.M)
    included = re.findall(r'^--8<-- "([^":]+)', text, re.M)
    for path in [*re.findall(rf"`({top})`", text), *scripts, *included]:
        assert list(ROOT.glob(path)), path


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short(page):
    text = re.sub(r"<!-- results.*?<!-- /results -->", "", (ROOT / page).read_text(), flags=re.S)
    assert [line for line in text.splitlines() if len(line) > WIDTH and not line.startswith("|")] == []


# --- Peers ------------------------------------------------------------------------------------------------------------

PEERS = {
    "torch.optim.AdamW": ("torch.optim", "AdamW", optim.SpectralKron),
    "torch.optim.Muon": ("torch.optim", "Muon", optim.SpectralKron),
    "SOAP": ("pytorch_optimizer", "SOAP", optim.SpectralKron),
    "singd": ("singd.optim.optimizer", "SINGD", optim.SINGD),
    "sirfshampoo": ("sirfshampoo", "SIRFShampoo", optim.IFShampoo),
}


def options_of(cls: type) -> set[str]:
    return {*inspect.signature(cls).parameters} - {"self"}


@pytest.mark.parametrize("peer", PEERS)
def test_every_option_of_a_peer_has_a_row(peer):
    """And what stands beside it are options of ours, or the reason for none."""
    module, name, ours = PEERS[peer]
    theirs = options_of(getattr(importlib.import_module(module), name))
    section = (ROOT / "docs/migrating.md").read_text().partition(f"## From {peer}\n")[2].partition("\n## ")[0]
    table = section.partition("|---|---|---|\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ", 2)] for line in table.splitlines()]
    named = [set(re.findall(r"`(\w+)(?:\[\d\])?`", row[0])) for row in rows]
    assert set.union(*named) == theirs
    for row in rows:
        options = set(re.findall(r"`(\w+)(?:\[\d\]|=[^`]*)?`", row[1])) - {"param_groups", *optim.__all__}
        assert row[1].startswith("none") or options <= options_of(ours), row


# --- The site ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr + done.stdout, done.stderr
    return folder


class Ids(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found: set[str] = set()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.found.add(given.get("id") or "")
        self.addresses += [given[name] for name in ("src", "href") if given.get(name)]


def read(site: Path, page: str) -> Ids:
    """Of `docs/reference/ops.md`, `reference/ops/index.html`."""
    name = page.removeprefix("docs/").removesuffix(".md")
    return Ids((site / ("" if name == "index" else name) / "index.html").read_text())


def test_nothing_is_fetched_from_elsewhere(site):
    for path in site.rglob("*.html"):
        assert not re.search(r'<(script|img|iframe)[^>]+src="(https?:)?//', path.read_text()), path
        assert not re.search(r'<link[^>]+rel="(stylesheet|preconnect)"[^>]+href="(https?:)?//', path.read_text()), path


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_every_page_is_in_the_navigation(page):
    def paths(tree):
        for entry in tree:
            value = next(iter(entry.values())) if isinstance(entry, dict) else entry
            yield from paths(value) if isinstance(value, list) else [value]

    assert page.removeprefix("docs/") in paths(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_into_the_documentation_hold(site, page):
    """mkdocs looks at those of its pages."""
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", (ROOT / page).read_text())
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        assert not anchor or anchor in read(site, path).found, link


def test_every_picture_is_there(site):
    for page in ("docs/curvature.md", "docs/mathematics.md", "bench/RESULTS.md"):
        pictures = [x for x in read(site, page).addresses if x.endswith(".png") and "results" in x]
        assert pictures
        for picture in pictures:
            assert (site / page.removeprefix("docs/").removesuffix(".md") / picture).exists(), picture


@pytest.mark.parametrize("space", [spectral_ops, optim, structures], ids=lambda x: x.__name__)
def test_every_public_name_is_in_the_reference(site, space):
    listed, headings = set(), set()
    for path in (ROOT / "docs" / "reference").glob("*.md"):
        listed |= set(re.findall(r"^::: (.+)$", path.read_text(), re.M))
        headings |= read(site, f"reference/{path.name}").found
    for name in space.__all__:
        entries = {f"{space.__name__}.{name}", f"{space.__name__}.{name}.{name}"}  # functions under the name of their file
        assert entries & listed & headings, name
