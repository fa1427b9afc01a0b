"""Lanes: batches over one model, so that a short row never pays for a long one's padding.

A batch pads every row to its longest. One row of 60,000 tokens would make
seven of a dozen tokens hold 60,000 each, and attend to the padding in every
step. So a row joins a lane only if the lane's padding stays small against what
is useful in it, and opens another otherwise. Rows of a lane grow together, so
what padding a lane begins with it never exceeds. Where rows that left made
lanes worse than they need be, one row a step changes its lane: see `balance`.

Rows of an adapter have lanes of their own, and a row that runs alone may have
one in which it writes several tokens a step: see `speculation`.

Every step runs one lane: that whose rows have had the least of the thread's
time, each row counting the same. So a long prompt that is read chunk by chunk,
or a lane whose attention is slow, takes its share and no more.

Everything here runs on the engine's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from forebay.mlx_service.worker import balance
from forebay.mlx_service.worker.batch import Batch, Generated, Kept, Prefilled
from forebay.mlx_service.worker.runtime import KVCache
from forebay.mlx_service.worker.sampling import Processor, Sampler
from forebay.mlx_service.worker.speculation import Solo, Speculation

MAX_LANES = 4
"""Most batches of one view at once. Each reads all the weights for a step of its own, so few beat many."""

LOOK_STEPS = 32
"""Steps after which lanes are looked at though no row came or left: rows grow, and become alike."""


@dataclass(slots=True, eq=False)
class _Row:
    """A row, with what another lane needs to go on with it."""

    number: int
    tokens: list[int]
    """Prompt and reply."""
    left: int
    """Tokens that it may still write."""
    sampler: Sampler
    processors: Sequence[Processor]
    speculates: bool
    is_writing: bool = False


@dataclass(slots=True, eq=False)
class _Lane:
    view: str
    batch: Batch | Solo
    rows: dict[int, _Row] = field(default_factory=dict)
    """Its rows by their numbers in the batch."""
    time: float = 0.0
    """Seconds of the thread's time that each of its rows has had."""

    @property
    def lengths(self) -> list[int]:
        return [len(row.tokens) for row in self.rows.values()]

    def padding_with(self, length: int) -> int:
        """Tokens of padding with one more row."""
        lengths = [*self.lengths, length]
        return balance.held(lengths) - sum(lengths)

    def has_place_for(self, length: int) -> bool:
        return balance.fits([*self.lengths, length])

    @property
    def shape(self) -> balance.Shape:
        return balance.Shape(
            self.view,
            {inner: len(row.tokens) for inner, row in self.rows.items()},
            frozenset(inner for inner, row in self.rows.items() if row.is_writing),
        )


