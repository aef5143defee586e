"""What the GPU programs decide, on a CPU: kernels in the interpreter, a made-up clock, made-up timings."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spectral_ops.bench import gpu, kernels, steps, tune
from spectral_ops.bench.cases import CASES, OPERANDS, fresh, judged, relative_error, unit
from spectral_ops.bench.optimizers import OPTIMIZERS
from spectral_ops.kernels.config import Config, choose_config
from spectral_ops.optim import SpectralKron

SOURCE = {"hardware": "a GPU", "threads": "1", "torch": "2", "date": "2026-11-21", "triton": "3", "driver": "5"}
TIMING = kernels.Timing(
    "gram", "ours", "small", 64, 64, 2, "bf16", 1.0, 2.0, 3.0, 4.0, 5.0, 0.6, 6.7, 8.3, True, "passed"
)  # fmt: skip
STEP = steps.Timing("text", "AdamW", "torch 2", 1.0, 1.0, 1.0, 5, None, 80, 10, 96, 3, "")


class Clock:
    """Each reading is a second later."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


# --- Correctness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", CASES)
def test_every_case_is_right(op):
    for operands in CASES[op].operands:
        if OPERANDS[operands].precision != "highest":
            continue  # the interpreter does not know them
        checks = gpu.check_case(op, operands, [(5, 33, 2)], "cpu", math.inf)
        assert checks and not gpu.failures(checks), gpu.failures(checks)


def test_a_broken_kernel_is_found(monkeypatch):
    run = type(CASES["gram_skew"]).run

    def scaled(case, arguments, config=None):
        results = run(case, arguments, config)
        return results | {"u": 1.05 * results["u"]}

    monkeypatch.setattr(type(CASES["gram_skew"]), "run", scaled)
    checks = gpu.check_case("gram_skew", "bf16", [(20, 9, 1)], "cpu", math.inf)
    assert [check.result for check in gpu.failures(checks)] == ["u"]
    assert "error" in gpu.failures(checks)[0].verdict


def test_an_element_that_is_not_written_is_found(monkeypatch):
    def unwritten(case, arguments, config=None):
        return {"w": torch.empty(arguments["x"].shape[0], 20, 20)}

    monkeypatch.setattr(type(CASES["gram"]), "run", unwritten)
    (check,) = gpu.check_case("gram", "fp32", [(20, 9, 1)], "cpu", math.inf)
    assert "error nan" in check.verdict and "not symmetric" in check.verdict


def test_a_kernel_that_raises_does_not_lose_the_other_shapes(monkeypatch):
    run = type(CASES["gram"]).run

    def sometimes(case, arguments, config=None):
        if arguments["x"].shape[1] == 3:
            raise RuntimeError("out of luck")
        return run(case, arguments, config)

    monkeypatch.setattr(type(CASES["gram"]), "run", sometimes)
    checks = gpu.check_case("gram", "fp32", [(2, 2, 1), (3, 3, 1), (4, 4, 1)], "cpu", math.inf)
    assert [check.verdict for check in checks] == ["", "RuntimeError: out of luck", ""]


def test_what_there_was_no_time_for_is_not_a_failure():
    checks = gpu.check_case("gram", "fp32", [(2, 2, 1)], "cpu", 0.0)
    assert [check.verdict for check in checks] == ["not run"] and not gpu.failures(checks)


def test_bounds():
    case, operands = CASES["gram"], OPERANDS["bf16"]
    wanted = {"w": torch.eye(2, dtype=torch.float64)}
    result, eager = {"w": (1.03 * torch.eye(2)).bfloat16()}, {"w": (1.02 * torch.eye(2)).bfloat16()}
    assert not any(found.verdict for found in judged(case, result, eager, wanted, unit(operands)))
    assert any(found.verdict for found in judged(case, result, wanted, wanted, unit(operands)))
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf
    lopsided = {"w": torch.eye(2) + torch.tensor([[0, 1e-6], [0, 0]])}
    assert [found.verdict for found in judged(case, lopsided, eager, wanted, 1.0)] == ["not symmetric"]


