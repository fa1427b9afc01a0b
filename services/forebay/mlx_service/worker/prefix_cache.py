"""The prefix cache: what attention remembers of texts that were read before, so that they are read once.

A radix tree of tokens. A node holds a run of tokens and the keys and values
that attention computed for that run and nothing else, so a system prompt that
many conversations begin with is there once, and stays when one of them leaves.

What is kept is copied out of the batch and evaluated at once: a lazy slice
would hold the whole batch's memory. What is given out is put together to
exactly the tokens that matched, so no buffer ever reaches a row with more in
it than the row's own prompt. Trees of different keys share nothing.

Only caches that can be cut anywhere are kept. A rotating window has forgotten
its beginning, and a recurrent state cannot go back; `why_not` says so.

Everything here runs on the engine's thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from forebay.mlx_service.worker.runtime import KVCache, make_prompt_cache, mx
from forebay.mlx_service.worker.sampling import Array

Caches: TypeAlias = list[KVCache]
"""One attention cache a layer."""

MIN_TOKENS = 32
"""Fewer tokens are read about as fast as they are looked up, and would fill the tree with crumbs."""

MAX_BUFFERS = 65536
"""Most arrays to hold. Metal refuses allocations beyond some 499,000 live buffers, whatever their size."""

PINNED_SHARE = 0.5
"""Share of the budget that pinned prefixes may take. The rest stays for everybody."""


def why_not(model: object) -> str | None:
    """Returns why the model's prefixes cannot be kept, or None if they can."""
    kinds = sorted({type(cache).__name__ for cache in make_prompt_cache(model)} - {"KVCache"})
    return (
        f"its layers keep {', '.join(kinds)}, which cannot be cut back to a shared beginning"
        if kinds
        else None
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixStats:
    """What the cache holds and how it did."""

    bytes: int = 0
    """Bytes of keys and values."""
    nodes: int = 0
    """Runs of tokens."""
    hits: int = 0
    """Lookups that found something."""
    misses: int = 0
    """Lookups that did not."""
    hit_tokens: int = 0
    """Tokens that did not have to be read."""
    evicted: int = 0
    """Runs that left for want of room."""


@dataclass(slots=True, eq=False)
class _Node:
    """A run of tokens after those of its parents."""

    run: tuple[int, ...]
    kept: tuple[Array, ...]
    """Keys and values of the run, those of one shape stacked: [arrays, 1, heads, tokens, size] each."""
    parent: _Node | None
    children: dict[int, _Node] = field(default_factory=dict)
    used: int = 0
    pinned: bool = False

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for array in self.kept)


