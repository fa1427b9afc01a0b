"""Keeps worker processes: loads models, watches them, starts them again, and takes them out of memory.

A model's life:

    AVAILABLE --asked for--> LOADING --worker serves--> ACTIVE
    ACTIVE --unloaded, unused, or others need the room--> UNLOADING --worker gone--> AVAILABLE
    LOADING --worker exits 3, or too late--> FAILED --asked for again, not too soon--> LOADING
    LOADING, ACTIVE --worker ends, is frozen or falls silent--> LOADING, at once or after a wait that doubles
    LOADING, ACTIVE --too many such ends--> QUARANTINED --loaded by name--> LOADING

Each model that is being kept has one task, its keeper, which alone starts and
stops its worker. Everybody else sets a wish (`stop`, `suspect`) and waits for
the state to change, so a caller that leaves takes nothing down with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import signal
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TypeAlias

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import metrics
from forebay.kit.failure import (
    BackendUnavailable,
    Failure,
    Internal,
    MemoryExhausted,
    ModelLoadFailed,
    ModelQuarantined,
)
from forebay.kit.metrics import Metrics
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.fetch import Progress, Report
from forebay.mlx_service.host import Host, this_host
from forebay.mlx_service.process import LOAD_FAILED, Launch, Spec, Worker
from forebay.mlx_service.steward import Steward

logger = logging.getLogger(__name__)

Prepare: TypeAlias = Callable[[Report], Awaitable[Path]]
"""Returns the folder to load, after fetching or converting what that takes."""

Waiting: TypeAlias = Callable[["Residence"], Awaitable[None]]
"""Is told again and again that a caller is waiting for a model."""

_POLL = 0.05
"""Seconds between two questions whether a worker has loaded its model, or is well again."""

_TICK = 0.001
"""Least seconds to wait for a moment: what is left of it may be too little for the clock to tell."""

_TELL = 1.0
"""Most seconds between two signs of life to a caller that waits for a model."""

_FROZEN = 0.5
"""Seconds for which a worker must have been stopped to be given up. What stops processes for a while to slow
them down does so for fractions of that."""

_LOOK = 0.1
"""Seconds between two looks at whether a worker that owes an answer is stopped."""

_READY_TIMEOUT = 5.0
"""Seconds a loading worker gets for one answer. It is busy; only `load_timeout` says when it is too late."""


_FROZEN_TEXT = "it was stopped, as by SIGSTOP"


class State(Enum):
    """Where a model is in its life."""

    AVAILABLE = pb.Model.STATE_AVAILABLE
    LOADING = pb.Model.STATE_LOADING
    ACTIVE = pb.Model.STATE_ACTIVE
    UNLOADING = pb.Model.STATE_UNLOADING
    FAILED = pb.Model.STATE_FAILED
    QUARANTINED = pb.Model.STATE_QUARANTINED


@dataclass(kw_only=True)
class Options:
    """How one model is kept; what `LoadModel` can ask for."""

    context_token_count: int | None = None
    """Most tokens of prompt and reply together. None is the model's own."""
    keep_alive: float = 0.0
    """Seconds after its last use when it is unloaded. 0 is never."""
    pinned: bool = False
    """Whether it stays in memory until it is unloaded by name."""


