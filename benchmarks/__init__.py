"""Benchmarks, which time and count: ``python -m benchmarks.bench``."""
