"""What is in LM Studio's memory, and who put it there.

LM Studio makes a second instance of a model that is loaded twice, loads one a
request if several first requests meet, and throws models out in the middle of
a reply when it loads by itself. So nothing here relies on that: the bridge
looks first, loads by name, one load a model at a time, and keeps the time of
the models it loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from forebay.kit.failure import Failure, ModelLoadFailed, ModelNotFound
from forebay.lmstudio_bridge.client import LmStudioClient, seconds
from forebay.lmstudio_bridge.config import LmStudioSettings
from forebay.lmstudio_bridge.listing import Dialect, Entry, Instance
from forebay.upstream.admission import Admission
from forebay.upstream.singleflight import SingleFlight
from forebay.upstream.tasks import OwnedTasks

logger = logging.getLogger(__name__)

LISTING_AGE: Final = 1.0
"""Seconds a listing may be old when a call begins. What is gone by then is noticed by the call itself."""

LOADING_POLL: Final = 0.5
"""Seconds between looks at a model that somebody else is loading."""

Loading = Callable[[str], Awaitable[None]]
"""Is told in a few words that a load goes on."""


@dataclass(slots=True)
class _Use:
    """How a model is used through this bridge."""

    active: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    ours: set[str] = field(default_factory=set)
    """Instances that this bridge loaded."""
    ttl: float | None = None
    pinned: bool = False
    last: float = 0.0
    by_instance: dict[str, int] = field(default_factory=dict)
    leaving: asyncio.Event | None = None
    """Set when an unload that waits for calls is over."""
    trouble: str = ""
    """Why the latest load failed."""

    def expires(self) -> float | None:
        """When it is to be unloaded, on the clock of the loop; None for never or not now."""
        if not self.ours or self.ttl is None or self.pinned or self.active:
            return None
        return self.last + self.ttl


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A model that can answer."""

    entry: Entry
    """The model."""
    name: str
    """What a request names to reach it."""
    context_length: int
    """Tokens it has room for. 0 is unknown."""
    load_seconds: float = 0.0
    """Seconds the load took. 0 if it was loaded before."""


