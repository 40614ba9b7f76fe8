"""Measure everything that a GPU changes, in minutes: `python -m benchmarks.gpu --out DIR`."""
