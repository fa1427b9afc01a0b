"""A step of all rows that write, with no more work in it than they ask for.

mlx-lm's own step computes every row's log probabilities of every token, and
cuts them into rows, whether anybody reads them or not. This one computes them
where they are drawn from, and else when they are looked at. What all layers'
caches have in common, positions and padding, they share, and rows without
padding need no mask.

Whatever `BatchGenerator` makes after this module is imported steps like this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from forebay.mlx_service.worker.runtime import BatchKVCache, generate, mx
from forebay.mlx_service.worker.sampling import Array, pick

Cache: TypeAlias = Any
"""One layer's `BatchKVCache`. mlx-lm has no types that mypy can follow."""


@dataclass(frozen=True, slots=True)
class Chances:
    """How likely the model found each token in one place."""

    logits: Array
    """Of several places, of shape [places, vocabulary]."""
    place: int
    """Which of them."""

    def logprobs(self) -> Array:
        """Computes the log probabilities."""
        logits = self.logits[self.place]
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class _Writing(generate.GenerationBatch):  # type: ignore[misc]  # mlx-lm has no types
    """Rows that write."""

    _next_tokens: Array
    _next_logprobs: list[Chances]

    def __init__(self, *arguments: object, **more: object) -> None:
        self._alike: list[list[Cache]] | None = None
        super().__init__(*arguments, **more)

    def extend(self, batch: _Writing) -> None:
        """Takes in the rows of another."""
        super().extend(batch)
        self._alike = None

    def filter(self, keep: list[int]) -> None:
        """Lets all rows go but these."""
        super().filter(keep)
        self._alike = None

    def _step(self) -> tuple[list[int], list[Chances]]:
        inputs = self._current_tokens = self._next_tokens
        current = self._current_logprobs = self._next_logprobs
        self._share()
        logits = self.model(inputs[:, None], cache=self.prompt_cache)[:, -1, :]
        contexts: list[Array] = []
        if any(self.logits_processors):
            logits = self._process(inputs, logits, contexts)
        self._next_tokens = pick(self.samplers, logits)
        self._next_logprobs = [Chances(logits, place) for place in range(len(self.uids))]
        mx.async_eval(self._next_tokens, contexts)  # type: ignore[no-untyped-call]  # mlx's stubs leave its arguments open
        mx.eval(inputs)
        told: list[int] = inputs.tolist()
        for tokens, token in zip(self.tokens, told, strict=True):
            tokens.append(token)
        return told, current

    def _process(self, inputs: Array, logits: Array, contexts: list[Array]) -> Array:
        """Runs every row's processors. Only rows that have some need what was written before."""
        rows = []
        for place, processors in enumerate(self.logits_processors):
            row = logits[place : place + 1]
            if processors:
                context = self._token_context[place].update_and_fetch(inputs[place : place + 1])
                contexts.append(context)
                for process in processors:
                    row = process(context, row)
            rows.append(row)
        return mx.concatenate(rows, axis=0)

    def _share(self) -> None:
        """Lets caches at the same positions have them in one array: whoever computes with it does so once."""
        if self._alike is None:
            self._alike = _alike(self.prompt_cache)
        for first, *others in self._alike:
            for cache in others:
                if cache._idx == first._idx:  # noqa: SLF001 - a model need not use all its layers in each step
                    cache.offset = first.offset


def _alike(caches: Sequence[Cache]) -> list[list[Cache]]:
    """Groups caches whose rows are at the same positions, and marks those without padding.

    All of them grow together from here on, until a row comes or leaves.
    """
    plain = [cache for cache in caches if type(cache) is BatchKVCache]
    mx.eval([(cache.offset, cache.left_padding) for cache in plain])
    groups: dict[tuple[object, ...], list[Cache]] = {}
    for cache in plain:
        padding = cache.left_padding.tolist()
        cache.is_whole = not any(padding)
        groups.setdefault((cache._idx, *cache.offset.tolist(), *padding), []).append(cache)  # noqa: SLF001
    return list(groups.values())


def _mask(cache: Cache, N: int, return_array: bool = False, **more: object) -> Array:  # noqa: N803 - as it is called
    """Makes no mask where there is nothing to hide from one more position: no padding, no window."""
    if N == 1 and cache.is_whole and not return_array and more.get("window_size") is None:
        return None
    return _made_mask(cache, N, return_array=return_array, **more)


_made_mask = BatchKVCache.make_mask
BatchKVCache.is_whole = False
BatchKVCache.make_mask = _mask
generate.GenerationBatch = _Writing
