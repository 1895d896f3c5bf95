"""Launches kernels on random inputs, a module per family, and computes the expected outputs in float64 NumPy."""
