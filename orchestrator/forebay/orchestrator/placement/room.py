"""What routing needs to know of a host's memory, and how much of it a model takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from forebay.inference.v1 import inference_pb2 as pb

_OVERHEAD = 1.2
"""Memory of a loaded model as a multiple of its files, where nobody measured it: the weights as they are, and
a fifth for the state of conversations and temporaries."""


def estimate(model: pb.Model) -> int:
    """Returns the bytes that a model takes or would take in memory. 0 is unknown."""
    return model.memory_bytes or int(model.disk_bytes * _OVERHEAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How much room there is for one more model on one backend."""

    free: float = math.inf
    """Bytes that can be taken at once."""
    evictable: float = 0.0
    """Bytes of models that nobody uses and that may be unloaded for another."""
    passing: float = 0.0
    """Bytes of models that may be unloaded once their calls, or their loads, are over."""
    limit: int = 0
    """Most bytes that models may take on the host together. 0 is no limit, or not known."""
    host: str = ""
    """The host."""

    @property
    def most(self) -> float:
        """Bytes that could be made free by unloading whatever may be unloaded."""
        return self.free + self.evictable + self.passing


ROOMY = Room()
"""Where nothing is known of the memory: anything may be tried."""
