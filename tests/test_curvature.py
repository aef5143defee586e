"""What the hooks of SINGD see: patches of convolutions, and the same curvature however a backward pass comes about."""

import copy
import gc
import io
import pickle
import socket
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from spectral_ops.optim import IKFAC, SINGD
from spectral_ops.optim._curvature import grad_outputs_of, inputs_of

APPROXIMATIONS = ("expand", "reduce")
BETA = 1e-3


def randn(*shape: int, seed: int | None = None) -> Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def moments(optimizer: IKFAC, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """`U` and `G`, of one update from the identity without damping: `K = I − β₁ / 2 · (U − I)`."""
    flat = (optimizer.state[layer.weight][f"factor_{side}"] for side in "kc")
    factors = (x.unflatten(0, (round(len(x) ** 0.5), -1)) for x in flat)
    u, g = (one + 2 / BETA * (one - x) for x in factors for one in [torch.eye(len(x), dtype=torch.float64)])
    return u, g


def watching(model: nn.Module, **options) -> IKFAC:
    return IKFAC(model, lr=0.0, preconditioner_lr=BETA, damping=0.0, update_interval=1, **options)


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], bound: float = 1e-10) -> None:
    for x, y in zip(got, want, strict=True):
        assert y.norm() > 1e-6 and error(x, y) < bound


def gram(x: Tensor) -> Tensor:
    return x.T @ x


# --- Layers -----------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vector": (lambda: nn.Linear(5, 3), (5,)),
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "sequence": (lambda: nn.Linear(5, 3), (4, 6, 5)),
    "images": (lambda: nn.Linear(5, 3, bias=False), (4, 2, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 3, 3, stride=2, padding=1), (5, 4, 9)),
    "conv1d same": (lambda: nn.Conv1d(4, 3, 4, padding="same", dilation=2), (5, 4, 9)),
    "conv1d circular": (lambda: nn.Conv1d(4, 3, 3, padding=2, padding_mode="circular"), (5, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (5, 4, 7, 6)),
    "conv2d no bias": (lambda: nn.Conv2d(4, 3, 1, bias=False), (5, 4, 3, 2)),
    "conv2d same": (lambda: nn.Conv2d(4, 3, (2, 3), padding="same"), (5, 4, 6, 5)),
    "conv2d valid": (lambda: nn.Conv2d(4, 3, 3, padding="valid", stride=2), (5, 4, 6, 5)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 3, 3, padding=(2, 1), padding_mode="reflect"), (5, 4, 6, 5)),
    "conv2d same circular": (lambda: nn.Conv2d(4, 3, (4, 3), padding="same", padding_mode="circular"), (5, 4, 6, 5)),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 3, 3, padding=1), (4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 3, 1), stride=(2, 1, 1), padding=(1, 0, 1), dilation=(1, 2, 1)), (3, 2, 4, 6, 2)),
    "conv3d replicate": (lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"), (3, 2, 3, 4, 2)),
}
GROUPED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, groups=2, stride=2), (5, 6, 8)),
    "conv2d": (lambda: nn.Conv2d(6, 9, (2, 3), groups=3, padding=(1, 2), dilation=(1, 2)), (5, 6, 4, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding="same", bias=False), (5, 4, 4, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 2, 2, groups=2), (3, 4, 3, 2, 4)),
}


