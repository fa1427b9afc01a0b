"""The one account of memory: what is granted, what leaves for it, and thousands of schedules of both."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import pytest

from forebay.kit.failure import BackendUnavailable, Failure, MemoryExhausted, ModelLoadFailed
from forebay.orchestrator.placement.ledger import Key, Ledger, Listed, Stage, Waiter
from soak import counted

SEEDS = 400
"""Schedules of 120 steps each. `make soak` plays ten thousand."""


class Desk:
    """A ledger, what it ordered, and what waiters were told."""

    def __init__(self, limit: int = 10, available: int | None = None) -> None:
        self.time = 0.0
        self.loads: list[Key] = []
        self.evictions: list[Key] = []
        self.ledger = Ledger(self, clock=lambda: self.time)
        self.ledger.measure("h", limit=limit, available=available)
        for name in "ab":
            self.ledger.place(name, host="h")

    def load(self, key: Key) -> None:
        self.loads.append(key)

    def evict(self, key: Key) -> None:
        self.evictions.append(key)

    def ask(self, name: str, size: int = 1, *, backend: str = "a", pinned: bool = False) -> Ask:
        return Ask(self, (backend, name), size, pinned=pinned)

    def resident(self, name: str, size: int, *, backend: str = "a", seconds: float | None = None) -> Key:
        """Has a model loaded and let go."""
        asked = self.ask(name, size, backend=backend)
        assert self.loads.pop() == asked.key
        self.ledger.loaded(asked.key, size=size, seconds=seconds)
        self.release(asked.key)
        return asked.key

    def release(self, key: Key) -> None:
        entry = self.ledger.find(key)
        assert entry is not None
        self.ledger.release(entry)

    def stage(self, key: Key) -> Stage | None:
        entry = self.ledger.find(key)
        return entry.stage if entry is not None else None


class Ask:
    """One who waits."""

    def __init__(self, desk: Desk, key: Key, size: int, *, pinned: bool = False) -> None:
        self.key = key
        self.told: list[Failure | None] = []
        self.waiter: Waiter = desk.ledger.ask(key, size, self.told.append, pinned=pinned)

    @property
    def failure(self) -> Failure:
        assert len(self.told) == 1
        assert self.told[0] is not None
        return self.told[0]


def test_a_load_is_reserved_before_it_begins_and_made_once_for_all_who_wait() -> None:
    desk = Desk()
    asks = [desk.ask("m", 6) for _ in range(3)]
    assert desk.loads == [("a", "m")]
    (figures,) = desk.ledger.figures()
    assert (figures.used, figures.reserved, figures.loads, figures.waiting) == (0, 6, 1, 0)
    desk.ledger.loaded(("a", "m"), size=7, seconds=2.0)
    assert [ask.told for ask in asks] == [[None]] * 3
    (figures,) = desk.ledger.figures()
    assert (figures.used, figures.reserved) == (7, 0), "as it was measured"
    entry = desk.ledger.find(("a", "m"))
    assert entry is not None
    assert entry.users == 3, "it is held for each until they let go"
    assert desk.ask("m", 6).told == [None], "it is there"


def test_two_loads_that_fit_alone_and_not_together_are_not_made_together() -> None:
    desk = Desk(limit=10)
    one, two = desk.ask("m", 6), desk.ask("n", 6, backend="b")
    assert desk.loads == [one.key]
    desk.ledger.loaded(one.key)
    assert desk.loads == [one.key], "the first is in use"
    assert desk.ledger.is_waiting(two.waiter)
    desk.release(one.key)
    assert desk.evictions == [one.key]
    assert desk.loads == [one.key], "not before it has left"
    desk.ledger.evicted(one.key)
    assert desk.loads == [one.key, two.key]
    assert not desk.ledger.is_waiting(two.waiter)


def test_what_can_never_fit_is_refused_with_figures() -> None:
    desk = Desk(limit=10)
    pinned = desk.ask("p", 6, pinned=True)
    desk.ledger.loaded(pinned.key)
    desk.release(pinned.key)
    refused = desk.ask("m", 5, backend="b")
    assert isinstance(refused.failure, MemoryExhausted)
    assert refused.failure.metadata == {
        "backend": "b",
        "model": "m",
        "needed_bytes": "5",
        "limit_bytes": "10",
        "used_bytes": "6",
        "reserved_bytes": "0",
        "pinned_bytes": "6",
    }
    assert desk.evictions == []
    assert desk.ledger.find(refused.key) is None
    desk.ledger.pin(pinned.key, pinned=False)
    assert not desk.ask("m", 5, backend="b").told
    assert desk.evictions == [pinned.key]


def test_what_takes_longest_to_load_again_stays_and_what_was_used_lately_too() -> None:
    desk = Desk(limit=10)
    slow = desk.resident("slow", 4, seconds=60.0)
    fast = desk.resident("fast", 4, seconds=1.0)
    desk.ask("m", 4)
    assert desk.evictions == [fast]
    assert desk.stage(slow) is Stage.RESIDENT

    desk = Desk(limit=10)
    old = desk.resident("old", 4, seconds=60.0)
    desk.time = 3600.0
    new = desk.resident("new", 4, seconds=1.0)
    desk.ask("m", 4)
    assert desk.evictions == [old]
    assert desk.stage(new) is Stage.RESIDENT


def test_no_more_leaves_than_has_to() -> None:
    desk = Desk(limit=12)
    small = desk.resident("small", 2, seconds=0.1)
    large = desk.resident("large", 10, seconds=5.0)
    desk.ask("m", 10)
    assert desk.evictions == [large], "the small one would have gone first, and is not enough"
    assert desk.stage(small) is Stage.RESIDENT


def test_loads_are_granted_in_their_order() -> None:
    desk = Desk(limit=10)
    busy = desk.ask("busy", 8)
    desk.ledger.loaded(busy.key)
    big, little = desk.ask("big", 10, backend="b"), desk.ask("little", 1, backend="b")
    assert desk.loads == [busy.key], "the little one would take the room that is being made"
    desk.ledger.leave(big.waiter)
    assert desk.loads == [busy.key, little.key], "whoever leaves is waited for no longer"
    assert big.told == []


def test_a_load_goes_on_when_those_who_asked_have_left_and_who_held_lets_go() -> None:
    desk = Desk()
    ask = desk.ask("m", 4)
    desk.ledger.leave(ask.waiter)
    assert desk.stage(ask.key) is Stage.LOADING
    desk.ledger.loaded(ask.key)
    assert desk.stage(ask.key) is Stage.RESIDENT
    again = desk.ask("m", 4)
    desk.ledger.leave(again.waiter)
    desk.ledger.leave(again.waiter)
    entry = desk.ledger.find(ask.key)
    assert entry is not None
    assert entry.users == 0


def test_a_failed_load_gives_its_room_back_and_everyone_hears_why() -> None:
    desk = Desk(limit=10)
    asks = [desk.ask("m", 8), desk.ask("m", 8)]
    other = desk.ask("n", 8)
    desk.ledger.failed(("a", "m"), ModelLoadFailed("x"))
    assert [ask.failure.reason for ask in asks] == ["MODEL_LOAD_FAILED"] * 2
    assert desk.loads == [("a", "m"), other.key]


def test_a_model_that_is_asked_for_while_it_leaves_comes_back() -> None:
    desk = Desk(limit=10)
    gone = desk.resident("gone", 8)
    desk.ask("m", 8)
    assert desk.stage(gone) is Stage.LEAVING
    back = desk.ask("gone", 8)
    assert back.told == []
    desk.ledger.evicted(gone)
    assert desk.stage(("a", "m")) is Stage.LOADING
    desk.ledger.loaded(("a", "m"))
    desk.release(("a", "m"))
    desk.ledger.evicted(("a", "m"))
    desk.ledger.loaded(gone)
    assert back.told == [None]


def test_a_model_that_could_not_be_unloaded_is_left_alone_for_a_while() -> None:
    desk = Desk(limit=10)
    stuck = desk.resident("stuck", 8)
    ask = desk.ask("m", 8)
    desk.ledger.kept(stuck)
    assert isinstance(ask.failure, MemoryExhausted)
    desk.time = 31.0
    desk.ask("m", 8)
    assert desk.evictions == [stuck, stuck]


def test_what_frameworks_do_by_themselves_is_counted() -> None:
    desk = Desk(limit=10)
    listed = [Listed(model="own", size=7, is_loaded=True, idle=60.0, seconds=3.0, pinned=True)]
    desk.ledger.observe("a", listed, asked=0.0)
    (figures,) = desk.ledger.figures()
    assert (figures.used, figures.pinned) == (7, 7)
    assert isinstance(desk.ask("m", 8, backend="b").failure, MemoryExhausted), "pinned by its framework"
    desk.time = 5.0
    desk.ledger.observe("a", [Listed(model="own", size=7, is_loaded=False)], asked=4.0)
    assert desk.ledger.find(("a", "own")) is None
    assert not desk.ask("m", 8, backend="b").told


def test_a_list_from_before_a_load_takes_nothing_away() -> None:
    desk = Desk()
    desk.time = 5.0
    key = desk.resident("m", 4)
    desk.ledger.observe("a", [Listed(model="m", size=4, is_loaded=False)], asked=4.0)
    assert desk.stage(key) is Stage.RESIDENT
    assert desk.ledger.hold(key)
    desk.ledger.observe("a", [], asked=9.0)
    assert desk.stage(key) is Stage.RESIDENT, "it is in use, so it is there"
    desk.release(key)
    desk.ledger.observe("a", [], asked=9.0)
    assert desk.stage(key) is None
    assert not desk.ledger.hold(key)


def test_a_load_of_somebody_else_is_counted_and_joined() -> None:
    desk = Desk(limit=10)
    desk.ledger.observe("a", [Listed(model="m", size=8, is_loaded=False, is_loading=True)], asked=0.0)
    (figures,) = desk.ledger.figures()
    assert figures.reserved == 8
    ask = desk.ask("m", 8)
    assert desk.loads == [ask.key], "nobody here followed it"
    desk.ask("m", 8)
    assert desk.loads == [ask.key]
    desk.ledger.loaded(ask.key)
    assert ask.told == [None]
    desk.ledger.observe("b", [Listed(model="n", size=1, is_loaded=False, is_loading=True)], asked=0.0)
    desk.ledger.observe("b", [Listed(model="n", size=1, is_loaded=False)], asked=0.0)
    assert desk.ledger.find(("b", "n")) is None, "it gave up"


def test_who_waits_for_room_is_served_when_somebody_else_loaded_the_model() -> None:
    desk = Desk(limit=10)
    busy = desk.ask("busy", 8)
    ask = desk.ask("m", 8)
    desk.ledger.observe("a", [Listed(model="m", size=8, is_loaded=True)], asked=0.0)
    assert ask.told == [None]
    assert desk.stage(busy.key) is Stage.LOADING


def test_other_programs_memory_counts_too() -> None:
    desk = Desk(limit=100, available=5)
    assert isinstance(desk.ask("m", 6).failure, MemoryExhausted)
    one = desk.ask("m", 4)
    two = desk.ask("n", 4)
    assert desk.loads == [one.key], "what is reserved may not be taken yet"
    desk.ledger.measure("h", limit=100, available=9)
    assert desk.loads == [one.key, two.key]


def test_a_backends_own_limit_counts_beside_the_hosts() -> None:
    desk = Desk(limit=100)
    desk.ledger.place("b", host="h", limit=10)
    mine = desk.resident("mine", 8, backend="b")
    other = desk.resident("other", 50)
    desk.ask("m", 8, backend="b")
    assert desk.evictions == [mine], "only what is in that backend helps"
    assert desk.stage(other) is Stage.RESIDENT
    room = desk.ledger.room("b")
    assert room is not None
    assert (room.free, room.limit) == (2, 10)


def test_frameworks_that_cannot_be_told_are_not_asked_to_leave() -> None:
    desk = Desk(limit=10)
    key = desk.resident("m", 8)
    desk.ledger.cannot_unload("a")
    ask = desk.ask("n", 8, backend="b")
    assert "by themselves" in ask.failure.message
    assert desk.stage(key) is Stage.RESIDENT


def test_unknown_sizes_and_unknown_limits_refuse_nothing() -> None:
    desk = Desk(limit=1)
    assert not desk.ask("m", 0).told
    desk = Desk(limit=0)
    assert not desk.ask("m", 10**15).told
    room = desk.ledger.room("a")
    assert room is not None
    assert room.most == float("inf")


def test_a_backend_that_is_lost_takes_its_models_out_and_its_waiters_elsewhere() -> None:
    desk = Desk(limit=10)
    key = desk.resident("m", 8)
    busy = desk.ask("busy", 2, backend="b")
    waiting = desk.ask("big", 8)
    assert desk.stage(key) is Stage.LEAVING
    desk.ledger.lose("a", BackendUnavailable("x"))
    assert isinstance(waiting.failure, BackendUnavailable)
    late = BackendUnavailable("x")
    desk.ledger.evicted(key)
    desk.ledger.lose("a", late)
    desk.ledger.lose("b", late)
    assert busy.told == []
    desk.ledger.failed(busy.key, late)
    assert busy.failure is late
    assert not desk.ledger.is_known("a")
    assert desk.ledger.room("a") is None
    assert desk.ledger.figures_of("a") is None
    assert repr(desk.ledger) == "<Ledger []>"


def test_who_waits_for_a_model_that_leaves_a_lost_backend_hears_so() -> None:
    desk = Desk(limit=10)
    key = desk.resident("m", 8)
    desk.ask("n", 8, backend="b")
    back = desk.ask("m", 8)
    desk.ledger.lose("a", BackendUnavailable("x"))
    desk.ledger.evicted(key)
    assert isinstance(back.failure, BackendUnavailable)


def test_a_backend_that_moves_takes_its_waiters_along() -> None:
    desk = Desk(limit=10)
    desk.ask("busy", 10, backend="b")
    ask = desk.ask("m", 8)
    desk.ledger.measure("other", limit=8)
    desk.ledger.place("a", host="other")
    assert desk.loads == [("b", "busy"), ask.key]
    figures = desk.ledger.figures_of("a")
    assert figures is not None
    assert (figures.host, figures.reserved) == ("other", 8)


def test_what_is_told_late_or_twice_changes_nothing() -> None:
    desk = Desk()
    key = desk.resident("m", 4)
    desk.ledger.loaded(key, size=9)
    desk.ledger.failed(key, ModelLoadFailed("x"))
    desk.ledger.evicted(key)
    desk.ledger.kept(key)
    desk.ledger.pin(("a", "nobody"), pinned=True)
    entry = desk.ledger.find(key)
    assert entry is not None
    assert (entry.stage, entry.size, entry.users) == (Stage.RESIDENT, 4, 0)


def test_the_room_says_what_is_free_what_could_leave_and_what_is_in_use() -> None:
    desk = Desk(limit=20)
    desk.resident("idle", 5)
    desk.ledger.hold(desk.resident("used", 4))
    desk.ask("pinned", 3, pinned=True)
    room = desk.ledger.room("b")
    assert room is not None
    assert (room.free, room.evictable, room.passing, room.most) == (8, 5, 4, 17)
    desk.ledger.pump()


# Simulation.


class Simulation(Desk):
    """One schedule of asking, leaving, loading, failing, evicting, listing and losing, by its seed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.asks: list[Ask] = []
        self.in_flight: Counter[Key] = Counter()
        self.sizes = {(b, m): self.chance.randint(1, 9) for b in "ab" for m in "mnop"}
        self.limit = self.chance.randint(9, 20)
        self.pins: set[Key] = set()
        self.held: list[Key] = []
        super().__init__(limit=self.limit)

    def load(self, key: Key) -> None:
        assert not self.in_flight[key], f"{key} is loaded twice at once"
        self.in_flight[key] += 1
        super().load(key)
        (figures,) = self.ledger.figures()
        assert figures.used + figures.reserved <= self.limit, f"{figures} is over the limit"

    def evict(self, key: Key) -> None:
        entry = self.ledger.find(key)
        assert entry is not None
        assert not entry.pinned, f"{key} is pinned"
        assert not entry.users, f"{key} is in use"
        assert not self.in_flight[key]
        super().evict(key)

    def step(self) -> None:
        chance = self.chance
        self.time += chance.expovariate(0.5)
        match chance.randrange(9):
            case 0 | 1 | 2:
                key = chance.choice(list(self.sizes))
                pinned = chance.random() < 0.05
                self.asks.append(self.ask(key[1], self.sizes[key], backend=key[0], pinned=pinned))
            case 3 if self.asks:
                self.ledger.leave(chance.choice(self.asks).waiter)
            case 4 | 5 if self.loads:
                self._end_load(self.loads.pop(chance.randrange(len(self.loads))))
            case 6 if self.evictions:
                key = self.evictions.pop(chance.randrange(len(self.evictions)))
                (self.ledger.evicted if chance.random() < 0.9 else self.ledger.kept)(key)
            case 7:
                done = [ask for ask in self.asks if ask.told == [None] and ask.waiter.held]
                if done:
                    self.ledger.leave(chance.choice(done).waiter)
            case 8:
                self._happen()

    def _end_load(self, key: Key) -> None:
        self.in_flight[key] -= 1
        if self.chance.random() < 0.8:
            self.ledger.loaded(key, size=self.sizes[key], seconds=self.chance.expovariate(0.1))
        else:
            self.ledger.failed(key, ModelLoadFailed("as played"))

    def _happen(self) -> None:
        """Something that was not ordered."""
        chance = self.chance
        backend = chance.choice("ab")
        if chance.random() < 0.2:
            self.ledger.lose(backend, BackendUnavailable("as played"))
            self.ledger.place(backend, host="h")
            return
        # A framework throws out what nobody uses, and forgets nothing else.
        listed = []
        for key, size in self.sizes.items():
            entry = self.ledger.find(key)
            is_there = entry is not None and entry.stage in (Stage.RESIDENT, Stage.LEAVING)
            if key[0] == backend:
                stays = is_there and chance.random() < 0.8
                listed.append(Listed(model=key[1], size=size, is_loaded=stays))
        self.ledger.observe(backend, listed, asked=self.time)

    def settle(self) -> None:
        """Lets everything end that has begun, and everybody let go."""
        for _ in range(10_000):
            if self.loads:
                self._end_load(self.loads.pop())
            elif self.evictions:
                self.ledger.evicted(self.evictions.pop())
            elif holding := [ask for ask in self.asks if ask.waiter.held]:
                self.ledger.leave(holding[0].waiter)
            else:
                self.time += 60.0  # what was stuck is no longer
                self.ledger.pump()
                if not self.loads and not self.evictions:
                    return
        raise AssertionError(f"it never settles: {self.ledger!r}")


