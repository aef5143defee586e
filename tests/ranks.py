"""What the tests of many ranks share: processes with an end in sight, a model of odd shapes, and the ways to lay it out."""

import datetime
import gc
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from spectral_ops.optim._engine import MatrixOptimizer

SECONDS = 60.0  # of a spawn; a collective waits for half of that


def spawn(world: int, check: Callable[..., None], *args: Any) -> None:
    """Call `check(*args)` on so many ranks. The first failure is the test's, with that rank's traceback; a hang is one too.

    Processes are forked: arguments, closures among them, are what they are here.
    """
    with tempfile.TemporaryDirectory() as folder:
        store, end = f"file://{folder}/store", time.monotonic() + SECONDS
        ranks = mp.start_processes(_rank, (world, store, check, args), nprocs=world, join=False, start_method="fork")
        try:
            while not ranks.join(timeout=max(end - time.monotonic(), 0)):
                if time.monotonic() > end:
                    pytest.fail(f"a rank hangs: {world} ranks did not end in {SECONDS:g} seconds")
        finally:
            for process in ranks.processes:
                process.kill()


def _rank(number: int, world: int, store: str, check: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what is inherited would be copied where it is looked at
    timeout = datetime.timedelta(seconds=SECONDS / 2)
    dist.init_process_group("gloo", init_method=store, rank=number, world_size=world, timeout=timeout)
    check(*args)
    gc.collect()  # a module in DistributedDataParallel must not outlive its group
    dist.destroy_process_group()


# --- Layouts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """A mesh, and how tensors lie on it: as DTensors of these placements, or, without any, as plain tensors on every rank."""

    shape: tuple[int, ...]
    placements: tuple[Placement, ...] = ()

    @property
    def world(self) -> int:
        return math.prod(self.shape)

    @property
    def options(self) -> dict[str, Any]:
        """Of an optimizer: where parameters are DTensors it needs none."""
        return {"mesh": self.mesh} if self.shape and not self.placements else {}

    @property
    def mesh(self) -> DeviceMesh:
        return init_device_mesh("cpu", self.shape)

    def placer(self) -> "Place":
        """What lays a tensor out, of which every rank has the whole. A dimension that it lacks is not sharded."""
        if not self.placements:
            return torch.clone
        mesh = self.mesh

        def place(x: Tensor) -> Tensor:
            fits = [p if not isinstance(p, Shard) or p.dim < x.ndim else Replicate() for p in self.placements]
            return distribute_tensor(x, mesh, fits, src_data_rank=None)

        return place


Place = Callable[[Tensor], Tensor]

ONE = Layout(())  # process, without a group
LAYOUTS = {
    "FSDP over 2": Layout((2,), (Shard(0),)),
    "FSDP over 4": Layout((4,), (Shard(0),)),
    "HSDP 2 x 2": Layout((2, 2), (Replicate(), Shard(0))),
    "replicated 2 x 2": Layout((2, 2), (Replicate(), Replicate())),
    "columns over 2": Layout((2,), (Shard(1),)),
    "FSDP x TP 2 x 2": Layout((2, 2), (Shard(0), Shard(1))),
    "plain over 4": Layout((4,)),
    "plain over 2 x 2": Layout((2, 2)),
}


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


# --- A model of odd shapes --------------------------------------------------------------------------------------------

GROUPS: tuple[tuple[dict[str, Any], dict[str, tuple[int, ...]]], ...] = (
    (
        {},
        {
            "few": (3, 6),  # rows, so that of four ranks one has none
            "row": (1, 7),
            "column": (7, 1),
            "odd": (13, 5),
            "vector": (5,),
            "scalar": (),
            "experts": (3, 4, 5),
            "conv": (4, 3, 3, 3),
            "alike_0": (2, 9),
            "alike_1": (2, 9),
            "alike_2": (2, 9),
        },
    ),
    ({"split_sizes": (6, 2, 2), "num_heads": (2, 1, 1)}, {"fused": (10, 4)}),
    ({"algorithm": "adamw"}, {"table": (10, 3)}),
)
EVERY = tuple(name for _, shapes in GROUPS for name in shapes)
SOME = "few", "odd", "vector", "experts", "fused", "table"  # of each kind, where the shape is not what matters


class Model(nn.Module):
    """Parameters of `GROUPS`, the same in every process."""

    def __init__(
        self, place: Place = torch.clone, names: Sequence[str] = SOME, dtype: torch.dtype = torch.float32, seed: int = 0
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for _, shapes in GROUPS:
            for name, shape in shapes.items():
                if name in names:
                    x = torch.randn(shape, generator=generator).to(dtype)
                    self.register_parameter(name, nn.Parameter(place(x)))


@dataclass(frozen=True)
class Case:
    """An optimizer with its options, and for how many steps."""

    kind: Callable[..., MatrixOptimizer]
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 20

    def build(self, model: nn.Module, **more: Any) -> MatrixOptimizer:
        """For a `Model`, in the groups above."""
        named = dict(model.named_parameters())
        uncut = {"split_sizes": None, "num_heads": None} if self.options.get("per_axis") else {}
        groups = [{"params": [named[name] for name in shapes if name in named]} | own | uncut for own, shapes in GROUPS]
        return self.kind(groups, **({"lr": 0.02} | self.options | more))


Change = Callable[[int, str, Tensor], Tensor | None]  # of a step and a name: what becomes of the gradient


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    place: Place = torch.clone,
    change: Change = lambda t, name, g: g,
) -> None:
    """Steps with gradients that depend on the step and the parameter, the same in every process."""
    for t in steps:
        for i, (name, p) in enumerate(model.named_parameters()):
            generator = torch.Generator().manual_seed(1000 * t + i)
            g = change(t, name, torch.randn(p.shape, generator=generator).to(p.dtype))
            p.grad = None if g is None or not p.requires_grad else place(g)
        optimizer.step()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Whole, by name: a collective where they are sharded."""
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def states(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Of a state dict: each tensor whole, by the number of the parameter and its name."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": whole(x).clone() for i in sorted(state) for name, x in state[i].items()}


# --- Comparisons ------------------------------------------------------------------------------------------------------


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """To a tolerance relative to the norm of each tensor; what is no real number, to the bit."""
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].shape == x.shape and got[name].dtype == x.dtype, name
        if x.is_floating_point():
            difference, norm = float((got[name].double() - x.double()).norm()), float(x.double().norm())
            assert difference <= tolerance * norm, f"{name}: {difference:.3e} of {norm:.3e}"
        else:
            assert torch.equal(got[name], x), name


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype and torch.equal(got[name], x), name


def assert_same_on_every_rank(tensors: dict[str, Tensor]) -> None:
    """Bit for bit, of plain tensors."""
    for name, x in tensors.items():
        others = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(others, x.contiguous())
        assert all(torch.equal(x, other) for other in others), name
