"""Which implementation an op takes: its kernel, or plain PyTorch."""

import subprocess
import sys

import pytest
import torch

import spectral_ops as ops
from spectral_ops._library import KERNELS, without_kernels
from spectral_ops.kernels import config, launch
from spectral_ops.kernels.launch import recording

X = torch.randn(2, 5, 7)


def kernels_of(call) -> list[str]:
    with recording() as launches:
        call()
    return [item.name for item in launches]


def test_a_cpu_takes_plain_pytorch():
    assert kernels_of(lambda: ops.gram(X)) == []


def test_kernels_are_taken_where_they_are_registered(kernels_on_cpu):
    assert kernels_of(lambda: ops.gram(X)) == ["gram"]
    assert kernels_of(lambda: ops.gram(X.double())) == []
    with without_kernels():
        assert kernels_of(lambda: ops.gram(X)) == []
    assert kernels_of(lambda: ops.gram(X)) == ["gram"]


def test_pytorch_is_taken_where_the_table_says_it_is_faster(kernels_on_cpu, monkeypatch):
    monkeypatch.setattr(launch, "choose_config", lambda *_, **__: None)
    want = ops.gram(X.double()).float()
    assert kernels_of(lambda: torch.testing.assert_close(ops.gram(X), want)) == []


def test_every_op_of_a_step_has_a_kernel():
    assert {"kron_track", "momentum_update", "apply_root", "parameter_update"} <= set(KERNELS)


def test_ops_work_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, spectral_ops as ops\n"
        "from spectral_ops.optim import SpectralKron\n"
        "w = torch.nn.Parameter(torch.randn(6, 4)); w.grad = torch.randn(6, 4)\n"
        "before = w.detach().clone(); SpectralKron([w]).step()\n"
        "assert w.isfinite().all() and not torch.equal(w, before)\n"
        "assert ops.gram(torch.randn(3, 4)).shape == (3, 3)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("setting,want", [("highest", "ieee"), ("high", "bf16x3"), ("medium", "tf32")])
def test_float32_products_follow_pytorchs_setting(setting, want):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert launch.precision(torch.float32) == want
        assert launch.precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_recording_without_running_takes_meta_tensors_and_another_gpus_tiles():
    from spectral_ops.kernels import gram

    x = torch.empty(3, 256, 64, dtype=torch.bfloat16, device="meta")
    with recording(run=False, assume=(9, 0)) as launches:
        tile = launch.pick("gram", 256, 64, 3, x)
        out = gram.gram(x, None, 1.0, 0.0, None, tile)
    assert out.shape == (3, 256, 256) and launches[0].config == tile != config.Config(32, 32, 4, 1)
    size = -(-256 // tile.block)
    assert launches[0].programs == 3 * size * (size + 1) // 2
    assert launch.pick("gram", 256, 64, 3, x) == config.Config(32, 32, 4, 1)


@pytest.mark.parametrize("shape", [(1, 40, 4096), (16, 2048, 512), (2, 33, 33)])
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("basis", [torch.bfloat16, torch.float32])
def test_the_shape_function_knows_how_many_sums_of_squares_there_are(shape, sides, basis):
    from spectral_ops.kernels import rotate

    batch, n, m = shape
    g, d_c, d_k, alpha = (torch.empty(*s, device="meta") for s in (shape, (batch, n), (batch, m), (batch,)))
    b_c, b_k = (
        torch.empty(batch, k, k, dtype=basis, device="meta") if p else None for k, p in zip((n, m), sides, strict=True)
    )
    with recording(run=False, assume=(9, 0)):
        _, squares = rotate.apply_root(g, b_c, d_c, b_k, d_k, alpha, 2.0)
        assert squares.shape == (batch, rotate.root_parts(g, b_c, b_k))
