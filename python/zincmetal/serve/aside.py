"""Work aside: functions that take a while, on another thread than the server's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

from ..errors import no_thread

P = ParamSpec("P")
T = TypeVar("T")


async def aside(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on a thread of the loop's pool. Raises DeviceError if the system starts none."""
    work = partial(copy_context().run, partial(function, *args, **kwargs))
    try:
        done = asyncio.get_running_loop().run_in_executor(None, work)
    except RuntimeError as error:
        raise no_thread(error) from error
    return await done
