"""What is known of an orchestrator and its backends, kept as news of it comes in. It draws nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from forebay.fleet.v1 import fleet_pb2 as fleet_pb
from forebay.inference.v1 import inference_pb2 as pb

KEPT = 200
"""Requests that ended and are still shown."""

POINTS = 60
"""Points of a history: half a minute at two a second."""


class Picture:
    """The newest picture of an orchestrator, and a little of its past."""

    def __init__(self) -> None:
        self.backends: dict[str, fleet_pb.Backend] = {}
        """By name, in the order in which they were first told."""
        self.active: list[fleet_pb.RequestActivity] = []
        """Requests in progress, oldest first."""
        self.ended: deque[fleet_pb.RequestActivity] = deque(maxlen=KEPT)
        """Requests that ended, newest first."""
        self.queue = fleet_pb.Queue()
        self.totals = fleet_pb.ActivityTotals()
        self.rates: deque[float] = deque(maxlen=POINTS)
        """Tokens a second that all backends together passed on, oldest first."""
        self.waits: deque[float] = deque(maxlen=POINTS)
        """Requests that waited in the queue, oldest first."""
        self.losses: dict[str, str] = {}
        """What cannot be followed now, and why, by what it is."""
        self._seen: tuple[float, int] | None = None  # time and tokens of the latest message

    def take_backend(self, backend: fleet_pb.Backend) -> None:
        """Takes in a backend as it is now."""
        self.backends[backend.name] = backend

    def keep_backends(self, names: Sequence[str]) -> None:
        """Forgets every other backend: the orchestrator has dropped it."""
        self.backends = {name: each for name, each in self.backends.items() if name in names}

    def begin_activity(self) -> None:
        """A stream of activity begins, and tells first all that is remembered."""
        self.ended.clear()
        self._seen = None

    def take_activity(self, message: fleet_pb.WatchActivityResponse) -> None:
        """Takes in what the orchestrator is doing."""
        self.active = list(message.active_requests)
        self.ended.extendleft(message.ended_requests)
        self.queue = message.queue
        self.totals = message.totals
        now = message.observe_time.ToNanoseconds() / 1e9
        tokens = message.totals.output_token_count
        if self._seen is not None and now > self._seen[0]:
            # A restarted orchestrator counts from zero again.
            self.rates.append(max(0, tokens - self._seen[1]) / (now - self._seen[0]))
        self._seen = (now, tokens)
        waiting = message.queue.waiting_interactive_count + message.queue.waiting_batch_count
        self.waits.append(waiting)

    def models(self) -> list[tuple[str, pb.Model]]:
        """Returns the name of the backend and the model, for each model; those in memory first."""
        found = [(backend.name, model) for backend in self.backends.values() for model in backend.models]
        return sorted(found, key=lambda each: (each[1].state == pb.Model.STATE_AVAILABLE, each[0]))

    def request(self, request_id: str) -> fleet_pb.RequestActivity | None:
        """Returns a request, in progress or ended."""
        return next((each for each in (*self.active, *self.ended) if each.request_id == request_id), None)
