"""How much memory this machine has for models."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from pathlib import Path

import psutil

from forebay.kit.config import is_local
from forebay.orchestrator.config import PlacementSettings

LOCAL = "local"
"""This machine, whatever its services call it."""

_CARDS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
"""Where there are graphics cards with memory of their own, one of these is there."""


def host_of(address: str, reported: str, local_names: AbstractSet[str]) -> str:
    """Returns the host that a backend is on.

    Args:
        address: where the backend listens.
        reported: what it calls its host. Empty is unknown.
        local_names: what backends on this machine call it.
    """
    if is_local(address) or reported in local_names:
        return LOCAL
    return reported or address.rpartition(":")[0]


class LocalMemory:
    """The memory of this machine.

    Where the graphics card has memory of its own, the machine's says nothing of
    which models fit, so there is no limit unless one is configured.
    """

    def __init__(self) -> None:
        self._has_card = any(card.exists() for card in _CARDS)
        self.total = int(psutil.virtual_memory().total)
        """Bytes this machine has."""

    def limit(self, settings: PlacementSettings) -> int:
        """Returns the most bytes that models may take here. 0 is no limit."""
        if settings.memory:
            return settings.memory
        return 0 if self._has_card else int(self.total * settings.share)

    def available(self, settings: PlacementSettings) -> int | None:
        """Returns the bytes that could be taken now. None where that says nothing."""
        if self._has_card or settings.memory:
            return None
        return int(psutil.virtual_memory().available)