class Lanes:
    """Rows that are generated together, in as many batches as their lengths call for.

    Args:
        new_batch: makes an empty batch over a view of the model.
        shared_step: tokens of a prompt read in one step while rows write; None reads as many as else.
        clock: tells how long a step took.
        balances: whether rows may change their lanes.
        speculation: decides when the row that runs alone speculates; None never does.
        model_of: the model behind a view. Needed to speculate.
        end_tokens: tokens that end a reply.
    """

    def __init__(
        self,
        new_batch: Callable[[str], Batch],
        *,
        shared_step: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        balances: bool = False,
        speculation: Speculation | None = None,
        model_of: Callable[[str], object] | None = None,
        end_tokens: Collection[int] = (),
    ) -> None:
        self._new_batch = new_batch
        self._shared_step = shared_step
        self._clock = clock
        self._balances = balances
        self._speculation = speculation
        self._model_of = model_of
        self._end_tokens = frozenset(end_tokens)
        self._lanes: list[_Lane] = []
        self._places: dict[int, tuple[_Lane, int]] = {}
        self._stepping: _Lane | None = None
        self._count = 0
        self._moves = 0
        self._unlooked = 0

    @property
    def widths(self) -> list[int]:
        """Rows of every lane."""
        return [len(lane.rows) for lane in self._lanes]

    @property
    def moves(self) -> int:
        """Times that a row changed its lane for balance."""
        return self._moves

    @property
    def cache_bytes(self) -> int:
        """Bytes that the rows' attention caches take."""
        return sum(lane.batch.cache_bytes for lane in self._lanes)

    def insert(
        self,
        tokens: Sequence[int],
        *,
        most: int,
        sampler: Sampler,
        processors: Sequence[Processor],
        caches: list[KVCache] | None = None,
        cached: int = 0,
        stops: Sequence[int] = (),
        view: str = "",
        speculates: bool = False,
    ) -> int:
        """Adds a row to the lane that suits its length. See `Batch.insert`.

        Args:
            view: the view of the model that writes it; "" is the model itself.
            speculates: whether it may, that is, whether its processors look at nothing but the tokens.
        """
        self._end_solo()
        row = _Row(self._count + 1, list(tokens), most, sampler, processors, speculates)
        self._put(row, self._lane_for(view, len(tokens)), caches, cached, stops)
        self._count += 1
        return row.number

    def step(self) -> tuple[list[Prefilled], list[Generated]]:
        """Runs the lane whose turn it is. If it raises, `broken` tells which rows are lost."""
        moved = self._rebalance()
        lane = self._stepping = min((x for x in self._lanes if x.rows), key=lambda x: x.time)
        width = len(lane.rows)
        is_shared = any(row.is_writing for other in self._lanes for row in other.rows.values())
        lane.batch.share_step(self._shared_step if is_shared else None)
        began = self._clock()
        read, written = lane.batch.step()
        took = self._clock() - began
        lane.time += took / width
        read = [replace(progress, uid=lane.rows[progress.uid].number) for progress in read]
        told = moved + [self._tell(lane, token.uid, token) for token in written]
        return read, told + self._speculate(lane, len(written), took)

    def peek(self, uid: int) -> Kept | None:
        """Returns what attention holds of a row that stays. See `Batch.peek`."""
        lane, inner = self._places[uid]
        assert not isinstance(lane.batch, Solo), "a prompt is read in a batch"
        return lane.batch.peek(inner)

    def remove(self, uid: int) -> Kept | None:
        """Takes a row out, and returns what attention holds of it. See `Batch.remove`."""
        lane, inner = self._places[uid]
        kept = lane.batch.remove(inner)
        self._forget(lane, inner)
        return kept

    def broken(self) -> Collection[int]:
        """Throws the lane away whose step raised, and returns its rows."""
        lane = self._stepping
        assert lane is not None
        lost = [row.number for row in lane.rows.values()]
        for uid in lost:
            del self._places[uid]
        self._lanes.remove(lane)
        self._stepping = None
        self._forget_guesses()
        lane.batch.close()
        return lost

    def close(self) -> None:
        """Gives back what all rows hold."""
        self._stepping = None
        self._places.clear()
        self._forget_guesses()
        while self._lanes:
            self._lanes.pop().batch.close()

    def close_view(self, view: str) -> None:
        """Gives back what empty lanes of a view hold, the view itself included."""
        for lane in [lane for lane in self._lanes if lane.view == view and not lane.rows]:
            self._lanes.remove(lane)
            lane.batch.close()

    # Rows and lanes

    def _put(
        self,
        row: _Row,
        lane: _Lane,
        caches: list[KVCache] | None,
        cached: int,
        stops: Sequence[int] = (),
    ) -> None:
        assert not isinstance(lane.batch, Solo)
        inner = lane.batch.insert(
            row.tokens,
            most=row.left,
            sampler=row.sampler,
            processors=row.processors,
            caches=caches,
            cached=cached,
            stops=stops,
        )
        lane.rows[inner] = row
        self._places[row.number] = lane, inner
        self._unlooked = LOOK_STEPS

    def _tell(self, lane: _Lane, inner: int, token: Generated) -> Generated:
        row = lane.rows[inner]
        row.tokens.append(token.token)
        row.left -= 1
        if not row.is_writing:
            row.is_writing = True
            self._unlooked = LOOK_STEPS
        if token.ended is not None:
            self._forget(lane, inner)
        return replace(token, uid=row.number)

    def _forget(self, lane: _Lane, inner: int) -> None:
        row = lane.rows.pop(inner)
        del self._places[row.number]
        self._unlooked = LOOK_STEPS
        if not self._places:
            self._forget_guesses()
        self._close_if_empty(lane)

    def _close_if_empty(self, lane: _Lane) -> None:
        if not lane.rows and (len(self._lanes) > 1 or isinstance(lane.batch, Solo)):
            self._lanes.remove(lane)
            lane.batch.close()

    def _lane_for(self, view: str, length: int) -> _Lane:
        alike = [lane for lane in self._lanes if lane.view == view and not isinstance(lane.batch, Solo)]
        fitting = [lane for lane in alike if lane.has_place_for(length)]
        if fitting:
            lane = min(fitting, key=lambda one: one.padding_with(length))
        elif len(alike) < MAX_LANES:
            return self._open(view)
        else:
            lane = min(alike, key=lambda one: one.padding_with(length))
        if not lane.rows:
            lane.time = self._least_time()
        return lane

    def _open(self, view: str, batch: Batch | Solo | None = None) -> _Lane:
        lane = _Lane(view, batch or self._new_batch(view), time=self._least_time())
        self._lanes.append(lane)
        return lane

    def _least_time(self) -> float:
        """What a lane begins with. One that stood still has no claim on the time that passed."""
        return min((other.time for other in self._lanes if other.rows), default=0.0)

    # Balance

    def _rebalance(self) -> list[Generated]:
        """Moves at most one row, and tells its next token, which its old lane had picked already."""
        if not self._balances or len(self._places) < 2:
            return []
        self._unlooked += 1
        if self._unlooked < LOOK_STEPS:
            return []
        move = balance.plan([lane.shape for lane in self._lanes], most=MAX_LANES)
        if move is None:
            self._unlooked = 0
            return []
        source = self._stepping = self._lanes[move.source]
        row = source.rows[move.row]
        taken = None if row.left < 2 else source.batch.take(move.row)
        if taken is None:  # its next token is its last: it leaves by itself
            self._unlooked = 0
            return []
        target = self._open(source.view) if move.target is None else self._lanes[move.target]
        told = self._moved(row, source, move.row, target, taken.following, taken.caches)
        self._moves += 1
        return told

    def _moved(
        self,
        row: _Row,
        source: _Lane,
        inner: int,
        target: _Lane,
        following: Generated | None,
        caches: list[KVCache],
    ) -> list[Generated]:
        """Puts a row that was taken out of one lane into another."""
        told = [] if following is None else [self._tell(source, inner, following)]
        self._put(row, target, caches, len(row.tokens) - 1)
        del source.rows[inner]
        self._close_if_empty(source)
        return told

    # Speculation

    def _speculate(self, lane: _Lane, count: int, took: float) -> list[Generated]:
        """Lets the row that runs alone begin to speculate, or end it, after its step."""
        if self._speculation is None or len(self._places) != 1 or not count:
            return []
        ((number, (place, inner)),) = self._places.items()
        row = lane.rows.get(inner)
        if place is not lane or row is None or not row.speculates or row.left < 2:
            return []
        if isinstance(lane.batch, Solo):
            if not self._speculation.goes_on(took):
                self._to_batch(lane)
            return []
        if not self._speculation.is_wanted(number, row.tokens, took):
            return []
        taken = lane.batch.take(inner)
        if taken is None:
            return []
        assert self._model_of is not None
        told = [] if taken.following is None else [self._tell(lane, inner, taken.following)]
        solo = self._speculation.begin(
            self._model_of(lane.view),
            row.tokens,
            taken,
            left=row.left,
            sampler=row.sampler,
            processors=row.processors,
            end_tokens=self._end_tokens,
        )
        alone = self._open(lane.view, solo)
        del lane.rows[inner]
        alone.rows[Solo.UID] = row
        self._places[number] = alone, Solo.UID
        self._close_if_empty(lane)
        return told

    def _end_solo(self) -> None:
        """Gives the row that speculates back to a batch: another comes."""
        self._forget_guesses()
        for lane in [lane for lane in self._lanes if isinstance(lane.batch, Solo)]:
            self._to_batch(lane)

    def _to_batch(self, lane: _Lane) -> None:
        ((inner, row),) = lane.rows.items()
        self._stepping = lane
        taken = lane.batch.take(inner)
        assert taken is not None
        target = self._lane_for(lane.view, len(row.tokens))
        self._moved(row, lane, inner, target, None, taken.caches)

    def _forget_guesses(self) -> None:
        if self._speculation is not None:
            self._speculation.forget()
