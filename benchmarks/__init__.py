"""What times and what counts: ``python -m benchmarks.bench``."""