# --- Bits ---------------------------------------------------------------------------------------------------------------


def test_both_roundings(monkeypatch):
    found = gpu.Findings()
    some = gpu.every_bfloat16("cpu").view(3, 256, 512)[:, :64].flatten()
    monkeypatch.setattr(gpu, "every_bfloat16", lambda device: some)
    monkeypatch.setattr(gpu, "ROUNDED", (3, 64, 512))
    gpu.roundings(found, "cpu")
    assert len(found.checks) == 2 and not gpu.failures(found.checks), found.checks


def test_another_rounding_is_found(monkeypatch):
    found = gpu.Findings()
    some = torch.randn(3 * 8 * 512)
    monkeypatch.setattr(gpu, "every_bfloat16", lambda device: some)
    monkeypatch.setattr(gpu, "ROUNDED", (3, 8, 512))
    monkeypatch.setattr(gpu.rounding, "stochastic_round", lambda x, seed: x.bfloat16())
    monkeypatch.setattr(gpu.update, "momentum", lambda buffer, x, *_: buffer.copy_((x * 0.999).bfloat16().view_as(buffer)))
    gpu.roundings(found, "cpu")
    assert [check.verdict for check in found.checks] == ["not to nearest even", "other bits than the reference"]


def test_every_bfloat16_has_all_of_them():
    x = gpu.every_bfloat16("cpu")
    assert len(x.bfloat16().view(torch.int16).unique()) > 65_000 and x.isnan().any() and x.isinf().any()


def test_moving_bits_are_found(monkeypatch):
    monkeypatch.setattr(gpu, "REPEATS", 2)
    monkeypatch.setattr(gpu, "CASES", {name: CASES[name] for name in ("gram", "average")})
    found = gpu.Findings()
    gpu.bits(found, math.inf, "cpu", [(6, 5, 2)])
    assert len(found.checks) == 3 and not gpu.failures(found.checks)
    noise = iter(range(100))
    monkeypatch.setattr(type(CASES["gram"]), "run", lambda *_: {"w": torch.full((2, 2), 1.0 + next(noise))})
    gpu.bits(found, math.inf, "cpu", [(6, 5, 2)])
    assert {check.verdict for check in gpu.failures(found.checks)} == {"moves: w"}
    monkeypatch.setattr(type(CASES["gram"]), "run", lambda *_: 1 / 0)
    gpu.bits(found, math.inf, "cpu", [(6, 5, 2)])
    assert found.checks[-3].verdict == "ZeroDivisionError: division by zero" and not found.checks[-1].verdict


