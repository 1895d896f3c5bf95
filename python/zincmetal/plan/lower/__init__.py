"""From operations to launches: the only place where kernel names, parameters and grids are formed.

Names, bindings and parameters are those of ``kernels/*.metal`` and ``kernels/params.h``. One module per family of
kernels registers a function for each kind of operation.
"""

from . import attention, experts, output, products, recurrent, rows
from .shared import Lowering

__all__ = ["Lowering", "attention", "experts", "output", "products", "recurrent", "rows"]
