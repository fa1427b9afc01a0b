"""How far a backend's word on what its models can do is to be believed, by what they did.

Frameworks say what a model can do, and few try it. A reply that did it has
tried it: from then on the capability counts as probed.

A backend says that it enforces a format, and was even seen to do so; then a
reply comes that has another. That is no failure of the connection nor of the
model as such, so no breaker may open for it: other calls are served well. It
is a promise that was broken, and calls that rely on the same promise should
go where it is kept, and it counts as probed no longer.

Doubt halves with time by itself, since a framework that was updated says
nothing of it, and a backend that is never asked again could not show that it
keeps its word now.
"""

from __future__ import annotations

from collections.abc import Mapping

from forebay.inference.v1 import inference_pb2 as pb
from forebay.orchestrator.clock import Clock

_BROKEN = 0.5
"""Part of the remaining trust that a broken promise takes. After two, half of what was said without proof is
left, so a backend that never said anything is as good."""

_KEPT = 0.7
"""Part of the doubt that is left after a promise was kept: it takes more replies to win back than to lose."""

_HALF_LIFE = 600.0
"""Seconds after which half of a doubt is forgotten."""

_FORGOTTEN = 0.01
"""A doubt below which there is none."""


class Trust:
    """Keeps doubts about one backend's capabilities.

    Args:
        clock: gives the time in seconds.
    """

    def __init__(self, *, clock: Clock) -> None:
        self._clock = clock
        self._doubts: dict[tuple[str, int], tuple[float, float]] = {}  # doubt, and when it was so
        self._proven: set[tuple[str, int]] = set()

    def note(self, model: str, capability: pb.Capability.ValueType, *, kept: bool) -> bool:
        """Takes in whether a reply was what a capability promises. Returns whether a proof came or went."""
        key = (model, int(capability))
        was_proven = key in self._proven
        if kept and was_proven and not self._doubts:
            return False
        (self._proven.add if kept else self._proven.discard)(key)
        doubt = self._doubt(key)
        if not kept:
            doubt += _BROKEN * (1.0 - doubt)
        elif doubt:
            doubt *= _KEPT
        if doubt < _FORGOTTEN:
            self._doubts.pop(key, None)
        else:
            self._doubts[key] = (doubt, self._clock())
        return kept is not was_proven

    def proven(self, model: str) -> set[int]:
        """Returns what the model was seen to do, and did the last time it had to."""
        return {capability for name, capability in self._proven if name == model}

    def forget(self) -> None:
        """Notes that the backend came back anew, perhaps in another version."""
        self._doubts.clear()
        self._proven.clear()

    def doubts(self) -> Mapping[tuple[str, int], float]:
        """Returns every doubt in (0.0, 1.0], by model and capability."""
        if not self._doubts:
            return {}
        return {key: doubt for key in self._doubts if (doubt := self._doubt(key)) >= _FORGOTTEN}

    def _doubt(self, key: tuple[str, int]) -> float:
        doubt, since = self._doubts.get(key, (0.0, 0.0))
        return doubt * 0.5 ** ((self._clock() - since) / _HALF_LIFE) if doubt else 0.0
