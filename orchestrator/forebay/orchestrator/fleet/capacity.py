"""How many calls the fleet can serve at once, as far as that is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from forebay.inference.v1 import inference_pb2 as pb
from forebay.orchestrator.clock import Clock
from forebay.orchestrator.fleet.endpoint import Endpoint, State

_LIFE = 0.1
"""Seconds for which an answer holds. Every call asks twice, and backends come and go in seconds."""

_POOLS = 256
"""Answers that are kept."""

_BETWEEN = "\n"
"""Stands between the members of a pool's name, since no model's name has a line break in it."""


class Capacity:
    """Adds up the slots of the backends that take calls now.

    A backend's slots are those of its settings, else those it lists for the
    model. Of one that tells neither, any number up to `unknown` is believed.

    Args:
        endpoints: the fleet.
        unknown: calls at once for a backend that does not tell, and for a fleet in which nobody takes calls:
            those calls should learn so from the router and not wait for it.
        clock: gives the time in seconds.
        find: returns the models that a name means, by backend. None asks each backend by itself.
    """

    def __init__(
        self,
        endpoints: Iterable[Endpoint],
        *,
        unknown: int,
        clock: Clock,
        find: Callable[[str], Mapping[str, pb.Model]] | None = None,
    ) -> None:
        self._find = find
        self._endpoints = endpoints
        self._unknown = unknown
        self._clock = clock
        self._known: dict[str, tuple[float, int]] = {}
        self._pools: dict[str, tuple[float, str]] = {}

    def change(self, *, unknown: int) -> None:
        """Believes another number of a backend that does not tell."""
        self._unknown = unknown
        self._known.clear()

    def pool(self, model: str) -> str:
        """Returns the pool of calls for a model: the models that the name means, each on its backend.

        Names that mean the same have one pool, so an alias brings no permits of its own. A name that nobody
        knows is a pool by itself.
        """
        now = self._clock()
        known = self._pools.get(model)
        if known is not None and now < known[0]:
            return known[1]
        if len(self._pools) >= _POOLS:
            self._pools.clear()
        if self._find is not None:
            found = {name: each.id for name, each in self._find(model).items()}
        else:
            each_own = ((endpoint.name, endpoint.find(model)) for endpoint in self._endpoints)
            found = {name: each.id for name, each in each_own if each is not None}
        pool = _BETWEEN.join(f"{name}/{id_}" for name, id_ in found.items()) or model
        self._pools[model] = (now + _LIFE, pool)
        return pool

    def __call__(self, pool: str) -> int:
        """Returns how many calls of a pool can run at once; for the empty name, how many in all."""
        now = self._clock()
        known = self._known.get(pool)
        if known is not None and now < known[0]:
            return known[1]
        if len(self._known) >= _POOLS:
            self._known.clear()
        members = dict(member.split("/", 1) for member in pool.split(_BETWEEN) if "/" in member)
        slots = sum(
            self._slots(each, members.get(each.name) if pool else "")
            for each in self._endpoints
            if each.state is State.ACTIVE
        )
        self._known[pool] = (now + _LIFE, slots or self._unknown)
        return slots or self._unknown

    def _slots(self, endpoint: Endpoint, model: str | None) -> int:
        if model is None:
            return 0
        if not model:
            return endpoint.settings.slots or self._unknown
        found = endpoint.find(model)
        if found is None:
            return 0
        return endpoint.settings.slots or found.slot_count or self._unknown
