"""Which model of each backend one name means, over the whole fleet.

A name that some backend lists means that very model. Another backend may then
serve it with equal weights, or with a model whose name says the same. A name
that nobody lists means what it says, and leaves open what it does not say.

Equal is told from alike: the same model in another quantisation answers
otherwise, so it is reported as alike and left to whoever decides.
"""

from __future__ import annotations

import operator
import re
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from forebay.inference.v1 import inference_pb2 as pb
from forebay.orchestrator.config import MatchingSettings
from forebay.orchestrator.routing import spelling
from forebay.orchestrator.routing.names import find_model, is_called
from forebay.orchestrator.routing.spelling import Spelling

Listed: TypeAlias = tuple[pb.Model, ...]
"""What one backend listed. Replaced as a whole and never changed in place."""

_KEPT = 512
"""Names whose meaning is kept. Clients ask for a handful."""

_LIKE_COUNT = 0.03
"""Share by which two counts of parameters of one model may differ: frameworks round."""


class Match(Enum):
    """How a name and a model belong together, the nearest first."""

    EXACT = "exact"
    """It is the model's name."""
    ALIAS = "alias"
    """It is another name of the model, of the framework's or of the operator's."""
    WEIGHTS = "weights"
    """The model has the very weights of the one that is called so elsewhere."""
    NAME = "name"
    """The model's own name says the same."""
    LIKE = "like"
    """The model differs in its quantisation, as far as is known."""


_ORDER = {match: place for place, match in enumerate(Match)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A model that a name means, or nearly."""

    model: pb.Model
    """The model, as its backend listed it."""
    match: Match
    """How they belong together."""
    detail: str = ""
    """Why, in one sentence for people. Empty if it is the model's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """A name with what its framework tells beside it."""

    name: str
    spelling: Spelling
    packing: str
    """Empty is not known."""
    parameters: float
    """In thousands of millions. 0 is not known."""
    is_open: bool = False
    """Whether any packing will do, because nobody asked for one."""


@dataclass(slots=True)
class _Memory:
    listings: Sequence[Listed]
    found: tuple[Found | None, ...] = field(default=())


class Matcher:
    """Finds models by name. Keeps what it found for as long as the lists are the same.

    Args:
        settings: how far it may go.
        own_names: names that the operator gave. They mean what the operator wrote, and nothing else.
    """

    def __init__(self, settings: MatchingSettings | None = None, own_names: Collection[str] = ()) -> None:
        self._kept: OrderedDict[str, _Memory] = OrderedDict()
        self.change(settings or MatchingSettings(), own_names=own_names)

    def change(self, settings: MatchingSettings, *, own_names: Collection[str]) -> None:
        """Goes by other settings and names from now on."""
        self.settings = settings
        self._own_names = frozenset(name.casefold() for name in own_names)
        self._kept.clear()

    def find(self, name: str, listings: Sequence[Listed]) -> tuple[Found | None, ...]:
        """Returns what the name means on each backend, in their order; None where it means nothing.

        Args:
            name: the name that is asked for.
            listings: what each backend lists.
        """
        kept = self._kept.get(name)
        if kept is not None and _are_same(kept.listings, listings):
            return kept.found
        found = self._find(name, listings)
        self._kept[name] = _Memory(listings, found)
        self._kept.move_to_end(name)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found

    def _find(self, name: str, listings: Sequence[Listed]) -> tuple[Found | None, ...]:
        called = [_called(name, listed) for listed in listings]
        if not self.settings.automatic or name.casefold() in self._own_names or all(called):
            return tuple(called)
        models = [found.model for found in called if found is not None]
        digests = {model.weights.digest: model.id for model in models if model.weights.digest}
        wanted = [facts for model in models if (facts := _facts(model)) is not None]
        if not models:
            asked = spelling.read(name, is_asked=True)
            wanted = [] if asked is None else [_asked(name, asked)]
        return tuple(
            found or _nearest(listed, digests, wanted) for found, listed in zip(called, listings, strict=True)
        )


def _are_same(one: Sequence[Listed], other: Sequence[Listed]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _called(name: str, listed: Listed) -> Found | None:
    model = find_model(name, listed)
    if model is None:
        return None
    if is_called(model, name):
        return Found(model=model, match=Match.EXACT)
    return Found(model=model, match=Match.ALIAS, detail=f"{name} is another name of it")


def _nearest(listed: Listed, digests: dict[str, str], wanted: Iterable[_Facts]) -> Found | None:
    found = [each for model in listed if (each := _compare(model, digests, wanted)) is not None]
    # Of equally near ones that which is in memory, and else the first that is listed.
    return min(
        found,
        key=lambda each: (_ORDER[each.match], each.model.state != pb.Model.STATE_ACTIVE),
        default=None,
    )


def _compare(model: pb.Model, digests: dict[str, str], wanted: Iterable[_Facts]) -> Found | None:
    same = digests.get(model.weights.digest)
    if same is not None:
        return Found(model=model, match=Match.WEIGHTS, detail=f"its weights are those of {same}")
    offered = _facts(model)
    if offered is None:
        return None
    alike = [facts for facts in wanted if _is_same_model(facts, offered)]
    for facts in alike:
        if facts.is_open:
            return Found(
                model=model,
                match=Match.NAME,
                detail=f"{facts.name} says line, size and variant of it, and no quantisation",
            )
        if facts.packing and facts.packing == offered.packing:
            return Found(
                model=model,
                match=Match.NAME,
                detail=f"line, size, variant and quantisation are those of {facts.name}",
            )
    if not alike:
        return None
    here, there = offered.packing or "unknown", alike[0].packing or "unknown"
    return Found(
        model=model,
        match=Match.LIKE,
        detail=f"its quantisation is {here}, and that of {alike[0].name} is {there}",
    )


def _is_same_model(wanted: _Facts, offered: _Facts) -> bool:
    one, other = wanted.spelling, offered.spelling
    if one.line != other.line or one.variant is not other.variant:
        return False
    if one.size and other.size:
        return one.size == other.size
    if one.size or other.size:
        size = one.size or other.size
        parameters = offered.parameters if one.size else wanted.parameters
        return parameters > 0 and spelling.is_size(size, parameters)
    if not (wanted.parameters and offered.parameters):
        return True  # the names say the same, and nothing is known that speaks against it
    return abs(wanted.parameters - offered.parameters) <= _LIKE_COUNT * wanted.parameters


def _asked(name: str, asked: Spelling) -> _Facts:
    return _Facts(name=name, spelling=asked, packing=asked.packing, parameters=0.0, is_open=not asked.packing)


def _facts(model: pb.Model) -> _Facts | None:
    read = spelling.read(model.id)
    if read is None:
        return None
    weights = model.weights
    return _Facts(
        name=model.id,
        spelling=read,
        packing=read.packing or spelling.normal(weights.quantization),
        parameters=weights.parameter_count / 1e9 or _labelled(weights.size_label),
    )


def _labelled(label: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mb])", label.strip().casefold())
    return 0.0 if match is None else float(match[1]) * (1e-3 if match[2] == "m" else 1.0)
