"""The benchmark of all registered losses: `python -m benchmarks --help`."""