class Memory:
    """Loads, finds and unloads models.

    Args:
        client: LM Studio.
        settings: how models are loaded, and for how long.
        tasks: owner of loads.
    """

    def __init__(self, client: LmStudioClient, settings: LmStudioSettings, tasks: OwnedTasks) -> None:
        self._client = client
        self._settings = settings
        self._loads: SingleFlight[str, str, float] = SingleFlight(tasks)
        # By how often the memory changed: a listing that was begun before a load must not be taken for one
        # from after it, or the model would be loaded again.
        self._listings: SingleFlight[int, None, tuple[Entry, ...]] = SingleFlight(tasks)
        self._changes = 0
        self._entries: tuple[Entry, ...] = ()
        self._listed_at: float | None = None
        self._uses: dict[str, _Use] = {}
        self._admissions: dict[str, Admission] = {}
        self._blind: set[str] = set()
        self._news = asyncio.Event()

    def __repr__(self) -> str:
        words = [f"{key} {use.active}" for key, use in self._uses.items() if use.active or use.ours]
        return f"<Memory [{' | '.join(words)}]>"

    def forget(self) -> None:
        """Forgets what was in memory, as when LM Studio went away."""
        self._changed()
        for use in self._uses.values():
            use.ours.clear()

    async def entries(self, *, max_age: float = 0.0) -> tuple[Entry, ...]:
        """Returns what LM Studio lists.

        Args:
            max_age: seconds it may be old. 0 asks LM Studio, together with whoever asks right now.
        """
        now = asyncio.get_running_loop().time()
        if max_age and self._listed_at is not None and now - self._listed_at < max_age:
            return self._entries
        return await self._listings.join(self._changes, self._list)

    async def _list(self, report: Callable[[None], None]) -> tuple[Entry, ...]:
        del report
        began, changes = asyncio.get_running_loop().time(), self._changes
        entries = tuple(
            replace(one, vision=False) if one.vision is None and one.key in self._blind else one
            for one in await self._client.models()
        )
        if changes == self._changes:
            self._entries, self._listed_at = entries, began
        return entries

    def _changed(self) -> None:
        """Makes every listing so far an old one."""
        self._changes += 1
        self._listed_at = None

    async def find(self, name: str, *, max_age: float = 0.0) -> Entry:
        """Returns the model of that key, or the one that has an instance of that identifier.

        Raises:
            ModelNotFound: there is none.
        """
        found = _named(await self.entries(max_age=max_age), name)
        if found is None and max_age:
            found = _named(await self.entries(), name)
        if found is None:
            raise ModelNotFound(
                f"{self._settings.name} has no model {name!r}",
                metadata={"backend": self._settings.name, "model": name},
            )
        return found

    async def ready(
        self,
        name: str,
        *,
        loading: Loading | None = None,
        options: Mapping[str, int | bool] | None = None,
        ttl: float | None = None,
        fresh: bool = False,
    ) -> Ready:
        """Returns a model that can answer, after a load if it takes one.

        Args:
            name: a model's key or an instance's identifier.
            loading: is told that a load goes on.
            options: how to load it, before the settings.
            ttl: seconds an older LM Studio keeps it, where it has to be loaded. None is the setting's.
            fresh: whether to look again before anything else.

        Raises:
            ModelNotFound: there is no such model.
            ModelLoadFailed: it cannot be loaded.
        """
        entry = await self.find(name, max_age=0.0 if fresh else LISTING_AGE)
        while (leaving := self._use(entry.key).leaving) is not None:
            await leaving.wait()
            entry = await self.find(name)
        took = 0.0
        if not entry.instances and entry.states_known:

            async def begin(report: Callable[[str], None]) -> float:
                return await self._load(entry.key, options or {}, ttl, report)

            took = await self._loads.join(entry.key, begin, progress=loading)
            entry = await self.find(name)
        return self._choose(entry, name, took)

    def _choose(self, entry: Entry, name: str, took: float) -> Ready:
        self.admission(entry)
        wanted = [one for one in entry.instances if one.id == name and name != entry.key]
        instances = wanted or list(entry.instances)
        if not instances:
            return Ready(entry=entry, name=entry.key, context_length=0, load_seconds=took)
        use = self._use(entry.key)

        def load(instance: Instance) -> float:
            return use.by_instance.get(instance.id, 0) / max(1, instance.parallel)

        chosen = min(instances, key=load)  # the first of equals
        return Ready(entry=entry, name=chosen.id, context_length=chosen.context_length, load_seconds=took)

    async def _load(
        self, key: str, options: Mapping[str, int | bool], ttl: float | None, report: Callable[[str], None]
    ) -> float:
        """Loads a model unless it is loaded, and returns the seconds that took."""
        clock = asyncio.get_running_loop().time
        began = clock()
        use = self._use(key)
        report("loading")
        entry = await self.find(key)
        while entry.loading and not entry.instances:
            await asyncio.sleep(
                LOADING_POLL
            )  # somebody else's load: a second one would make a second instance
            entry = await self.find(key)
        if entry.instances:
            return 0.0
        kept = ttl if ttl is not None else seconds(self._settings.ttl)
        merged = self._settings.load_options(key) | dict(options)
        try:
            instance = await self._client.load(entry, merged, ttl=kept)
        except Failure as failure:
            use.trouble = failure.message
            raise
        finally:
            self._changed()
        use.trouble = ""
        if self._client.dialect is Dialect.NATIVE:
            use.ours.add(instance)  # an older LM Studio keeps the time of what it was made to load
        use.ttl = kept
        use.pinned = key in self._settings.preload
        use.last = clock()
        self._news.set()
        logger.info("%s loaded %s in %.1f s", self._settings.name, key, clock() - began)
        return clock() - began

    def keep(self, key: str, *, ttl: float | None, pinned: bool) -> None:
        """Sets how long a model stays in memory after its last use.

        Args:
            key: the model.
            ttl: seconds. None leaves it as it is.
            pinned: whether it stays until it is unloaded by name.
        """
        use = self._use(key)
        if ttl is not None:
            use.ttl = ttl
        use.pinned = pinned or key in self._settings.preload
        self._news.set()

    def note_blind(self, key: str) -> None:
        """Remembers that a model refused an image, where its listing does not say whether it reads any."""
        self._blind.add(key)
        self._changed()

    def is_blind(self, key: str) -> bool:
        """Whether a model refused an image."""
        return key in self._blind

    def is_loading(self, key: str) -> bool:
        """Whether this bridge is loading a model."""
        return key in self._loads

    def trouble(self, key: str) -> str:
        """Returns why the latest load of a model failed, empty if it did not."""
        use = self._uses.get(key)
        return use.trouble if use is not None else ""

    def is_leaving(self, key: str) -> bool:
        """Whether a model is to be unloaded as soon as its calls are over."""
        use = self._uses.get(key)
        return use is not None and use.leaving is not None

    def expires_in(self, key: str) -> float | None:
        """Returns the seconds until a model is unloaded if nobody uses it; None for never or not known."""
        use = self._uses.get(key)
        expires = use.expires() if use is not None else None
        return None if expires is None else max(0.0, expires - asyncio.get_running_loop().time())

    def admission(self, entry: Entry) -> Admission:
        """Returns the slots of a model, as many as LM Studio has for it."""
        settings = self._settings
        slots = settings.slots or entry.slots or 1
        admission = self._admissions.get(entry.key)
        if admission is None:
            admission = self._admissions[entry.key] = Admission(
                name=settings.name,
                slots=slots,
                queue=settings.queue,
                max_wait=seconds(settings.queue_timeout),
            )
        elif slots != admission.slots:
            admission.resize(slots)
        return admission

    @contextmanager
    def using(self, ready: Ready, *, ttl: float | None = None) -> Iterator[None]:
        """Counts a call as using a model for the block.

        Args:
            ready: the model.
            ttl: seconds it stays after this use. None leaves that as it is.
        """
        use = self._use(ready.entry.key)
        if ttl is not None:
            use.ttl = ttl
        use.active += 1
        use.by_instance[ready.name] = use.by_instance.get(ready.name, 0) + 1
        use.idle.clear()
        try:
            yield
        finally:
            use.active -= 1
            use.by_instance[ready.name] -= 1
            if not use.by_instance[ready.name]:
                del use.by_instance[ready.name]
            use.last = asyncio.get_running_loop().time()
            if not use.active:
                use.idle.set()
                self._news.set()

    async def unload(self, name: str, *, force: bool) -> Entry:
        """Unloads a model, all its instances or the one that is named, and returns what it is then.

        Args:
            name: a model's key or an instance's identifier.
            force: whether to break off the calls it serves, instead of waiting for them.

        Raises:
            ModelNotFound: there is no such model.
        """
        entry = await self.find(name)
        if entry.key in self._loads:
            with contextlib.suppress(Failure):  # a load that failed leaves nothing to unload
                await self._loads.join(entry.key, _never)  # half a load cannot be unloaded
            entry = await self.find(name)
        if not entry.instances:
            if not entry.states_known or self._client.dialect is not Dialect.NATIVE:
                await self._client.unload(name)  # says that it cannot be done
            return entry
        chosen = [one.id for one in entry.instances if one.id == name and name != entry.key]
        async with self._emptied(entry.key, force=force):
            for identifier in chosen or [one.id for one in entry.instances]:
                await self._remove(entry.key, identifier)
        try:
            return await self.find(entry.key)
        except ModelNotFound:
            return entry  # removed from disk meanwhile

    async def _remove(self, key: str, identifier: str) -> None:
        try:
            await self._client.unload(identifier)
        finally:
            self._changed()
        self._use(key).ours.discard(identifier)

    @asynccontextmanager
    async def _emptied(self, key: str, *, force: bool) -> AsyncIterator[None]:
        """Waits until nobody uses a model, and keeps new calls waiting for the block."""
        use = self._use(key)
        while use.leaving is not None:
            await use.leaving.wait()
        use.leaving = over = asyncio.Event()
        try:
            while use.active and not force:
                await use.idle.wait()
            yield
        finally:
            use.leaving = None
            over.set()

    async def expire(self) -> None:
        """Unloads, forever, the models that this bridge loaded and nobody has used for their time."""
        clock = asyncio.get_running_loop().time
        while True:
            self._news.clear()
            waits: list[float] = []
            for key, use in list(self._uses.items()):
                expires = use.expires()
                if expires is not None and expires <= clock():
                    await self._expire(key, use)
                elif expires is not None:
                    waits.append(expires - clock())
            try:
                async with asyncio.timeout(min(waits, default=None)):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def _expire(self, key: str, use: _Use) -> None:
        for identifier in list(use.ours):
            try:
                await self._remove(key, identifier)
                logger.info("%s unloaded %s, which was idle", self._settings.name, key)
            except Failure as failure:
                use.ours.discard(identifier)  # it is not there to be unloaded, or LM Studio is not
                logger.warning("%s could not unload %s: %s", self._settings.name, key, failure.message)

    def _use(self, key: str) -> _Use:
        use = self._uses.get(key)
        if use is None:
            use = self._uses[key] = _Use()
            use.idle.set()
        return use


def too_small(entry: Entry, wanted: int, *, backend: str) -> ModelLoadFailed:
    """Returns the failure of a model that is loaded with less context than is asked for."""
    return ModelLoadFailed(
        f"{entry.key} is loaded with room for {entry.context_length} tokens and not for {wanted}: unload it "
        "first",
        metadata={
            "backend": backend,
            "model": entry.key,
            "loaded_context_token_count": str(entry.context_length),
        },
    )


async def _never(report: Callable[[str], None]) -> float:
    del report
    return 0.0


def _named(entries: tuple[Entry, ...], name: str) -> Entry | None:
    by_key = next((one for one in entries if one.key == name), None)
    return by_key or next((one for one in entries if one.answers_to(name)), None)
