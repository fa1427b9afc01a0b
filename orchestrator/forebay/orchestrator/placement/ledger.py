"""One account of memory for all backends: who is in, who may come in, and who has to leave for that.

Frameworks that share a machine know nothing of each other. Each of two finds
room for its model, both load, and the machine swaps or kills. So whatever the
orchestrator has loaded goes through this account: a load is reserved before it
begins, one load at a time is made for a model however many wait for it, and
where there is no room the models whose reload costs least leave first.

Loads on one host are granted in the order in which they were asked for. A small
one that slipped past a large one would take the room that was being made for
it, and the large one would never load.

Models that frameworks load or throw out by themselves are entered as they are
seen. They may exceed the limit; nothing that is granted here ever does.

Nothing here waits or does I/O: `Effects` is told what to do, and tells back how
it went.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, TypeAlias

from forebay.kit.failure import BackendUnavailable, Failure, MemoryExhausted
from forebay.orchestrator.clock import Clock
from forebay.orchestrator.placement.room import Room

Key: TypeAlias = tuple[str, str]
"""A model on a backend: the backend's name, and the model's as the backend spells it."""

_READ_RATE = 2.0**30
"""Bytes a second in which a model is thought to load where no load of it was seen: an SSD's pace."""

_LOAD_LEAST = 1.0
"""Seconds that any load is thought to take."""

_FADE = 300.0
"""Seconds after its last use in which a model's claim to its place halves. People come back to a model within
minutes or not soon."""

_STUCK = 30.0
"""Seconds for which a model that could not be unloaded is left alone."""


class Stage(Enum):
    """Where a model is on its way into memory and out of it."""

    WAITING = "waiting"
    """There is no room for it yet. It takes none."""
    LOADING = "loading"
    """Its room is reserved."""
    RESIDENT = "resident"
    """It is in memory."""
    LEAVING = "leaving"
    """It is being unloaded. Its room is taken until that is done."""


class Effects(Protocol):
    """What the ledger has done. Neither method may call back before it returns."""

    def load(self, key: Key) -> None:
        """Loads a model, and tells `loaded` or `failed`."""

    def evict(self, key: Key) -> None:
        """Unloads a model, and tells `evicted` or `kept`."""


@dataclass(eq=False, slots=True)
class Waiter:
    """One who wants a model in memory. Told how that ended once, unless they leave before."""

    on_end: Callable[[Failure | None], None]
    """Called with why it is not in memory, or with None; then the model is held for the waiter."""
    key: Key
    """The model."""
    is_over: bool = False
    """Whether they were told, or left."""
    held: Entry | None = None
    """What is held for them."""


@dataclass(eq=False, slots=True, kw_only=True)
class Entry:
    """One model in the account."""

    key: Key
    """The model."""
    size: int
    """Bytes that it takes, or is expected to take. 0 is unknown."""
    stage: Stage
    """Where it is."""
    since: float
    """When it came there."""
    used: float
    """When it was used last."""
    seconds: float | None = None
    """How long its last load took. None is not known."""
    pinned: bool = False
    """Whether it never leaves for another."""
    users: int = 0
    """Calls that use it now."""
    foreign: bool = False
    """Whether somebody else is loading it, so that nobody here follows that load."""
    stuck_until: float = 0.0
    """Until when it is no use to try to unload it."""
    waiters: list[Waiter] = field(default_factory=list)
    """Who waits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One model as its backend lists it."""

    model: str
    """Its name there."""
    size: int
    """Bytes that it takes, or is expected to take. 0 is unknown."""
    is_loaded: bool
    """Whether it is in memory."""
    is_loading: bool = False
    """Whether it is being loaded."""
    pinned: bool = False
    """Whether the backend keeps it whatever comes."""
    seconds: float | None = None
    """How long its last load took."""
    idle: float | None = None
    """Seconds since its last use, by whoever used it. None is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A host's memory at one moment, in bytes."""

    host: str
    limit: int
    """Most that models may take. 0 is no limit, or not known."""
    used: int
    """What models take."""
    reserved: int
    """What loads in progress are going to take."""
    pinned: int
    """What of `used` and `reserved` never leaves for another model."""
    available: int | None
    """What the host has left, whoever uses the rest. None is not known."""
    loads: int
    """Loads in progress."""
    waiting: int
    """Loads that wait for room."""


@dataclass(slots=True)
class _Host:
    name: str
    limit: int = 0
    available: int | None = None
    queue: deque[Entry] = field(default_factory=deque)


