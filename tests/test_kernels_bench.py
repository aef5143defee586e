"""The timings of single operations: what is timed, against what, and that a wrong result is no speed-up."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from spectral_ops.bench import kernels, output
from spectral_ops.bench.cases import CASES, Case, Work
from spectral_ops.bench.kernels import Job, Roof, Shape

TIMING = kernels.Timing(
    "gram", "ours", "small", 64, 64, 2, "bf16", 1.0, 2.0, 3.0, 4.0, 5.0, 0.6, 6.7, 8.3, True, "passed"
)  # fmt: skip
TINY = (Shape("ViT-B", 6, 5, 2), Shape("square", 7, 7, 1))
COLUMNS = (
    "op,provider,model,n,m,batch,operands,p20_us,p50_us,p80_us,tflops,gb_per_s,roof,roof_tflops,roof_gb_per_s,graph,gate"
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two small shapes, and a moment for each."""
    monkeypatch.setattr(kernels, "SHAPES", {"cuda": TINY, "cpu": TINY})
    monkeypatch.setattr(kernels, "ROOFS", {"cpu": (1000, {"fp32": 16})})
    monkeypatch.setattr(kernels, "SECONDS", {"cuda": 0.01, "cpu": 0.01})
    monkeypatch.setattr(kernels, "COMPILED", {"cuda": 0, "cpu": 0})
    monkeypatch.setattr(kernels, "CORE_CACHE", 1000)
    monkeypatch.setattr(kernels, "OTHER_OPERANDS", 1)
    yield
    torch.set_flush_denormal(False)  # the program sets it for its process, which here is everyone's


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is the CPU: kernels in the interpreter, functions that replay themselves."""
    arguments = Case.arguments
    monkeypatch.setattr(Case, "arguments", lambda *args: arguments(*args[:5], "cpu", *args[6:]))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(kernels, "captured", lambda function: None if "full_product" in repr(function) else function)
    monkeypatch.setattr(kernels, "CLOCKS", {"cuda": kernels.host_seconds})
    monkeypatch.setattr(kernels, "measure_roof", lambda _: Roof(dict.fromkeys(kernels.OPERANDS, 1e12), 1e9))


# --- The command --------------------------------------------------------------------------------------------------------


def test_on_a_cpu_ops_are_timed_against_eager_and_compiled_pytorch(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels, "COMPILED", {"cuda": 1, "cpu": 1})
    kernels.main(["--device", "cpu", "--op", "momentum", "--out", str(tmp_path)])
    rows = output.read_csv(tmp_path / "kernels-cpu.csv")
    assert [*rows[0]] == [*COLUMNS.split(","), *output.PROVENANCE, "command"]
    assert [(row["model"], row["provider"]) for row in rows] == [
        ("ViT-B", "ours"), ("ViT-B", "eager"), ("ViT-B", "compiled"), ("square", "ours"), ("square", "eager"),
    ]  # fmt: skip
    assert all(row["gate"] == ("passed" if row["provider"] == "ours" else "") for row in rows)
    assert all(float(row["p50_us"]) > 0 and float(row["roof_gb_per_s"]) > 0 and row["graph"] == "False" for row in rows)
    assert {row["command"] for row in rows} == {"python -m spectral_ops.bench kernels --device cpu --op momentum"}
    table = capsys.readouterr().out
    assert "6 x 5 x 2" in table and "compiled us" in table and "refused" not in table


def test_a_broken_op_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(type(CASES["gram"]), "op", lambda case, arguments: {"w": 1.05 * case.eager(arguments)["w"]})
    kernels.main(["--device", "cpu", "--op", "gram", "--out", str(tmp_path)])
    rows = output.read_csv(tmp_path / "kernels-cpu.csv")
    assert all(row["gate"].startswith("failed: w: error") for row in rows if row["provider"] == "ours")
    assert capsys.readouterr().out.count("  refused") == len(TINY)


def test_parts_of_ops_need_a_gpu(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--device", "cpu", "--op", "gram,rotate"])
    assert "--op rotate: only on a GPU" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_sentence(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--device", "cuda"])
    assert "PyTorch sees no CUDA GPU" in capsys.readouterr().err


# --- On a GPU -----------------------------------------------------------------------------------------------------------


def test_on_a_gpu_launches_are_timed_from_graphs(monkeypatch, gpu):
    monkeypatch.setattr(kernels, "COMPILED", {"cuda": 1, "cpu": 1})
    monkeypatch.setattr(kernels, "precompiled", lambda jobs, device, until: [])
    launched = []
    run = type(CASES["gram"]).run
    monkeypatch.setattr(type(CASES["gram"]), "run", lambda *args: launched.append(1) or run(*args))
    rows, notes = kernels.benchmark(["gram"], "cuda", math.inf)
    first = [row for row in rows if (row.model, row.operands) == ("ViT-B", "bf16")]
    assert [(row.provider, row.graph, row.gate) for row in first] == [
        ("ours", True, "passed"), ("eager", True, ""), ("cublas", False, ""),
    ]  # fmt: skip
    assert launched and {row.operands for row in rows} == set(CASES["gram"].operands)
    assert "compiled in time: 0 of 1 compositions" in notes


def test_what_compiles_in_other_processes_comes_from_their_cache(tmp_path):
    program = """
