"""What a model's caches are made of, and what of them can be cut at any token.

Attention over everything keeps keys and values of each token: any beginning of
them is what attention would keep of that beginning. A sliding window has
forgotten what left it, and a recurrent state is one sum of all it read: they
are good after the very token after which they were copied, and nowhere else.
So a model's caches fall into *runs*, which can be cut, and the *rest*, which
is copied whole. Models mix them, layer by layer and within a layer.

Everything here runs on the engine's thread.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from forebay.mlx_service.worker.runtime import ArraysCache, CacheList, KVCache, RotatingKVCache
from forebay.mlx_service.worker.sampling import Array

Caches: TypeAlias = list[KVCache]
"""One cache a layer, of whatever kind the model wants."""


@dataclass(frozen=True, slots=True)
class _Leaf:
    """One cache that is no list of caches."""

    kind: str
    """`run`, `window` or `arrays`."""
    size: int = 0
    """Of a window its tokens, of arrays their number."""


_Shape: TypeAlias = "_Leaf | tuple[_Shape, ...]"


def why_not(caches: Sequence[object]) -> str | None:
    """Returns why state in such caches cannot be kept, or None if it can."""
    strange = sorted({type(leaf).__name__ for leaf in _leaves(caches) if _leaf(leaf) is None})
    return f"its layers keep {', '.join(strange)}, which cannot be copied" if strange else None


class Layout:
    """The kinds of a model's caches.

    Args:
        caches: caches of the model, empty or not, for which `why_not` is None.
    """

    def __init__(self, caches: Sequence[object]) -> None:
        self._shapes: tuple[_Shape, ...] = tuple(_shape(cache) for cache in caches)
        kinds = [leaf.kind for shape in self._shapes for leaf in _flat(shape)]
        self.run_count = 2 * kinds.count("run")
        """Arrays that can be cut: keys and values of each cache that can be."""
        self.is_cuttable = self.run_count == 2 * len(kinds)
        """Whether all of it can be cut."""

    def __repr__(self) -> str:
        return f"<Layout {self._shapes!r}>"

    def runs(self, caches: Sequence[object]) -> list[Array]:
        """Returns the arrays that can be cut, tokens on their third axis."""
        return [
            array
            for leaf in _leaves(caches)
            if isinstance(leaf, KVCache)
            for array in (leaf.keys, leaf.values)
        ]

    def rest(self, caches: Sequence[object]) -> list[Array]:
        """Returns what cannot be cut, not evaluated, as `build` takes it."""
        found: list[Array] = []
        for leaf in _leaves(caches):
            if isinstance(leaf, RotatingKVCache):
                inside = slice(-leaf.size(), None)  # after a prompt there is more than the window
                order = leaf._temporal_order  # noqa: SLF001  # as mlx-lm does where it joins windows
                found += [order(array)[..., inside, :] for array in (leaf.keys, leaf.values)]
            elif isinstance(leaf, ArraysCache):
                found += leaf.cache
        return found

    def covers(self, caches: Sequence[object], count: int) -> bool:
        """Whether the caches hold something in every place, of exactly so many tokens where that shows."""
        for leaf in _leaves(caches):
            if isinstance(leaf, ArraysCache):
                if any(array is None for array in leaf.cache):
                    return False
            elif leaf.keys is None or leaf.offset != count:  # type: ignore[attr-defined]  # the other two kinds
                return False
        return True

    def least(self, caches: Sequence[object]) -> int:
        """Returns of how many tokens the caches that can be cut hold something."""
        return min(
            (
                0 if leaf.keys is None else int(leaf.offset)
                for leaf in _leaves(caches)
                if isinstance(leaf, KVCache)
            ),
            default=0,
        )

    def build(self, runs: Sequence[Array], rest: Sequence[Array], count: int) -> Caches:
        """Returns caches of `count` tokens that hold these arrays."""
        # Caches write into the objects they hold. These share memory with those given, until they do.
        run, other = iter([copy.copy(array) for array in runs]), iter([copy.copy(array) for array in rest])

        def one(shape: _Shape) -> object:
            if isinstance(shape, tuple):
                return CacheList(*(one(inner) for inner in shape))
            if shape.kind == "arrays":
                arrays = ArraysCache(shape.size)
                arrays.cache = [next(other) for _ in range(shape.size)]
                return arrays
            if shape.kind == "run":
                cut = KVCache()
                cut.keys, cut.values, cut.offset = next(run), next(run), count
                return cut
            window = RotatingKVCache(shape.size)
            keys, values = next(other), next(other)
            window.state = keys, values, count, 0, shape.size, int(keys.shape[2])
            return window

        return [one(shape) for shape in self._shapes]


def _shape(cache: object) -> _Shape:
    if isinstance(cache, CacheList):
        return tuple(_shape(inner) for inner in cache.caches)
    leaf = _leaf(cache)
    assert leaf is not None, "why_not was not asked"
    return leaf


def _leaf(cache: object) -> _Leaf | None:
    if type(cache) not in {KVCache, RotatingKVCache, ArraysCache}:
        return None  # of their subclasses nothing is known
    if isinstance(cache, KVCache):
        return _Leaf("run")
    if isinstance(cache, RotatingKVCache) and not cache.keep:  # batches forget what is to be kept for ever
        return _Leaf("window", int(cache.max_size))
    if isinstance(cache, ArraysCache):
        return _Leaf("arrays", len(cache.cache))
    return None


def _leaves(caches: Sequence[object]) -> Iterator[object]:
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from _leaves(cache.caches)
        else:
            yield cache


def _flat(shape: _Shape) -> Iterator[_Leaf]:
    if isinstance(shape, tuple):
        for inner in shape:
            yield from _flat(inner)
    else:
        yield shape
