"""Who may run and who goes next: the queue before all backends, as synchronous code over an injected clock.

Three questions are answered. *How urgent?* The most urgent go first. *Whose
turn among callers?* That of the caller who has used the fewest tokens. A
counter and not a deficit round, for what a reply takes is known only when it
is over, and a counter can be put right then. *Does anybody starve?* A call
that waited long is aged, and every eighth turn is that of the oldest aged one.
Ageing is a share and not a promotion: under a lasting overload everything in
the queue grows old, and promoted work would crowd out the urgent calls that
the order is there for.

A call belongs to a pool: the models that may serve it. A pool has no more calls running than its
backends have slots, so calls for a busy model do not take the permits of a
backend that is idle.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum

from forebay.kit.failure import QueueFull, QueueTimeout
from forebay.kit.pipeline import Urgency
from forebay.orchestrator.clock import Clock

EVERYTHING = ""
"""The pool that every call is in besides its own."""

OLDEST_EVERY = 8
"""Every how many turns the oldest aged call goes. An eighth bounds every wait, and leaves the urgent what
they need while their own load is below seven eighths."""

_WEIGHT = 0.25
"""Weight of the latest call in the averages: four calls after a change, two thirds of it are seen."""

_RATES = 256
"""Pools whose pace is remembered; a name that nobody has is a pool too, and must cost no memory for ever."""

_CALLERS = 1024
"""Callers whose counters are remembered while they have no call here."""

_ROOMY = 8
"""Waiting calls above which one place for the oldest of each urgency is little."""

_MOST_DEBT = 100_000.0
"""Tokens a caller can be behind the others: an hour at 30 tokens a second. More would punish a busy night
on an idle machine for longer than anybody remembers it."""

_OVERDUE = 0.25
"""What a call that takes longer than expected is expected to take still, as a share of what it took."""

_RETRY_MIN, _RETRY_MAX, _RETRY_UNKNOWN = 0.1, 60.0, 1.0
"""Seconds that a refused caller is told to wait: at least, at most, and while nothing is known."""


class Turn(Enum):
    """Where a call is."""

    WAITING = "waiting"
    RUNNING = "running"
    DROPPED = "dropped"
    """It lost its place in a full queue to a call that had more right to it."""
    OVER = "over"


@dataclass(eq=False, slots=True, kw_only=True)
class Ticket:
    """One call at the queue."""

    urgency: Urgency
    """How urgent it came."""
    caller: str
    """Who asks."""
    pool: str
    """What it needs: the models that may serve it."""
    cost: float
    """Tokens it is expected to take."""
    size: int
    """Bytes that it keeps in memory while it waits."""
    number: int
    """Place in the order of arrival."""
    arrived: float
    """When it came, on the queue's clock."""
    on_turn: Callable[[], None]
    """Called when the call begins to run, or is dropped."""
    turn: Turn = Turn.WAITING
    started: float = field(default=0.0)
    """When it began to run."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a waiting call can expect."""

    ahead: int
    """Calls that go first."""
    seconds: float | None
    """Expected wait from now on; None while nothing is known of how long calls take."""


@dataclass(slots=True)
class Tally:
    """What became of calls, since the start."""

    admitted: int = 0
    """Calls that got to run."""
    full: int = 0
    """Calls that were refused for want of room, or dropped."""
    late: int = 0
    """Calls that were refused because their turn would come after their deadline."""
    left: int = 0
    """Calls that left while they waited."""