def gradient(layer: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """Of a layer's weight, and of its bias in the last column."""
    parameters = [p for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]
    grads = torch.autograd.grad(layer(x), parameters, g)
    return torch.cat([grads[0].flatten(1), *(b[:, None] for b in grads[1:])], 1)


def samples_of(layer: nn.Module, x: Tensor) -> int:
    axes = 1 if isinstance(layer, nn.Linear) else len(layer.kernel_size) + 1
    return len(x) if x.ndim > axes else 1


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_rows_give_the_gradient(name, approximation):
    """`∇W = gᵀ a` holds for patches and nothing else; in KFAC-reduce where all positions have one gradient, as under a mean."""
    make, shape = LAYERS[name]
    layer, x = make().double(), randn(*shape)
    y = layer(x)
    g = torch.randn_like(y)
    if approximation == "reduce":
        features = -1 if isinstance(layer, nn.Linear) else y.ndim - len(layer.kernel_size) - 1
        axes = [i for i in range(samples_of(layer, x) > 1, y.ndim) if i != features % y.ndim]
        g = g.mean(axes, keepdim=True).expand_as(g) if axes else g
    a, b = inputs_of(layer, x, approximation), grad_outputs_of(layer, g, approximation)
    assert len(a) == len(b) == (samples_of(layer, x) if approximation == "reduce" else y.numel() // 3)
    torch.testing.assert_close(b.T @ a, gradient(layer, x, g), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", GROUPED)
def test_each_group_has_rows_of_its_own(name):
    make, shape = GROUPED[name]
    layer, x = make().double(), randn(*shape)
    y = layer(x)
    g = torch.randn_like(y)
    a, b = inputs_of(layer, x, "expand"), grad_outputs_of(layer, g, "expand")
    a, b = a.unflatten(0, (len(b), layer.groups)), b.unflatten(1, (layer.groups, -1))
    torch.testing.assert_close(torch.einsum("rgo,rgi->goi", b, a).flatten(0, 1), gradient(layer, x, g), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [*LAYERS, *(f"{name} grouped" for name in GROUPED)])
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("average", ["batch", "batch+sequence", None])
def test_moments_are_those_of_the_rows(name, approximation, average):
    """`U = mean a aᵀ`, of a grouped convolution averaged over groups too, and `G = N · sum g gᵀ` with `N` terms of the loss."""
    make, shape = GROUPED[name.removesuffix(" grouped")] if name.endswith("grouped") else LAYERS[name]
    layer, x = make().double(), randn(*shape)
    optimizer = watching(layer, kfac_approx=approximation, loss_average=average)
    y = layer(x)
    g = 0.02 * torch.randn_like(y)  # larger steps are shortened
    y.backward(g)
    optimizer.step()
    samples = samples_of(layer, x)
    positions = y.numel() // (len(layer.weight) * samples)
    u, v = gram(inputs_of(layer, x, "expand")), gram(grad_outputs_of(layer, g, "expand"))
    groups = getattr(layer, "groups", 1)
    if approximation == "reduce":
        a = inputs_of(layer, x, "expand").unflatten(0, (samples, positions, groups)).mean(1).flatten(0, 1)
        u, v = gram(a) * positions, gram(grad_outputs_of(layer, g, "expand").unflatten(0, (samples, positions)).sum(1))
    terms = {"batch": samples, "batch+sequence": samples * positions, None: 1}[average]
    assert_close(moments(optimizer, layer), (u / (samples * positions * groups), terms * v), 1e-9)


def test_the_input_may_have_a_name():
    layer, x = nn.Linear(5, 3).double(), randn(4, 5)
    optimizer = watching(layer)
    layer(input=x).square().sum().backward()
    optimizer.step()
    assert error(moments(optimizer, layer)[0], gram(inputs_of(layer, x, "expand")) / 4) < 1e-10


# --- However a backward pass comes about -------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers of unlike shapes and of like, a norm that takes AdamW, and weights that a sequence shares."""

    def __init__(self, inplace: bool = False):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.norm, self.last, self.activation = nn.LayerNorm(6), nn.Linear(6, 3), nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.first(x))
        return self.last(self.norm(self.body(x)))

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.third(torch.tanh(self.second(x))))


def sgd_like(model: nn.Module, **options) -> SINGD:
    given = {"lr": 0.05, "preconditioner_lr": 0.05, "damping": 0.01, "update_interval": 1, "adamw_lr": 1e-2}
    return SINGD(model, **given | options)


def start(inplace: bool = False, **options) -> tuple[nn.Module, SINGD]:
    torch.manual_seed(0)
    model = Net(inplace).double()
    return model, sgd_like(model, **options)


def data(t: int, samples: int = 12) -> tuple[Tensor, Tensor]:
    x = 1 + randn(samples, 4, 5, seed=t)
    return x, torch.sin(2 * x[..., :3])


def loss_of(y: Tensor, target: Tensor, average: str | None = "batch", samples: int | None = None) -> Tensor:
    """The sum over the batch, divided by its terms: a mini-batch's by those of the whole."""
    samples = samples or len(y)
    terms = {"batch": samples, "batch+sequence": samples * y.shape[1], None: 1}[average]
    return (y - target).square().sum() / terms


def train(model: nn.Module, optimizer: SINGD, steps: Iterator[int] | range = range(5), average: str | None = "batch") -> None:
    for t in steps:
        optimizer.zero_grad()
        x, target = data(t)
        loss_of(model(x), target, average).backward()
        optimizer.step()


def factors(optimizer: SINGD) -> list[Tensor]:
    return [x for held in optimizer.state.values() for key, x in held.items() if key.startswith(("factor_", "momentum_"))]


def assert_same(first: tuple[nn.Module, SINGD], second: tuple[nn.Module, SINGD], bound: float = 1e-11) -> None:
    """All parameters and factors agree, and moved. With `bound=0`, bit for bit."""
    for p, q in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert error(q, p) <= bound
    want, got = factors(first[1]), factors(second[1])
    assert len(want) >= 20 and all(x.norm() > 1e-3 and error(y, x) <= bound for x, y in zip(want, got, strict=True))
    initial = start()[0]
    assert all(error(p, q) > 1e-3 for p, q in zip(first[0].parameters(), initial.parameters(), strict=True) if q.norm() > 0)


def reference(average: str | None = "batch", **options) -> tuple[nn.Module, SINGD]:
    pair = start(loss_average=average, **options)
    train(*pair, average=average)
    return pair


SCALED = {"batch": {}, "batch+sequence": {}, None: {"lr": 0.01, "preconditioner_lr": 0.002}}


@pytest.mark.parametrize("parts", [[6, 6], [4, 4, 4], [1] * 12, [7, 2, 3]], ids=str)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("average", SCALED)
def test_accumulated_mini_batches_are_one_batch(parts, approximation, average):
    """Each with its share of the loss: `loss / A` for `A` equal ones. For sums as they are."""
    options = SCALED[average] | {"kfac_approx": approximation}
    model, optimizer = start(loss_average=average, **options)
    for t in range(5):
        optimizer.zero_grad()
        for x, target in zip(*(z.split(parts) for z in data(t)), strict=True):
            loss_of(model(x), target, average, samples=12).backward()
        optimizer.step()
    assert_same(reference(average, **options), (model, optimizer))


@pytest.mark.parametrize(
    "structures", [("tril", "triu"), ("diagonal", "hierarchical1_2"), ("triltoeplitz", "blockdiagonal2")], ids=str
)
def test_accumulated_mini_batches_are_one_batch_in_structures(structures):
    """Also of few rows, whose products with a factor come before the sum."""
    model, optimizer = start(structures=structures)
    for t in range(5):
        optimizer.zero_grad()
        for x, target in zip(*(z.split([1, 9, 2]) for z in data(t)), strict=True):
            loss_of(model(x), target, samples=12).backward()
        optimizer.step()
    assert_same(reference(structures=structures), (model, optimizer))


def test_several_backward_passes_add_up():
    """Of two losses of two forward passes, and twice through one graph: `U` is the mean, `G` counts the terms of both."""
    layer = nn.Linear(5, 3).double()
    x, y = randn(4, 5), randn(6, 5)
    rows = [inputs_of(layer, z, "expand") for z in (x, y)]
    optimizer = watching(layer)
    outputs = [layer(x), layer(y)]
    outputs[0].square().sum().backward()
    outputs[1].pow(3).sum().backward()
    optimizer.step()
    g = [2 * outputs[0], 3 * outputs[1].square()]
    assert_close(moments(optimizer, layer), (sum(map(gram, rows)) / 10, 10 * sum(map(gram, g))))

    optimizer = watching(layer)
    output = layer(x)
    output.square().sum().backward(retain_graph=True)
    output.pow(3).sum().backward()
    optimizer.step()
    g = [2 * output, 3 * output.square()]
    assert_close(moments(optimizer, layer), (gram(rows[0]) / 4, 8 * sum(map(gram, g))))


def test_a_module_called_twice_has_the_rows_of_both_calls():
    """As if it were called once, on a sequence of the two."""
    layer = nn.Linear(5, 3).double()
    x, y, weight = randn(4, 5), randn(4, 5), randn(4, 2, 3)
    results = []
    for call in (lambda: torch.stack([layer(x), layer(y)], 1), lambda: layer(torch.stack([x, y], 1))):
        optimizer = watching(layer)
        layer.zero_grad()
        (weight * call().square()).sum().backward()
        optimizer.step()
        results.append(moments(optimizer, layer))
    assert_close(*results)


def test_activations_may_work_in_place():
    """Also on an output that is a view, as that of a layer with a bias on a sequence is."""
    pair = start(inplace=True)
    train(*pair)
    assert_same(reference(), pair, 0.0)


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_may_be_changed_in_place(name):
    make, shape = LAYERS[name]
    layer, x = make().double(), 0.1 * randn(*shape)
    results = []
    for activation in (torch.relu, torch.relu_):
        optimizer = watching(layer)
        layer.zero_grad()
        (0.02 * activation(layer(x))).sum().backward()
        optimizer.step()
        results.append(moments(optimizer, layer))
    assert_close(*results, 1e-12)


def test_zero_grad_drops_what_was_seen():
    for set_to_none in (True, False):
        model, optimizer = start()
        for t in range(5):
            x, target = data(t + 100, 3)
            loss_of(model(x), target).backward()
            optimizer.zero_grad(set_to_none=set_to_none)
            x, target = data(t)
            loss_of(model(x), target).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        assert_same(reference(), (model, optimizer), 0.0)


EVALUATIONS: dict[str, Callable[[nn.Module], object]] = {
    "no_grad": lambda model: torch.no_grad()(model)(data(50, 3)[0]),
    "inference_mode": lambda model: torch.inference_mode()(model)(data(50, 3)[0]),
    "no backward": lambda model: model(data(50, 3)[0]),
    "eval": lambda model: (model.eval(), model(data(50, 3)[0]), model.train()),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation_is_not_seen(name):
    """Before, between and after the passes of a step."""
    model, optimizer = start()
    evaluate = EVALUATIONS[name]
    for t in range(5):
        evaluate(model)
        x, target = data(t)
        loss = loss_of(model(x), target)
        evaluate(model)
        optimizer.zero_grad()
        loss.backward()
        evaluate(model)
        optimizer.step()
    assert_same(reference(), (model, optimizer), 0.0)


# --- Mixed precision --------------------------------------------------------------------------------------------------


def scaled_step(pair: tuple[nn.Module, SINGD], scaler: torch.amp.GradScaler, t: int, clip: bool, factor: float = 1.0) -> None:
    (model, optimizer), (x, target) = pair, data(t)
    model.zero_grad()  # not the optimizer's: what it saw is dropped by its step
    scaler.scale(factor * loss_of(model(x), target)).backward()
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    scaler.step(optimizer)
    scaler.update()


def clipped() -> tuple[nn.Module, SINGD]:
    model, optimizer = start()
    for t in range(5):
        optimizer.zero_grad()
        x, target = data(t)
        loss_of(model(x), target).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 0.5
        optimizer.step()
    return model, optimizer


def grad_scaler() -> torch.amp.GradScaler:
    """Its scale doubles every other step."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)


@pytest.mark.parametrize("known,clip", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("bad", [False, True])
def test_a_scaled_loss_is_the_loss(known, clip, bad):
    """With `scaler.step` alone, and with `scaler.unscale_` where the optimizer knows the scaler. A step of infinite gradients
    leaves no trace, nor does it in the next."""
    scaler = grad_scaler()
    model, optimizer = start(grad_scaler=scaler if known else None)
    for t in range(5):
        if bad and t % 2:
            before = [x.clone() for x in (*model.parameters(), *factors(optimizer))]
            scale = scaler.get_scale()
            scaled_step((model, optimizer), scaler, t + 100, clip, factor=float("inf"))
            assert scaler.get_scale() == scale / 2
            assert all(torch.equal(x, y) for x, y in zip(before, (*model.parameters(), *factors(optimizer)), strict=True))
        scaled_step((model, optimizer), scaler, t, clip)
    assert scaler.get_scale() != 2.0**10 or bad
    assert_same(clipped() if clip else reference(), (model, optimizer))


def test_a_scaler_that_unscales_must_be_known():
    model, optimizer = start()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="grad_scaler"):
        scaled_step((model, optimizer), grad_scaler(), 0, clip=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_scaled_mini_batches_are_one_batch():
    for known in (False, True):
        scaler = grad_scaler()
        model, optimizer = start(grad_scaler=scaler if known else None)
        for t in range(5):
            optimizer.zero_grad()
            for x, target in zip(*(z.split(4) for z in data(t)), strict=True):
                scaler.scale(loss_of(model(x), target) / 3).backward()
            scaler.step(optimizer)
            scaler.update()
        assert_same(reference(), (model, optimizer))


@pytest.mark.parametrize("scaled", [False, True])
def test_autocast_gives_the_curvature_to_its_precision(scaled):
    """Factors are float32 as the parameters are, and those of float32 but for the rounding of inputs; the loss falls."""
    pairs, losses = [], []
    for enabled in (False, True):
        model = start()[0].float()
        optimizer = sgd_like(model)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        for t in range(20):
            optimizer.zero_grad()
            x, target = (z.float() for z in data(t % 3))
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = loss_of(model(x), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            if t == 3:
                pairs.append([x.clone() for held in optimizer.state.values() for key, x in held.items() if "factor" in key])
        assert all(x.dtype == torch.float32 and x.isfinite().all() for x in factors(optimizer))
    assert len(pairs[0]) == 8 and all(error(y, x) < 5e-3 for x, y in zip(*pairs, strict=True))
    assert losses[-1] < 0.6 * losses[20] and abs(losses[-1] / losses[19] - 1) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_low_precision(dtype):
    model = start()[0].to(dtype)
    optimizer = sgd_like(model)
    losses = []
    for t in range(20):
        optimizer.zero_grad()
        x, target = (z.to(dtype) for z in data(t % 3))
        loss = loss_of(model(x).float(), target.float())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(x.isfinite().all() for x in factors(optimizer)) and losses[-1] < 0.6 * losses[0]


# --- Activation checkpointing -----------------------------------------------------------------------------------------


class Checkpointed(Net):
    reentrant: bool

    def body(self, x: Tensor) -> Tensor:
        return checkpoint(super().body, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_change_nothing(reentrant):
    model, optimizer = start()
    model.__class__ = Checkpointed
    model.reentrant = reentrant
    train(model, optimizer)
    assert_same(reference(), (model, optimizer), 1e-13)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_module_shared_by_checkpoints(reentrant):
    """A nested backward pass is not one more mini-batch."""
    layer = nn.Linear(5, 5).double()
    x = randn(4, 5).requires_grad_()
    results = []
    for run in (lambda x: layer(x).tanh(), lambda x: checkpoint(lambda z: layer(z).tanh(), x, use_reentrant=reentrant)):
        optimizer = watching(layer)
        layer.zero_grad()
        run(run(x)).square().mean().backward()
        optimizer.step()
        results.append(moments(optimizer, layer))
    assert_close(*results, 1e-12)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_hooks_keep_no_input_that_a_checkpoint_drops(checkpointed):
    """Between the passes the inputs within are gone; without a checkpoint they are there, so that this would see them."""
    model, optimizer = start()
    seen: list[StorageWeakRef] = []
    model.third.register_forward_pre_hook(lambda _, args: seen.append(StorageWeakRef(args[0].untyped_storage())))
    x, target = data(0)
    hidden = torch.relu(model.first(x))
    y = checkpoint(model.body, hidden, use_reentrant=False) if checkpointed else model.body(hidden)
    loss = loss_of(model.last(model.norm(y)), target)
    gc.collect()
    assert [x.expired() for x in seen] == [checkpointed]
    loss.backward()
    optimizer.step()
    del loss, y, hidden
    gc.collect()
    assert all(x.expired() for x in seen) and optimizer.state[model.third.weight]["updates"] == 1


# --- Other processes --------------------------------------------------------------------------------------------------


def replica(number: int, average: str, approximation: str) -> None:
    whole, model = reference(average, kfac_approx=approximation), start()[0]
    wrapped = DistributedDataParallel(model)
    optimizer = sgd_like(wrapped, loss_average=average, kfac_approx=approximation)
    for t in range(5):
        optimizer.zero_grad()
        x, target = (z.chunk(2)[number] for z in data(t))
        if t % 2:  # in two mini-batches
            with wrapped.no_sync():
                loss_of(wrapped(x[:3]), target[:3], average, samples=6).backward()
            loss_of(wrapped(x[3:]), target[3:], average, samples=6).backward()
        else:
            loss_of(wrapped(x), target, average).backward()
        optimizer.step()
    assert_same(whole, (model, optimizer))
    for x in (*(p.detach() for p in model.parameters()), *factors(optimizer)):
        other = x.clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, x)


def rank(number: int, port: int, average: str, approximation: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    try:
        replica(number, average, approximation)
    finally:  # once the model is gone: one that outlives its group now and then hangs, whatever the optimizer
        gc.collect()
        dist.destroy_process_group()


@pytest.mark.parametrize("average,approximation", [("batch", "expand"), ("batch+sequence", "reduce")])
def test_two_ranks_are_one_process_with_the_whole_batch(average, approximation):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(rank, (port, average, approximation), nprocs=2, start_method="fork")


# --- Copies -----------------------------------------------------------------------------------------------------------


def saved(x: object) -> object:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[object], object]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": saved,
}


def plain(**options) -> tuple[nn.Module, SINGD]:
    """Of classes that can be pickled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, sgd_like(model, **options)


def equal(first: tuple[nn.Module, SINGD], second: tuple[nn.Module, SINGD]) -> bool:
    pairs = [(*first[0].parameters(), *factors(first[1])), (*second[0].parameters(), *factors(second[1]))]
    return all(torch.equal(x, y) for x, y in zip(*pairs, strict=True))


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_the_model_is_not_seen(name):
    """But by an optimizer of its own, which works as any."""
    model, optimizer = plain()
    want = plain()
    train(*want)
    for t in range(5):
        optimizer.zero_grad()
        x, target = data(t)
        loss_of(model(x), target).backward()
        twin = COPIES[name](model)
        loss_of(twin(data(50, 3)[0]), data(50, 3)[1]).backward()
        assert all(p.grad is not None for p in twin.parameters())
        optimizer.step()
    assert equal(want, (model, optimizer))
    twin = COPIES[name](plain()[0])
    pair = twin, sgd_like(twin)
    train(*pair)
    assert equal(want, pair)


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("interval", [1, 3])
def test_copies_of_both_go_on_alike(name, interval):
    pair = plain(update_interval=interval)
    train(*pair, range(12))
    model, optimizer = COPIES[name](pair)
    assert all(p is not q for p, q in zip(model.parameters(), pair[0].parameters(), strict=True))
    assert equal(pair, (model, optimizer))
    train(*pair, range(12, 17))
    assert not equal(pair, (model, optimizer))
    train(model, optimizer, range(12, 17))
    assert equal(pair, (model, optimizer))


@pytest.mark.parametrize("interval", [1, 3])
def test_a_checkpoint_goes_on_alike(interval):
    pair = plain(update_interval=interval)
    train(*pair, range(12))
    state = copy.deepcopy((pair[0].state_dict(), pair[1].state_dict()))
    other = plain(update_interval=interval)
    train(*other, range(2))
    for x, content in zip(other, state, strict=True):
        x.load_state_dict(content)
    for each in (pair, other):
        train(*each, range(12, 17))
    assert equal(pair, other)


def test_an_optimizer_that_is_gone_sees_nothing():
    """Nor does a model keep it, so that another may take its place."""
    model, optimizer = plain()
    train(model, optimizer, range(2))
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    model.load_state_dict(plain()[0].state_dict())
    pair, want = (model, sgd_like(model)), plain()
    train(*pair)
    train(*want)
    assert equal(want, pair)


# --- Which layers -----------------------------------------------------------------------------------------------------


def algorithm(optimizer: SINGD, p: Tensor) -> str:
    (name,) = {group["algorithm"] for group in optimizer.param_groups if any(p is q for q in group["params"])}
    assert ("factor_k" in optimizer.state[p]) <= (name == "matrix")
    return name


def fit(model: nn.Module, optimizer: SINGD, x: Tensor, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def moved(model: nn.Module, before: dict[str, Tensor]) -> dict[str, bool]:
    return {name: not torch.equal(p, before[name]) for name, p in model.named_parameters()}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.filterwarnings("error")
def test_frozen_weights_and_biases():
    """A frozen bias is no column of the factor; a bias without its weight takes AdamW; what is frozen stays."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3))).double()
    model[0].bias.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    optimizer, before = sgd_like(model), snapshot(model)
    fit(model, optimizer, randn(8, 5))
    frozen = {"0.bias", "1.weight"}
    assert moved(model, before) == {name: name not in frozen for name in before}
    assert optimizer.state[model[0].weight]["factor_k"].numel() == 25
    assert optimizer.state[model[2].weight]["factor_k"].numel() == 36
    assert algorithm(optimizer, model[1].bias) == "adamw" and algorithm(optimizer, model[2].bias) == "matrix"

    first, second = nn.Linear(5, 3, dtype=torch.float64), nn.Linear(5, 3, bias=False, dtype=torch.float64)
    second.weight.data.copy_(first.weight)
    first.bias.requires_grad_(False).zero_()
    x = randn(8, 5)
    for layer in (first, second):
        fit(layer, sgd_like(layer), x)
    assert torch.equal(first.weight, second.weight)


class Tied(nn.Module):
    def __init__(self, other: bool):
        super().__init__()
        self.table, self.hidden, self.out = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.table.weight
        self.other = nn.Linear(4, 3) if other else None  # that is never called

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.table(x))))


@pytest.mark.filterwarnings("error")
def test_tied_weights_take_adamw_and_what_is_not_called_stays():
    torch.manual_seed(0)
    model = Tied(True).double()
    optimizer, before = sgd_like(model), snapshot(model)
    fit(model, optimizer, torch.arange(7))
    assert moved(model, before) == {name: not name.startswith("other") for name in before}
    assert algorithm(optimizer, model.table.weight) == "adamw" and algorithm(optimizer, model.hidden.weight) == "matrix"
    assert "AdamW" in str(optimizer.routing) and "table.weight" in str(optimizer.routing)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.after = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.attention(x, x, x)[0])


@pytest.mark.filterwarnings("error")
def test_the_projection_that_attention_does_not_call_takes_adamw():
    torch.manual_seed(0)
    model = Attention().double()
    optimizer, before = sgd_like(model), snapshot(model)
    fit(model, optimizer, randn(3, 5, 4))
    assert all(moved(model, before).values())
    for name, p in model.named_parameters():
        assert algorithm(optimizer, p) == ("matrix" if name.startswith("after") else "adamw"), name


def test_two_layers_of_one_weight_have_the_rows_of_both():
    first, second = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    second.weight, second.bias = first.weight, first.bias
    x, results = randn(6, 4), []
    for model in (nn.Sequential(first, nn.Tanh(), second), nn.Sequential(first, nn.Tanh(), first)):
        optimizer = watching(model)
        model.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        results.append(moments(optimizer, first))
    assert_close(*results, 1e-12)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_layers_that_only_some_steps_call(set_to_none):
    """A layer that a step does not call, or calls on nothing, as of experts some are, keeps its factors."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)).double()
    optimizer = sgd_like(model)
    for t in range(6):
        optimizer.zero_grad(set_to_none=set_to_none)
        before = [x.clone() for x in (optimizer.state[m.weight].get("factor_k", torch.empty(0)) for m in model)]
        x = randn(6, 4)
        parts = x.split([6, 0]) if t % 2 else x.split([4, 2])
        outputs = [model[0](parts[0]), model[1](parts[1])] + ([model[2](x)] if t % 2 else [])
        torch.cat(outputs).square().sum().backward()
        optimizer.step()
        after = [optimizer.state[m.weight].get("factor_k", torch.empty(0)) for m in model]
        changed = [not torch.equal(x, y) for x, y in zip(before, after, strict=True)]
        assert changed == [True, t % 2 == 0, t % 2 == 1] or (t < 2 and changed[0])
        assert all(p.isfinite().all() for p in (*model.parameters(), *after))
