"""What mkdocs cannot find by itself: the packages under their import name, and pages and plots outside docs/."""

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"spectral_ops": "spectral_ops", "optim": "spectral_ops/optim"}  # with public names, as pyproject.toml maps them
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "bench/RESULTS.md", "bench/results/plots/*.png", "bench/results/*.png")

_site = TemporaryDirectory()


@event_priority(100)
def on_config(config: MkDocsConfig) -> None:
    """Put the sources together as an installation does: the documentation's parser follows no mapped folders."""
    for source, target in PACKAGES.items():
        shutil.copytree(ROOT / source, Path(_site.name, target), dirs_exist_ok=True)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_site.name]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take files in under their path from the root of the repository."""
    for path in (path for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern))):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Links between docs/ and the rest of the repository, as they hold there, lead to the same page in the site."""
    markdown = re.sub(r"\]\(\.\./(?=bench/|[A-Z])", "](", markdown)  # of docs/*.md
    return re.sub(r"\]\(docs/", "](", markdown)  # of *.md
