"""Plans: kernels, addresses and barriers for operations, and the memory that they need."""
