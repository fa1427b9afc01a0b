"""The prefix cache: what a model remembers of texts that were read before, so that they are read once.

A radix tree of tokens. A node holds a run of tokens and the keys and values
that attention computed for that run and nothing else, so a system prompt that
many conversations begin with is there once, and stays when one of them leaves.

Of a model some of whose layers cannot be cut (see `cache_layout`), a node also
holds a *snapshot* of those layers after its last token, if one was taken
there. Such a model goes on from the last snapshot within what is known of a
text. The engine takes them where texts are likely to part: `stops` says where.

A *mark* is a number somebody knows a beginning by, such as the digest of its
messages. A mark is held as long as what answers that beginning is.

What is kept is copied out of the batch and evaluated at once: a lazy slice
would hold the whole batch's memory. What is given out is put together to
exactly the tokens that matched, so no buffer ever reaches a row with more in
it than the row's own prompt. Trees of different keys share nothing.

Everything here runs on the engine's thread, but for the figures.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from forebay.mlx_service.worker import cache_layout
from forebay.mlx_service.worker.beginnings import common
from forebay.mlx_service.worker.cache_layout import Caches, Layout
from forebay.mlx_service.worker.runtime import make_prompt_cache, mx
from forebay.mlx_service.worker.sampling import Array

Mark: TypeAlias = tuple[int, int]
"""A number by which a beginning is known, and the tokens of that beginning."""

Groups: TypeAlias = tuple[tuple[int, ...], ...]
"""Places in a list of arrays, those of arrays of one shape together."""

MIN_TOKENS = 32
"""Fewer tokens are read about as fast as they are looked up, and would fill the tree with crumbs."""

MAX_BUFFERS = 65536
"""Most arrays to hold. Metal refuses allocations beyond some 499,000 live buffers, whatever their size."""

PINNED_SHARE = 0.5
"""Share of the budget that pinned prefixes may take. The rest stays for everybody."""

SNAPSHOT_TOKENS = 4096
"""Tokens after which a long text gets a snapshot wherever its messages end: about a second's reading."""

SNAPSHOT_GAP = 16
"""Tokens that are read again rather than having a snapshot of their own, and by which a mark may miss."""

MOST_MARKS = 64
"""Marks to tell. A router knows the conversations it sent lately; older ones it finds elsewhere or anew."""


