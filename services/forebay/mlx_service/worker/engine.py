"""The engine: one thread that owns the model and every array, and generates all rows together.

Only integers, floats and strings leave the thread. Callers live on an event
loop: they hand in a `Row`, get a `Ticket`, and read from it what happens to
the row. All that happened in one step reaches the loop in one hop, and so
does what happened in several where steps are shorter than anybody can see.

A row's life is waiting, then reading its prompt, then writing, then over:

    waiting -> reading   a place in the batch is free and it is the row's turn
    reading -> writing   the first token came
    reading, writing -> waiting  memory is short, and others are more urgent or were here before
    any     -> over      end token, limit, cancelled, deadline, failure

A slow reader costs no unbounded memory: what waits in a ticket are the tokens
of its row, at most as many as the row may generate, and they are read all at
once.

A row that is set aside keeps its tokens, and its place before all that came
later. It is read again from them, so its reply is the same as if nothing had
happened.

If a step fails, nobody can tell what its lane holds. The engine then throws
the lane away and reads every row again from its tokens, one suspect at a
time: a row during whose first step the batch fails again and again is the
culprit, and fails alone.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import itertools
import logging
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Protocol, TypeAlias, TypeVar, cast

from forebay.kit.failure import (
    BackendError,
    DeadlineExceeded,
    Draining,
    Failure,
    MemoryExhausted,
    QueueFull,
)
from forebay.mlx_service.ledger import mib
from forebay.mlx_service.worker.batch import Batch, Generated, Kept, Prefilled, can_move, top_tokens
from forebay.mlx_service.worker.cache_layout import Layout
from forebay.mlx_service.worker.lanes import Lanes
from forebay.mlx_service.worker.memory import KvCost, Ledger, is_out_of_memory, probe, read_memory
from forebay.mlx_service.worker.model_thread import ModelThread, why_ended
from forebay.mlx_service.worker.prefix_cache import MOST_MARKS, Mark, PrefixCache, PrefixStats, why_not
from forebay.mlx_service.worker.prefix_disk import DiskStats, DiskTier, Post
from forebay.mlx_service.worker.pressure import FREED_SHARE, Held, Level, Pressure
from forebay.mlx_service.worker.restoring import Restoring
from forebay.mlx_service.worker.runtime import mx
from forebay.mlx_service.worker.sampling import Array, Processor, SamplingParams, processors, sampler
from forebay.mlx_service.worker.speculation import Speculation, SpeculationStats

log = logging.getLogger(__name__)

PREFILL_STEPS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Tokens of a prompt that may be read in one step."""

PREFILL_MOST = 512
"""How many of them are tried where nobody knows the machine. More makes only large GPUs faster."""

PREFILL_SECONDS = 0.5
"""How long one such step may take. A cancelled row holds its place for it, and a new one waits for it.
Small models on Metal read 512 tokens in less; a CPU reads 16 in more."""

SHARED_SECONDS = 0.15
"""How long it may take while rows write: they wait for it, and a longer gap between words is felt."""

ROW_RETRIES = 2
"""Times a row is read again after steps that failed. A fault that comes back is no accident."""

FREED_BYTES = 2 << 30
"""Freed memory that mlx may hold for the next step, where nothing is said. Unbound, it takes all there is."""

JOIN_SECONDS = 0.008
"""Time for which a token may be held so that it leaves with the next. A hop keeps the thread from its next
step, and every message each process on the way. A reply's first token is never held, nor its end."""

MEASURE_STEPS = 16
"""Steps between two looks at how much memory is in use."""

FLUSH_SECONDS = 2.0
"""How long an orderly end may take to write prefixes to disk. Whoever ends a worker gives it five."""

IDLE_SECONDS = 1.0
"""Idle time after which freed buffers go back to the system. Shorter would thrash between two requests."""

T = TypeVar("T")

Loader: TypeAlias = Callable[[], tuple[object, Collection[int]]]
"""Loads a model on the engine's thread. Returns it and the tokens that end a reply."""


class NewBatch(Protocol):
    """Makes an empty batch. See `Batch`."""

    def __call__(self, model: object, /, *, rows: int, prefill_step: int, end_tokens: Sequence[int]) -> Batch:
        """Returns the batch."""


