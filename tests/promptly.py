"""Bounds in time that a busy machine keeps too."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

TRIES = 5


async def promptly(bound: float, attempt: Callable[[], Awaitable[float]], *, tries: int = TRIES) -> None:
    """Asserts that something is done within a time, in one of a few tries.

    What is slow by itself is slow each time. A machine with more to run than it has cores lets a process
    wait now and then, for longer than many a bound that is worth asserting.

    Args:
        bound: the most that it may take, in seconds.
        attempt: does it once, with all assertions but that about time, and returns how many seconds it took.
        tries: how often it is tried at most.
    """
    took: list[float] = []
    while not took or (took[-1] > bound and len(took) < tries):
        took.append(await attempt())
    assert took[-1] <= bound, f"{[round(each, 3) for each in took]} s, and {bound} s are promised"
