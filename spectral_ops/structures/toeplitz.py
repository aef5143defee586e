"""Triangular Toeplitz matrices: one number for each diagonal."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_ops.reference import accumulation_dtype, raised
from spectral_ops.structures.base import Structure, check_size


def _wide(x: Tensor) -> Tensor:
    """In the next wider dtype, float32 or float64: a transform spreads the rounding error of the largest number over all,
    and a mean over the few entries of the outer diagonals has its share in that of the sum over `n`."""
    return x.to(torch.float64 if x.dtype == torch.float32 else accumulation_dtype(x.dtype))


@dataclass(frozen=True)
class Toeplitz(Structure):
    """`n` numbers: entry `j` is that of the `j`-th diagonal, above the main one if `upper`, else below.

    A product is a convolution, a projection a correlation, of a signal with zeros after it: Fourier transforms, in
    `O(n log n)` for each column.

    Args:
        n: rows and columns.
        upper: upper triangular, else lower.
    """

    n: int
    upper: bool

    def __post_init__(self) -> None:
        check_size(self.n, "n", "Toeplitz")

    @property
    def size(self) -> int:
        return self.n

    @property
    def name(self) -> str:
        return "triutoeplitz" if self.upper else "triltoeplitz"

    def dense(self, a: Tensor) -> Tensor:
        # Row i of a lower one is (a_i, …, a_0, 0, …): windows of (a_{n−1}, …, a_0, 0, …), from the last to the first.
        windows = torch.nn.functional.pad(a.flip(-1), (0, self.n)).unfold(-1, self.n, 1)
        lower = windows[..., : self.n, :].flip(-2)
        return lower.mT.contiguous() if self.upper else lower

    def project(self, x: Tensor) -> Tensor:
        # The sum along a diagonal of x xᵀ is an autocorrelation of the columns of x, summed over them.
        f = self._transform(_wide(x).mT)
        power = torch.view_as_real(f).square().sum(-3).sum(-1)  # both at once take a CPU four times as long
        return self._mean(self._inverse(power)).to(x.dtype)

    def apply(self, a: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
        f = self._transform(_wide(a)).unsqueeze(-2)
        if self.upper != transpose:
            f = f.conj()
        y = self._inverse(f * self._transform(_wide(x).mT))
        return y.mT.to(x.dtype)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        f = self._transform(_wide(a)) * self._transform(_wide(b))
        return self._inverse(f).to(a.dtype)

    def gram(self, a: Tensor) -> Tensor:
        # Σ_k (AᵀA)_{k,k+j} = Σ_l (n − j − l) a_l a_{l+j}, for upper and lower ones: a correlation with (n − m) a_m.
        wide = _wide(a)
        f = self._transform(wide).conj() * self._transform(wide * self._counts(wide))
        return self._mean(self._inverse(f)).to(a.dtype)

    def diagonals(self, a: Tensor) -> tuple[Tensor, ...]:
        """Here the one number that stands for all."""
        return (a[..., None, :1],)

    def trace(self, a: Tensor) -> Tensor:
        return super().trace(a) * self.n

    def _inner(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = raised(a), raised(b)
        return (a * b * self._counts(a)).sum(-1)

    def _counts(self, a: Tensor) -> Tensor:
        """Entries on each diagonal: n, …, 1."""
        return torch.arange(self.n, 0, -1, dtype=accumulation_dtype(a.dtype), device=a.device)

    def _mean(self, sums: Tensor) -> Tensor:
        """`Π̂` from the sums along the diagonals: means, of off-diagonal ones twice that."""
        sums = sums / self._counts(sums)
        sums[..., 1:] *= 2
        return sums

    def _length(self) -> int:
        """Of the transforms: at least 2n − 1, so that nothing wraps around, with small factors."""
        least = max(2 * self.n - 1, 1)
        return min(m << (-(-least // m) - 1).bit_length() for m in (1, 3, 5, 9, 15))

    def _transform(self, signal: Tensor) -> Tensor:
        if 0 in signal.shape[:-1]:  # which MKL refuses
            return signal.new_zeros(*signal.shape[:-1], self._length() // 2 + 1, dtype=torch.result_type(signal, 1j))
        return torch.fft.rfft(signal, self._length())

    def _inverse(self, f: Tensor) -> Tensor:
        """The first `n` numbers of the signal."""
        if 0 in f.shape[:-1]:
            return f.real.new_zeros(*f.shape[:-1], self.n)
        return torch.fft.irfft(f, self._length())[..., : self.n]
