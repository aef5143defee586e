"""What ranks share may grow, and travel in several dtypes at once."""

import gc
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from spectral_ops.optim import SpectralKron
from spectral_ops.optim._exchange import Message
from tests.ranks import LAYOUTS, ONE, Layout, assert_close, spawn, whole

SHAPES = ((6, 4), (4, 6), (3, 5, 5), (7,))


def grown(layout: Layout, more: dict[str, object]) -> dict[str, Tensor]:
    """Parameters and momenta after steps with some parameters, and with more that come in a group of their own."""
    place = layout.placer()
    params = [
        nn.Parameter(place(torch.randn(shape, generator=torch.Generator().manual_seed(i)))) for i, shape in enumerate(SHAPES)
    ]
    optimizer = SpectralKron([{"params": params[:1]}], lr=0.02, **layout.options)

    def train(mine: list[nn.Parameter], steps: range) -> None:
        for t in steps:
            for i, p in enumerate(mine):
                p.grad = place(torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i)))
            optimizer.step()

    train(params[:1], range(4))
    optimizer.add_param_group({"params": params[1:]} | more)
    train(params, range(4, 8))
    state = optimizer.state_dict()["state"]
    return {f"p{i}": whole(p.detach()) for i, p in enumerate(params)} | {
        f"m{i}": whole(s["momentum_buffer"]) for i, s in state.items() if "momentum_buffer" in s
    }


def compares(layout: Layout, more: dict[str, object], tolerance: float) -> Callable[[], None]:
    expected = grown(ONE, {})
    return lambda: assert_close(grown(layout, more), expected, tolerance)


def test_a_group_that_comes_later_moves_no_owner() -> None:
    """It would find the state of its matrices with another rank."""
    for name in ("FSDP over 2", "HSDP 2 x 2", "plain over 4"):
        spawn(LAYOUTS[name].world, compares(LAYOUTS[name], {}, 1e-6))


def test_groups_travel_in_dtypes_of_their_own() -> None:
    """float32 for the first, as its parameters are; the second is rounded on its way."""
    expected = grown(ONE, {})
    layout = LAYOUTS["FSDP over 2"]

    def check() -> None:
        got = grown(layout, {"transport_dtype": torch.bfloat16})
        first = {name: got.pop(name) for name in ("p0", "m0")}
        assert_close(first, {name: expected[name] for name in first})
        rest = {name: expected[name] for name in got}
        assert_close(got, rest, 2e-2)
        assert not torch.equal(got["m1"], rest["m1"])

    spawn(layout.world, check)


def test_skipped_steps_are_remembered() -> None:
    layout = LAYOUTS["FSDP over 2"]

    def check() -> None:
        place = layout.placer()
        params = [nn.Parameter(place(torch.ones(shape))) for shape in SHAPES]
        optimizer = SpectralKron(params)
        for size in (1.0, torch.inf, 1.0, torch.nan):
            for i, p in enumerate(params):
                p.grad = place(torch.full(p.shape, size if i != 1 else 1.0))
            optimizer.step()
        assert optimizer.skipped_steps() == 2 * (len(params) - 1)
        other = SpectralKron(params)
        other.load_state_dict(optimizer.state_dict())
        assert other.skipped_steps() == 2 * (len(params) - 1)

    spawn(layout.world, check)


def test_nothing_of_a_step_lives_on_but_state() -> None:
    """Gradients go with `zero_grad`, and so does what was sent and came."""
    layout = LAYOUTS["plain over 4"]

    def check() -> None:
        p = nn.Parameter(torch.ones(6, 4))
        optimizer = SpectralKron([p], weight_decay=0.1, **layout.options)
        p.grad = torch.ones(6, 4)
        gradient = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        assert gradient() is None
        assert not any(isinstance(x, Message) for x in gc.get_objects())

    spawn(layout.world, check)