class Residence:
    """A model's place in memory, whether it is there or not.

    Args:
        model_id: the model's identifier.
        options: how it is kept.
    """

    def __init__(self, model_id: str, options: Options) -> None:
        self.id = model_id
        self.options = options
        self.state = State.AVAILABLE
        self.detail = ""
        self.worker: Worker | None = None
        """The worker that serves. None unless ACTIVE."""
        self.suspect = False
        """Whether the worker was lost sight of, and new calls wait until it is clear what it is."""
        self.calls = 0
        self.last_used = 0.0
        self.has_served = False
        """Whether it ever served a call."""
        self.load_seconds = 0.0
        self.described: pb.Model | None = None
        """The model as its worker described it last."""
        self.step: Progress | None = None
        """How far the preparation of a load is."""
        self.attempts = 0
        """Loads that were begun."""
        self.failure: Failure | None = None
        """How the latest of them failed."""
        self.failed_at = 0.0
        self.restarting_since: float | None = None
        self.crashes: deque[float] = deque()
        self.stopping = False
        self.forced = False
        self.kept = False
        """Whether it has a keeper, and so takes or is about to take memory."""
        self.wake = asyncio.Event()
        """Makes the keeper look at once."""
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        words = [self.state.name, f"calls {self.calls}"]
        words += ["suspect"] if self.suspect else []
        words += ["pinned"] if self.options.pinned else []
        words += [self.detail] if self.detail else []
        return f"<{self.id} {' '.join(words)}>"

    @property
    def usable(self) -> Worker | None:
        """The worker, if it serves and is to stay, and nothing is known against it since a moment ago."""
        worker = self.worker
        if worker is None or self.suspect or self.stopping or worker.exit_code is not None:
            return None
        return worker

    def become(self, state: State, detail: str = "") -> None:
        """Changes the state and tells all who wait."""
        if state is not self.state:
            logger.info("%s is %s%s", self.id, state.name, detail and f": {detail}")
        self.state, self.detail = state, detail
        if state is not State.ACTIVE:
            self.worker = None
            self.suspect = False
        self.notify()

    def notify(self) -> None:
        """Tells all who wait that something changed."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def change(self, timeout: float | None = None) -> None:
        """Waits until something changes, at most so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._changed.wait()

    def stop(self, *, force: bool) -> None:
        """Asks the keeper to take the model out of memory: after the last call, or at once."""
        self.stopping = True
        self.forced = self.forced or force
        self.wake.set()

    def doubt(self, worker: Worker) -> None:
        """Reports that a call lost this worker."""
        if worker is self.worker:
            self.suspect = True
            self.wake.set()

    def expires_in(self, now: float) -> float | None:
        """Seconds until it is unloaded if nobody uses it; None is never."""
        if self.state is not State.ACTIVE or self.options.pinned or not self.options.keep_alive:
            return None
        return max(0.0, self.last_used + self.options.keep_alive - now)


class End(Enum):
    """How one life of a worker ended."""

    STOPPED = "stopped"
    CRASHED = "crashed"
    LOAD_FAILED = "load failed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one life of a worker ended, and why."""

    end: End
    detail: str = field(default="")


