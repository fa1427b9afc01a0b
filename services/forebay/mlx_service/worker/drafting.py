"""Guesses of what a row writes next, for the model to check several at once.

Two kinds. `PromptLookup` looks whether the last few tokens were there before
and guesses what followed them: free, and right where a reply repeats its
prompt or itself. `DraftModel` asks a small model. A guess changes nothing in a
reply: only tokens that the model picks itself are told.

Everything here runs on the engine's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from forebay.mlx_service.worker.runtime import KVCache, generation_stream, make_prompt_cache, mx
from forebay.mlx_service.worker.sampling import Array

RUNS = (4, 3, 2)
"""Tokens in a row that must have been there before, the longest first."""

LOOK_BACK = 16384
"""Most tokens before the end that are looked at: an index of more would take longer to make than a step."""


class Drafter(Protocol):
    """Guesses for one row."""

    def prepare(self, tokens: Sequence[int]) -> bool:
        """Does at most one step's work to get ready. Returns whether it is ready for these tokens."""

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """Returns at most so many tokens that may follow. `tokens` must begin with those seen before."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of the attention caches that it holds."""


class PromptLookup:
    """Guesses that what followed the last tokens before follows them again."""

    cache_bytes = 0

    def __init__(self) -> None:
        self._seen: int | None = None
        self._after: dict[tuple[int, ...], int] = {}

    def prepare(self, tokens: Sequence[int]) -> bool:
        """Indexes what is new."""
        self._index(tokens)
        return True

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """Returns what followed the latest place that ends as these tokens do."""
        if most < 1:
            return []
        self._index(tokens)
        for length in RUNS:
            place = self._after.get(tuple(tokens[-length:])) if len(tokens) > length else None
            if place is not None:
                run = list(tokens[place : place + most])
                gap = len(tokens) - place
                while len(run) < most:  # a loop goes on as it is
                    run.append(run[-gap])
                return run
        return []

    def _index(self, tokens: Sequence[int]) -> None:
        """Notes for each run of tokens where it was followed last."""
        begin = max(0, len(tokens) - LOOK_BACK) if self._seen is None else self._seen
        for place in range(max(begin, 1), len(tokens)):
            for length in RUNS:
                if place >= length:
                    self._after[tuple(tokens[place - length : place])] = place
        self._seen = max(begin, len(tokens))


class DraftModel:
    """Guesses what a smaller model with the same tokens would write.

    Args:
        model: the small model, loaded on this thread. All its caches can be cut back.
        vocabulary: tokens that the large model knows.
        chunk: tokens read in one step to catch up with a row.
    """

    def __init__(self, model: object, *, vocabulary: int, chunk: int) -> None:
        assert callable(model)
        self._model = model
        self._vocabulary = vocabulary
        self._chunk = chunk
        self._caches: list[KVCache] = make_prompt_cache(model)
        self._read: list[int] = []
        """What its caches hold."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of its attention caches."""
        return sum(int(cache.nbytes) for cache in self._caches)

    def prepare(self, tokens: Sequence[int]) -> bool:
        """Reads one chunk of what it has not read; ready when the rest is one."""
        self._agree(tokens)
        behind = len(tokens) - 1 - len(self._read)
        if behind <= self._chunk:
            return True
        chunk = list(tokens[len(self._read) : len(self._read) + self._chunk])
        with mx.stream(generation_stream):
            self._model(mx.array([chunk]), cache=self._caches)
            mx.eval([cache.state for cache in self._caches])
        self._read += chunk
        return False

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """Returns the likeliest tokens to follow, one after the other."""
        if most < 1:
            return []
        self._agree(tokens)
        fresh = list(tokens[len(self._read) :])
        with mx.stream(generation_stream):
            inputs = mx.array([fresh])
            picked = []
            for _ in range(most):
                logits = self._model(inputs, cache=self._caches)[:, -1, : self._vocabulary]
                inputs = mx.argmax(logits, axis=-1)[None]
                mx.async_eval(inputs)  # type: ignore[no-untyped-call]  # mlx's stubs leave its arguments open
                picked.append(inputs)
            drafted: Array = mx.concatenate(picked, axis=1)[0]
            guesses: list[int] = drafted.tolist()
        self._read += fresh + guesses[:-1]  # the last one was picked and not read
        return guesses

    def _agree(self, tokens: Sequence[int]) -> None:
        """Forgets what was guessed and did not come. At least the last token is read anew."""
        same = min(len(self._read), len(tokens) - 1)
        first = max(0, same - 64)  # only guesses can be wrong, and they are few
        while first < same and self._read[first] == tokens[first]:
            first += 1
        surplus = len(self._read) - first
        if surplus:
            for cache in self._caches:
                cache.trim(surplus)
            del self._read[first:]
