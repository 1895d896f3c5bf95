"""Lowering: turns operations into launches. Only this room forms kernel names, parameters and grids.

``kernels/*.metal`` has the same names and bindings, ``kernels/params.h`` the parameters. One module per family of
kernels registers a function for each kind of operation.
"""

from . import attention, experts, output, products, recurrent, rows
from .shared import Lowering

__all__ = ["Lowering", "attention", "experts", "output", "products", "recurrent", "rows"]
