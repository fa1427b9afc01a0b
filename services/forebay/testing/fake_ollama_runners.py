"""The models of a fake Ollama and the scheduler that keeps them in memory.

The rules are the real ones: one load at a time in order of arrival, a load
that is given up when its request goes away, a bounded queue for requests that
need a load and none for those that do not, and a reload whenever an option
that is fixed at load time differs.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from forebay.testing.fake_ollama_wire import FOREVER, LOAD_OPTIONS, Name, WireError, parse_name

BUSY = "server busy, please try again.  maximum pending requests exceeded"
"""What the real server says, two spaces included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeModel:
    """A model on the fake's disk."""

    name: str
    """Name as listed, with its tag."""
    capabilities: tuple[str, ...] = ("completion", "tools")
    """What it can do, in the server's words."""
    context_length: int = 8192
    """Tokens it was trained for."""
    embedding_length: int = 64
    """Components of its embeddings."""
    family: str = "llama"
    """Architecture."""
    parameter_size: str = "3.2B"
    """Size as listed."""
    quantization: str = "Q4_K_M"
    """Quantisation as listed."""
    size: int = 2_019_393_189
    """Bytes on disk."""
    answer_tokens: int = 12
    """Tokens it says unless it is stopped."""
    thinking_tokens: int = 4
    """Tokens it thinks first, if it can."""
    reply: tuple[str, ...] | None = None
    """Says exactly this instead, a piece a chunk."""
    tools_early: bool = False
    """Whether tool calls come in a chunk before the last."""
    load_error: str = ""
    """Fails every load with this text."""
    single: bool = False
    """Whether it has one slot whatever the server is set to."""

    @property
    def parsed(self) -> Name:
        """The name in its parts."""
        name = parse_name(self.name)
        assert name is not None, self.name
        return name

    @property
    def weights(self) -> str:
        """Digest of the file of weights, without the algorithm's name."""
        return hashlib.sha256(f"weights {self.family} {self.size} {self.quantization}".encode()).hexdigest()

    @property
    def digest(self) -> str:
        """Digest of the manifest, without the algorithm's name."""
        return hashlib.sha256(f"{self.family} {self.size} {self.quantization}".encode()).hexdigest()


class Runner:
    """A model in memory."""

    def __init__(self, model: FakeModel, wanted: Mapping[str, object], slots: int) -> None:
        self.model = model
        self.wanted = dict(wanted)
        self.slots = asyncio.Semaphore(slots)
        self.users = 0
        self.keep_alive = 0.0
        self.expires_at: float | None = None
        """On the loop's clock; None while in use or kept for ever."""
        self.expiring = False
        self.gone = asyncio.Event()
        self.timer: asyncio.TimerHandle | None = None

    @property
    def context(self) -> int:
        """Tokens of prompt and reply together."""
        context = self.wanted["num_ctx"]
        assert isinstance(context, int)
        return context


