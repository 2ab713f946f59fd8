"""Measuring: what a model is worth, and how fast it is. One file = one kind of measurement."""
