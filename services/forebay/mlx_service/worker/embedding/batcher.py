"""Which texts are embedded together next. No mlx in here, and no clock.

A batch costs its longest text times its number of texts, so texts of like
length go together, whoever asked for them. Which text must be in the next
batch is another question: the most urgent, and of those the one whose turn it
is. Turns are counted in tokens: a request's first text has its turn now, and
each further one as much later as the texts before it are long. So one text
that comes while ten thousand of another caller wait is in the next batch or
the one after, and the ten thousand lose nothing but that.

Equal texts are embedded once, however many wait for them.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

WASTE = 0.25
"""Most of a batch that may be padding. A second batch costs less than much more of it."""

ALIGNMENT = 8
"""Batches are padded to a multiple of this many tokens, so that shapes, and with them buffers, repeat."""

SHORT = 16
"""Up to so many tokens batches are not padded: there are few such lengths, and padding costs them most."""

WaiterT = TypeVar("WaiterT", bound=Hashable)


def padded(length: int) -> int:
    """Returns the tokens that a text of such length takes in a batch whose longest text it is."""
    return length if length <= SHORT else -(-length // ALIGNMENT) * ALIGNMENT


@dataclass(slots=True, eq=False)
class Pending(Generic[WaiterT]):
    """A text that waits to be embedded."""

    tokens: bytes
    """Its tokens, each four bytes."""
    turn: tuple[int, int, int]
    """Sorts it: urgency, turn in tokens, arrival."""
    waiters: set[WaiterT] = field(default_factory=set)
    """Who waits for it."""

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return len(self.tokens) // 4


class Batcher(Generic[WaiterT]):
    """Texts that wait, and the choice of those that go together.

    Args:
        budget: most tokens of a batch, padding included. A longer text goes alone.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._pending: dict[bytes, Pending[WaiterT]] = {}
        self._by_length: list[tuple[int, bytes]] = []
        self._by_turn: list[tuple[tuple[int, int, int], bytes]] = []
        self._now = 0
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._pending)

    def __repr__(self) -> str:
        return f"<Batcher {len(self)} texts, budget {self.budget}>"

    def add(self, waiter: WaiterT, texts: Iterable[bytes], *, urgency: int) -> None:
        """Adds the texts of one request, for which a waiter waits."""
        turn = self._now
        for tokens in texts:
            self._arrivals += 1
            wanted = (urgency, turn, self._arrivals)
            entry = self._pending.get(tokens)
            if entry is None:
                entry = self._pending[tokens] = Pending(tokens, wanted)
                bisect.insort(self._by_length, (entry.length, tokens))
                heapq.heappush(self._by_turn, (wanted, tokens))
            elif wanted < entry.turn:
                entry.turn = wanted
                heapq.heappush(self._by_turn, (wanted, tokens))
            entry.waiters.add(waiter)
            turn += entry.length

    def remove(self, waiter: WaiterT, texts: Iterable[bytes]) -> None:
        """Takes a waiter from texts; those for which nobody waits any more are forgotten."""
        for tokens in texts:
            entry = self._pending.get(tokens)
            if entry is not None:
                entry.waiters.discard(waiter)
                if not entry.waiters:
                    self._drop(entry)

    def take(self) -> list[Pending[WaiterT]]:
        """Takes out the texts of the next batch, the shortest first. Empty if none wait."""
        head = self._head()
        if head is None:
            return []
        self._now = max(self._now, head.turn[1])
        order = self._by_length
        first = bisect.bisect_left(order, (head.length, head.tokens))
        last = first  # both included
        total = head.length
        while True:
            below = order[first - 1][0] if first > 0 else None
            above = order[last + 1][0] if last + 1 < len(order) else None
            longest, shortest = order[last][0], order[first][0]
            # The neighbour that is nearer in length wastes less.
            goes_up = above is not None and (below is None or above - longest <= shortest - below)
            length = above if goes_up else below
            if length is None or not self._fits(last - first + 2, max(longest, length), total + length):
                break
            total += length
            if goes_up:
                last += 1
            else:
                first -= 1
        batch = [self._pending.pop(tokens) for _, tokens in order[first : last + 1]]
        del order[first : last + 1]
        return batch

    def _fits(self, count: int, longest: int, total: int) -> bool:
        size = count * padded(longest)
        return size <= self.budget and total >= (1 - WASTE) * count * longest

    def _head(self) -> Pending[WaiterT] | None:
        """Returns the text whose turn it is, and forgets turns that are over."""
        while self._by_turn:
            turn, tokens = self._by_turn[0]
            entry = self._pending.get(tokens)
            if entry is not None and entry.turn == turn:
                return entry
            heapq.heappop(self._by_turn)
        return None

    def _drop(self, entry: Pending[WaiterT]) -> None:
        del self._pending[entry.tokens]
        del self._by_length[bisect.bisect_left(self._by_length, (entry.length, entry.tokens))]