class Admission:
    """Admits calls to run, and keeps those that have to wait in order.

    Args:
        queue: most calls that wait.
        queue_bytes: most bytes that their requests may have together.
        ageing: seconds after which a normal call is aged. Batch takes twice as long, and an interactive call
            none, for it has nobody before it but its like.
        capacity: calls that may run at once in a pool; `EVERYTHING` asks for the whole.
        clock: gives the time in seconds.
    """

    def __init__(
        self,
        *,
        queue: int,
        ageing: float,
        capacity: Callable[[str], int],
        clock: Clock,
        queue_bytes: int = 2**28,
    ) -> None:
        self._queue = queue
        self._queue_bytes = queue_bytes
        self._bytes = 0
        self._ageing = ageing
        self._capacity = capacity
        self._clock = clock
        self._numbers = itertools.count()
        self._waiting: list[Ticket] = []  # in order of arrival
        self._running: dict[Ticket, None] = {}
        self._pools: dict[str, int] = {}  # calls that run, by pool
        self._used: OrderedDict[str, float] = OrderedDict()  # tokens by caller
        self._level_used = 0.0  # the counter of who ran last: where newcomers begin
        self._turns = 0
        self._rates: OrderedDict[str, float] = OrderedDict()  # seconds a token, by pool
        self._rate: float | None = None
        self._plan: dict[Ticket, Outlook] | None = None
        self.tally = Tally()

    def __repr__(self) -> str:
        return f"<Admission {self.running} running, queue {self.waiting}/{self._queue}>"

    @property
    def running(self) -> int:
        """Calls that run now."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Calls that wait now."""
        return len(self._waiting)

    def change(self, *, queue: int, queue_bytes: int, ageing: float) -> None:
        """Goes by other bounds from now on. Who waits, goes on waiting."""
        self._queue, self._queue_bytes, self._ageing = queue, queue_bytes, ageing
        self._plan = None

    @property
    def permits(self) -> int:
        """Most calls that run at once."""
        return self._capacity(EVERYTHING)

    @property
    def oldest_wait(self) -> float | None:
        """Seconds that the oldest of the waiting calls has waited; None if none waits."""
        return self._clock() - self._waiting[0].arrived if self._waiting else None

    def depth(self) -> dict[Urgency, int]:
        """Returns how many calls wait, by urgency."""
        depth = dict.fromkeys(Urgency, 0)
        for ticket in self._waiting:
            depth[ticket.urgency] += 1
        return depth

    def used(self, caller: str) -> float:
        """Returns the tokens on a caller's counter."""
        return self._used.get(caller, 0.0)

    def arrive(
        self,
        *,
        urgency: Urgency,
        caller: str,
        pool: str,
        cost: float,
        size: int = 0,
        remaining: float | None = None,
        on_turn: Callable[[], None] = lambda: None,
    ) -> Ticket:
        """Takes in a call, which then runs or waits as its ticket says.

        Args:
            urgency: how urgent it is.
            caller: who asks.
            pool: what it needs: the models that may serve it.
            cost: tokens it is expected to take.
            size: bytes that it keeps in memory while it waits.
            remaining: seconds until its deadline; None is never.
            on_turn: called when its turn comes after a wait, or never will.

        Raises:
            QueueFull: there is no room to wait in.
            QueueTimeout: its turn would come after its deadline.
        """
        ticket = Ticket(
            urgency=urgency,
            caller=caller,
            pool=pool,
            cost=max(1.0, cost),
            size=size,
            number=next(self._numbers),
            arrived=self._clock(),
            on_turn=on_turn,
        )
        self._welcome(caller)
        if not self._waiting and self._has_room(ticket):
            self._run(ticket)
            return ticket
        self._enter(ticket)
        if self._has_room(ticket):  # who waits, waits for another pool: it may run beside them
            self.pump()
            if ticket.turn is Turn.RUNNING:
                return ticket
        if self.waiting > self._queue or self._bytes > self._queue_bytes:
            self._make_room(ticket)
        if remaining is not None:
            seconds = self.outlook(ticket).seconds
            if seconds is not None and seconds >= remaining:
                self._forget(ticket, Turn.OVER)
                self.tally.late += 1
                raise _late(seconds, remaining)
        return ticket

    def leave(self, ticket: Ticket, *, tokens: float | None = None, aside: float = 0.0) -> None:
        """Takes a call out, wherever it is. A second time does nothing.

        Args:
            ticket: the call.
            tokens: what it took, if it ran to its end.
            aside: seconds of it that tell nothing of the pace of calls to come, such as the load of a model.
        """
        if ticket.turn is Turn.WAITING:
            self._forget(ticket, Turn.OVER)
            self.tally.left += 1
        elif ticket.turn is Turn.RUNNING:
            self._stop(ticket, tokens, aside)
        self.pump()

    def pump(self) -> None:
        """Lets run whoever may. To be called, too, when the capacity may have grown."""
        while self._waiting:
            ticket = next(self._order(only_startable=True), None)
            if ticket is None:
                return
            self._forget(ticket, Turn.RUNNING)
            self._turns += 1
            self._run(ticket)
            ticket.on_turn()

    def outlook(self, ticket: Ticket) -> Outlook:
        """Returns what a waiting call can expect if nobody else comes."""
        if self._plan is None:
            self._plan = self._forecast()
        return self._plan[ticket]

    def prospect(self) -> float | None:
        """Returns the seconds that an interactive call which came now would wait; None if that is not known.

        It is that of a caller who had no call yet, with a model that is free.
        """
        if not self._waiting and len(self._running) < self.permits:
            return 0.0
        newcomer = Ticket(
            urgency=Urgency.INTERACTIVE,
            caller="",
            pool=EVERYTHING,
            cost=1.0,
            size=0,
            number=-1,
            arrived=self._clock(),
            on_turn=lambda: None,
        )
        self._waiting.append(newcomer)
        try:
            return self._forecast()[newcomer].seconds
        finally:
            self._waiting.pop()

    def full(self, pool: str) -> QueueFull:
        """Returns what to tell a call that there is no room for."""
        turns = max(1, self._capacity(EVERYTHING))
        rate = self._pace(pool)
        if rate is None:
            seconds = _RETRY_UNKNOWN
        else:
            # One pass over costs and not a forecast: refusing has to stay cheap when everything is late.
            seconds = sum(ticket.cost for ticket in self._waiting) * rate / turns
        seconds = min(_RETRY_MAX, max(_RETRY_MIN, seconds))
        return QueueFull(
            f"the orchestrator is full: {self.running} calls run and {self.waiting} wait; try again later",
            metadata={"active": str(self.running), "waiting": str(self.waiting)},
            retry_after=timedelta(seconds=seconds),
        )

    # Running.

    def _has_room(self, ticket: Ticket) -> bool:
        return len(self._running) < self._capacity(EVERYTHING) and self._pools.get(
            ticket.pool, 0
        ) < self._capacity(ticket.pool)

    def _run(self, ticket: Ticket) -> None:
        self._plan = None
        ticket.turn = Turn.RUNNING
        ticket.started = self._clock()
        self._running[ticket] = None
        self._pools[ticket.pool] = self._pools.get(ticket.pool, 0) + 1
        used = self._used.get(ticket.caller, 0.0)
        self._level_used = max(self._level_used, used)
        self._used[ticket.caller] = used + ticket.cost
        self.tally.admitted += 1

    def _stop(self, ticket: Ticket, tokens: float | None, aside: float) -> None:
        self._plan = None
        ticket.turn = Turn.OVER
        del self._running[ticket]
        self._pools[ticket.pool] -= 1
        if not self._pools[ticket.pool]:
            del self._pools[ticket.pool]
        if tokens is None:
            return
        taken = max(1.0, tokens)
        if ticket.caller in self._used:
            self._used[ticket.caller] += taken - ticket.cost
        pace = max(0.0, self._clock() - ticket.started - aside) / taken
        self._rate = _average(self._rate, pace)
        self._rates[ticket.pool] = _average(self._rates.get(ticket.pool), pace)
        self._rates.move_to_end(ticket.pool)
        if len(self._rates) > _RATES:
            self._rates.popitem(last=False)

    # Waiting.

    def _enter(self, ticket: Ticket) -> None:
        self._plan = None
        self._waiting.append(ticket)
        self._bytes += ticket.size

    def _forget(self, ticket: Ticket, turn: Turn) -> None:
        self._plan = None
        ticket.turn = turn
        self._waiting.remove(ticket)
        self._bytes -= ticket.size

    def _make_room(self, newcomer: Ticket) -> None:
        """Drops the call that has the least right to its place.

        Raises:
            QueueFull: that is the newcomer.
        """
        victim = self._victim(newcomer)
        self.tally.full += 1
        if victim is None or self._bytes - victim.size > self._queue_bytes:
            self._forget(newcomer, Turn.OVER)
            raise self.full(newcomer.pool)
        self._forget(victim, Turn.DROPPED)
        victim.on_turn()

    # Order.

    def _welcome(self, caller: str) -> None:
        """Brings a counter in line when its caller comes back: rest earns no credit, and debt has an end."""
        waiting = {ticket.caller for ticket in self._waiting}
        if caller not in waiting:
            low = min((self._used[each] for each in waiting if each in self._used), default=self._level_used)
            self._used[caller] = min(max(self._used.get(caller, low), low), low + _MOST_DEBT)
        self._used.move_to_end(caller)
        if len(self._used) > _CALLERS:
            busy = waiting | {ticket.caller for ticket in self._running}
            idle = next((each for each in self._used if each not in busy and each != caller), None)
            if idle is not None:
                del self._used[idle]

    def _is_aged(self, ticket: Ticket, now: float) -> bool:
        return now - ticket.arrived >= max(1, ticket.urgency) * self._ageing

    def _order(self, *, only_startable: bool) -> Iterator[Ticket]:
        """Yields the waiting calls in the order of their turns, were nobody else to come."""
        now = self._clock()
        levels: dict[int, _Level] = {}
        aged: deque[Ticket] = deque()
        rooms: dict[str, bool] = {}
        used: dict[str, float] = {}
        for ticket in self._waiting:
            if only_startable:
                if ticket.pool not in rooms:
                    rooms[ticket.pool] = self._has_room(ticket)
                if not rooms[ticket.pool]:
                    continue
            used.setdefault(ticket.caller, self._used.get(ticket.caller, 0.0))
            levels.setdefault(ticket.urgency, _Level()).add(ticket, used)
            if self._is_aged(ticket, now):
                aged.append(ticket)
        turns = self._turns
        taken: set[Ticket] = set()
        for _, level in sorted(levels.items()):
            while (first := level.first(used, taken)) is not None:
                ticket = first
                turns += 1
                if turns % OLDEST_EVERY == 0:
                    while aged and aged[0] in taken:
                        aged.popleft()
                    if aged:
                        ticket = aged.popleft()
                taken.add(ticket)
                used[ticket.caller] += ticket.cost
                yield ticket

    def _victim(self, newcomer: Ticket) -> Ticket | None:
        """Returns the waiting call that has less right to a place than the newcomer, or None."""
        counts: dict[str, int] = {newcomer.caller: 0}
        # The oldest is the next to profit from its age, and so the one call that is sure of its turn. Where
        # places are many the oldest of each urgency is, or none would live to age under ever new urgent ones.
        now = self._clock()
        is_roomy = len(self._waiting) > _ROOMY
        spared: dict[int, Ticket] = {}
        for ticket in self._waiting:
            if is_roomy or (not spared and self._is_aged(ticket, now)):
                spared.setdefault(ticket.urgency, ticket)
            counts[ticket.caller] = counts.get(ticket.caller, 0) + (ticket is not newcomer)
        found: tuple[int, int, int] | None = None
        victim = None
        for ticket in self._waiting:
            if ticket is newcomer or ticket is spared.get(ticket.urgency):
                continue
            is_less_urgent = ticket.urgency > newcomer.urgency
            # A caller with a crowd here gives a place to one with few, their youngest call's.
            is_of_a_crowd = (
                ticket.urgency >= newcomer.urgency and counts[ticket.caller] > counts[newcomer.caller] + 1
            )
            if not (is_less_urgent or is_of_a_crowd):
                continue
            rank = (ticket.urgency if is_less_urgent else 0, counts[ticket.caller], ticket.number)
            if found is None or rank > found:
                found, victim = rank, ticket
        return victim

    # Forecast.

    def _pace(self, pool: str) -> float | None:
        return self._rates.get(pool, self._rate)

    def _forecast(self) -> dict[Ticket, Outlook]:
        """Plays what is to come: each call begins when its pool and the whole have a permit."""
        now = self._clock()
        ends: dict[str, list[float]] = {EVERYTHING: []}
        for ticket in self._running:
            pace = self._pace(ticket.pool)
            elapsed = now - ticket.started
            left = max(ticket.cost * pace - elapsed, elapsed * _OVERDUE) if pace is not None else 0.0
            ends[EVERYTHING].append(left)
            ends.setdefault(ticket.pool, []).append(left)
        for ticket in self._waiting:
            ends.setdefault(ticket.pool, [])
        for pool, heap in ends.items():
            spare = self._capacity(pool) - len(heap)
            heap.sort()
            if spare > 0:
                heap[:0] = [0.0] * spare
            elif spare < 0:  # the capacity shrank: so many have to end before anyone begins
                del heap[: min(-spare, len(heap) - 1)]
        is_whole_full = len(self._running) >= self._capacity(EVERYTHING)
        plan: dict[Ticket, Outlook] = {}
        before: dict[str, int] = {}
        for place, ticket in enumerate(self._order(only_startable=False)):
            own = before.get(ticket.pool, 0)
            before[ticket.pool] = own + 1
            # Who waits for another model is not in the way while only the models' own permits are short.
            ahead = place if is_whole_full else own
            pace = self._pace(ticket.pool)
            if pace is None:
                plan[ticket] = Outlook(ahead, None)
                continue
            begin = max(ends[ticket.pool][0], ends[EVERYTHING][0])
            end = begin + ticket.cost * pace
            heapq.heapreplace(ends[ticket.pool], end)
            heapq.heapreplace(ends[EVERYTHING], end)
            plan[ticket] = Outlook(ahead, begin)
        return plan


