"""Launches of kernels on random inputs, by family, with what they must give in float64 NumPy."""
