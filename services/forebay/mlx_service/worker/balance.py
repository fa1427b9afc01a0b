"""Which row should change its lane, if any. Lengths in, one move out: no batch and no array here.

Two things make lanes worse as time goes by. Long rows leave and a lane is left
with a long one and many short ones, all as wide as the long one; and rows
leave several lanes, each of which goes on reading all weights for a few rows.
So a row moves out of a lane that pads too much, and lanes that fit together
become one. One row moves in a step: whoever writes waits for one copy at most.

Lanes that were joined would have to pad twice as much before they were taken
apart again, and rows of a lane grow together, so nothing moves to and fro.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PADDED = 1.5
"""Tokens that a lane may hold for each useful one."""

FREE_TOKENS = 512
"""Tokens that a lane may hold whatever is useful in it. Apart, so short rows would cost more than padding."""

JOINED = 1.25
"""Tokens that a lane joined of two may hold for each useful one."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A lane, as far as its balance goes."""

    kind: str
    """Lanes of one kind can exchange rows."""
    lengths: Mapping[int, int]
    """Tokens of each of its rows."""
    writing: frozenset[int]
    """Rows that write, and so can move."""

    @property
    def is_calm(self) -> bool:
        """Whether all its rows write: a row that came now would wait for no prompt."""
        return len(self.writing) == len(self.lengths)


@dataclass(frozen=True, slots=True)
class Move:
    """A row that should change its lane."""

    row: int
    source: int
    """Index of the lane it is in."""
    target: int | None
    """Index of the lane it is for; None is a new one."""


def held(lengths: Sequence[int]) -> int:
    """Tokens that a lane of such rows holds."""
    return max(lengths, default=0) * len(lengths)


def fits(lengths: Sequence[int], *, most: float = PADDED) -> bool:
    """Whether such rows may share a lane."""
    return held(lengths) <= max(FREE_TOKENS, most * sum(lengths))


def is_padded(lengths: Sequence[int]) -> bool:
    """Whether a lane of such rows pads too much to be left as it is."""
    return held(lengths) - sum(lengths) > max(FREE_TOKENS, (PADDED - 1) * sum(lengths))


def plan(lanes: Sequence[Shape], *, most: int) -> Move | None:
    """Returns the row to move now, or None if lanes are well as they are.

    Args:
        lanes: the lanes.
        most: most lanes of one kind.
    """
    return _apart(lanes, most) or _together(lanes)


def _apart(lanes: Sequence[Shape], most: int) -> Move | None:
    """The move that saves the most tokens, out of a lane that pads too much; a lane that is there first."""
    best: tuple[tuple[bool, int], Move] | None = None
    for source, lane in enumerate(lanes):
        lengths = list(lane.lengths.values())
        if not is_padded(lengths):
            continue
        alike = [index for index, other in enumerate(lanes) if other.kind == lane.kind]
        targets: list[int | None] = [i for i in alike if i != source and lanes[i].is_calm]
        if len(alike) < most:
            targets.append(None)
        for row in lane.writing:
            rest = [length for other, length in lane.lengths.items() if other != row]
            for target in targets:
                there = [] if target is None else list(lanes[target].lengths.values())
                joined = [*there, lane.lengths[row]]
                if not fits(joined):
                    continue
                saved = held(lengths) + held(there) - held(rest) - held(joined)
                worth = target is not None, saved
                if saved > 0 and (best is None or worth > best[0]):
                    best = worth, Move(row, source, target)
    return best and best[1]


def _together(lanes: Sequence[Shape]) -> Move | None:
    """The next row of the smallest lane that another has room for as a whole."""
    for source in sorted(range(len(lanes)), key=lambda index: len(lanes[index].lengths)):
        small = lanes[source]
        if not small.writing or not small.is_calm:
            continue
        for target, lane in enumerate(lanes):
            if target == source or lane.kind != small.kind or not lane.lengths or not lane.is_calm:
                continue
            if len(lane.lengths) < len(small.lengths):
                continue
            if fits([*lane.lengths.values(), *small.lengths.values()], most=JOINED):
                return Move(min(small.writing), source, target)
    return None
