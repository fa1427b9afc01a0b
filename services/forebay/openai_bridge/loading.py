"""Loads and unloads models of a llama-server in router mode, and remembers how long each may stay."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import Failure, ModelLoadFailed
from forebay.openai_bridge.client import Client, Offer
from forebay.upstream.errors import translated
from forebay.upstream.singleflight import Report, SingleFlight
from forebay.upstream.tasks import OwnedTasks

_log = logging.getLogger(__name__)

POLL: Final = 0.2
"""Seconds between two looks at a load. Loads take seconds."""

REAP: Final = 1.0
"""Seconds between two looks for models that nobody uses."""

Look = Callable[[str], Awaitable[Offer | None]]
"""Asks the server for one model now; None if it does not list it."""


@dataclass(slots=True)
class Lease:
    """How long a model that we loaded stays."""

    keep: float | None
    """Seconds after its last use. None is without end."""
    pinned: bool
    """Whether it stays whoever uses it."""
    used_at: float
    """When it was used last, on the loop's clock."""

    def ends_at(self) -> float | None:
        """Returns when it ends if nobody uses the model, on the loop's clock; None is never."""
        return None if self.pinned or self.keep is None else self.used_at + self.keep


class Loader:
    """Keeps what is in memory.

    Args:
        client: speaks with the server.
        look: asks for a model's state.
        tasks: owns the loads, which outlive their callers.
        timeout: seconds a load may take.
        keep: seconds a model stays after its last use where its caller says nothing. None is without end.
        pinned: models that stay.
    """

    def __init__(
        self,
        client: Client,
        look: Look,
        tasks: OwnedTasks,
        *,
        timeout: float,
        keep: float | None,
        pinned: tuple[str, ...],
    ) -> None:
        self._client = client
        self._name = client.name
        self._look = look
        self._timeout = timeout
        self._keep = keep
        self._pinned = pinned
        self._flights: SingleFlight[str, str, float] = SingleFlight(tasks)
        self._active: Counter[str] = Counter()
        self._freed: dict[str, asyncio.Event] = {}
        self._leases: dict[str, Lease] = {}

    def lease(self, model: str) -> Lease | None:
        """Returns how long a model stays; None if we did not load it."""
        return self._leases.get(model)

    def keep(self, model: str, *, seconds: float | None, pinned: bool) -> None:
        """Says how long a model stays from now on. None seconds is what the settings say."""
        now = asyncio.get_running_loop().time()
        keep = self._keep if seconds is None else seconds
        self._leases[model] = Lease(keep, pinned or model in self._pinned, now)

    @contextmanager
    def using(self, model: str) -> Iterator[None]:
        """Keeps a model from being unloaded while the block runs."""
        self._active[model] += 1
        try:
            yield
        finally:
            self._active[model] -= 1
            if lease := self._leases.get(model):
                lease.used_at = asyncio.get_running_loop().time()
            if not self._active[model]:
                del self._active[model]
                if freed := self._freed.pop(model, None):
                    freed.set()

    async def ready(self, offer: Offer, tell: Callable[[str], Awaitable[None]] | None = None) -> float:
        """Returns when the model is in memory; the result is the seconds that took.

        A router would load it by itself. It is loaded by name so that the
        caller sees it happen, and so that a caller who leaves stops nothing.
        """
        if offer.state == pb.Model.STATE_ACTIVE and offer.id not in self._flights:
            return 0.0

        async def begin(report: Report[str]) -> float:
            return await self._load(offer.id, report)

        return await self._flights.join(offer.id, begin, progress=tell)

    async def unload(self, model: str, *, force: bool = False) -> None:
        """Removes a model from memory; without `force`, after its calls."""
        while not force and self._active[model]:
            await self._freed.setdefault(model, asyncio.Event()).wait()
        self._leases.pop(model, None)
        with translated(backend=self._name, model=model):
            await self._client.unload(model)
        busy = {pb.Model.STATE_ACTIVE, pb.Model.STATE_LOADING, pb.Model.STATE_UNLOADING}
        while True:
            offer = await self._look(model)
            if offer is None or offer.state not in busy:
                return
            await asyncio.sleep(POLL)

    async def reap(self) -> None:
        """Unloads, forever, the models whose leases ended. Never one in use."""
        while True:
            await asyncio.sleep(REAP)
            now = asyncio.get_running_loop().time()
            for model, lease in list(self._leases.items()):
                ends = lease.ends_at()
                if ends is None or ends > now or self._active[model]:
                    continue
                _log.info("%s unloads %s, which nobody used", self._name, model)
                try:
                    await self.unload(model)
                except Failure as failure:
                    _log.warning("%s could not unload %s: %s", self._name, model, failure.message)

    async def _load(self, model: str, report: Report[str]) -> float:
        clock = asyncio.get_running_loop().time
        began = clock()
        report("asking the server to load the model")
        with translated(backend=self._name, model=model):
            await self._client.load(model)
        seen = False
        while clock() - began < self._timeout:
            offer = await self._look(model)
            state = offer.state if offer is not None else pb.Model.STATE_FAILED
            if state == pb.Model.STATE_ACTIVE:
                if model not in self._leases:
                    self.keep(model, seconds=None, pinned=False)
                return clock() - began
            if state == pb.Model.STATE_FAILED or (seen and state == pb.Model.STATE_AVAILABLE):
                why = offer.detail if offer is not None else "It is gone."
                raise ModelLoadFailed(
                    f"{self._name} could not load {model}; the server's log says why. {why}".rstrip(),
                    metadata={"backend": self._name, "model": model},
                )
            if state == pb.Model.STATE_LOADING and not seen:
                seen = True
                report("loading the model")
            await asyncio.sleep(POLL)
        raise ModelLoadFailed(
            f"{self._name} did not load {model} within {self._timeout:g} s",
            metadata={"backend": self._name, "model": model},
        )
