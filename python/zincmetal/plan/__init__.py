"""From operations to dispatches: kernels, addresses, barriers, and the memory that they need."""
