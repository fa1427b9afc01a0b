"""Speculation: a row that runs alone writes several tokens a step where they can be guessed.

A step of one row reads all weights to write one token. With `n` guesses it
reads them once too and learns what the model picks after each of them: as long
as the guesses are right, all of that is written. Whatever is told was picked
by the model from the same beginning with the same draws, so a reply is the
same with speculation and without, but for the low bits in which a step of
several tokens may differ from several steps.

A step with others serves them all for the price of one, so a row speculates
only while it is alone, and goes back into a batch when another comes.

Guesses by looking back cost nothing but the looking, so a row is watched in
its batch and taken out when what would have been guessed was mostly right.
Whether it pays is then measured: seconds a token with it against without. If
it does not, the row goes back, and the next try is the further off the more
tries came to nothing.

Everything here runs on the engine's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from forebay.kit.failure import ModelLoadFailed
from forebay.mlx_service.worker.batch import Generated, Kept, Prefilled, Taken, has_plain_caches
from forebay.mlx_service.worker.decoding import Chances
from forebay.mlx_service.worker.drafting import Drafter, DraftModel, PromptLookup
from forebay.mlx_service.worker.memory import KvCost, probe
from forebay.mlx_service.worker.runtime import BatchKVCache, KVCache, generation_stream, mx
from forebay.mlx_service.worker.sampling import Array, Processor, Sampler, pick_each, take_back

FIRST_GUESSES = 4
"""Tokens guessed at first. Doubled while all are right, halved when most are wrong."""

MOST_GUESSES = 16
"""Most tokens guessed in one step. A step of more takes visibly longer than one of a few."""

WATCHED = 12
"""Tokens over which guesses are watched before a row speculates by looking back."""

RIGHT = 6
"""How many of them must have been guessed."""

SILENT_ROUNDS = 8
"""Steps without any guess after which a row goes back, where a step overlaps with the next."""

MEASURED_STEPS = 4
"""Steps without speculation that must have been measured before it is tried."""

MEASURED_ROUNDS = 16
"""Steps with it after which it is decided whether it pays. The first few are left out."""

UNMEASURED_ROUNDS = 2
"""Steps left out: they make the caches grow, and compile kernels for shapes not seen before."""

REST_TOKENS = 64
"""Tokens to write before the next try when one did not pay. Doubled each time, up to `MOST_REST_TOKENS`."""

MOST_REST_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """How speculation did."""

    steps: int = 0
    """Steps with guesses."""
    drafted: int = 0
    """Tokens guessed."""
    accepted: int = 0
    """Of these, tokens that the model picked too."""
    tries: int = 0
    """Times that a row began to speculate."""
    given_up: int = 0
    """Times that it did not pay."""


class Solo:
    """One row, written several tokens a step. Looks like a batch to lanes.

    Args:
        model: the model.
        tokens: the row's tokens, which others add to as they are told.
        taken: the row as its batch gave it. Its caches are this object's own.
        left: tokens that it may still write, at least one.
        sampler: picks the tokens.
        processors: change the logits first; functions of the tokens alone.
        drafters: guess; the first that has a guess is taken.
        end_tokens: tokens that end a reply.
        on_round: is told guesses, right guesses and tokens written of each step.
    """

    UID = 0
    """Number of its row."""

    def __init__(
        self,
        model: object,
        tokens: Sequence[int],
        taken: Taken,
        *,
        left: int,
        sampler: Sampler,
        processors: Sequence[Processor],
        drafters: Sequence[Drafter],
        end_tokens: frozenset[int],
        on_round: Callable[[int, int, int], None],
    ) -> None:
        assert callable(model)
        self._model = model
        self._tokens = list(tokens)
        self._caches: list[KVCache] = taken.caches
        for cache in self._caches:
            cache.step = BatchKVCache.step  # grows as it did in the batch, which is what was reserved
        self._left = left
        self._sampler = sampler
        self._processors = processors
        self._drafters = drafters
        self._end_tokens = end_tokens
        self._on_round = on_round
        self._guesses = FIRST_GUESSES

    def step(self) -> tuple[list[Prefilled], list[Generated]]:
        """Guesses, checks, and tells what the model picked: at least one token."""
        most = min(self._guesses, self._left - 1)
        draft = next(
            (found for drafter in self._drafters if (found := drafter.draft(self._tokens, most))), []
        )
        picked, logits = self._check(draft)
        right = 0
        while right < len(draft) and picked[right] == draft[right]:
            right += 1
        told = picked[: right + 1]
        ended = next((i for i, token in enumerate(told) if token in self._end_tokens), None)
        if ended is not None:
            told = told[: ended + 1]
        surplus = len(draft) + 1 - len(told)
        for cache in self._caches:
            cache.trim(surplus)
        take_back(self._sampler, surplus)
        self._tokens += told
        self._left -= len(told)
        if draft:
            self._adapt(right, len(draft))
        self._on_round(len(draft), right, len(told))
        reason = "stop" if ended is not None else "length" if self._left < 1 else None
        return [], [
            Generated(
                self.UID,
                token,
                Chances(logits, i),
                reason if i == len(told) - 1 else None,
                Kept(tuple(self._tokens[:-1]), self._caches) if reason and i == len(told) - 1 else None,
                drafted=len(draft) if i == 0 else 0,
                accepted=i < right,
            )
            for i, token in enumerate(told)
        ]

    def take(self, uid: int) -> Taken | None:
        """Gives the row up. Its caches hold all its tokens but the last."""
        return Taken(None, self._cut())

    def remove(self, uid: int) -> Kept | None:
        """Takes the row out, and returns what attention holds of it."""
        return Kept(tuple(self._tokens[:-1]), self._cut())

    def share_step(self, most: int | None) -> None:
        """Does nothing: no prompt is read here."""

    @property
    def cache_bytes(self) -> int:
        """Bytes that the row's caches take, and those of its drafters."""
        own = sum(int(cache.nbytes) for cache in self._caches)
        return own + sum(drafter.cache_bytes for drafter in self._drafters)

    def close(self) -> None:
        """Gives back what the row holds."""
        self._caches = []

    def _check(self, draft: Sequence[int]) -> tuple[list[int], Array]:
        """What the model picks after the last token and after each guess, were those before it right."""
        with mx.stream(generation_stream):
            logits = self._model(mx.array([[self._tokens[-1], *draft]]), cache=self._caches)[0]
            if self._processors:
                rows = []
                for i in range(len(draft) + 1):
                    context = mx.array([*self._tokens, *draft[:i]])
                    row = logits[i : i + 1]
                    for process in self._processors:
                        row = process(context, row)
                    rows.append(row)
                logits = mx.concatenate(rows)
            picked = pick_each(self._sampler, logits)
            mx.eval(picked, logits)
            tokens: list[int] = picked.tolist()
            return tokens, logits

    def _adapt(self, right: int, guessed: int) -> None:
        if right == guessed:
            self._guesses = min(2 * self._guesses, MOST_GUESSES)
        elif 2 * right < guessed:
            self._guesses = max(self._guesses // 2, 2)

    def _cut(self) -> list[KVCache]:
        """The caches, with nothing in them of guesses that were wrong."""
        for cache in self._caches:
            cache.keys = cache.keys[..., : cache.offset, :]
            cache.values = cache.values[..., : cache.offset, :]
        mx.eval([cache.state for cache in self._caches])
        return self._caches


class Worth:
    """Measures whether speculation pays: seconds a token with it and without."""

    def __init__(self) -> None:
        self._plain = 0.0
        self._plain_steps = 0
        self._rounds = 0
        self._seconds = 0.0
        self._tokens = 0
        self._rest = REST_TOKENS
        self._resting = 0

    @property
    def is_due(self) -> bool:
        """Whether there is something to compare with, and no rest to take."""
        return self._plain_steps >= MEASURED_STEPS and self._resting <= 0

    def restart(self) -> None:
        """Forgets how long steps take: another row has another length."""
        self._plain, self._plain_steps = 0.0, 0

    def without(self, seconds: float) -> None:
        """Notes a step of one token."""
        self._plain_steps += 1
        weight = max(0.1, 1 / self._plain_steps)
        self._plain += weight * (seconds - self._plain)
        self._resting -= 1

    def begin(self) -> None:
        """Begins to measure speculation."""
        self._rounds, self._seconds, self._tokens = 0, 0.0, 0

    def pays(self, seconds: float, tokens: int) -> bool:
        """Notes a step with speculation. Returns False when it has turned out not to pay."""
        self._rounds += 1
        if self._rounds <= UNMEASURED_ROUNDS:
            return True
        self._seconds += seconds
        self._tokens += tokens
        if self._rounds < MEASURED_ROUNDS:
            return True
        pays = self._seconds < self._plain * self._tokens
        self._rest = REST_TOKENS if pays else self._rest
        self.begin()
        if not pays:
            self._resting = self._rest
            self._rest = min(2 * self._rest, MOST_REST_TOKENS)
        return pays


class Speculation:
    """Decides when the row that runs alone speculates, and measures how that does.

    Args:
        lookup: whether to guess by looking back.
        load_draft: loads a small model with the same tokens, on the engine's thread; None has none.
        worth: measures whether it pays.
    """

    def __init__(
        self,
        *,
        lookup: bool = True,
        load_draft: Callable[[], object] | None = None,
        worth: Worth | None = None,
    ) -> None:
        self._lookup = lookup
        self._load_draft = load_draft
        self._draft: Callable[[], Drafter] | None = None
        self._small: object = None
        self._worth = worth or Worth()
        self._row: int | None = None
        self._looker = PromptLookup()
        self._drafter: Drafter | None = None
        self._expected: int | None = None
        self._watched: deque[bool] = deque(maxlen=WATCHED)
        self._silent = 0
        self._round = (0, 0, 0)
        self._stats = SpeculationStats()

    @property
    def stats(self) -> SpeculationStats:
        """How it did so far."""
        return self._stats

    def load(self, model: object) -> KvCost:
        """Loads what it needs to speculate with a model, and returns what that takes for a row.

        Raises:
            ModelLoadFailed: there is a draft model, and the model's or its own caches cannot be cut back.
        """
        if not has_plain_caches(model):
            self._lookup = False
            if self._load_draft is not None:
                raise ModelLoadFailed(
                    "a draft model cannot guess for this model, whose caches cannot be cut back when a guess "
                    "was wrong: take it out of draft_models"
                )
        if self._load_draft is None:
            return KvCost()
        self._small = self._load_draft()
        if not has_plain_caches(self._small):
            raise ModelLoadFailed(
                "the draft model's caches cannot be cut back when a guess was wrong: name another one in "
                "draft_models"
            )
        return probe(self._small)

    def start(self, *, vocabulary: int, chunk: int) -> None:
        """Gets ready to guess, and runs the draft model once.

        Args:
            vocabulary: tokens that the model knows.
            chunk: tokens that a draft model reads in one step.
        """
        if self._small is not None:
            self._draft = partial(DraftModel, self._small, vocabulary=vocabulary, chunk=chunk)
            self._draft().draft([0], 2)

    def close(self) -> None:
        """Drops the draft model."""
        self.forget()
        self._draft = self._small = None

    def is_wanted(self, row: int, tokens: Sequence[int], seconds: float) -> bool:
        """Notes a plain step of the row that runs alone; returns whether to speculate from here on."""
        if row != self._row:
            self._follow(row)
        else:
            self._watched.append(tokens[-1] == self._expected)
        self._worth.without(seconds)
        if self._lookup:
            self._expected = next(iter(self._looker.draft(tokens, 1)), None)
        if not self._worth.is_due:
            return False
        if self._draft is not None:
            self._drafter = self._drafter or self._draft()
            return self._drafter.prepare(tokens)
        return self._expected is not None and sum(self._watched) >= RIGHT

    def begin(
        self,
        model: object,
        tokens: Sequence[int],
        taken: Taken,
        *,
        left: int,
        sampler: Sampler,
        processors: Sequence[Processor],
        end_tokens: frozenset[int],
    ) -> Solo:
        """Makes the row speculate. See `Solo`."""
        self._silent = 0
        self._worth.begin()
        self._stats = replace(self._stats, tries=self._stats.tries + 1)
        drafters: list[Drafter] = [self._looker] if self._lookup else []
        if self._drafter is not None:
            drafters.append(self._drafter)
        return Solo(
            model,
            tokens,
            taken,
            left=left,
            sampler=sampler,
            processors=processors,
            drafters=drafters,
            end_tokens=end_tokens,
            on_round=self._note,
        )

    def goes_on(self, seconds: float) -> bool:
        """Notes how long a step with speculation took; returns False if the row should go back."""
        drafted, _, told = self._round
        self._silent = 0 if drafted else self._silent + 1
        if not self._worth.pays(seconds, told):
            self._stats = replace(self._stats, given_up=self._stats.given_up + 1)
            self._watched.clear()
            return False
        if self._silent >= SILENT_ROUNDS:
            self._watched.clear()
            return False
        return True

    def forget(self) -> None:
        """Drops what is held of the row."""
        self._row = self._drafter = self._expected = None
        self._looker = PromptLookup()
        self._watched.clear()

    def _follow(self, row: int) -> None:
        self.forget()
        self._row = row
        self._worth.restart()

    def _note(self, drafted: int, right: int, told: int) -> None:
        self._round = drafted, right, told
        if drafted:
            stats = self._stats
            self._stats = replace(
                stats,
                steps=stats.steps + 1,
                drafted=stats.drafted + drafted,
                accepted=stats.accepted + min(right, told),
            )
