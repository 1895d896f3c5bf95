"""This machine: which core runs, its memory, and the kernels that it can make."""
