"""Benchmarks and quality measurements: one module per kind of measurement."""