def why_not(model: object) -> str | None:
    """Returns why the model's prefixes cannot be kept, or None if they can."""
    return cache_layout.why_not(make_prompt_cache(model))


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixStats:
    """What the cache holds and how it did."""

    bytes: int = 0
    """Bytes of keys, values and snapshots."""
    nodes: int = 0
    """Runs of tokens."""
    hits: int = 0
    """Lookups that found something."""
    misses: int = 0
    """Lookups that did not."""
    hit_tokens: int = 0
    """Tokens that did not have to be read."""
    evicted: int = 0
    """Runs and snapshots that left for want of room."""
    snapshots: int = 0
    """Snapshots of layers that cannot be cut."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Arrays, those of one shape stacked along a new first axis, so that many are few buffers."""

    groups: Groups = ()
    arrays: tuple[Array, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(int(array.nbytes) for array in self.arrays)

    def unpack(self) -> list[Array]:
        """Returns the arrays in their order."""
        found: dict[int, Array] = {}
        for group, stack in zip(self.groups, self.arrays, strict=True):
            found.update({place: stack[n] for n, place in enumerate(group)})
        return [found[place] for place in range(len(found))]

    def cut(self, begin: int, end: int | None) -> Packed:
        """Returns a copy of some of the tokens of runs."""
        return Packed(self.groups, _detached([stack[..., begin:end, :] for stack in self.arrays]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """What is kept of a stretch of a text: that of one node."""

    key: str
    """Whose it is."""
    tokens: tuple[int, ...]
    """The text up to the stretch's end."""
    begin: int
    """Tokens before the stretch."""
    kept: Packed
    """Keys and values of the stretch."""
    rest: Packed | None
    """A snapshot after its last token."""
    marks: tuple[Mark, ...]
    """Marks it has."""


@dataclass(slots=True, eq=False)
class _Node:
    """A run of tokens after those of its parents."""

    key: str
    run: tuple[int, ...]
    kept: Packed
    parent: _Node | None
    children: dict[int, _Node] = field(default_factory=dict)
    used: int = 0
    pinned: bool = False
    rest: Packed | None = None
    rest_used: int = 0
    marks: dict[int, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.kept.nbytes + (self.rest.nbytes if self.rest is not None else 0)

    @property
    def buffers(self) -> int:
        return len(self.kept.arrays) + (len(self.rest.arrays) if self.rest is not None else 0)


class PrefixCache:
    """Keeps the state of token sequences within a budget, the least recently used leaving first.

    Args:
        max_bytes: most bytes to hold.
        max_buffers: most arrays to hold.
        min_tokens: shortest match, and shortest sequence, worth anything.
    """

    def __init__(
        self, *, max_bytes: int, max_buffers: int = MAX_BUFFERS, min_tokens: int = MIN_TOKENS
    ) -> None:
        self.spill: Callable[[Stretch], None] | None = None
        """Is given what leaves for want of room, before it leaves."""
        self.marks: tuple[int, ...] = ()
        """Marks that are held, newest first, some of them. May be read on any thread."""
        self._budget = max_bytes
        self._max_bytes = max_bytes
        self._max_buffers = max_buffers
        self._min_tokens = max(1, min_tokens)
        self._layout: Layout | None = None
        self._groups: Groups = ()
        self._roots: dict[str, _Node] = {}
        self._marked: OrderedDict[int, int] = OrderedDict()
        self._clock = 0
        self._bytes = 0
        self._buffers = 0
        self._nodes = 0
        self._snapshots = 0
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
            snapshots=self._snapshots,
        )

    def learn(self, model: object) -> Layout:
        """Learns of what kinds the model's caches are; else the first that are stored tell."""
        self._layout = Layout(make_prompt_cache(model))
        return self._layout

    def stops(self, tokens: Sequence[int], cached: int, beginnings: Iterable[Mark]) -> list[int]:
        """Returns after how many tokens of a text the engine is to stop and store, in order.

        Of a model that can be cut anywhere there are none: what is stored in the end serves every beginning.

        Args:
            tokens: the text.
            cached: tokens that are found and not read.
            beginnings: where its messages end.
        """
        if self._layout is None or self._layout.is_cuttable:
            return []
        last = len(tokens) - 1
        ends = [count for _, count in beginnings] + [last]
        ends += range(cached + SNAPSHOT_TOKENS, last, SNAPSHOT_TOKENS)
        found: list[int] = []
        for count in sorted(ends):
            if (
                count >= self._min_tokens
                and cached < count <= last
                and count - max(found, default=0) >= SNAPSHOT_GAP
            ):
                found.append(count)
        return found

    def find(self, key: str, tokens: Sequence[int]) -> tuple[Caches | None, int]:
        """Returns caches of the longest known beginning of `tokens` and its length.

        The last token is never part of it: the model needs one to answer from. The caches are the
        caller's own.
        """
        path, count = self._usable(key, tuple(tokens[:-1]))
        if count < self._min_tokens:
            self._misses += 1
            return None, 0
        self._touch(path)
        if path[-1].rest is not None:
            path[-1].rest_used = self._clock
        for node in path:
            self._renew(digest for digest, end in node.marks.items() if end <= count)
        self._tell()
        self._hits += 1
        self._hit_tokens += count
        return self._assemble(path, count), count

    def known(self, key: str, tokens: Sequence[int]) -> tuple[int, list[int]]:
        """Returns how long a beginning `find` would find, and after how many tokens nodes on its way end.

        It counts as no lookup: it is asked to see whether more is to be had elsewhere.
        """
        wanted = tuple(tokens[:-1])
        ends = [end for node, end in self._ends(key, wanted) if end <= len(wanted)]
        return self._usable(key, wanted)[1], ends

    def store(
        self, key: str, tokens: Sequence[int], caches: Caches, *, pin: int = 0, marks: Iterable[Mark] = ()
    ) -> None:
        """Keeps what is new of a sequence. One that exceeds the budget is left out.

        Args:
            key: whose it is; nobody with another key ever finds it.
            tokens: the sequence.
            caches: what the model's layers hold of it; they are only read.
            pin: tokens at its beginning that no lack of room drives out.
            marks: what its beginnings are known by.
        """
        layout = self._layout or Layout(caches)
        whole = tuple(tokens)
        if layout.is_cuttable:
            whole = whole[: layout.least(caches)]
        elif not layout.covers(caches, len(whole)):
            return
        if len(whole) < self._min_tokens:
            return
        runs, rest = layout.runs(caches), layout.rest(caches)
        per_token = sum(int(array.nbytes) // int(array.shape[2]) for array in runs)
        fixed = sum(int(array.nbytes) for array in rest)
        if not self._fits(key, whole, per_token, fixed):
            return
        self._layout = layout
        if not self._groups:
            self._groups = _groups(runs, lambda array: (array.shape[1], array.shape[3], array.dtype))
        node = self._grow(
            key, whole, lambda begin: _pack([array[:, :, begin : len(whole)] for array in runs], self._groups)
        )
        if rest and node.rest is None:
            self._attach(node, _pack(rest, _groups(rest, lambda array: (*array.shape, array.dtype))))
        self._note(key, whole, node, marks)
        if pin >= self._min_tokens:
            self._pin(key, whole[:pin])
        self.shrink(self._max_bytes)
        self._tell()

    def adopt(self, stretch: Stretch) -> bool:
        """Takes a stretch in that was spilled before. Returns whether its text is known to its end now."""
        whole = stretch.tokens
        _, count = self._walk(stretch.key, whole)
        kept, rest = stretch.kept, stretch.rest
        fixed = 0 if rest is None else rest.nbytes
        if count < stretch.begin or not self._fits(
            stretch.key, whole, kept.nbytes // (len(whole) - stretch.begin), fixed
        ):
            return False
        self._groups = self._groups or kept.groups
        node = self._grow(stretch.key, whole, lambda begin: kept.cut(begin - stretch.begin, None))
        if rest is not None and node.rest is None:
            self._attach(node, rest)
        self._note(stretch.key, whole, node, stretch.marks)
        self.shrink(self._max_bytes)
        self._tell()
        return self._walk(stretch.key, whole)[1] == len(whole)

    def stretches(self, key: str | None = None, tokens: Sequence[int] = ()) -> list[Stretch]:
        """Returns what is kept of a sequence, or, without a key, of all, parents before their children."""
        if key is None:
            return [_stretch(node) for node in self._all()]
        return [_stretch(node) for node, end in self._ends(key, tuple(tokens)) if end <= len(tokens)]

    def limit(self, room: int | None) -> None:
        """Keeps the cache within its budget and what room others leave; None leaves all of it."""
        self._max_bytes = self._budget if room is None else min(self._budget, room)
        self.shrink(self._max_bytes)

    def shrink(self, max_bytes: int) -> None:
        """Drops the least recently used until no more than so many bytes are held."""
        while self._bytes > max_bytes or self._buffers > self._max_buffers:
            victim = self._victim()
            if victim is None:
                return
            self._evict(victim)
            self._tell()
        if len(self._roots) > self._nodes:  # keys of callers that left
            self._roots = {key: root for key, root in self._roots.items() if root.children}

    def clear(self) -> None:
        """Drops everything."""
        self._roots.clear()
        self._marked.clear()
        self._bytes = self._buffers = self._nodes = self._snapshots = 0
        self._tell()

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
            same = common(child.run, tokens[count : count + len(child.run)])
            count += same
            if same < len(child.run):
                break
            node = child
        return path, count

    def _ends(self, key: str, tokens: tuple[int, ...]) -> list[tuple[_Node, int]]:
        """Returns the nodes all of whose run is on the way, and after how many tokens they end."""
        path, count = self._walk(key, tokens)
        end = 0
        found = []
        for node in path:
            end += len(node.run)
            if end <= count:
                found.append((node, end))
        return found

    def _usable(self, key: str, tokens: tuple[int, ...]) -> tuple[list[_Node], int]:
        """Returns the nodes to go on from, and how far they lead."""
        if self._layout is None or self._layout.is_cuttable:
            return self._walk(key, tokens)
        path: list[_Node] = []
        found, count = 0, 0
        for node, end in self._ends(key, tokens):
            path.append(node)
            if node.rest is not None:
                found, count = len(path), end
        return path[:found], count

    def _fits(self, key: str, whole: tuple[int, ...], per_token: int, fixed: int) -> bool:
        """Whether what is new of a text is less than all there is room for."""
        return (len(whole) - self._walk(key, whole)[1]) * per_token + fixed <= self._max_bytes

    def _grow(self, key: str, whole: tuple[int, ...], kept: Callable[[int], Packed]) -> _Node:
        """Makes the tree know a text and returns the node that holds its end."""
        path, count = self._walk(key, whole)
        self._touch(path)
        if count == len(whole) and self._layout is not None and self._layout.is_cuttable:
            return path[-1]
        parent = (
            self._cut(path, count) if path else self._roots.setdefault(key, _Node(key, (), Packed(), None))
        )
        if count == len(whole):
            return parent
        node = _Node(key, whole[count:], kept(count), parent)
        parent.children[whole[count]] = node
        self._count(node, 1)
        self._touch([node])
        return node

    def _attach(self, node: _Node, rest: Packed) -> None:
        self._count(node, -1)
        node.rest, node.rest_used = rest, self._clock
        self._count(node, 1)

    def _assemble(self, path: Sequence[_Node], count: int) -> Caches:
        assert self._layout is not None
        parts = zip(*(node.kept.arrays for node in path), strict=True)
        stacks = tuple(mx.concatenate(list(part), axis=3)[:, :, :, :count] for part in parts)
        rest = path[-1].rest
        return self._layout.build(
            Packed(self._groups, stacks).unpack(), [] if rest is None else rest.unpack(), count
        )

    def _cut(self, path: Sequence[_Node], count: int) -> _Node:
        """Makes the path end with a node that ends after `count` tokens, and returns that node."""
        last = path[-1]
        begin = sum(len(node.run) for node in path[:-1])
        keep = count - begin
        if keep == len(last.run):
            return last
        assert last.parent is not None
        head, tail = last.kept.cut(0, keep), last.kept.cut(keep, None)
        upper = _Node(last.key, last.run[:keep], head, last.parent, used=last.used, pinned=last.pinned)
        last.parent.children[last.run[0]] = upper
        self._count(last, -1)
        last.run, last.kept, last.parent = last.run[keep:], tail, upper
        upper.children[last.run[0]] = last
        if last.rest is None:  # else its marks are the snapshot's
            upper.marks = {mark: end for mark, end in last.marks.items() if end <= count}
            last.marks = {mark: end for mark, end in last.marks.items() if end > count}
        self._count(upper, 1)
        self._count(last, 1)
        return upper

    def _note(self, key: str, whole: tuple[int, ...], node: _Node, marks: Iterable[Mark]) -> None:
        """Puts marks where what answers them is: on runs, or on the snapshot that comes nearest."""
        if node.rest is not None:
            near = [(mark, end) for mark, end in marks if end < len(whole) + SNAPSHOT_GAP]
            last = max((end for _, end in near), default=0)
            self._mark(node, [(mark, end) for mark, end in near if end == last])
            return
        begin = 0
        for one, end in [*self._ends(key, whole), (node, len(whole))]:
            self._mark(one, [(mark, place) for mark, place in marks if begin < place <= end])
            begin = end

    def _mark(self, node: _Node, marks: Iterable[Mark]) -> None:
        for mark, end in marks:
            if mark not in node.marks:
                node.marks[mark] = end
                self._marked[mark] = self._marked.get(mark, 0) + 1
                if len(node.marks) > MOST_MARKS:
                    self._unmark(node, [next(iter(node.marks))])
            self._renew([mark])

    def _unmark(self, node: _Node, marks: Iterable[int]) -> None:
        for mark in list(marks):
            del node.marks[mark]
            self._marked[mark] -= 1
            if not self._marked[mark]:
                del self._marked[mark]

    def _renew(self, marks: Iterable[int]) -> None:
        for mark in marks:
            self._marked.move_to_end(mark)

    def _tell(self) -> None:
        self.marks = tuple(itertools.islice(reversed(self._marked), MOST_MARKS))

    def _pin(self, key: str, tokens: tuple[int, ...]) -> None:
        assert self._layout is not None
        if self._layout.is_cuttable:
            path, count = self._walk(key, tokens)
            self._cut(path, count)
        path = [node for node, _ in self._ends(key, tokens)]
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
        self._buffers += sign * node.buffers
        self._nodes += sign
        self._snapshots += sign * (node.rest is not None)

    def _victim(self) -> _Node | None:
        """Returns what was not used for longest: a snapshot, or, where there are none, a leaf."""
        free = [node for node in self._all() if not node.pinned]
        snapshots = [node for node in free if node.rest is not None]
        if snapshots:
            return min(snapshots, key=lambda node: node.rest_used)
        return min((node for node in free if not node.children), key=lambda node: node.used, default=None)

    def _evict(self, victim: _Node) -> None:
        self._evicted += 1
        if self.spill is not None:
            self.spill(_stretch(victim))
        if victim.rest is not None:
            self._unmark(victim, victim.marks)
            self._count(victim, -1)
            victim.rest = None
            self._count(victim, 1)
            self._prune(victim)
        else:
            self._drop(victim)

    def _prune(self, node: _Node) -> None:
        """Drops runs that lead to no snapshot any more."""
        while node.parent is not None and not (node.children or node.rest is not None or node.pinned):
            parent = node.parent
            self._drop(node)
            node = parent
            if self.spill is not None and node.parent is not None and not node.children:
                self.spill(_stretch(node))

    def _drop(self, leaf: _Node) -> None:
        assert leaf.parent is not None
        self._unmark(leaf, leaf.marks)
        del leaf.parent.children[leaf.run[0]]
        self._count(leaf, -1)

    def _all(self) -> Iterator[_Node]:
        rest = [child for root in self._roots.values() for child in root.children.values()]
        while rest:
            node = rest.pop()
            yield node
            rest.extend(node.children.values())


def _stretch(node: _Node) -> Stretch:
    runs = []
    one: _Node | None = node
    while one is not None:
        runs.append(one.run)
        one = one.parent
    tokens = tuple(itertools.chain.from_iterable(reversed(runs)))
    return Stretch(
        key=node.key,
        tokens=tokens,
        begin=len(tokens) - len(node.run),
        kept=node.kept,
        rest=node.rest,
        marks=tuple(node.marks.items()),
    )


def _groups(arrays: Sequence[Array], kind: Callable[[Array], tuple[object, ...]]) -> Groups:
    kinds: dict[tuple[object, ...], list[int]] = {}
    for place, array in enumerate(arrays):
        kinds.setdefault(kind(array), []).append(place)
    return tuple(tuple(places) for places in kinds.values())


def _pack(arrays: Sequence[Array], groups: Groups) -> Packed:
    """Copies arrays, those of one shape into one."""
    return Packed(groups, _detached([mx.stack([arrays[place] for place in group]) for group in groups]))


def _detached(arrays: Sequence[Array]) -> tuple[Array, ...]:
    """Copies arrays into memory of their own, now."""
    copies = tuple(mx.contiguous(array) * 1 for array in arrays)  # a slice may be contiguous and yet a view
    mx.eval(copies)
    return copies
