"""The only place that reads time.

Everything below takes `now` (seconds on a monotonic clock) as an argument; whoever calls it asks
the event loop through here, so that a test's loop with virtual time moves all of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


def monotonic_s() -> float:
    """Seconds on the running event loop's monotonic clock."""
    return asyncio.get_running_loop().time()


def precise_clock() -> Callable[[], float]:
    """The running loop's clock, to the microsecond.

    uvloop tells whole milliseconds of the same system clock, too coarse for estimates of quick tools.
    """
    loop = asyncio.get_running_loop()
    return time.monotonic if type(loop).__module__.startswith("uvloop") else loop.time