class _Level:
    """Waiting calls of one urgency: a line for each caller, and the caller with the fewest tokens first."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[Ticket]] = {}
        self._heap: list[tuple[float, int, str]] = []

    def add(self, ticket: Ticket, used: dict[str, float]) -> None:
        """Adds a call that came after those that were added before."""
        line = self._lines.get(ticket.caller)
        if line is None:
            line = self._lines[ticket.caller] = deque()
            heapq.heappush(self._heap, (used[ticket.caller], ticket.number, ticket.caller))
        line.append(ticket)

    def first(self, used: dict[str, float], taken: set[Ticket]) -> Ticket | None:
        """Returns the call whose turn it is, or None if all are taken."""
        while self._heap:
            counter, number, caller = self._heap[0]
            line = self._lines[caller]
            while line and line[0] in taken:
                line.popleft()
            if not line:
                heapq.heappop(self._heap)
            elif (used[caller], line[0].number) != (counter, number):
                # Counters and numbers only grow, so an entry that is out of date is never too far behind.
                heapq.heapreplace(self._heap, (used[caller], line[0].number, caller))
            else:
                return line[0]
        return None


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)


def _late(seconds: float, remaining: float) -> QueueTimeout:
    return QueueTimeout(
        f"the turn of this call would come in {seconds:.1f} s, and its deadline is in {remaining:.1f} s",
        metadata={"wait_seconds": f"{seconds:.3f}", "remaining_seconds": f"{remaining:.3f}"},
        retry_after=timedelta(seconds=min(_RETRY_MAX, max(_RETRY_MIN, seconds - remaining))),
    )