class PrefixCache:
    """Keeps attention state of token sequences within a budget, the least recently used leaving first.

    Args:
        max_bytes: most bytes to hold.
        max_buffers: most arrays to hold.
        min_tokens: shortest match, and shortest sequence, worth anything.
    """

    def __init__(
        self, *, max_bytes: int, max_buffers: int = MAX_BUFFERS, min_tokens: int = MIN_TOKENS
    ) -> None:
        self._budget = max_bytes
        self._max_bytes = max_bytes
        self._max_buffers = max_buffers
        self._min_tokens = max(1, min_tokens)
        self._roots: dict[str, _Node] = {}
        self._groups: tuple[tuple[int, ...], ...] = ()
        self._clock = 0
        self._bytes = 0
        self._buffers = 0
        self._nodes = 0
        self._hits = 0
        self._misses = 0
        self._hit_tokens = 0
        self._evicted = 0

    @property
    def stats(self) -> PrefixStats:
        """What is held now."""
        return PrefixStats(
            bytes=self._bytes,
            nodes=self._nodes,
            hits=self._hits,
            misses=self._misses,
            hit_tokens=self._hit_tokens,
            evicted=self._evicted,
        )

    def find(self, key: str, tokens: Sequence[int]) -> tuple[Caches | None, int]:
        """Returns caches of the longest known beginning of `tokens` and its length.

        The last token is never part of it: the model needs one to answer from. The caches are the
        caller's own.
        """
        wanted = tuple(tokens[:-1])
        path, count = self._walk(key, wanted)
        if count < self._min_tokens:
            self._misses += 1
            return None, 0
        self._touch(path)
        self._hits += 1
        self._hit_tokens += count
        return self._assemble(path, count), count

    def store(self, key: str, tokens: Sequence[int], caches: Caches, *, pin: int = 0) -> None:
        """Keeps what is new of a sequence. One that exceeds the budget is left out.

        Args:
            key: whose it is; nobody with another key ever finds it.
            tokens: the sequence.
            caches: what attention holds of it; they are only read.
            pin: tokens at its beginning that no lack of room drives out.
        """
        whole = tuple(tokens[: min((int(cache.offset) for cache in caches), default=0)])
        if len(whole) < self._min_tokens:
            return
        path, count = self._walk(key, whole)
        fresh = len(whole) - count
        per_token = sum(
            int(array.nbytes) // int(array.shape[2])
            for cache in caches
            for array in (cache.keys, cache.values)
        )
        if fresh * per_token > self._max_bytes:
            return
        self._touch(path)
        if fresh:
            root = self._roots.setdefault(key, _Node((), (), None))
            parent = self._cut(path, count) if path else root
            node = _Node(whole[count:], self._slice(caches, count, len(whole)), parent)
            parent.children[whole[count]] = node
            self._count(node, 1)
            self._touch([node])
        if pin >= self._min_tokens:
            self._pin(key, whole[:pin])
        self.shrink(self._max_bytes)

    def limit(self, room: int | None) -> None:
        """Keeps the cache within its budget and what room others leave; None leaves all of it."""
        self._max_bytes = self._budget if room is None else min(self._budget, room)
        self.shrink(self._max_bytes)

    def shrink(self, max_bytes: int) -> None:
        """Drops the least recently used until no more than so many bytes are held."""
        while self._bytes > max_bytes or self._buffers > self._max_buffers:
            leaf = min(self._leaves(), key=lambda node: node.used, default=None)
            if leaf is None:
                return
            self._drop(leaf)
            self._evicted += 1
        if len(self._roots) > self._nodes:  # keys of callers that left
            self._roots = {key: root for key, root in self._roots.items() if root.children}

    def clear(self) -> None:
        """Drops everything."""
        self._roots.clear()
        self._bytes = self._buffers = self._nodes = 0

    def _walk(self, key: str, tokens: tuple[int, ...]) -> tuple[list[_Node], int]:
        """Returns the nodes that `tokens` leads through, the last perhaps in part, and how far it leads."""
        path: list[_Node] = []
        count = 0
        node = self._roots.get(key)
        while node is not None and count < len(tokens):
            child = node.children.get(tokens[count])
            if child is None:
                break
            path.append(child)
            same = _common(child.run, tokens[count : count + len(child.run)])
            count += same
            if same < len(child.run):
                break
            node = child
        return path, count

    def _assemble(self, path: Sequence[_Node], count: int) -> Caches:
        stacks = [mx.concatenate(list(parts), axis=3) for parts in zip(*(n.kept for n in path), strict=True)]
        caches: Caches = [KVCache() for _ in range(sum(len(group) for group in self._groups) // 2)]
        for group, stack in zip(self._groups, stacks, strict=True):
            for place, index in enumerate(group):
                array = stack[place, :, :, :count]
                if index % 2:
                    caches[index // 2].values = array
                else:
                    caches[index // 2].keys = array
        for cache in caches:
            cache.offset = count
        return caches

    def _slice(self, caches: Caches, begin: int, end: int) -> tuple[Array, ...]:
        """Copies a run out of caches, arrays of one shape in one, so that a node is one or two buffers."""
        arrays = [array for cache in caches for array in (cache.keys, cache.values)]
        if not self._groups:
            kinds: dict[tuple[object, ...], list[int]] = {}
            for index, array in enumerate(arrays):
                kind = (array.shape[1], array.shape[3], array.dtype)
                kinds.setdefault(kind, []).append(index)
            self._groups = tuple(tuple(indices) for indices in kinds.values())
        stacks = [mx.stack([arrays[i][:, :, begin:end] for i in group]) for group in self._groups]
        return _detached(stacks)

    def _cut(self, path: Sequence[_Node], count: int) -> _Node:
        """Makes the path end with a node that ends after `count` tokens, and returns that node."""
        last = path[-1]
        keep = count - sum(len(node.run) for node in path[:-1])
        if keep == len(last.run):
            return last
        assert last.parent is not None
        head = _detached([array[..., :keep, :] for array in last.kept])
        tail = _detached([array[..., keep:, :] for array in last.kept])
        upper = _Node(last.run[:keep], head, last.parent, used=last.used, pinned=last.pinned)
        last.parent.children[last.run[0]] = upper
        self._count(last, -1)
        last.run, last.kept, last.parent = last.run[keep:], tail, upper
        upper.children[last.run[0]] = last
        self._count(upper, 1)
        self._count(last, 1)
        return upper

    def _pin(self, key: str, tokens: tuple[int, ...]) -> None:
        path, count = self._walk(key, tokens)
        self._cut(path, count)
        path, _ = self._walk(key, tokens)
        pinned = sum(node.nbytes for node in self._all() if node.pinned or node in path)
        if pinned <= self._max_bytes * PINNED_SHARE:
            for node in path:
                node.pinned = True

    def _touch(self, path: Sequence[_Node]) -> None:
        self._clock += 1
        for node in path:
            node.used = self._clock

    def _count(self, node: _Node, sign: int) -> None:
        self._bytes += sign * node.nbytes
        self._buffers += sign * len(node.kept)
        self._nodes += sign

    def _drop(self, leaf: _Node) -> None:
        assert leaf.parent is not None
        del leaf.parent.children[leaf.run[0]]
        self._count(leaf, -1)

    def _all(self) -> Iterator[_Node]:
        rest = [child for root in self._roots.values() for child in root.children.values()]
        while rest:
            node = rest.pop()
            yield node
            rest.extend(node.children.values())

    def _leaves(self) -> Iterator[_Node]:
        return (node for node in self._all() if not node.children and not node.pinned)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    if tuple(one) == tuple(other):
        return len(one)
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _detached(arrays: Sequence[Array]) -> tuple[Array, ...]:
    """Copies arrays into memory of their own, now."""
    copies = tuple(mx.contiguous(array) * 1 for array in arrays)  # a slice may be contiguous and yet a view
    mx.eval(copies)
    return copies
