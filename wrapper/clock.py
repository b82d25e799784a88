"""The only place that reads time.

Everything below takes `now` (seconds on a monotonic clock) as an argument; whoever calls it asks
the event loop through here, so that a test's loop with virtual time moves all of it.
"""

from __future__ import annotations

import asyncio


def monotonic_s() -> float:
    """Seconds on the running event loop's monotonic clock."""
    return asyncio.get_running_loop().time()
