"""Pickers: each takes one of the scored candidates."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

Picker: TypeAlias = Callable[[Sequence[float], random.Random], int]
"""Returns the position of the one to take. There is at least one."""

_TIE = 1e-9


def best(scores: Sequence[float], source: random.Random) -> int:
    """Takes the best, and one at random where several are equally good, so that equals share the calls."""
    if len(scores) == 1:
        return 0
    top = max(scores)
    return source.choice([place for place, score in enumerate(scores) if top - score <= _TIE])


def two(scores: Sequence[float], source: random.Random) -> int:
    """Takes the better of two at random.

    Several orchestrators that all took the best would send a burst to the one
    that was idle when they last looked.
    """
    if len(scores) == 1:
        return 0
    one, other = source.sample(range(len(scores)), 2)
    return one if scores[one] >= scores[other] else other


PICKERS: Mapping[str, Picker] = {"best": best, "two": two}
"""Every picker by name, as in the settings."""
