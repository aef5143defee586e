"""The choice of tiles: a pure function of the shape, the dtype and the GPU."""

import itertools
import tomllib
from pathlib import Path

import pytest
import torch

from spectral_ops.bench.tune import SOURCES, WHOLE
from spectral_ops.kernels import config
from spectral_ops.kernels.config import INTERPRETER, TABLES, Config, choose_config, load, table

DTYPES = [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "split")]
DTYPES += [(torch.float32, precision) for precision in ("ieee", "bf16x3", "tf32")]
GPUS = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]


@pytest.fixture
def entries(monkeypatch):
    """Replace the tables by one with these entries."""

    def put(*rows: dict) -> None:
        full = [{"operands": ["16"], "max_n": None, "block": 64, "k": 64, "warps": 4, "stages": 3} | row for row in rows]
        monkeypatch.setattr(config, "load", lambda number: {"entries": full})
        choose_config.cache_clear()

    yield put
    choose_config.cache_clear()


def choose(op: str, n: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16, **options) -> Config | None:
    return choose_config(op, n, n, batch, dtype, (9, 0), **options)


@pytest.mark.parametrize("gpu", GPUS)
def test_every_kernel_has_a_tile(gpu):
    for op, (dtype, precision), n, batch in itertools.product(SOURCES, DTYPES, (1, 32, 33, 250, 1024, 4096, 50_000), (1, 500)):
        tile = choose_config(op, n, n, batch, dtype, gpu, precision=precision)
        if tile is None:  # measured: PyTorch is faster
            assert op in WHOLE and any(op in entry["ops"] and entry["block"] is None for entry in table(gpu)["entries"])
            continue
        assert tile.block >= 16 and tile.k >= 16 and tile.warps in (1, 2, 4, 8) and tile.stages >= 1


@pytest.mark.parametrize("number", TABLES)
def test_tables_say_where_they_come_from(number):
    provenance = load(number)["provenance"]
    assert provenance["gpu"] if provenance["source"] == "measured" else "not measured" in provenance["source"]
    assert provenance["date"]


@pytest.mark.parametrize("number", TABLES)
def test_every_entry_can_be_reached(number):
    """None stands behind one that takes all it would."""
    rows = load(number)["entries"]
    for i, row in enumerate(rows):
        for op, operand in itertools.product(row["ops"], row["operands"]):
            before = [r for r in rows[:i] if op in r["ops"] and operand in r["operands"]]
            n, batch = row["max_n"] or 10**9, row.get("min_batch", 1)
            assert not any((r["max_n"] or 10**9) >= n and r.get("min_batch", 1) <= batch for r in before), (op, operand, i)


@pytest.mark.parametrize(
    "gpu, number",
    [((8, 0), 80), ((8, 6), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((11, 0), 100), ((12, 0), 80)],
)
def test_a_gpu_takes_the_table_of_its_kind(gpu, number):
    assert table(gpu) is load(number)


def test_a_gpu_takes_its_own_table_if_there_is_one(monkeypatch, tmp_path):
    (tmp_path / "sm_86.json").write_text('{"entries": ["its own"]}')
    monkeypatch.setattr(config, "FOLDER", tmp_path)
    load.cache_clear()
    assert table((8, 6))["entries"] == ["its own"]
    load.cache_clear()


def test_the_interpreter_has_one_tile():
    tiles = {choose_config("gram", n, 5, 2, dtype, INTERPRETER) for n in (1, 100) for dtype in (torch.float32, torch.bfloat16)}
    assert tiles == {Config(32, 32, 4, 1)}


def test_the_first_entry_that_fits_is_taken(entries):
    entries(
        {"ops": ["gram"], "max_n": 64, "block": 32},
        {"ops": ["gram", "turn"], "max_n": 256, "block": 16, "min_batch": 8},
        {"ops": ["gram"], "block": 128},
    )
    assert choose("gram", 64).block == 32
    assert choose("gram", 65).block == 128
    assert choose("gram", 65, batch=8).block == 16
    assert choose("gram", 257, batch=8).block == 128
    assert choose("turn", 65) is None


def test_sizes_that_no_vector_load_fits_take_a_tile_of_their_own(entries):
    entries({"ops": ["gram"], "max_n": 64, "block": 32}, {"ops": ["gram"], "max_n": 128}, {"ops": ["gram"], "block": None})
    assert choose("gram", 50, aligned=False).block == 32
    assert choose("gram", 100, aligned=False) == config.UNALIGNED != choose("gram", 100)
    assert choose("gram", 200, aligned=False) is None


def test_null_leaves_it_to_pytorch(entries):
    entries({"ops": ["gram"], "max_n": 128, "block": None}, {"ops": ["gram"], "block": 64})
    assert choose("gram", 128) is None
    assert choose("gram", 129) == Config(64, 64, 4, 3)


def test_operands(entries):
    entries(*({"ops": ["gram"], "operands": [name], "stages": i} for i, name in enumerate(("16", "split", "ieee", "tf32"))))
    assert choose("gram", 9).stages == choose("gram", 9, dtype=torch.float16, precision="tf32").stages == 0
    stages = [choose("gram", 9, dtype=torch.float32, precision=p).stages for p in ("split", "ieee", "tf32")]
    assert stages == [1, 2, 3]
    assert choose("gram", 9, dtype=torch.float32, precision="bf16x3") is None


def test_the_tables_are_packaged():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    (pattern,) = project["tool"]["setuptools"]["package-data"]["spectral_ops.kernels"]
    assert {path.name for path in config.FOLDER.parent.glob(pattern)} == {f"sm_{number}.json" for number in TABLES}
