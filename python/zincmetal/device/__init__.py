"""This machine: the compiled core that runs, its memory, and the kernels that it can build."""
