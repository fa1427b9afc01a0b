"""Where the synchronous core gets its time from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Clock: TypeAlias = Callable[[], float]
"""Returns seconds that never go back. In a process it is the running loop's clock; tests bring their own."""
