"""Large matrices on a CPU: blocks of half the products against the whole ones."""

import pytest
import torch

from spectral_ops import blocked, reference

SIZES = [(1, 1), (1, 7), (2, 3), (16, 16), (17, 40), (40, 17), (65, 33)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "SMALLEST", 2)
    monkeypatch.setattr(blocked, "BLOCK", 9)


def arguments(n: int, m: int, dtype: torch.dtype, carry: bool = True, batch: int = 3) -> list:
    """Of `kron_track`, in its order. A third update: nothing is at its start."""
    generator = torch.Generator().manual_seed(n * 100 + m)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    bases = [torch.linalg.qr(normal(batch, k, k))[0].to(dtype).contiguous() for k in (n, m)]
    lower = [0.2 * normal(batch, k, k).tril(-1) for k in (n, m)]
    residuals = [(r + r.mT).to(dtype) for r in lower] if carry else [None, None]
    wide = reference.accumulation_dtype(dtype)
    eigenvalues = [(0.3 + normal(batch, k).abs()).to(wide) for k in (n, m)]
    seeds = torch.arange(batch) + 5 if dtype == torch.bfloat16 else None
    numbers = [torch.full((batch,), 0.7, dtype=wide), torch.full((batch,), 2.0, dtype=wide)]
    return [normal(batch, n, m).to(wide), *bases, *residuals, *eigenvalues, *numbers, seeds, 0.4, 0.1, 0.1, 0.48]


def both(order: int, values: list) -> tuple[list, list]:
    """The whole products and the blocks, each on a copy."""
    results = []
    for options in ({}, {"track": blocked.tracked}):
        copy = [x.clone() if isinstance(x, torch.Tensor) else x for x in values]
        copy.append(reference.kron_track(*copy, order, **options))
        results.append([x for x in copy if isinstance(x, torch.Tensor)])
    return results[0], results[1]


@pytest.mark.parametrize("n,m", SIZES)
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("carry", [True, False])
def test_blocks_are_the_whole_products(n: int, m: int, order: int, carry: bool) -> None:
    for whole, block in zip(*both(order, arguments(n, m, torch.float64, carry)), strict=True):
        torch.testing.assert_close(block, whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_in_other_dtypes_they_differ_by_rounding(dtype: torch.dtype, tolerance: float) -> None:
    for whole, block in zip(*both(3, arguments(33, 20, dtype)), strict=True):
        assert block.dtype == whole.dtype
        torch.testing.assert_close(block, whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_residuals_are_symmetric_bit_for_bit_with_zero_diagonals(dtype: torch.dtype) -> None:
    _, (_, _, _, left, right, *_) = both(3, arguments(33, 20, dtype))
    for r in (left, right):
        assert torch.equal(r, r.mT) and not r.diagonal(dim1=-2, dim2=-1).any() and r.any()


@pytest.mark.parametrize("flaw", [float("nan"), float("inf"), 0.0])
def test_matrices_without_a_usable_gradient_stay(flaw: float) -> None:
    values = arguments(20, 12, torch.float32)
    values[0][1] = flaw
    before = [x[1].clone() for x in values[1:8]]
    whole, block = both(3, values)
    assert all(torch.equal(x[1], old) for x, old in zip(block[1:8], before, strict=True))
    assert not torch.equal(block[1][0], values[1][0])
    assert torch.equal(block[-1], whole[-1])


def test_bases_are_rounded_with_the_same_random_bits() -> None:
    """Residuals are not: between average and turn the whole products round them once more."""
    whole, block = both(3, arguments(20, 12, torch.bfloat16))
    assert all((x == y).float().mean() > 0.95 for x, y in zip(whole[1:3], block[1:3], strict=True))


@pytest.mark.parametrize("n", [1, 9, 10, 37, 64])
def test_blocks_cover_the_lower_triangle_once(n: int) -> None:
    count = torch.zeros(n, n, dtype=torch.int64)
    for rows, columns in blocked.lower_blocks(n):
        count[rows, columns] += 1
        assert rows == columns or columns.stop <= rows.start
    assert (count.tril() == torch.ones(n, n, dtype=torch.int64).tril()).all() and count.max() == 1


def test_half_of_the_operations() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for track in (reference.tracked, blocked.tracked):
        with FlopCounterMode(display=False) as flops:
            reference.kron_track(*arguments(64, 64, torch.float32, batch=1), 3, track=track)
        counts.append(flops.get_total_flops())
    # Of 16 products of n³ two thirds are symmetric: seven eighths of their half with these blocks.
    assert counts[1] < 0.75 * counts[0], counts


def test_what_it_leaves_to_whole_products() -> None:
    b = torch.eye(8)
    assert blocked.serves(b, 3) and not blocked.serves(b, 8) and not blocked.serves(b.to("meta"), 3)
    assert not blocked.serves(torch.eye(1), 3)


def test_each_thread_has_a_workspace_of_its_own() -> None:
    """Two optimizers that step at the same time must not share one."""
    import threading

    mine = blocked.workspace.tensors(3, (4, 4), torch.float32)
    assert [x.shape for x in mine] == [(4, 4)] * 3
    assert blocked.workspace.tensors(3, (3, 3), torch.float32)[0].data_ptr() == mine[0].data_ptr()
    others = []
    thread = threading.Thread(target=lambda: others.extend(blocked.workspace.tensors(3, (4, 4), torch.float32)))
    thread.start()
    thread.join()
    assert others[0].data_ptr() != mine[0].data_ptr()
    assert blocked.workspace.tensors(3, (4, 4), torch.float64)[2].dtype == torch.float64
