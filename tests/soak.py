"""Says how far a long test is."""

from __future__ import annotations

import time
from collections.abc import Iterator

_PERIOD = 10.0
"""Seconds between two lines."""


def counted(count: int, what: str) -> Iterator[int]:
    """Yields the numbers below `count`, and prints now and then how far it is and how long it takes.

    Args:
        count: how many.
        what: what they are, in the plural.
    """
    begun = told = time.monotonic()
    for number in range(count):
        now = time.monotonic()
        if now - told >= _PERIOD:
            told, took = now, now - begun
            left = took / number * (count - number)
            print(f"{number:>9,} of {count:,} {what}, {took:.0f} s, about {left:.0f} s left", flush=True)
        yield number
    print(f"{count:>9,} {what} in {time.monotonic() - begun:.0f} s", flush=True)