from torch._dynamo.utils import counters
from spectral_ops.bench import kernels
import time
kernels.WORKERS = 1
jobs = [kernels.Job("momentum", kernels.Shape("small", 8, 8, 2), "fp32", True)]
assert kernels.precompiled(jobs, "cpu", time.time() + 100) == jobs
kernels.compile_job(jobs[0], "cpu")
assert counters["inductor"]["fxgraph_cache_hit"] == 1 and not counters["inductor"]["fxgraph_cache_miss"], counters
"""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_what_does_not_compile_in_time_is_timed_without(monkeypatch):
    monkeypatch.setattr(kernels.multiprocessing, "get_context", lambda _: SimpleNamespace(Pool=Slow))
    jobs = [Job("gram", TINY[0], "fp32", True), Job("momentum", TINY[0], "fp32", True)]
    assert kernels.precompiled(jobs, "cpu", time.time()) == jobs[1:]


class Slow:
    """A pool in which `gram` takes too long."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> "Slow":
        return self

    def __exit__(self, *_: object) -> None: ...

    def apply_async(self, function: Callable[..., None], arguments: tuple[Job, str]) -> SimpleNamespace:
        def get(timeout: float) -> None:
            if arguments[0].op == "gram":
                raise TimeoutError

        return SimpleNamespace(get=get)


# --- The gate -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [name for name, case in CASES.items() if case.has_op])
def test_public_ops_mean_what_the_launches_mean(op):
    assert kernels.gate(Job(op, Shape("", 5, 33, 2), "fp32", False), "cpu") == "passed"


def test_every_public_op_is_timed():
    assert [name for name, case in CASES.items() if not case.has_op] == ["gram_track", "gram_track_both", "rotate", "average"]


def test_the_gate_tells_what_there_was_no_time_for_and_what_raised(monkeypatch):
    job = Job("gram", TINY[0], "fp32", False)
    assert kernels.gate(job, "cpu", deadline=0.0) == "not run"
    monkeypatch.setattr(type(CASES["gram"]), "op", lambda *_: 1 / 0)
    assert kernels.gate(job, "cpu") == "failed: ZeroDivisionError: division by zero"


def test_ratios():
    eager = replace(TIMING, provider="eager", p50_us=5.0, gate="")
    assert "64 x 64 x 2" in kernels.ratios([TIMING, eager]) and "2.50" in kernels.ratios([TIMING, eager])
    for gate in ("failed: w", "not run"):
        text = kernels.ratios([replace(TIMING, gate=gate), eager])
        assert "refused" in text and "2.50" not in text


# --- What is timed, and how ---------------------------------------------------------------------------------------------


def test_every_operation_is_planned_the_telling_shapes_first():
    jobs = list(kernels.plan(CASES, "cuda"))
    assert len(set(jobs)) == len(jobs)
    assert {(job.op, job.operands) for job in jobs} == {(n, o) for n, case in CASES.items() for o in case.operands}
    assert {job.shape for job in jobs[: len(CASES)]} == {TINY[0]}
    assert {job.operands for job in kernels.plan(CASES, "cpu")} == {"fp32"}


def test_shapes_carry_their_models(monkeypatch):
    monkeypatch.undo()
    models = {device: {shape.model for shape in shapes} for device, shapes in kernels.SHAPES.items()}
    assert models["cuda"] == {"ViT-B", "GPT-2 medium", "Llama-1B", "small", "square"} > models["cpu"]
    for shapes in kernels.SHAPES.values():
        assert len({shape.size for shape in shapes}) == len(shapes)


def test_candidates_are_interleaved_and_short_of_time_there_are_fewer_rounds():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ab"}

    def clock(function):
        function()
        return 0.1

    times = kernels.interleaved(functions, clock, limit=2.0, rounds=30)
    assert {name: len(values) for name, values in times.items()} == {"a": 20, "b": 20}
    rounds = calls[2 * kernels.WARMUP :]
    assert all(set(rounds[i : i + 2]) == {"a", "b"} for i in range(0, 40, 2)) and rounds[::2] != ["a"] * 20


def test_the_share_of_the_roof_is_of_what_binds():
    roof = Roof({"bf16": 100.0}, 10.0)
    assert roof.share(Work(50, 1), "bf16", 1.0) == 0.5
    assert roof.share(Work(50, 9), "bf16", 1.0) == 0.9
