"""From operations to launches: the only place where kernel names, parameters and grids are formed.

``kernels/*.metal`` has the same names and bindings, ``kernels/params.h`` the parameters. One module per family of
kernels registers a function for each kind of operation.
"""

from . import attention, experts, output, products, recurrent, rows
from .shared import Lowering

__all__ = ["Lowering", "attention", "experts", "output", "products", "recurrent", "rows"]
