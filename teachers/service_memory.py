"""Memory that was freed goes back to the system.

A loop that holds small results for long between large buffers for a moment leaves the C library's heap full of holes:
under load the bundled teacher's service held 320 MiB of them after 400 requests. glibc keeps such pages for itself
until it is told otherwise.
"""

import ctypes
import time
from collections.abc import Callable

BUSY_S = 30.0  # between two times while there is work


def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None on systems with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


class Trimmer:
    """Tells the C library to give free pages back: when work ends, and every BUSY_S while it goes on."""

    def __init__(self, trim: Callable[[int], int] | None = None, clock_s: Callable[[], float] = time.monotonic):
        self._trim, self._clock_s = trim or _trim(), clock_s
        self._last_s, self._is_due = clock_s(), False

    def turn(self, has_worked: bool) -> None:
        """Called after every turn of a loop."""
        self._is_due |= has_worked
        if self._trim and self._is_due and (not has_worked or self._clock_s() - self._last_s >= BUSY_S):
            self._trim(0)
            self._last_s, self._is_due = self._clock_s(), False