def play(seed: int) -> Simulation:
    simulation = Simulation(seed)
    for _ in range(120):
        simulation.step()
    simulation.settle()
    return simulation


def hold(seeds: Iterable[int]) -> Counter[str]:
    """Plays schedules, holds each against the promises, and returns what the waiters were told."""
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        try:
            simulation = play(seed)
            for ask in simulation.asks:
                assert len(ask.told) <= 1, "an outcome is told once"
                assert ask.told or ask.waiter.is_over, "everybody who stayed was told"
                if ask.told:
                    outcomes["served" if ask.told[0] is None else ask.told[0].reason] += 1
            (figures,) = simulation.ledger.figures()
            assert (figures.reserved, figures.loads, figures.waiting) == (0, 0, 0)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    assert set(outcomes) == {"served", "MODEL_LOAD_FAILED", "MEMORY_EXHAUSTED", "BACKEND_UNAVAILABLE"}
    return outcomes


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS // 4))
def test_whatever_happens_the_account_holds(first: int) -> None:
    hold(range(first, first + SEEDS // 4))


@pytest.mark.soak(minutes=0.5)
@pytest.mark.timeout(3600)
def test_in_ten_thousand_schedules_the_account_holds() -> None:
    outcomes = hold(counted(10_000, "schedules of loads and evictions"))
    print(", ".join(f"{outcome} {count:,}" for outcome, count in outcomes.most_common()))


def test_one_seed_is_one_schedule() -> None:
    told = [[str(ask.told) for ask in play(7).asks] for _ in range(2)]
    assert told[0] == told[1]
