"""Benchmarks, run from a checkout: `python -m spectral_ops.bench train|steps|search`."""