@dataclass(slots=True)
class _Backend:
    host: _Host
    limit: int = 0  # of its own, beside the host's
    can_unload: bool = True


class Ledger:
    """Decides what is loaded, and what leaves.

    Args:
        effects: does what is decided.
        clock: gives the time in seconds.
    """

    def __init__(self, effects: Effects, *, clock: Clock) -> None:
        self._effects = effects
        self._clock = clock
        self._hosts: dict[str, _Host] = {}
        self._backends: dict[str, _Backend] = {}
        self._entries: dict[Key, Entry] = {}
        self._sizes: dict[Key, int] = {}  # as they were measured

    def __repr__(self) -> str:
        shown = (f"{each.key[0]}/{each.key[1]} {each.stage.value}" for each in self._entries.values())
        return f"<Ledger [{' | '.join(shown)}]>"

    # What is known of hosts and backends.

    def measure(self, host: str, *, limit: int, available: int | None = None) -> None:
        """Notes how much memory a host has for models."""
        known = self._host(host)
        known.limit, known.available = limit, available
        self._pump(known)

    def place(self, backend: str, *, host: str, limit: int = 0) -> None:
        """Notes on which host a backend is, and what limit it has of its own."""
        on = self._host(host)
        known = self._backends.get(backend)
        if known is None:
            self._backends[backend] = _Backend(host=on, limit=limit)
            return
        before, known.host, known.limit = known.host, on, limit
        if before is not on:
            moved = [entry for entry in before.queue if entry.key[0] == backend]
            for entry in moved:
                before.queue.remove(entry)
                on.queue.append(entry)
            self._pump(before)
        self._pump(on)

    def cannot_unload(self, backend: str) -> None:
        """Notes that a framework loads and unloads by itself and cannot be told."""
        self._backends[backend].can_unload = False

    def is_known(self, backend: str) -> bool:
        """Returns whether a backend was placed, and not lost since."""
        return backend in self._backends

    def observe(self, backend: str, listed: Sequence[Listed], *, asked: float) -> None:
        """Takes in a list of models.

        Args:
            backend: whose list it is.
            listed: every model it has.
            asked: when the list was asked for: what changed later is not in it.
        """
        now = self._clock()
        there = {(backend, each.model): each for each in listed}
        for key, each in there.items():
            if each.is_loaded:
                self._see(key, each, now)
            elif each.is_loading and key not in self._entries:
                entry = self._enter(key, each.size, Stage.LOADING)
                entry.foreign = True
        for key, entry in list(self._entries.items()):
            if key[0] != backend:
                continue
            listing = there.get(key)
            is_there = listing is not None and (listing.is_loaded or (entry.foreign and listing.is_loading))
            # One in use is in memory whatever the list says: frameworks that load by themselves list it late.
            is_gone = entry.stage is Stage.RESIDENT and not entry.users and entry.since < asked
            if not is_there and (is_gone or entry.foreign):
                del self._entries[key]
        self._pump(self._backends[backend].host)

    def _see(self, key: Key, listed: Listed, now: float) -> None:
        entry = self._entries.get(key)
        if entry is None:
            entry = self._enter(key, listed.size, Stage.RESIDENT)
            entry.used = now - (listed.idle or 0.0)
        if listed.size:
            self._sizes[key] = listed.size
        if entry.stage is Stage.WAITING or entry.foreign:
            # Somebody else loaded it.
            self._arrive(entry, listed.size or entry.size, listed.seconds)
        if entry.stage is Stage.RESIDENT:
            entry.size = listed.size or entry.size
            entry.seconds = listed.seconds if listed.seconds is not None else entry.seconds
            entry.pinned = entry.pinned or listed.pinned
            if listed.idle is not None:
                entry.used = max(entry.used, now - listed.idle)

    def lose(self, backend: str, failure: Failure) -> None:
        """Notes that a backend is away: whatever it had in memory cannot be told from what it lost."""
        known = self._backends.pop(backend, None)
        if known is None:
            return
        for key, entry in list(self._entries.items()):
            # Whoever loads or unloads will say themselves that it failed.
            if key[0] != backend or (entry.stage is Stage.LOADING and not entry.foreign):
                continue
            if entry.stage is Stage.LEAVING:
                continue
            del self._entries[key]
            if entry in known.host.queue:
                known.host.queue.remove(entry)
            self._end(entry, failure)
        self._pump(known.host)

    # What calls want.

    def hold(self, key: Key) -> Entry | None:
        """Keeps a model in memory until `release`. Returns None, and keeps nothing, if it is not there."""
        entry = self._entries.get(key)
        if entry is None or entry.stage is not Stage.RESIDENT:
            return None
        entry.users += 1
        entry.used = self._clock()
        return entry

    def release(self, held: Entry) -> None:
        """Lets go of what was held, once."""
        held.users -= 1
        held.used = self._clock()
        if not held.users:
            self._pump_of(held.key[0])

    def ask(
        self, key: Key, size: int, on_end: Callable[[Failure | None], None], *, pinned: bool = False
    ) -> Waiter:
        """Asks for a model to be in memory.

        Args:
            key: the model; its backend was placed.
            size: bytes that it is expected to take. 0 is unknown, and always fits.
            on_end: called once with how it ended, perhaps before this returns. After None the model is held.
            pinned: whether it never leaves for another from then on.
        """
        waiter = Waiter(on_end, key)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._enter(key, size, Stage.WAITING)
            self._backends[key[0]].host.queue.append(entry)
        entry.pinned = entry.pinned or pinned
        entry.waiters.append(waiter)
        if entry.stage is Stage.RESIDENT:
            self._end(entry, None)
        elif entry.foreign:
            entry.foreign = False
            self._effects.load(key)  # which joins the load that is going on there
        self._pump_of(key[0])
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Takes a waiter out. A load that has begun goes on; a model that was held is let go."""
        held, waiter.held = waiter.held, None
        if held is not None:
            self.release(held)
        if waiter.is_over:
            return
        waiter.is_over = True
        entry = self._entries.get(waiter.key)
        if entry is None or waiter not in entry.waiters:
            return
        entry.waiters.remove(waiter)
        if entry.stage is Stage.WAITING and not entry.waiters:
            self._drop(entry)
            self._pump_of(entry.key[0])

    def is_waiting(self, waiter: Waiter) -> bool:
        """Returns whether there is no room yet for what a waiter asked for."""
        entry = self._entries.get(waiter.key)
        return not waiter.is_over and entry is not None and entry.stage in (Stage.WAITING, Stage.LEAVING)

    def pin(self, key: Key, *, pinned: bool) -> None:
        """Has a model never leave for another, or lets it leave again."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.pinned = pinned
            self._pump_of(key[0])

    def pump(self) -> None:
        """Grants whatever has room by now."""
        for host in self._hosts.values():
            self._pump(host)

    # How it went.

    def loaded(self, key: Key, *, size: int = 0, seconds: float | None = None) -> None:
        """Notes that a load that was ordered is done.

        Args:
            key: the model.
            size: bytes that it takes. 0 is not known.
            seconds: how long that took. None is not known.
        """
        entry = self._entries.get(key)
        if entry is None or entry.stage is not Stage.LOADING:
            return
        if size:
            self._sizes[key] = size
        self._arrive(entry, size or entry.size, seconds)
        self._pump_of(key[0])

    def failed(self, key: Key, failure: Failure) -> None:
        """Notes that a load that was ordered failed."""
        entry = self._entries.get(key)
        if entry is not None and entry.stage is Stage.LOADING:
            del self._entries[key]
            self._end(entry, failure)
            self._pump_of(key[0])

    def evicted(self, key: Key) -> None:
        """Notes that a model that was to leave has left."""
        entry = self._entries.get(key)
        if entry is None or entry.stage is not Stage.LEAVING:
            return
        del self._entries[key]
        if entry.waiters and key[0] not in self._backends:
            self._end(entry, BackendUnavailable(f"backend {key[0]} was lost", metadata={"backend": key[0]}))
        elif entry.waiters:  # they came while it left
            again = self._enter(key, entry.size, Stage.WAITING)
            again.waiters, again.pinned, again.seconds = entry.waiters, entry.pinned, entry.seconds
            self._backends[key[0]].host.queue.append(again)
        self._pump_of(key[0])

    def kept(self, key: Key) -> None:
        """Notes that a model that was to leave is still there."""
        entry = self._entries.get(key)
        if entry is not None and entry.stage is Stage.LEAVING:
            entry.stuck_until = self._clock() + _STUCK
            self._arrive(entry, entry.size, entry.seconds)
            self._pump_of(key[0])

    # What there is to see.

    def find(self, key: Key) -> Entry | None:
        """Returns a model in the account."""
        return self._entries.get(key)

    def figures(self) -> list[Figures]:
        """Returns every host's memory."""
        # Copies in one step each: metrics are read on another thread.
        return [self._figures(host) for host in list(self._hosts.values())]

    def figures_of(self, backend: str) -> Figures | None:
        """Returns the memory of a backend's host; None if that is not known."""
        known = self._backends.get(backend)
        return self._figures(known.host) if known is not None else None

    def room(self, backend: str) -> Room | None:
        """Returns how much room there is for one more model on a backend; None if it is not known."""
        known = self._backends.get(backend)
        if known is None:
            return None
        free = math.inf
        if known.host.limit:
            free = self._free(known.host)
        own = math.inf
        if known.limit:
            own = known.limit - sum(each.size for each in self._on_backend(backend))
        is_own = own < free  # which of the two is short decides whose leaving helps
        near = self._on_backend(backend) if is_own else self._on_host(known.host)
        evictable = passing = 0
        for entry in near:
            if entry.pinned or not self._can_unload(entry):
                continue
            if self._is_idle(entry):
                evictable += entry.size
            else:
                passing += entry.size
        return Room(
            free=min(free, own),
            evictable=evictable,
            passing=passing,
            limit=known.limit if is_own else known.host.limit,
            host=known.host.name,
        )

    def refusal(self, key: Key, size: int) -> MemoryExhausted:
        """Returns what to tell a caller whose model has no room."""
        size = self._sizes.get(key, size)
        backend = self._backends[key[0]]
        own = [each for each in self._backends.values() if each.host is backend.host]
        figures = self._figures(backend.host)
        text = (
            f"model {key[1]} needs {_mib(size)} and does not fit: models may take "
            f"{_mib(figures.limit)} on this host, {_mib(figures.used)} are used, {_mib(figures.reserved)} "
            f"reserved and {_mib(figures.pinned)} of that pinned"
        )
        if figures.available is not None:
            text += f"; the host has {_mib(figures.available)} left"
        if backend.limit:
            text += f"; backend {key[0]} takes at most {_mib(backend.limit)}"
        if not all(each.can_unload for each in own):
            text += "; some frameworks unload only by themselves"
        metadata = {
            "backend": key[0],
            "model": key[1],
            "needed_bytes": str(size),
            "limit_bytes": str(figures.limit),
            "used_bytes": str(figures.used),
            "reserved_bytes": str(figures.reserved),
            "pinned_bytes": str(figures.pinned),
        }
        return MemoryExhausted(text, metadata=metadata)

    # Inside.

    def _host(self, name: str) -> _Host:
        return self._hosts.setdefault(name, _Host(name))

    def _enter(self, key: Key, size: int, stage: Stage) -> Entry:
        now = self._clock()
        size = self._sizes.get(key, size)
        entry = self._entries[key] = Entry(key=key, size=size, stage=stage, since=now, used=now)
        return entry

    def _drop(self, entry: Entry) -> None:
        del self._entries[entry.key]
        known = self._backends.get(entry.key[0])
        if known is not None and entry in known.host.queue:
            known.host.queue.remove(entry)

    def _arrive(self, entry: Entry, size: int, seconds: float | None) -> None:
        known = self._backends.get(entry.key[0])
        if known is not None and entry in known.host.queue:
            known.host.queue.remove(entry)
        entry.stage, entry.foreign = Stage.RESIDENT, False
        entry.since = entry.used = self._clock()
        entry.size = size
        entry.seconds = seconds if seconds is not None else entry.seconds
        self._end(entry, None)

    def _end(self, entry: Entry, failure: Failure | None) -> None:
        waiters, entry.waiters = entry.waiters, []
        for waiter in waiters:
            waiter.is_over = True
            if failure is None:
                waiter.held = entry
                entry.users += 1
        for waiter in waiters:
            waiter.on_end(failure)

    def _pump_of(self, backend: str) -> None:
        known = self._backends.get(backend)
        if known is not None:
            self._pump(known.host)
        else:  # it was lost, and its host may have room now
            self.pump()

    def _pump(self, host: _Host) -> None:
        """Grants the loads that have room, in their order, and makes room for the first that has none."""
        while host.queue:
            entry = host.queue[0]
            own, shared = self._shortages(entry)
            if own <= 0 and shared <= 0:
                host.queue.popleft()
                entry.stage, entry.since = Stage.LOADING, self._clock()
                self._effects.load(entry.key)
                continue
            if not self._can_be_made(entry, own, shared):
                host.queue.popleft()
                del self._entries[entry.key]
                self._end(entry, self.refusal(entry.key, entry.size))
                continue
            for victim in self._victims(entry, own, shared):
                victim.stage, victim.since = Stage.LEAVING, self._clock()
                self._effects.evict(victim.key)
            return

    def _shortages(self, entry: Entry) -> tuple[float, float]:
        """Returns the bytes that are missing for a load, by the backend's own limit and by the host's."""
        backend = self._backends[entry.key[0]]
        own = shared = 0.0
        if not entry.size:
            return own, shared
        if backend.limit:
            own = entry.size - (backend.limit - sum(each.size for each in self._on_backend(entry.key[0])))
        if backend.host.limit:
            shared = entry.size - self._free(backend.host)
        return own, shared

    def _free(self, host: _Host) -> float:
        taken = reserved = 0
        for entry in self._on_host(host):
            taken += entry.size
            if entry.stage is Stage.LOADING:
                reserved += entry.size
        free = host.limit - taken
        if host.available is not None:
            # How much of what is reserved is taken already nobody knows, so all of it may be to come.
            free = min(free, host.available - reserved)
        return free

    def _can_be_made(self, entry: Entry, own: float, shared: float) -> bool:
        """Whether waiting, or unloading what may be unloaded, can ever make room."""
        host = self._backends[entry.key[0]].host
        near = sum(each.size for each in self._on_backend(entry.key[0]) if self._may_leave(each))
        far = sum(each.size for each in self._on_host(host) if self._may_leave(each))
        return own <= near and shared <= far

    def _may_leave(self, entry: Entry) -> bool:
        return not entry.pinned and (self._can_unload(entry) or entry.stage is Stage.LEAVING)

    def _can_unload(self, entry: Entry) -> bool:
        known = self._backends.get(entry.key[0])
        return known is not None and known.can_unload and self._clock() >= entry.stuck_until

    def _is_idle(self, entry: Entry) -> bool:
        return entry.stage is Stage.RESIDENT and not entry.users

    def _victims(self, entry: Entry, own: float, shared: float) -> list[Entry]:
        """Returns who leaves for a load: those whose reload costs least. Nobody, if that would not do."""
        host = self._backends[entry.key[0]].host
        near = self._choose(self._on_backend(entry.key[0]), own, ())
        if near is None:
            return []
        far = self._choose(self._on_host(host), shared, near)
        return [] if far is None else [*near, *far]

    def _choose(self, among: Iterable[Entry], missing: float, chosen: Sequence[Entry]) -> list[Entry] | None:
        """Returns who has to leave besides those chosen; None if that is not enough."""
        entries = list(among)
        missing -= sum(each.size for each in entries if each.stage is Stage.LEAVING)
        missing -= sum(each.size for each in chosen)
        if missing <= 0:
            return []
        now = self._clock()
        idle = [each for each in entries if self._is_idle(each) and self._may_leave(each) and each.size]
        idle = [each for each in idle if each not in chosen]
        idle.sort(key=lambda each: _claim(each, now) / each.size)
        taken: list[Entry] = []
        for each in idle:
            if missing <= 0:
                break
            taken.append(each)
            missing -= each.size
        if missing > 0:
            return None
        for each in sorted(taken, key=lambda each: _claim(each, now), reverse=True):
            if missing + each.size <= 0:  # the ones after it are enough without it
                taken.remove(each)
                missing += each.size
        return taken

    def _on_backend(self, backend: str) -> Iterator[Entry]:
        return (
            each
            for each in list(self._entries.values())
            if each.key[0] == backend and each.stage is not Stage.WAITING
        )

    def _on_host(self, host: _Host) -> Iterator[Entry]:
        for each in list(self._entries.values()):
            known = self._backends.get(each.key[0])
            if known is not None and known.host is host and each.stage is not Stage.WAITING:
                yield each

    def _figures(self, host: _Host) -> Figures:
        used = reserved = pinned = loads = 0
        for entry in self._on_host(host):
            if entry.stage is Stage.LOADING:
                reserved += entry.size
                loads += 1
            else:
                used += entry.size
            pinned += entry.size if entry.pinned else 0
        return Figures(
            host=host.name,
            limit=host.limit,
            used=used,
            reserved=reserved,
            pinned=pinned,
            available=host.available,
            loads=loads,
            waiting=len(host.queue),
        )


def _claim(entry: Entry, now: float) -> float:
    """Returns how much is lost if a model leaves: the seconds of its reload, times how likely that is."""
    seconds = entry.seconds if entry.seconds else max(_LOAD_LEAST, entry.size / _READ_RATE)
    return seconds * math.pow(0.5, max(0.0, now - entry.used) / _FADE)


def _mib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