class Constraint(Protocol):
    """What a row's tokens must follow, such as a grammar."""

    def processor(self, prompt_count: int) -> Processor:
        """Returns a fresh processor for a row whose first `prompt_count` tokens are prompt.

        It may raise any `Failure`; the row then ends with it.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One reply to generate. Everything in it has been checked."""

    tokens: tuple[int, ...]
    """What to read: the prompt, and the tokens of the reply that are there already. At least one."""
    reply_count: int = 0
    """How many of `tokens`, at their end, belong to the reply."""
    most: int
    """Tokens to generate at most, at least one."""
    sampling: SamplingParams
    """How to pick tokens."""
    constraint: Constraint | None = None
    """What the tokens must follow."""
    top_logprobs: int | None = None
    """Likeliest tokens to report with every token; None reports no log probabilities at all."""
    urgency: int = 1
    """Rows of lower urgency figures go first."""
    deadline: float | None = None
    """When to give up, in seconds of `time.monotonic`."""
    cache_key: str = ""
    """Rows share what was read of their prompts only with rows of the same key."""
    pin: bool = False
    """Whether what was read of the prompt stays, whatever else comes."""
    beginnings: tuple[Mark, ...] = ()
    """Numbers by which beginnings of the prompt are known, and their tokens."""
    view: str = ""
    """Which view of the model writes it: an adapter's, or "" for the model itself."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """The row waits; so many are ahead."""

    position: int


@dataclass(frozen=True, slots=True)
class Reading:
    """The row is in the batch, since then, and so much of its prompt was read or found read."""

    done: int
    total: int
    since: float
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Written:
    """The row has a new token. End tokens are not told."""

    token: int
    at: float
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    drafted: int = 0
    """Tokens guessed in the step that begins with this one."""
    accepted: bool = False
    """Whether it was guessed, and right."""


@dataclass(frozen=True, slots=True)
class Over:
    """The row is over: `stop` after an end token, `length` at the limit, or `failed`."""

    reason: str
    failure: Failure | None = None


Happening: TypeAlias = Waiting | Reading | Written | Over


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What the engine is doing. Cheap to ask from any thread."""

    live: int
    """Rows in the batch."""
    waiting: int
    """Rows that wait for a place in it."""
    steps: int
    """Steps so far."""
    last_step_age: float
    """Seconds since the thread last showed that it moves, while rows wait or are live; else 0."""
    memory_bytes: int
    """Memory that mlx holds in use: weights, caches and temporaries."""
    faults: int
    """Steps that failed."""
    lanes: tuple[int, ...] = ()
    """Rows of each lane."""
    weights_bytes: int = 0
    """Bytes of the model's weights."""
    token_bytes: int = 0
    """Bytes of attention cache that one token of a row takes, as measured."""
    reserved_bytes: int = 0
    """Bytes that the rows accepted can come to hold."""
    ceiling_bytes: int = 0
    """Bytes that weights and rows may take together; 0 sets no bound."""
    cache_bytes: int = 0
    """Bytes of the rows' attention caches, at the last look."""
    prefix: PrefixStats = field(default_factory=PrefixStats)
    """The prefix cache."""
    disk: DiskStats = field(default_factory=DiskStats)
    """Its second tier."""
    moves: int = 0
    """Times that a row changed its lane."""
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    """Tokens guessed."""
    freed_bytes: int = 0
    """Memory that mlx has freed and keeps for the next step."""
    peak_bytes: int = 0
    """Most memory that was in use at once since the model was loaded."""
    preempted: int = 0
    """Times that a row was set aside for want of memory."""
    wanted_bytes: int = 0
    """Ceiling with which no row would be set aside now; 0 is that there is enough."""


class Ticket:
    """What the event loop holds of a row."""

    def __init__(self, row: Row, leave: Callable[[Ticket], None]) -> None:
        self.row = row
        self.is_over = False
        self.submitted_at = time.monotonic()
        self._leave = leave
        self._happenings: deque[Happening] = deque()
        self._news = asyncio.Event()

    async def next(self) -> list[Happening]:
        """Waits until something happened and returns all of it, in order. `Over` comes last."""
        await self._news.wait()
        self._news.clear()
        happenings = list(self._happenings)
        self._happenings.clear()
        return happenings

    def cancel(self) -> None:
        """Takes the row out of the batch before its next step. Does nothing if it is over."""
        if not self.is_over:
            self.is_over = True
            self._leave(self)

    def tell(self, happening: Happening) -> None:
        """Adds news. Called on the event loop."""
        if self._happenings and type(happening) is type(self._happenings[-1]) is not Written:
            self._happenings.pop()  # an older position or fraction is of no use
        self._happenings.append(happening)
        self._news.set()


@dataclass(slots=True, eq=False)
class _Live:
    """A row on the engine's thread."""

    ticket: Ticket
    written: list[int] = field(default_factory=list)
    guard: _Guard | None = None
    suspect: bool = False
    faults: int = 0
    since: float = 0.0
    cached: int = 0
    skipped: int = 0
    stops: frozenset[int] = frozenset()
    number: int = 0

    @property
    def row(self) -> Row:
        return self.ticket.row


