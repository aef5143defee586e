"""The ahead-of-time gate: what it objects to, and that the shipped tiles pass it, compiled without a GPU."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from spectral_ops.bench import aot
from spectral_ops.kernels.launch import Launch

GOOD = aot.Row("gram", "bf16", "sm_90", 1024, "16", 64, 64, 4, 3, 100, 0, 41_472, "wgmma", 4, 8, 0, 0)
# All operands on one target, and on the others those whose code differs most; at sizes that the larger tiles serve too.
COMPILED = """
from spectral_ops.bench import aot

if __name__ == "__main__":
    rows = aot.table(["bf16", "split", "fp32", "fp32 high", "fp32 medium"], ["sm_90"], [1024])
    rows += aot.table(["bf16", "fp32 high"], ["sm_80", "sm_100"], [1024])
    rows += aot.table(["bf16"], ["sm_90"], [4096, aot.ODD])
    classes = [{aot.key(item, "sm_90") for item in aot.launches("bf16", "sm_90", n)} for n in (1024, 528)]
    assert classes[0] == classes[1], "a shape of the same class is compiled again"
    print(len(rows), *aot.gate(rows), sep="\\n")
"""


def launch(op: str, operands: str, target: str = "sm_90", n: int = 1024) -> Launch:
    return next(item for item in aot.launches(operands, target, n) if item.name == op)


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"spills": 8}, "spills 8 bytes."),
        ({"n": 1001, "spills": 17}, "spills 17 bytes."),
        ({"shared": 232_449}, "shares 232449 bytes, over the 232448 of sm_90."),
        ({"target": "sm_80", "tensor_core": "mma", "shared": 101_377}, "shares 101377 bytes, over the 101376 of sm_80."),
        ({"tensor_core": "-", "tensor_core_count": 0}, "has no tensor-core instruction."),
        ({"product": "bf16x3", "tensor_core": "-"}, "has no tensor-core instruction."),
        ({"product": "tf32", "tensor_core": "-"}, "has no tensor-core instruction."),
        ({"tensor_core": "mma"}, "has mma where wgmma would do."),
        ({"product": "split", "tensor_core": "mma"}, "has mma where wgmma would do."),
        ({"target": "sm_100"}, "has wgmma where tcgen05 would do."),
        ({"vector_stores": 0, "scalar_stores": 32}, "has no vector store."),
        ({"fp64": 3}, "has 3 fp64 instructions."),
    ],
)
def test_each_violation_is_named(change, fault):
    row = replace(GOOD, **change)
    assert aot.gate([GOOD, row]) == [f"{row.label} {fault}"]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"target": "sm_80", "tensor_core": "mma"},
        {"target": "sm_120", "tensor_core": "mma"},
        {"block": 32, "tensor_core": "mma"},  # too small for wgmma
        {"product": "tf32", "tensor_core": "mma"},
        {"product": "ieee", "tensor_core": "-"},
        {"product": "-", "tensor_core": "-", "vector_stores": 0, "scalar_stores": 1},  # it writes no matrix
        {"n": 1001, "vector_stores": 0, "scalar_stores": 64, "spills": 16},  # slow in any case
    ],
)
def test_what_is_right_passes(change):
    assert aot.gate([replace(GOOD, **change)]) == []


def test_several_violations_are_several_sentences():
    assert len(aot.gate([replace(GOOD, spills=8, fp64=1)])) == 2


@pytest.mark.parametrize(
    "op, operands, kind",
    [("gram", "bf16", "16"), ("gram", "fp16", "16"), ("turn", "fp32", "ieee"), ("map", "fp32 high", "bf16x3"),
     ("track", "fp32 medium", "tf32"), ("rotate", "split", "split"), ("average", "fp32", "-"), ("momentum", "split", "-")],
)  # fmt: skip
def test_operand_kinds(op, operands, kind):
    assert aot.operand_kind(launch(op, operands)) == kind


def test_launches_take_the_settings_and_leave_them():
    before = torch.get_float32_matmul_precision()
    assert launch("gram", "fp32 medium").arguments["PRECISION"] == "tf32"
    assert torch.get_float32_matmul_precision() == before
    assert launch("gram", "fp32 high").arguments["PRECISION"] == "bf16x3"
    assert launch("gram", "bf16", n=16).config != launch("gram", "bf16", n=1024).config


def test_the_worst_variant_is_shown():
    rows = [GOOD, replace(GOOD, registers=200), replace(GOOD, spills=8), replace(GOOD, kernel="turn")]
    assert [(row.kernel, row.spills) for row in aot.worst(rows)] == [("gram", 8), ("turn", 0)]


def test_the_interpreter_is_refused(capsys):
    with pytest.raises(SystemExit):
        aot.main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        aot.main(["--targets", "sm_90,sm_7"])
    assert "sm_7: not among sm_80" in capsys.readouterr().err


def test_shipped_tiles_pass_the_gate(tmp_path):
    """In a process of its own, since kernels that were defined for the interpreter cannot be compiled."""
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    count, *violations = done.stdout.splitlines()
    assert int(count) > 100 and not violations, violations