@dataclass(slots=True, kw_only=True)
class Scheduler:
    """Loads and unloads models. Its settings are the server's environment variables."""

    parallel: int = 1
    """Slots of each model."""
    max_queue: int = 512
    """Requests that may wait for a load."""
    max_loaded: int = 3
    """Models in memory at once."""
    keep_alive: float = 300.0
    """Seconds a model stays after its last use."""
    context_length: int = 4096
    """Context of a model whose request names none."""
    load_seconds: float = 0.0
    """Seconds a load takes."""
    unload_seconds: float = 0.0
    """Seconds for which an unloaded model is still listed."""
    hold_loads: asyncio.Event | None = None
    """Loads end only once this is set."""
    runners: dict[str, Runner] = field(default_factory=dict)
    """Models in memory by the key of their name."""
    loads: Counter[str] = field(default_factory=Counter)
    """Finished loads by name."""
    aborted_loads: int = 0
    """Loads given up because their request went away."""
    loading: int = 0
    """Loads under way."""
    _pending: int = 0
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def pending(self) -> int:
        """Requests that wait for a load."""
        return self._pending

    @asynccontextmanager
    async def lease(
        self, model: FakeModel, options: Mapping[str, object], *, shift: bool, keep_alive: float | None
    ) -> AsyncIterator[tuple[Runner, float]]:
        """Holds a model in memory. Gives the runner and the seconds its load took.

        Raises:
            WireError: the queue is full, or the model does not load.
        """
        wanted = self._wanted(model, options, shift)
        runner, took = self._ready(model, wanted), 0.0
        if runner is None:
            runner, took = await self._queue(model, wanted)
        if keep_alive is not None:
            runner.keep_alive = keep_alive
        try:
            yield runner, took
        finally:
            self._release(runner)

    def unload(self, model: FakeModel) -> None:
        """Removes a model once it is idle."""
        runner = self.runners.get(model.parsed.key())
        if runner is not None:
            runner.keep_alive = 0.0
            if runner.users == 0:
                self._expire(runner)

    def close(self) -> None:
        """Forgets everything and stops the timers."""
        for runner in list(self.runners.values()):
            self._remove(runner)

    def _wanted(self, model: FakeModel, options: Mapping[str, object], shift: bool) -> dict[str, object]:
        wanted: dict[str, object] = {key: options[key] for key in LOAD_OPTIONS if key in options}
        context = wanted.get("num_ctx", self.context_length)
        assert isinstance(context, int)
        least = 2048 if "vision" in model.capabilities else 4
        wanted["num_ctx"] = min(max(context, least), model.context_length)
        wanted["shift"] = shift
        return wanted

    def _ready(self, model: FakeModel, wanted: Mapping[str, object]) -> Runner | None:
        runner = self.runners.get(model.parsed.key())
        if runner is None or runner.expiring or runner.wanted != wanted:
            return None
        runner.users += 1
        runner.expires_at = None
        if runner.timer is not None:
            runner.timer.cancel()
        return runner

    async def _queue(self, model: FakeModel, wanted: Mapping[str, object]) -> tuple[Runner, float]:
        if self._pending >= self.max_queue:
            raise WireError(503, BUSY)
        self._pending += 1
        try:
            async with self._lock:
                return self._ready(model, wanted) or await self._load(model, wanted), self.load_seconds
        finally:
            self._pending -= 1

    async def _load(self, model: FakeModel, wanted: Mapping[str, object]) -> Runner:
        key = model.parsed.key()
        if key in self.runners:
            await self._drop(self.runners[key])
        while len(self.runners) >= self.max_loaded:
            idle = [runner for runner in self.runners.values() if runner.users == 0]
            candidates = idle or list(self.runners.values())
            await self._drop(min(candidates, key=lambda runner: runner.keep_alive))
        self.loading += 1
        try:
            await asyncio.sleep(self.load_seconds)
            if self.hold_loads is not None:
                await self.hold_loads.wait()
        except asyncio.CancelledError:
            self.aborted_loads += 1
            raise
        finally:
            self.loading -= 1
        if model.load_error:
            raise WireError(500, model.load_error)
        alone = model.single or "completion" not in model.capabilities
        runner = Runner(model, wanted, 1 if alone else self.parallel)
        runner.keep_alive, runner.users = self.keep_alive, 1
        self.runners[key] = runner
        self.loads[model.name] += 1
        return runner

    async def _drop(self, runner: Runner) -> None:
        if runner.users == 0:
            self._expire(runner)
        else:
            runner.keep_alive = 0.0
        await runner.gone.wait()

    def _release(self, runner: Runner) -> None:
        runner.users -= 1
        if runner.users or runner.expiring:
            return
        if runner.keep_alive <= 0:
            self._expire(runner)
        elif runner.keep_alive != FOREVER:
            loop = asyncio.get_running_loop()
            runner.expires_at = loop.time() + runner.keep_alive
            runner.timer = loop.call_later(runner.keep_alive, self._expire, runner)

    def _expire(self, runner: Runner) -> None:
        if runner.expiring:
            return
        runner.expiring = True
        if self.unload_seconds:
            loop = asyncio.get_running_loop()
            runner.timer = loop.call_later(self.unload_seconds, self._remove, runner)
        else:
            self._remove(runner)

    def _remove(self, runner: Runner) -> None:
        if runner.timer is not None:
            runner.timer.cancel()
        self.runners.pop(runner.model.parsed.key(), None)
        runner.gone.set()