class Recorder(TorchDispatchMode):
    """Stands for a CUDA graph: replays the operations on the tensors of their first run, without the Python around them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.calls.append((func, args, kwargs or {}, results))
        return results

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, results in self.calls:
                for old, new in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


def recorded(step):
    """A capture does nothing yet: what it changes here is put back."""
    optimizer, recorder = step.__self__, Recorder()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    held += [x for state in optimizer.state.values() for x in state.values()]
    before = [x.detach().clone() for x in held]
    with recorder:
        step()
    with torch.no_grad():
        for x, old in zip(held, before, strict=True):
            x.copy_(old)
    return recorder.replay


def test_captured_steps_replay_bit_for_bit():
    found = gpu.Findings()
    gpu.captured_steps(found, math.inf, "cpu", recorded)
    assert len(found.checks) == 2 * len(OPTIMIZERS) and not gpu.failures(found.checks), found.checks


def test_captured_steps_that_keep_a_count_on_the_host_are_found(monkeypatch):
    step = SpectralKron.step

    def slowing(self, closure=None):
        self.count = getattr(self, "count", 0) + 1
        self.param_groups[0]["lr"] = torch.tensor(0.01 / self.count)
        return step(self, closure)

    monkeypatch.setattr(SpectralKron, "step", slowing)
    monkeypatch.setattr(gpu, "OPTIMIZERS", {"SpectralKron": OPTIMIZERS["SpectralKron"]})
    found = gpu.Findings()
    gpu.captured_steps(found, math.inf, "cpu", recorded)
    assert all(check.verdict.startswith("differs in a graph: 0.value") for check in found.checks)
    assert gpu.failures(found.checks) == found.checks


def test_a_nan_is_the_same_as_itself():
    x = torch.tensor([math.nan, -0.0])
    assert gpu.same(x, x.clone()) and not gpu.same(x, torch.tensor([math.nan, 0.0])) and not gpu.same(x, x.double())


# --- Sections -----------------------------------------------------------------------------------------------------------


def test_a_section_gets_what_those_before_left_over():
    clock, ends = Clock(), []
    lines = gpu.run_sections([(name, 10.0, lambda _, end: ends.append(end)) for name in "ab"], gpu.Findings(), clock=clock)
    assert ends == [11.0, 21.0]
    assert lines == ["a: 1 s", "b: 1 s"]


def test_a_section_that_fails_leaves_the_others_and_their_results(capsys):
    found, kept = gpu.Findings(), []

    def fails(found, end):
        found.stepped.append(STEP)
        raise ValueError("no luck")

    sections = [("kernels", 1, fails), ("same bits", 1, fails), ("tiles", 1, lambda found, end: found.notes.append("ran"))]
    lines = gpu.run_sections(sections, found, lambda: kept.append(len(found.stepped)), Clock())
    assert "no luck" in lines[0] and found.notes == ["ran"]
    assert kept == [1, 2, 2]  # what there was after each section
    assert [check.op for check in gpu.failures(found.checks)] == ["same bits"]  # the others check nothing
    assert "Traceback" in capsys.readouterr().err


def test_fewer_sections_share_the_time_of_all():
    whole, some = gpu.planned([name for name, _, _ in gpu.SECTIONS]), gpu.planned(["kernels", "tiles"])
    assert whole == gpu.SECTIONS and [name for name, _, _ in some] == ["kernels", "tiles"]
    assert sum(seconds for _, seconds, _ in some) == pytest.approx(sum(seconds for _, seconds, _ in whole))
    assert sum(seconds for _, seconds, _ in whole) <= 540


def test_steps_stop_with_the_time(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    small = steps.Setting("width", ("SpectralKron", "AdamW"), rounds=2, width=8, layers=1, shapes=steps.block(8))
    found = gpu.Findings()
    gpu.optimizer_steps(found, math.inf, [small], "cpu")
    assert [(row.optimizer, row.gate) for row in found.stepped] == [("SpectralKron", "passed"), ("AdamW", "")]
    gpu.optimizer_steps(found, 0.0, [small], "cpu")
    assert len(found.stepped) == 2 and found.notes == ["no time was left for the steps of width, 1 of 8"]


def test_the_summary_fits_and_ends_with_the_verdict(tmp_path):
    found = gpu.Findings(timings=[replace(TIMING, n=n) for n in range(500)], notes=["a note"], stepped=[STEP])
    found.checks = [gpu.Check("float64", "gram", "bf16", n, 1, 1, "w", 1, 0, 0, "error" if n % 2 else "") for n in range(200)]
    text = gpu.summary(found, ["kernels: 3 s"], SOURCE)
    assert len(text) <= gpu.PRINTED
    assert text.splitlines()[-1] == "200 checks, 100 failed, 0 not run"
    assert "a note" in text and "Triton 3" in text and "AdamW" in text


def test_files_carry_their_provenance(tmp_path):
    found = gpu.Findings(timings=[TIMING, replace(TIMING, provider="eager", gate="")], stepped=[STEP])
    found.checks = [gpu.Check("float64", "gram", "bf16", 4, 1, 1, "w", 1e-3, 0, 0, "")]
    found.out = tmp_path
    gpu.save(found, SOURCE)
    for name in ("checks", "kernels-cuda", "steps-cuda"):
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows and all(row["hardware"] == "a GPU" and row["driver"] == "5" and row["date"] for row in rows)
    with (tmp_path / "kernels-cuda.csv").open(newline="") as file:
        assert [(row["provider"], row["gate"], row["command"]) for row in csv.DictReader(file)] == [
            ("ours", "passed", "make gpu"), ("eager", "", "make gpu")
        ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("program", [gpu, tune])
def test_without_a_gpu_there_is_one_sentence(program):
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        program.main([])


# --- Tiles --------------------------------------------------------------------------------------------------------------


def made_up(best: dict[int, Config], plain: float = 9.0) -> tune.Timer:
    """From size to the fastest tiles, which take 1 s in each kernel; others take 2."""

    def seconds(op, operands, n, batch, config):
        config = replace(config)
        kernels_of = {"gram": ["gram"], "cayley_update": ["square", "turn"], "cayley_track_3": ["square", "turn"]}[op]
        return dict.fromkeys(kernels_of, 1.0 if config == best[n] else 2.0)

    return tune.Timer(seconds, lambda op, operands, n, batch: plain)


SMALL, LARGE = Config(32, 32, 4, 2), Config(128, 64, 8, 3)
BEST = {n: SMALL if n <= 256 else LARGE for n in tune.SIZES}


def test_the_fastest_tiles_are_found_and_equal_sizes_joined():
    entries = tune.search(made_up(BEST), tune.jobs(["gram", "turn"], ["bf16"]))
    assert [(e["ops"], e["max_n"], e.get("min_batch"), e["block"]) for e in entries] == [
        (["gram", "turn"], 256, 16, 32), (["gram", "turn"], None, 16, 128),
        (["gram", "turn"], 256, None, 32), (["gram", "turn"], None, None, 128),
    ]  # fmt: skip


def test_where_pytorch_is_faster_the_entry_is_null():
    timer = made_up(BEST, plain=1.5)  # over one kernel, under two
    gram, turn, whole = (tune.search(timer, [(op, "bf16")]) for op in ("gram", "turn", "cayley"))
    assert all(e["block"] for e in [*gram, *turn])
    assert [(e["max_n"], e["block"]) for e in whole] == [(None, None), (None, None)]


def test_tiles_that_do_not_launch_are_left_out():
    timer = made_up(BEST)

    def seconds(op, operands, n, batch, config):
        return None if config.block == 128 else timer.kernels(op, operands, n, batch, config)

    assert all(e["block"] != 128 for e in tune.search(tune.Timer(seconds, timer.plain), [("gram", "bf16")]))
    with pytest.raises(RuntimeError, match="no tiles launch"):
        tune.search(tune.Timer(lambda *_: None, timer.plain), [("gram", "bf16")])


def test_the_search_stops_at_the_deadline_with_whole_jobs():
    calls = len(tune.SIZES) * len(tune.BATCHES)
    entries = tune.search(made_up(BEST), tune.jobs(["gram", "turn"], ["bf16"]), calls + 3, Clock())
    assert {op for e in entries for op in e["ops"]} == {"gram"}


def test_the_table_written_is_one_that_kernels_read(tmp_path, monkeypatch):
    path = tune.write(tmp_path, tune.search(made_up(BEST), [("gram", "bf16")]), SOURCE, "tune", (9, 0))
    table = json.loads(path.read_text())
    assert path.name == "sm_90.json" and table["provenance"]["source"] == "measured" and table["provenance"]["gpu"] == "a GPU"
    monkeypatch.setattr("spectral_ops.kernels.config.load", lambda number: table)
    choose_config.cache_clear()
    assert choose_config("gram", 300, 5, 1, torch.bfloat16, (9, 0)) == LARGE
    assert choose_config("gram", 300, 5, 1, torch.float32, (9, 0)) is not None  # as before
    choose_config.cache_clear()


def test_every_candidate_launches_what_the_search_times():
    """Each source's launches bear the names that tables know."""
    from spectral_ops.kernels.launch import recording

    for op, source in tune.SOURCES.items():
        case = CASES[source]
        with recording(run=False, assume=(9, 0)) as launches:
            case.run(fresh(case.arguments(64, 64, 2, OPERANDS["bf16"], "meta")), SMALL)
        names = {item.name for item in launches}
        assert tune.KERNELS.get(op, op) in names or op in tune.WHOLE, (op, names)
        assert all(item.config == SMALL for item in launches if "PRECISION" in item.arguments)
