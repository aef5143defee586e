"""torch's own inputs for tests of optimizers, those of AdamW and SGD, given to every optimizer of the package.

None is left out: what they ask for is done, or refused in a sentence that names the option.
"""

import copy

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    optim_error_inputs_func_adamw,
    optim_error_inputs_func_sgd,
    optim_inputs_func_adamw,
    optim_inputs_func_sgd,
)

from spectral_ops.bench.optimizers import OPTIMIZERS

# "cuda" gives those with `capturable` too, and makes nothing there.
INPUTS = [*optim_inputs_func_adamw("cuda"), *optim_inputs_func_sgd("cuda")]
ERRORS = [*optim_error_inputs_func_adamw("cpu", torch.float32), *optim_error_inputs_func_sgd("cpu", torch.float32)]
every_optimizer = pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)


def refusal(build, options: dict) -> tuple[type[Exception], str] | None:
    known = build([nn.Parameter(torch.ones(1, 1))]).defaults
    if foreign := [name for name, value in options.items() if name not in known and value]:
        return TypeError, f"has no option `{foreign[0]}`"
    if any(isinstance(beta, torch.Tensor) for beta in options.get("betas", ())):
        return ValueError, "`betas` must be two numbers"  # they are read on the host
    return None


@every_optimizer
@pytest.mark.parametrize("given", INPUTS, ids=lambda given: given.desc)
def test_inputs(build, given):
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    options = dict(given.kwargs) | ({"update_interval": 1} if "capturable" in given.kwargs else {})
    if error := refusal(build, options):
        with pytest.raises(error[0], match=error[1]):
            build(model.parameters(), **options)
        return
    optimizer = build(model.parameters(), **copy.deepcopy(options))
    repr(optimizer)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()  # without gradients
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    x, y = torch.randn(64, 5), torch.randn(64, 1)
    sign, losses = -1 if options.get("maximize") else 1, []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(sign * loss.item())
    assert losses[-1] < losses[0] and calls == ["before", "after"] * 20
    other = copy.deepcopy(model)
    second = build(other.parameters(), **copy.deepcopy(options))
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, second)):
        o.zero_grad()
        (m(x) - y).square().mean().backward()
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@every_optimizer
@pytest.mark.parametrize("wrong", ERRORS, ids=lambda wrong: wrong.optimizer_error_input.desc)
def test_errors(build, wrong):
    assert wrong.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = wrong.optimizer_error_input
    params = given.params if given.params is not None else [nn.Parameter(torch.randn(1, 1))]
    if wrong.error_type is UserWarning:
        with pytest.warns(UserWarning, match=wrong.error_regex):
            build(params, **given.kwargs)
        return
    with pytest.raises((ValueError, TypeError)) as raised:
        build(params, **given.kwargs)
    # torch's own checks speak for themselves; ours name the option and what it got.
    said = str(raised.value)
    assert wrong.error_regex in said or any(f"`{name}`" in said for name in given.kwargs), said
