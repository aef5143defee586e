"""Triton's own way from a call to machine code, with a driver that has no GPU behind it: arguments are bound and specialised,
and kernels compiled, as at their first launch. What ahead-of-time compilation and the interpreter leave out."""

import os
import subprocess
import sys

PROGRAM = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from spectral_ops._library import KERNELS
from spectral_ops.bench.cases import CASES, OPERANDS
from spectral_ops.kernels.launch import Launch, recording
from spectral_ops.optim import SpectralKron


class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)


def warmup(self):
    tile = {"num_warps": self.config.warps, "num_stages": self.config.stages}
    assert self.kernel.warmup(grid=(self.programs,), **self.arguments, **tile).asm["cubin"]


driver.set_active(Driver())
Launch.run = warmup
library = torch.library.Library("spectral_ops", "IMPL")
for name, kernel in KERNELS.items():
    library.impl(name, kernel, "CPU")
with recording(assume=(9, 0)) as launches:
    for operands in ("bf16", "fp32"):
        for case in CASES.values():
            if operands in case.operands:
                with OPERANDS[operands].setting():
                    case.run(case.arguments(128, 48, 2, OPERANDS[operands], "cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        parameters = [torch.nn.Parameter(torch.randn(64, 32, dtype=dtype)) for _ in range(3)]
        optimizer = SpectralKron(parameters, weight_decay=0.1)
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
print(*sorted({item.name for item in launches}))
"""
KERNELS = (
    "average conjugate diagonal diagonal_squares even factor factor_squares finish_map gram gram_skew map momentum "
    "parameter_update rotate skew_generator spectrum square stochastic_round track turn"
)


def test_every_kernel_binds_its_arguments_and_compiles():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == KERNELS.split()
