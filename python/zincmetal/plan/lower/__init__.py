"""Lowering: turns operations into launches. Only this room forms kernel names, parameters and grids.

``kernels/*.metal`` has the same names and bindings, ``kernels/params.h`` the parameters. One module per family of
kernels registers a function for each kind of operation.
"""

from . import attention, attention_latent, draw, experts, mamba2, output, products, recurrent, rows, step
from .shared import Lowering

__all__ = [
    "Lowering",
    "attention",
    "attention_latent",
    "draw",
    "experts",
    "mamba2",
    "output",
    "products",
    "recurrent",
    "rows",
    "step",
]
