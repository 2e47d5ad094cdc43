"""Benchmarks: run as ``python -m bench.svd`` and ``python -m bench.report`` from the repository."""
