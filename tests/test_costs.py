"""The counts of work: against launches as they are recorded, and the two savings that the fusion is for."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from spectral_ops._library import KERNELS
from spectral_ops.bench import costs
from spectral_ops.bench.cases import CASES, OPERANDS, Work
from spectral_ops.kernels.launch import Launch, cdiv, recording
from spectral_ops.optim import SpectralKron

BF16 = OPERANDS["bf16"]


def launched_flops(item: Launch) -> int:
    """Of all programs of a launch: tiles of the result times the inner size, rounded up to pieces of `k`."""
    a, tile = item.arguments, item.config
    inner = {"gram": "k", "gram_skew": "k", "rotate": "k", "factor": "n"}.get(item.name)
    if inner is not None:
        loops = item.programs * cdiv(a[inner], tile.k)
    elif "PRECISION" in a:
        batch = item.programs / (a["count0"] + a["count1"])
        sides = (a["m"], a["n"]) if item.name == "track" else (a["n"], a["m"])
        loops = batch * sum(a[f"count{side}"] * cdiv(size, tile.k) for side, size in enumerate(sides))
        if item.name == "map":  # `BᵀB`, and powers of the generator
            loops *= a["CORRECT"] + {3: 1, 4: 2}.get(a["ORDER"], 0)
    else:
        loops = 0
    return int(loops * 2 * tile.block**2 * tile.k)


def launched_bytes(item: Launch) -> int:
    """Each tensor of a launch once."""
    tensors = {id(x): x for x in item.arguments.values() if isinstance(x, Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


@pytest.mark.parametrize("n, m, batch", [(512, 256, 3), (1000, 500, 2), (64, 320, 1)])
@pytest.mark.parametrize("name", CASES)
def test_the_formula_agrees_with_the_launches(name, n, m, batch):
    case = CASES[name]
    kind = OPERANDS[case.operands[0]]
    with recording(run=False, assume=(9, 0)) as launches:
        case.run(case.arguments(n, m, batch, kind, "meta"))
    work = case.work(n, m, batch, kind)
    flops, tile = sum(map(launched_flops, launches)), max(item.config.block for item in launches)
    padding = (cdiv(n, tile) * tile / n * cdiv(m, tile) * tile / m) ** 1.5
    assert work.flops <= flops <= work.flops * padding * (1 + 1e-9)
    if name in ("parameter_update", "diagonal_step"):
        return  # they take addresses
    in_place = name in ("average", "kron_track", "momentum")  # what is read and written counts twice in the formula
    assert sum(map(launched_bytes, launches)) == pytest.approx(work.bytes, rel=0.26 if in_place else 0.02)


@pytest.mark.parametrize("n", costs.SIZES)
@pytest.mark.parametrize("name", ["gram_skew", "gram_track", "gram_track_both"])
def test_the_u_build_moves_less_than_half(name, n):
    work, eager = CASES[name].work(n, n, 4, BF16), costs.eager_work(CASES[name], n, n, 4, BF16)
    assert work.bytes <= 0.4 * eager.bytes
    assert work.flops <= 0.63 * eager.flops


@pytest.mark.parametrize("n", costs.SIZES)
def test_the_cayley_chain_computes_little_more_than_half(n):
    """Four of eight products, and the diagonal tiles' other halves."""
    case = CASES["cayley_update"]
    assert costs.eager_work(case, n, n, 1, BF16).flops == 8 * 2 * n**3
    assert case.work(n, n, 1, BF16).flops <= 0.6 * 8 * 2 * n**3


def test_eager_traffic_counts_what_is_read_and_written():
    x = torch.empty(8, 6, device="meta")
    with costs.Traffic() as traffic:
        y = x.T  # a view
        z = y + 1
        z.mul_(2)
        z @ x
        x[:1].expand(8, 6) + x
    words = 2 * 48 + 2 * 48 + (48 + 48 + 36) + (6 + 48 + 48)
    assert traffic.bytes == 4 * words


def test_the_floor_is_the_larger_of_two():
    assert costs.floor(Work(790e12, 4.3e12), "bf16") == pytest.approx(1)
    assert costs.floor(Work(790e12, 8.6e12), "bf16") == pytest.approx(2)
    assert costs.floor(Work(790e12, 0), "fp32") == pytest.approx(790 / 67)