class _Guard:
    """Runs a row's processors in a step that other rows share: it keeps their exceptions to itself."""

    def __init__(self, chain: Sequence[Processor]) -> None:
        self._chain = chain
        self.error: Exception | None = None

    def __call__(self, tokens: Array, logits: Array) -> Array:
        if self.error is None:
            try:
                for process in self._chain:
                    logits = process(tokens, logits)
            except Exception as error:  # noqa: BLE001  # the row fails with it after the step
                self.error = error
        return logits


def _step_within(seconds: float, took: float, most: int) -> int:
    """The most tokens that can be read in a time, if the fewest took that long."""
    fits = [step for step in PREFILL_STEPS if step <= most and took * step / PREFILL_STEPS[0] <= seconds]
    return max(fits, default=PREFILL_STEPS[0])


class Engine(ModelThread):
    """Generates rows together on a thread of its own.

    Args:
        load: loads the model, on the engine's thread.
        rows: most rows at once.
        queue_rows: most rows that wait for a place.
        prefill_step: tokens of a prompt read in one step. None measures what the device can do.
        prefixes: keeps what was read, for prompts that begin the same. None keeps nothing.
        ceiling: bytes that weights and rows may take together. None sets no bound.
        prefill_most: most tokens of a prompt read in one step, however fast the device is.
        freed_bytes: freed memory that mlx may hold for the next step.
        wired_bytes: memory that macOS may not page out. 0 wires none.
        new_batch: makes an empty batch of rows.
        disk: makes what keeps prefixes on disk, on the engine's thread. None keeps none.
        speculation: lets a row that runs alone write several tokens a step. None never does.
        read: tells what memory mlx holds.
    """

    def __init__(
        self,
        load: Loader,
        *,
        rows: int,
        queue_rows: int = 64,
        prefill_step: int | None = None,
        prefixes: PrefixCache | None = None,
        ceiling: int | None = None,
        prefill_most: int = PREFILL_MOST,
        freed_bytes: int = FREED_BYTES,
        wired_bytes: int = 0,
        new_batch: NewBatch = Batch,
        disk: Callable[[Layout, Post], DiskTier] | None = None,
        speculation: Speculation | None = None,
        read: Callable[[], Held] = read_memory,
    ) -> None:
        super().__init__("mlx-engine")
        self._make_batch = new_batch
        self._load = load
        self._prefill_most = prefill_most
        self._freed_bytes = freed_bytes
        self._wired_bytes = wired_bytes
        self._rows = rows
        self._queue_rows = queue_rows
        self._prefill_step = prefill_step
        self._shared_step = prefill_step
        self._prefixes = prefixes
        self._new_disk = disk
        self._disk: DiskTier | None = None
        self._restoring: Restoring[_Live] | None = None
        self._speculation = speculation
        # On the event loop:
        self._tickets: set[Ticket] = set()  # of rows that are not over
        self.vocabulary_size = 0
        """Tokens that the model knows; 0 until it is loaded. It may be more than its tokenizer knows."""
        self._row_seconds = 1.0
        self._ledger = Ledger(ceiling, rows=rows)
        self._view_bytes: dict[str, int] = {}
        self._prefix_room: int | None = None
        # On the engine's thread:
        self._lanes: Lanes
        self._views: dict[str, object] = {}
        self._view_sizes: dict[str, int] = {}
        self._end_tokens: frozenset[int]
        self._live: dict[int, _Live] = {}
        self._again: deque[_Live] = deque()
        self._queue: list[tuple[int, int, Ticket]] = []
        self._aside: dict[Ticket, _Live] = {}
        self._pressure = Pressure(read=read, give_back=mx.clear_cache, shrink=self._forget_prefixes)
        self._preempted = 0
        self._count = 0
        self._outbox: list[tuple[Ticket, Happening]] = []
        self._is_pressing = False
        self._steps = 0
        self._step_seconds = self._flushed_at = 0.0
        self._faults = 0
        self._stepped_at = 0.0
        self._memory_bytes = 0
        self._cache_bytes = 0
        self._peak_bytes = 0
        self._widths: tuple[int, ...] = ()
        self._moves = 0

    # On the event loop

    def submit(self, row: Row) -> Ticket:
        """Queues a row.

        Raises:
            QueueFull: too many rows wait.
            MemoryExhausted: there is not enough memory for what the row can come to hold.
            Draining: the engine stops.
        """
        self._check_running()
        waiting = len(self._tickets) - self._rows
        wait = timedelta(
            seconds=round(min(max(self._row_seconds * (max(0, waiting) + 1) / self._rows, 0.5), 60.0), 1)
        )
        if waiting >= self._queue_rows:
            raise QueueFull(
                f"{self._rows} requests run and {waiting} wait; try again later",
                metadata={"running": str(self._rows), "waiting": str(waiting)},
                retry_after=wait,
            )
        ticket = Ticket(row, self._leave)
        kept = 0 if self._prefixes is None else self._prefixes.stats.bytes
        self._ledger.reserve(
            ticket, len(row.tokens) + row.most, in_use=self._memory_bytes - kept, retry_after=wait
        )
        self._prefix_room = self._ledger.room_for_prefixes
        if not self._tickets:
            self._stepped_at = time.monotonic()  # it was idle, and from now on it has to move
        self._tickets.add(ticket)
        self._commands.put(partial(self._add, ticket))
        return ticket

    def stats(self) -> EngineStats:
        """Returns what the engine is doing."""
        live = len(self._live)
        age = time.monotonic() - self._stepped_at if live or self._tickets else 0.0
        return EngineStats(
            live=live,
            waiting=len(self._queue) + len(self._again) + len(self._restored),
            steps=self._steps,
            last_step_age=max(0.0, age),
            memory_bytes=self._memory_bytes,
            faults=self._faults,
            lanes=self._widths,
            weights_bytes=self._ledger.weights,
            token_bytes=self._ledger.cost.per_token,
            reserved_bytes=self._ledger.reserved,
            ceiling_bytes=self._ledger.ceiling or 0,
            cache_bytes=self._cache_bytes,
            prefix=PrefixStats() if self._prefixes is None else self._prefixes.stats,
            disk=DiskStats() if self._disk is None else self._disk.stats,
            moves=self._moves,
            speculation=SpeculationStats() if self._speculation is None else self._speculation.stats,
            freed_bytes=self._pressure.held.freed,
            peak_bytes=self._peak_bytes,
            preempted=self._preempted,
            wanted_bytes=self._pressure.wanted,
        )

    def limit(self, ceiling: int) -> int:
        """Changes the ceiling, but not to less than the rows accepted can come to need, and returns it."""
        ceiling = self._ledger.limit(ceiling)
        self._prefix_room = self._ledger.room_for_prefixes
        self._commands.put(partial(self._limit, ceiling))
        return ceiling

    async def run(self, call: Callable[[], T]) -> T:
        """Runs a call on the engine's thread, between two steps.

        Raises:
            Draining: the engine has ended.
            Exception: whatever the call raised.
        """
        answer: asyncio.Future[T] = self._loop.create_future()
        self._commands.put(partial(self._answer, call, answer))
        await asyncio.wait((answer, self._ended), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise why_ended(None)
        return answer.result()

    async def open_view(self, name: str, make: Callable[[object], object], *, size: int) -> None:
        """Adds a view of the model, which rows can then name.

        Args:
            name: its name.
            make: makes it of the model, on the engine's thread.
            size: bytes that it takes in addition.

        Raises:
            MemoryExhausted: there is no room for it.
            Exception: whatever `make` raised.
        """
        self._ledger.hold(size)
        try:
            await self.run(partial(self._open_view, name, make, size))
        except BaseException:
            self._commands.put(partial(self._close_view, name))  # it may be there all the same
            self._ledger.weights -= size
            raise
        self._view_bytes[name] = size

    async def close_view(self, name: str) -> None:
        """Drops a view that no row names any more."""
        self._ledger.weights -= self._view_bytes.pop(name)
        await self.run(partial(self._close_view, name))

    def end_view(self, name: str) -> None:
        """Ends all rows of a view."""
        self._commands.put(partial(self._end_view, name))

    @property
    def keeps_prefixes(self) -> bool:
        """Whether what was read of prompts is kept."""
        return self._prefixes is not None

    @property
    def marks(self) -> tuple[int, ...]:
        """Numbers of beginnings that are kept, newest first. See `Row.beginnings`."""
        held = () if self._prefixes is None else self._prefixes.marks
        if self._disk is None:
            return held
        return tuple(itertools.islice(dict.fromkeys((*held, *self._disk.marks)), MOST_MARKS))

    def _leave(self, ticket: Ticket) -> None:
        self._release(ticket)
        self._commands.put(partial(self._remove, ticket))

    def _release(self, ticket: Ticket) -> None:
        self._tickets.discard(ticket)
        self._ledger.release(ticket)
        self._prefix_room = self._ledger.room_for_prefixes

    def _weigh(self, weights: int, cost: KvCost, cost_alone: KvCost) -> None:
        self._ledger.weights, self._ledger.cost, self._ledger.cost_alone = weights, cost, cost_alone
        self._prefix_room = self._ledger.room_for_prefixes

    def _deliver(self, news: list[tuple[Ticket, Happening]]) -> None:
        for ticket, happening in news:
            if ticket.is_over:
                continue
            if isinstance(happening, Over):
                ticket.is_over = True
                self._release(ticket)
                took = time.monotonic() - ticket.submitted_at
                self._row_seconds += 0.2 * (took - self._row_seconds)
            ticket.tell(happening)

    def _fail_rest(self, failure: Failure) -> None:
        self._deliver([(ticket, Over("failed", failure)) for ticket in self._tickets])

    # On the engine's thread

    def _work(self) -> None:
        while not self._stopped:
            self._drain()
            self._expire()
            self._admit()
            self._relieve()
            if self._live:
                self._step()
            if not self._may_hold():
                self._flush()

    def _start_model(self) -> None:
        # Every thread begins with the same random state; without this, equal prompts to
        # two workers would get equal "random" replies.
        mx.random.seed(int.from_bytes(os.urandom(7), "little"))
        mx.set_cache_limit(self._freed_bytes)
        if self._wired_bytes and mx.metal.is_available():
            mx.set_wired_limit(self._wired_bytes)
        before = int(mx.get_active_memory())
        model, end_tokens = self._load()
        self._views[""] = model
        cost_alone = KvCost() if self._speculation is None else self._speculation.load(model)
        self._pressure.weights = int(mx.get_active_memory()) - before
        if self._ledger.ceiling is not None:
            self._limit(self._ledger.ceiling)
        self._cost = probe(model)
        self._post(self._weigh, self._pressure.weights, self._cost, cost_alone)
        mx.reset_peak_memory()
        self._end_tokens = frozenset(end_tokens)
        if self._prefixes is not None and (reason := why_not(model)) is not None:
            log.info("no prefixes are kept of this model: %s", reason)
            self._prefixes = None
        if self._prefixes is not None:
            layout = self._prefixes.learn(model)
            if self._new_disk is not None:
                self._disk = self._new_disk(layout, self._commands.put)
                self._prefixes.spill = self._disk.write
                self._restoring = Restoring(self._prefixes, self._disk, ready=self._again_later)
        self._lanes = self._new_lanes()
        self._warm_up(2)
        took = self._warm_up(PREFILL_STEPS[0] + 1)
        if self._prefill_step is None:
            # Measured once: with steps that change all the time, low bits would differ from run to run.
            self._prefill_step = _step_within(PREFILL_SECONDS, took, self._prefill_most)
            self._shared_step = _step_within(SHARED_SECONDS, took, self._prefill_most)
            self._lanes.close()
            self._lanes = self._new_lanes()
        if self._speculation is not None:
            self._speculation.start(vocabulary=self.vocabulary_size, chunk=self._prefill_step)
        mx.clear_cache()
        self._measure()

    def _new_lanes(self) -> Lanes:
        return Lanes(
            self._new_batch,
            shared_step=self._shared_step,
            # The other ranks of a model that is shared would not hear of a move.
            balances=self._make_batch is Batch and can_move(self._views[""]),
            speculation=self._speculation,
            model_of=self._views.__getitem__,
            end_tokens=self._end_tokens,
        )

    def _new_batch(self, view: str) -> Batch:
        return self._make_batch(
            self._views[view],
            rows=self._rows,
            prefill_step=self._prefill_step or PREFILL_STEPS[0],
            end_tokens=sorted(self._end_tokens),
        )

    def _warm_up(self, count: int) -> float:
        """Runs the model on some tokens, so that no request has to compile kernels or find out it is broken.

        Returns the seconds of its longest step.
        """
        self._lanes.insert(
            (0,) * count, most=2, sampler=sampler(SamplingParams(temperature=0), position=0), processors=()
        )
        longest = 0.0
        while True:
            began = time.monotonic()
            _, written = self._lanes.step()
            longest = max(longest, time.monotonic() - began)
            if written:
                self.vocabulary_size = int(written[0].chances.logits.shape[-1])
            if any(token.ended for token in written):
                return longest

    def _limit(self, ceiling: int) -> None:
        mx.set_memory_limit(ceiling)  # no more than a hint: it makes mlx wait for frees, and refuses nothing
        room = max(0, ceiling - self._pressure.weights)
        mx.set_cache_limit(min(self._freed_bytes, int(room * FREED_SHARE)))
        self._pressure.limit = ceiling
        if self._prefixes is not None:
            self._prefixes.limit(self._prefix_room)

    def _forget_prefixes(self, size: int) -> None:
        if self._prefixes is not None:
            self._prefixes.shrink(max(0, self._prefixes.stats.bytes - size))

    def _relieve(self) -> None:
        """Looks at the memory, and sets a row aside if nothing else helps: see `pressure`."""
        level = self._pressure.look()
        self._memory_bytes = self._pressure.held.used
        if level < Level.HARD or not self._live:
            return
        if len(self._live) > 1:
            self._set_aside()
        elif self._pressure.is_hopeless(time.monotonic()):
            ((uid, live),) = self._live.items()
            del self._live[uid]
            self._lanes.remove(uid)
            self._fail(live.ticket, self._exhausted(live))

    def _set_aside(self) -> None:
        """Takes the least urgent row out, of these the youngest, and puts it back into the queue."""
        uid = max(self._live, key=lambda each: (self._live[each].row.urgency, self._live[each].number))
        live = self._live.pop(uid)
        self._lanes.remove(uid)  # what attention held of it goes too: keeping it would free nothing
        live.suspect = False
        self._aside[live.ticket] = live
        heapq.heappush(self._queue, (live.row.urgency, live.number, live.ticket))
        self._preempted += 1
        log.info("memory is short: a reply of %d tokens is set aside", len(live.written))

    def _exhausted(self, live: _Live) -> MemoryExhausted:
        held, limit = self._pressure.held.used, self._pressure.limit or 0
        tokens = len(live.row.tokens) + len(live.written)
        return MemoryExhausted(
            f"the reply ran out of memory after {len(live.written)} tokens: with {tokens} tokens in all, "
            f"{mib(held)} are in use, of these {mib(self._pressure.weights)} by the model, and the limit is "
            f"{mib(limit)}",
            metadata={
                "in_use_bytes": str(held),
                "weights_bytes": str(self._pressure.weights),
                "ceiling_bytes": str(limit),
            },
        )

    def _measure(self) -> None:
        self._memory_bytes = int(mx.get_active_memory())
        self._peak_bytes = int(mx.get_peak_memory())
        self._widths = tuple(self._lanes.widths)
        self._moves = self._lanes.moves
        self._cache_bytes = self._lanes.cache_bytes

    def _drain(self) -> None:
        """Runs the commands that came. With nothing to generate it sleeps until one does."""
        restoring = self._restored
        if not (self._live or self._again or (self._queue and len(restoring) < self._rows)):
            self._measure()  # what the last row held must not count against the next one
            try:
                command = self._commands.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                mx.clear_cache()
                self._measure()
                self._stepped_at = time.monotonic()
                if restoring:
                    return
                command = self._commands.get()
            self._stepped_at = time.monotonic()
            command()
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            self._flush()  # nobody knows how long it takes
            command()

    def _add(self, ticket: Ticket) -> None:
        self._count += 1
        if self._prefixes is not None:
            self._prefixes.limit(self._prefix_room)
        heapq.heappush(self._queue, (ticket.row.urgency, self._count, ticket))

    def _remove(self, ticket: Ticket) -> None:
        for uid, live in self._live.items():
            if live.ticket is ticket:
                self._drop(uid)
                return
        self._aside.pop(ticket, None)
        if self._restoring is not None:
            for live in [live for live in self._restored if live.ticket is ticket]:
                self._restoring.drop(live)
        self._queue = [entry for entry in self._queue if entry[2] is not ticket]
        heapq.heapify(self._queue)
        self._again = deque(live for live in self._again if live.ticket is not ticket)

    def _answer(self, call: Callable[[], T], answer: asyncio.Future[T]) -> None:
        def tell(result: T | None, error: Exception | None) -> None:
            if answer.done():
                return  # who asked has left
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(cast("T", result))

        try:
            result = call()
        except Exception as error:  # noqa: BLE001  # told to who asked
            self._post(tell, None, error)
        else:
            self._post(tell, result, None)

    def _open_view(self, name: str, make: Callable[[object], object], size: int) -> None:
        self._views[name] = make(self._views[""])
        self._view_sizes[name] = size
        self._pressure.weights += size
        self._measure()

    def _close_view(self, name: str) -> None:
        if self._views.pop(name, None) is not None:
            self._pressure.weights -= self._view_sizes.pop(name)
            self._lanes.close_view(name)
            gc.collect()
            mx.clear_cache()
            self._measure()

    def _end_view(self, name: str) -> None:
        tickets = [live.ticket for live in (*self._live.values(), *self._again, *self._restored)]
        for ticket in [*tickets, *(entry[2] for entry in self._queue)]:
            if ticket.row.view == name:
                self._remove(ticket)
                self._tell(ticket, Over("failed", Draining(f"adapter {name} is taken out of memory")))

    def _drop(self, uid: int) -> None:
        live = self._live.pop(uid)
        self._keep(live, self._lanes.remove(uid))

    def _keep(self, live: _Live, kept: Kept | None) -> None:
        """Keeps what a row that left has read, for the next one that begins the same."""
        if (
            self._prefixes is None
            or kept is None
            or (live.guard is not None and live.guard.error is not None)
        ):
            return
        pin = len(live.row.tokens) - live.row.reply_count if live.row.pin else 0
        try:
            self._prefixes.limit(self._prefix_room)
            self._prefixes.store(
                live.row.cache_key, kept.tokens, kept.caches, pin=pin, marks=live.row.beginnings
            )
            if self._disk is not None and (pin or self._disk.writes_finished):
                for stretch in self._prefixes.stretches(live.row.cache_key, kept.tokens):
                    self._disk.write(stretch)
        except Exception as error:  # a cache that fails costs time and no reply
            log.error("the prefix cache failed and is emptied: %s", type(error).__name__, exc_info=error)
            self._prefixes.clear()

    def _expire(self) -> None:
        now = time.monotonic()

        def is_late(ticket: Ticket) -> bool:
            return ticket.row.deadline is not None and now >= ticket.row.deadline

        late = [ticket for _, _, ticket in self._queue if is_late(ticket)]
        late += [
            live.ticket
            for live in (*self._live.values(), *self._again, *self._restored)
            if is_late(live.ticket)
        ]
        for ticket in late:
            self._remove(ticket)
            self._tell(
                ticket, Over("failed", DeadlineExceeded("the deadline passed while the reply was made"))
            )

    def _admit(self) -> None:
        """Fills the batch: rows that a fault threw out first, one suspect at a time, then those that wait."""
        suspected = any(live.suspect for live in self._live.values())
        if self._again:
            if not suspected and self._may_join(self._again[0]):
                self._insert(self._again.popleft())
            return
        admitted = False
        if self._restoring is not None:
            self._restoring.give_up()
        while (
            self._queue
            and len(self._live) + len(self._restored) < self._rows
            and not suspected
            and self._may_join(self._next())
        ):
            _, number, ticket = heapq.heappop(self._queue)
            live = self._aside.pop(ticket, None) or _Live(ticket, number=number)
            tokens = (*live.row.tokens, *live.written)
            if self._restoring is None or not self._restoring.begin(live, live.row.cache_key, tokens):
                self._insert(live)
            admitted = True
        if admitted or self._queue:
            for position, (_, _, ticket) in enumerate(sorted(self._queue, key=lambda entry: entry[:2])):
                if ticket not in self._aside:  # a reply that has begun has no place in a queue to be told
                    self._tell(ticket, Waiting(position))

    def _next(self) -> _Live:
        """Returns the first row that waits."""
        ticket = self._queue[0][2]
        return self._aside.get(ticket) or _Live(ticket)

    def _may_join(self, first: _Live) -> bool:
        """Whether there is memory for a row. A row alone may always try."""
        if not self._live:
            return True
        kept = 0 if self._prefixes is None else self._prefixes.stats.bytes
        rows = sum(self._cost.of(len(live.row.tokens) + len(live.written)) for live in self._live.values())
        # Rows that have just joined hold nothing yet, and what is kept of prompts makes room for rows.
        used = max(self._pressure.weights + rows, self._pressure.held.used - kept)
        return self._pressure.allows(used + self._cost.of(len(first.row.tokens) + len(first.written)))

    def _again_later(self, live: _Live) -> None:
        """Lets a row whose prefix is there in with the next that are admitted."""
        self._again.append(live)

    @property
    def _restored(self) -> list[_Live]:
        """Rows that wait for their prefixes."""
        return [] if self._restoring is None else self._restoring.rows

    def _insert(self, live: _Live) -> None:
        self._flush()  # reading a prompt takes long
        row = live.row
        prompt_count = len(row.tokens) - row.reply_count
        try:
            chain = processors(row.sampling, prompt_count=prompt_count)
            if row.constraint is not None:
                chain.append(row.constraint.processor(prompt_count))
            live.guard = _Guard(chain) if chain else None
            tokens = (*row.tokens, *live.written)
            caches, live.skipped = None, 0
            if self._prefixes is not None and not live.faults:
                caches, live.skipped = self._prefixes.find(row.cache_key, tokens)
            if self._prefixes is not None:
                live.stops = frozenset(self._prefixes.stops(tokens, live.skipped, row.beginnings))
            uid = self._lanes.insert(
                tokens,
                caches=caches,
                cached=live.skipped,
                stops=sorted(live.stops),
                most=row.most - len(live.written),
                sampler=sampler(row.sampling, position=row.reply_count + len(live.written)),
                processors=[live.guard] if live.guard else [],
                view=row.view,
                speculates=row.constraint is None,  # a format follows tokens and cannot go back
            )
        except Exception as error:  # noqa: BLE001  # told to the row's caller; the others go on
            self._fail(live.ticket, error)
            return
        live.since = time.monotonic()
        self._live[uid] = live
        if not live.written:
            live.cached = live.skipped
            self._tell(live.ticket, Reading(live.cached, len(row.tokens), live.since, live.cached))

    def _step(self) -> None:
        began = time.monotonic()
        try:
            read, written = self._lanes.step()
        except Exception as error:  # noqa: BLE001  # a fault of one row or of mlx must not end the others
            self._recover(error)
            return
        now = self._stepped_at = time.monotonic()
        self._step_seconds = now - began
        self._steps += 1
        if self._steps % MEASURE_STEPS == 0:
            self._measure()
        for progress in read:
            self._on_read(progress)
        for token in written:
            self._on_written(token, now)
        for uid, live in list(self._live.items()):
            if live.guard is not None and live.guard.error is not None:
                self._drop(uid)
                self._fail(live.ticket, live.guard.error)

    def _on_read(self, progress: Prefilled) -> None:
        live = self._live.get(progress.uid)
        if live is None:
            return
        done, total = progress.done + live.skipped, progress.total + live.skipped
        if progress.stopped and done in live.stops:
            self._keep(live, self._lanes.peek(progress.uid))
        if not live.written:
            self._tell(live.ticket, Reading(done, total, live.since, live.cached))

    def _on_written(self, generated: Generated, now: float) -> None:
        live = self._live.get(generated.uid)
        if live is None:
            return
        live.suspect = False
        live.written.append(generated.token)
        self._is_pressing |= len(live.written) == 1
        if generated.token not in self._end_tokens:
            logprob: float | None = None
            top: tuple[tuple[int, float], ...] = ()
            if live.row.top_logprobs is not None:
                logprobs = generated.chances.logprobs()
                logprob = float(logprobs[generated.token].item())
                top = tuple(top_tokens(logprobs, live.row.top_logprobs))
            self._tell(
                live.ticket,
                Written(generated.token, now, logprob, top, generated.drafted, generated.accepted),
            )
        if generated.ended is not None:
            del self._live[generated.uid]
            self._tell(live.ticket, Over(generated.ended))
            self._flush()  # the reply is whole: nobody waits for what is kept of it
            self._keep(live, generated.kept)
            self._measure()

    def _recover(self, error: Exception) -> None:
        """Throws the lane away whose step failed and reads its rows again: see the module's text."""
        self._faults += 1
        log.error("a step failed: %s", type(error).__name__, exc_info=error)
        rows = [self._live.pop(uid) for uid in self._lanes.broken()]
        blamed = [live for live in rows if live.suspect] or rows
        is_memory = is_out_of_memory(error)
        if is_memory:
            self._forget_prefixes(self._pressure.held.used)
        gc.collect()
        mx.clear_cache()
        for live in blamed:
            live.faults += 1
        # Those blamed go last, so that the others are writing again before the culprit is tried.
        for live in sorted(rows, key=lambda one: one in blamed):
            if live.faults > ROW_RETRIES:
                self._fail(live.ticket, self._exhausted(live) if is_memory else error)
            else:
                live.suspect = True
                self._again.append(live)
        self._stepped_at = time.monotonic()

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if not isinstance(error, Failure):
            log.error("a reply failed: %s", type(error).__name__, exc_info=error)
            failure: Failure = BackendError(f"generating the reply failed: {type(error).__name__}")
            failure.__cause__ = error
        else:
            failure = error
        self._tell(ticket, Over("failed", failure))

    def _tell(self, ticket: Ticket, happening: Happening) -> None:
        self._is_pressing |= type(happening) is not Written
        self._outbox.append((ticket, happening))

    def _may_hold(self) -> bool:
        """Whether all that happened are tokens that can leave with those of the next step."""
        leaves_at = self._stepped_at + self._step_seconds
        return bool(self._live) and not self._is_pressing and leaves_at < self._flushed_at + JOIN_SECONDS

    def _flush(self) -> None:
        if self._outbox:
            news, self._outbox = self._outbox, []
            self._is_pressing = False
            self._flushed_at = time.monotonic()
            self._post(self._deliver, news)

    def _let_go(self, error: BaseException | None) -> None:
        for ticket in [live.ticket for live in (*self._live.values(), *self._again, *self._restored)] + [
            entry[2] for entry in self._queue
        ]:
            self._tell(ticket, Over("failed", why_ended(error)))
        self._live.clear()
        self._again.clear()
        self._queue.clear()
        self._aside.clear()
        self._flush()
        if self._disk is not None and self._prefixes is not None:
            for stretch in self._prefixes.stretches() if error is None else []:
                self._disk.write(stretch, patiently=True)
            self._disk.close(FLUSH_SECONDS)
        if self._prefixes is not None:
            self._prefixes.clear()
        if hasattr(self, "_lanes"):
            self._lanes.close()
        if self._speculation is not None:
            self._speculation.close()
        self._views.clear()
