"""The examples of frameworks: they learn, and resume to the bit from the checkpoint that the framework made half-way."""

import re
import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spectral_ops.optim import SpectralKron, param_groups

EXAMPLES = Path(__file__).parents[1] / "examples"
Run = Callable[..., tuple[dict[str, torch.Tensor], list[str]]]


@pytest.fixture
def run(frameworks: None, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs an example with options: the parameters at the end, and the lines that tell its losses."""
    from accelerate.state import AcceleratorState

    def run(name: str, *options: str) -> tuple[dict[str, torch.Tensor], list[str]]:
        AcceleratorState._reset_state(reset_partial_state=True)  # of the process, and an example is a process
        capfd.readouterr()
        model = runpy.run_path(str(EXAMPLES / name))["main"](options)
        return model.state_dict(), [line for line in capfd.readouterr().out.splitlines() if "loss" in line]

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def loss_of(line: str) -> float:
    found = re.search(r"'?loss'?:? '?([\d.]+)", line)
    assert found, line
    return float(found[1])


def half(folder: Path, checkpoint: str, name: str) -> str:
    """A folder that has the checkpoint of half-way, as its last."""
    other = folder.with_name("half")
    other.mkdir()
    copy = shutil.copytree if (folder / checkpoint).is_dir() else shutil.copy
    copy(folder / checkpoint, other / name)
    return str(other)


def check(whole: tuple[dict[str, Any], list[str]], resumed: tuple[dict[str, Any], list[str]], count: int, below: float) -> None:
    (parameters, losses), (same, rest) = whole, resumed
    assert len(rest) == count and rest == losses[-count:]
    assert parameters.keys() == same.keys() and all(torch.equal(x, same[name]) for name, x in parameters.items())
    assert loss_of(losses[-1]) < below * loss_of(losses[0])


@pytest.mark.parametrize("by", ["factory", "class"])
def test_hugging_face_trainer(by: str, run: Run, tmp_path: Path) -> None:
    folder, options = tmp_path / "whole", ("--by", by, "--steps", "20")
    whole = run("huggingface_trainer.py", *options, "--output", str(folder))
    again = half(folder, "checkpoint-10", "checkpoint-10")
    resumed = run("huggingface_trainer.py", *options, "--output", again, "--resume")
    # The last line is of the whole run: its time, and a mean loss.
    check((whole[0], whole[1][:-1]), (resumed[0], resumed[1][:-1]), 5, below=0.6)


def test_hugging_face_trainer_makes_the_same_by_class_and_by_factory(run: Run, tmp_path: Path) -> None:
    options = "--steps", "4", "--output"
    ways = ("factory", "class")
    (first, _), (second, _) = (run("huggingface_trainer.py", "--by", by, *options, str(tmp_path / by)) for by in ways)
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str, run: Run, tmp_path: Path) -> None:
    """Resumes within an epoch, of 64 batches of which two make a step."""
    options = "--steps", "40", "--precision", precision, "--output", str(tmp_path)
    whole = run("accelerate_loop.py", *options, "--save-at", "17")
    check(whole, run("accelerate_loop.py", *options, "--resume"), 23, below=0.7)


def test_lightning(run: Run, tmp_path: Path) -> None:
    folder, options = tmp_path / "whole", ("--epochs", "4", "--batches", "6")
    whole = run("lightning_module.py", *options, "--output", str(folder))
    again = half(folder, "epoch=1-step=12.ckpt", "last.ckpt")
    check(whole, run("lightning_module.py", *options, "--output", again, "--resume"), 12, below=0.7)


def test_timm(run: Run, tmp_path: Path) -> None:
    folder, options = tmp_path / "whole", ("--epochs", "4", "--batches", "25")
    whole = run("timm_registry.py", *options, "--output", str(folder))
    again = half(folder, "checkpoint-1.pth.tar", "last.pth.tar")
    check(whole, run("timm_registry.py", *options, "--output", again, "--resume"), 2, below=0.7)


def test_torchtitan(run: Run, tmp_path: Path) -> None:
    options = "--steps", "20", "--output", str(tmp_path)
    whole = run("torchtitan_container.py", *options, "--save-at", "9")
    check(whole, run("torchtitan_container.py", *options, "--resume"), 11, below=0.7)


def test_what_timm_calls_fallback_takes_adamw(frameworks: None) -> None:
    from timm.models import VisionTransformer

    example = runpy.run_path(str(EXAMPLES / "timm_registry.py"))
    model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=16, depth=1, num_heads=2)
    optimizer = example["optimizer_of"](model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    by_matrix = {name for name, p in model.named_parameters() if "basis_left" in optimizer.state[p]}
    ours = {name for group in param_groups(model) if group["algorithm"] == "matrix" for name in group["param_names"]}
    assert by_matrix == ours - {"patch_embed.proj.weight"} and len(by_matrix) == 4


def test_a_fallback_group_keeps_an_algorithm_of_its_own() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2, 2))], "use_fallback": use} | given for use, given in FALLBACK]
    assert [group["algorithm"] for group in SpectralKron(groups).param_groups] == ["adamw", "matrix", None]


FALLBACK: list[tuple[bool, dict[str, str]]] = [(True, {}), (True, {"algorithm": "matrix"}), (False, {})]