def test_costs_prints_a_row_for_each_operation(capsys, monkeypatch):
    monkeypatch.setattr(costs, "SIZES", (64,))
    costs.main([])
    text = capsys.readouterr().out
    assert all(f"\n{name} " in text for name in CASES)
    assert "measured" in text.lower()
    assert all(f"\n{name} " in text for name in costs.STEPS)


# --- Optimizer steps ----------------------------------------------------------------------------------------------------


class WithKernels(TorchDispatchMode):
    """Ops of the package launch their kernels, whatever the device; bytes of the copies that PyTorch makes are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.copied = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "spectral_ops":
            with self:
                return KERNELS[func.name().partition("::")[2].partition(".")[0]](*args)
        result = func(*args, **(kwargs or {}))
        if func.name().partition(".")[0] in ("aten::stack", "aten::cat"):
            self.copied += 2 * result.numel() * result.element_size()
        return result


def after_two_steps(optimizer, p):
    for _ in range(2):
        p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("operands", ["bf16", "fp32"])
def test_the_parts_of_a_step_are_what_it_launches(operands):
    """Two matrices, so that they are gathered as in a model."""
    n, m = 512, 256
    params = [nn.Parameter(torch.randn(n, m, dtype=OPERANDS[operands].dtype)) for _ in range(2)]
    optimizer = SpectralKron(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        with WithKernels() as mode, recording(run=False, assume=(9, 0)) as launches:
            optimizer.step()
    first = [item.name for item in launches].index("momentum")
    for parts, mine in ((costs.tracking, launches[:first]), (costs.stepping, launches[first:])):
        flops = sum(work.flops for work, _ in parts(n, m, operands))
        assert 2 * flops == pytest.approx(sum(map(launched_flops, mine)), rel=1e-3)
    # In place, so read and written: the buffer, of which a launch counts one, and the parameters, which it finds by address.
    moved = mode.copied + sum(map(launched_bytes, launches[first:])) + 2 * (1 + 2) * params[0].nbytes
    assert 2 * sum(work.bytes for work, _ in costs.stepping(n, m, operands)) == pytest.approx(moved, rel=2e-3)


@pytest.mark.parametrize("operands", ["bf16", "fp32"])
def test_tracking_is_all_of_kron_track(operands):
    whole = CASES["kron_track"].work(768, 3072, 1, OPERANDS[operands])
    parts = [work for work, _ in costs.tracking(768, 3072, operands)]
    assert sum(work.flops for work in parts) == whole.flops
    assert sum(work.bytes for work in parts) == whole.bytes


@pytest.mark.parametrize("n, m", [(48, 80), (80, 48), (64, 64)])
def test_muon_computes_the_products_that_are_counted(n, m):
    p = nn.Parameter(torch.randn(n, m))
    optimizer = after_two_steps(torch.optim.Muon([p]), p)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == sum(work.flops for work, _ in costs.muon(n, m, 4))


@pytest.mark.parametrize("n, m", [(48, 80), (64, 64)])
def test_soap_computes_the_products_that_are_counted(n, m):
    """But for QR, which the counter does not know."""
    soap = pytest.importorskip("pytorch_optimizer").SOAP
    p = nn.Parameter(torch.randn(n, m))
    optimizer = after_two_steps(soap([p], precondition_frequency=1), p)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    qr = 8 / 3 * (n**3 + m**3)
    assert counter.get_total_flops() == pytest.approx(sum(work.flops for work, _ in costs.soap(n, m)) - qr)


def test_the_floor_of_a_step_by_hand(monkeypatch):
    monkeypatch.setattr(costs, "NETWORKS", {"one": ((1000, 1000, 3),)})
    assert costs.step_floor("AdamW fp32", "one") == pytest.approx(3 * 28e6 / 4.3e12)
    assert costs.step_floor("forward and backward, bf16", "one") == pytest.approx(3 * 6e6 * 2**19 / 790e12)
    once, half, tenth = (costs.step_floor(f"SpectralKron bf16, interval {k}", "one") for k in (1, 2, 10))
    assert once - half == pytest.approx((once - tenth) * 5 / 9)
    assert half < once


def test_the_networks_have_as_many_parameters_as_they_should():
    """Hidden matrices: of ViT-B 85M, of GPT-2 medium 302M, of a Llama of 1B 973M."""
    counts = {name: sum(n * m * count for n, m, count in shapes) for name, shapes in costs.NETWORKS.items()}
    assert counts == {"ViT-B": 12 * 12 * 768**2, "GPT-2 medium": 24 * 12 * 1024**2, "Llama-1B": 973_078_528}
