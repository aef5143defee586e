"""Triton kernels and the choice of their tiles.

The lowest floor: it knows nothing of optimizers. Until the first kernel lands, every op of `spectral_ops` runs its
PyTorch composition on every device.
"""