class _Frost:
    """Tells a worker that is stopped from one that is merely slow: it needs not be waited for.

    A slow worker wants to run, or waits for a disk. One that is stopped does neither, whatever else the
    machine does, until somebody lets it go on.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._since = math.inf

    @property
    def is_seen(self) -> bool:
        """Whether it was stopped at the latest look."""
        return self._since < math.inf

    def holds(self) -> bool:
        """Looks, and returns whether the worker was stopped at every look for `_FROZEN` seconds."""
        self._since = min(self._since, _now()) if self._worker.is_stopped() else math.inf
        return _now() - self._since >= _FROZEN


class Supervisor:
    """Keeps the workers of all models. Use it as a block: at its end every worker is gone.

    Args:
        settings: limits and times.
        launch: starts a worker.
        jitter: a number in [0.0, 1.0), anew each time, that spreads restarts.
        measured: the metrics of this process; None measures nothing.
        host: the machine whose memory is dealt out; None is this one.
        beside: returns the folder of the model that a model's worker loads in addition, if any.
    """

    def __init__(
        self,
        settings: MlxSettings,
        *,
        launch: Launch,
        jitter: Callable[[], float] = random.random,
        measured: Metrics | None = None,
        host: Host | None = None,
        beside: Callable[[str], Path | None] = lambda model_id: None,
    ) -> None:
        self._settings = settings
        self._launch = launch
        self._jitter = jitter
        self._metrics = measured or Metrics()
        self._metrics.observe(metrics.LOADED, lambda: [(self.loaded_count, {})])
        self._residences: dict[str, Residence] = {}
        self._steward = Steward(
            settings,
            host=host or this_host(),
            residences=self._residences,
            measured=self._metrics,
            beside=beside,
        )
        self._watch: asyncio.Task[None] | None = None
        self._keepers = asyncio.TaskGroup()
        self._closing = False

    def __repr__(self) -> str:
        return f"<Supervisor [{' | '.join(repr(r) for r in self._residences.values())}]>"

    async def __aenter__(self) -> Supervisor:
        await self._keepers.__aenter__()
        self._watch = self._keepers.create_task(self._steward.watch(), name="watch memory")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._closing = True
        if self._watch is not None:
            self._watch.cancel()
        for residence in self._residences.values():
            residence.stop(force=True)
        await self._keepers.__aexit__(None, None, None)

    @property
    def loaded_count(self) -> int:
        """Models in memory. It may be asked on any thread."""
        return sum(residence.state is State.ACTIVE for residence in list(self._residences.values()))

    def residence(self, model_id: str) -> Residence:
        """Returns a model's place."""
        if model_id not in self._residences:
            keep_alive = self._settings.keep_alive.total_seconds()
            options = Options(
                context_token_count=self._settings.context_token_count,
                keep_alive=keep_alive,
                pinned=self._settings.pins(model_id),
            )
            self._residences[model_id] = Residence(model_id, options)
        return self._residences[model_id]

    @contextlib.asynccontextmanager
    async def lease(self, model_id: str, prepare: Prepare, waiting: Waiting) -> AsyncIterator[Worker]:
        """Gives a worker that has the model, loading it first if that takes, and counts its user.

        Args:
            model_id: the model.
            prepare: returns its folder, should it be loaded.
            waiting: is told while the caller waits.

        Raises:
            ModelLoadFailed: it cannot be loaded.
            ModelQuarantined: it crashed too often.
            MemoryExhausted: all room is taken by models in use.
            BackendUnavailable: its worker is being restarted, and that takes too long.
        """
        residence = self.residence(model_id)
        worker = await self._ready(residence, prepare, waiting)
        residence.calls += 1
        try:
            yield worker
        finally:
            residence.calls -= 1
            residence.last_used = _now()
            residence.has_served = True
            if residence.stopping:
                residence.wake.set()

    async def load(self, model_id: str, prepare: Prepare, waiting: Waiting, options: Options) -> Residence:
        """Loads a model by name, which also ends a quarantine, and returns when it is in memory.

        Raises:
            Failure: as `lease`.
        """
        residence = self.residence(model_id)
        loaded = residence.options.context_token_count
        residence.options = options
        residence.crashes.clear()
        if residence.state in {State.FAILED, State.QUARANTINED}:
            residence.become(State.AVAILABLE)
        if residence.kept and loaded != options.context_token_count:
            await self.unload(model_id, force=False)
        await self._ready(residence, prepare, waiting)
        return residence

    async def widen(self, model_id: str, wanted: int) -> bool:
        """Gives a worker a limit of so many bytes, if that is possible. Returns whether it has it now."""
        return await self._steward.widen(self.residence(model_id), wanted)

    def takes(self, model_id: str, weights: int) -> int:
        """Returns the bytes that a model takes, or would take if it were loaded, its process included."""
        return self._steward.takes(model_id, weights)

    def progress(self, residence: Residence) -> float | None:
        """Returns how far a load is, from 0 to 1: its preparation, then its weights. None is unknown."""
        step = residence.step
        if step is not None:
            return min(1.0, step.done / step.total) if step.total else None
        return self._steward.arrived(residence.id) if residence.state is State.LOADING else None

    def memory(self) -> pb.Memory:
        """Describes the machine's memory and what the models take of it."""
        return self._steward.memory()

    async def unload(self, model_id: str, *, force: bool) -> Residence:
        """Takes a model out of memory and returns when its process is gone.

        Args:
            model_id: the model.
            force: whether calls in progress are broken off rather than waited for.
        """
        residence = self.residence(model_id)
        attempt = residence.attempts
        if residence.kept:
            residence.stop(force=force)
        while residence.kept and residence.attempts == attempt:
            await residence.change()
        return residence

    async def _ready(self, residence: Residence, prepare: Prepare, waiting: Waiting) -> Worker:
        """Waits until the model is in memory; whoever comes first has it loaded."""
        seen = residence.attempts - 1 if residence.kept else residence.attempts
        while True:
            if (worker := residence.usable) is not None:
                return worker
            if not residence.kept:
                self._raise_if_refused(residence, seen)
                self._begin(residence, prepare)
            self._raise_if_late(residence)
            await waiting(residence)
            await residence.change(_TELL)

    def _raise_if_refused(self, residence: Residence, seen: int) -> None:
        failure = residence.failure
        if residence.state is State.QUARANTINED:
            raise ModelQuarantined(
                f"{residence.id} is left alone because {residence.detail}. Load it by name to try again",
                metadata={"model": residence.id},
            )
        if failure is None:
            return
        is_recent = _now() - residence.failed_at < self._settings.failed_retry.total_seconds()
        if residence.attempts > seen or (residence.state is State.FAILED and is_recent):
            raise type(failure)(
                failure.message, metadata=failure.metadata, retry_after=failure.retry_after
            ) from failure

    def _raise_if_late(self, residence: Residence) -> None:
        since = residence.restarting_since
        if since is not None and _now() - since >= self._settings.restart_wait.total_seconds():
            raise BackendUnavailable(
                f"the worker of {residence.id} is being restarted: {residence.detail}",
                metadata={"model": residence.id},
                retry_after=self._settings.restart_backoff_max,
            )

    def _begin(self, residence: Residence, prepare: Prepare) -> None:
        """Gives a model its keeper. Nothing here waits, so of many callers one begins."""
        if self._closing:
            raise BackendUnavailable("the service is stopping")
        residence.kept = True
        residence.attempts += 1
        residence.failure = None
        residence.restarting_since = None
        residence.stopping = residence.forced = False
        residence.wake.clear()
        residence.become(State.LOADING)
        self._keepers.create_task(self._keep(residence, prepare), name=f"keep {residence.id}")

    # From here on: the keeper.

    async def _keep(self, residence: Residence, prepare: Prepare) -> None:
        """Keeps one model in memory until it is stopped, cannot be loaded, or crashes too often."""
        state, detail = State.AVAILABLE, ""
        failure: Failure | None = None
        try:
            folder = await self._prepare(residence, prepare)
            await self._steward.admit(residence, folder)
            outcome = await self._lives(residence, folder)
            detail = outcome.detail
            if outcome.end is End.CRASHED:
                state = State.QUARANTINED
            elif outcome.end is End.LOAD_FAILED:
                state = State.FAILED
                failure = ModelLoadFailed(
                    f"{residence.id} cannot be loaded: {detail}", metadata={"model": residence.id}
                )
        except MemoryExhausted as error:
            failure = error  # nothing is wrong with the model: the next call may find room
        except Failure as error:
            state, failure, detail = State.FAILED, error, error.message
        except Exception as error:
            logger.exception("keeping %s failed through a fault of ours", residence.id)
            detail = (
                f"{type(error).__name__} while loading: a fault of Forebay's own; its log has the details"
            )
            state, failure = State.FAILED, Internal(detail)
        finally:
            self._steward.release(residence)
            residence.kept = False
            residence.failure, residence.failed_at = failure, _now()
            residence.restarting_since = None
            residence.described = None
            residence.step = None
            residence.become(state, detail)

    async def _prepare(self, residence: Residence, prepare: Prepare) -> Path:
        def report(step: Progress) -> None:
            residence.step = step
            residence.detail = step.what

        folder = await prepare(report)
        residence.step = None
        residence.detail = ""
        return folder

    async def _lives(self, residence: Residence, folder: Path) -> Outcome:
        """Runs one worker after another until the last one's end is no crash, or there were too many."""
        while True:
            outcome = await self._life(residence, folder)
            if outcome.end is not End.CRASHED:
                return outcome
            now = _now()
            window = self._settings.quarantine_window.total_seconds()
            residence.crashes.append(now)
            while residence.crashes[0] < now - window:
                residence.crashes.popleft()
            logger.warning("the worker of %s is lost: %s", residence.id, outcome.detail)
            if len(residence.crashes) >= self._settings.quarantine_crashes:
                count = len(residence.crashes)
                return Outcome(
                    End.CRASHED,
                    f"its worker was lost {count} times within {window:g}s, "
                    f"the last time because {outcome.detail}",
                )
            if residence.restarting_since is None:
                residence.restarting_since = now
            residence.become(State.LOADING, outcome.detail)
            self._metrics.add(metrics.RESTARTS, self._label(residence))
            if await self._pause(residence, self._backoff(len(residence.crashes))):
                return Outcome(End.STOPPED)

    def _backoff(self, crashes: int) -> float:
        """Seconds before the next start: none after one crash, then doubling.

        They are spread so that workers do not start in step.
        """
        if crashes == 1:
            return 0.0
        shortest = self._settings.restart_backoff_min.total_seconds()
        longest = self._settings.restart_backoff_max.total_seconds()
        return min(longest, shortest * 2.0 ** (crashes - 2)) * (1 - self._jitter() / 2)

    async def _pause(self, residence: Residence, seconds: float) -> bool:
        """Waits, and returns at once with True if the model is to be stopped."""
        end = _now() + seconds
        while not residence.stopping and (left := end - _now()) > 0:
            await self._woken(residence, left)
        return residence.stopping

    async def _life(self, residence: Residence, folder: Path) -> Outcome:
        """Runs one worker from its start to its end."""
        spec = Spec(
            model_id=residence.id,
            folder=folder,
            context_token_count=residence.options.context_token_count,
            memory_limit=self._steward.limit(residence),
        )
        begun = _now()
        async with self._launch(spec, residence.wake.set) as worker:
            self._steward.started(residence, worker.pid)
            outcome = await self._until_loaded(residence, worker)
            if outcome is None:
                residence.load_seconds = residence.last_used = _now()
                residence.load_seconds -= begun
                self._metrics.record(metrics.LOAD, residence.load_seconds, self._label(residence))
                residence.described = await worker.describe()
                await self._steward.settle(residence, worker)
                residence.worker = worker
                residence.restarting_since = None
                residence.become(State.ACTIVE)
                outcome = await self._until_over(residence, worker)
            if outcome.end is End.STOPPED:
                residence.become(State.UNLOADING)
            else:
                residence.become(State.LOADING, outcome.detail)
            silent = outcome.end is not End.STOPPED and worker.exit_code is None
            await worker.stop(0.0 if silent else self._settings.stop_grace.total_seconds())
            if outcome.end is End.STOPPED and (code := worker.exit_code):
                logger.warning(
                    "worker %d of %s did not stop in peace: %s", worker.pid, residence.id, _how(worker, code)
                )
        return outcome

    def _label(self, residence: Residence) -> dict[str, str]:
        return {"gen_ai.request.model": self._metrics.admit(residence.id)}

    async def _until_loaded(self, residence: Residence, worker: Worker) -> Outcome | None:
        """Waits until the worker serves and returns None, or how it ended instead."""
        deadline = _now() + self._settings.load_timeout.total_seconds()
        frost = _Frost(worker)
        while True:
            if (code := worker.exit_code) is not None:
                end = End.LOAD_FAILED if code == LOAD_FAILED else End.CRASHED
                return Outcome(end, _how(worker, code))
            if residence.stopping:
                return Outcome(End.STOPPED)
            if frost.holds():
                return Outcome(End.CRASHED, _FROZEN_TEXT)
            if _now() >= deadline:
                return Outcome(
                    End.LOAD_FAILED,
                    f"its worker was not ready within {self._settings.load_timeout.total_seconds():g}s",
                )
            if await worker.is_well(_READY_TIMEOUT):
                return None
            await self._woken(residence, _POLL)

    async def _until_over(self, residence: Residence, worker: Worker) -> Outcome:
        """Watches a worker that serves, and returns why that is over."""
        interval = self._settings.health_interval.total_seconds()
        next_check = _now() + interval
        while True:
            await self._woken(residence, max(_TICK, next_check - _now()))
            if (code := worker.exit_code) is not None:
                return Outcome(End.CRASHED, _how(worker, code))
            if residence.stopping:
                return await self._until_unused(residence, worker)
            if residence.suspect or _now() >= next_check:
                if not await self._is_well(residence, worker):
                    return Outcome(End.CRASHED, self._why_lost(worker))
                self._steward.note(residence, await worker.adjust(None))
                next_check = _now() + interval
            if not residence.calls and residence.expires_in(_now()) == 0.0:
                self._steward.left(residence, "unused")
                return Outcome(End.STOPPED, "")

    def _why_lost(self, worker: Worker) -> str:
        if (code := worker.exit_code) is not None:
            return _how(worker, code)
        if worker.is_stopped():
            return _FROZEN_TEXT
        return f"it did not answer for {self._settings.health_timeout.total_seconds():g}s"

    async def _is_well(self, residence: Residence, worker: Worker) -> bool:
        """Asks a worker whether it is well, and waits for the answer unless the worker is frozen."""
        async with asyncio.TaskGroup() as tasks:
            answer = tasks.create_task(self._answers(residence, worker))
            frozen = tasks.create_task(self._until_frozen(residence, worker))
            await asyncio.wait({answer, frozen}, return_when=asyncio.FIRST_COMPLETED)
            is_well = answer.done() and answer.result()
            answer.cancel()
            frozen.cancel()
        return is_well

    async def _answers(self, residence: Residence, worker: Worker) -> bool:
        """Gives a worker `health_timeout` to say that it is well; new calls wait from its first silence."""
        deadline = _now() + self._settings.health_timeout.total_seconds()
        while worker.exit_code is None and (left := deadline - _now()) > 0:
            if await worker.is_well(left):
                if residence.suspect:
                    residence.suspect = False
                    residence.notify()
                return True
            residence.suspect = True
            await asyncio.sleep(min(_POLL, left))
        return False

    @staticmethod
    async def _until_frozen(residence: Residence, worker: Worker) -> None:
        """Returns when a worker has been stopped for long; new calls wait from the first sight of that."""
        frost = _Frost(worker)
        while not frost.holds():
            residence.suspect = residence.suspect or frost.is_seen
            await asyncio.sleep(_LOOK)

    async def _until_unused(self, residence: Residence, worker: Worker) -> Outcome:
        """Lets calls in progress end, unless the stop is forced."""
        residence.become(State.UNLOADING)
        while residence.calls and not residence.forced and worker.exit_code is None:
            await self._woken(residence, None)
        return Outcome(End.STOPPED)

    @staticmethod
    async def _woken(residence: Residence, timeout: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await residence.wake.wait()
        residence.wake.clear()


def _how(worker: Worker, code: int) -> str:
    """Says how a worker ended, and what it said last."""
    if code < 0:
        with contextlib.suppress(ValueError):
            how = f"it was ended by {signal.Signals(-code).name}"
            return f"{how} ({worker.tail()[-1]})" if worker.tail() else how
    tail = worker.tail()
    if code == LOAD_FAILED and tail:
        return tail[-1].removeprefix("forebay mlx-worker: ")
    return f"it ended with exit code {code}" + (f" ({tail[-1]})" if tail else "")


def _now() -> float:
    return asyncio.get_running_loop().time()
