"""Triton kernels and the choice of their tiles.

The lowest floor: it knows nothing of optimizers. Each file is one family of kernels and the function that launches it; tensors
come in with one batch dimension and their shapes checked. `tiles` holds what the kernels share, `launch` the one way to the
GPU, `config` the tiles.
"""
