"""The thread that owns a model: how it begins, is spoken to, and ends.

Every engine of a worker has one, for mlx wants an array to be used and dropped
on the thread that made it. Callers live on an event loop. What they want of
the thread they put into `_commands`, which it empties between two steps; what
it has to say it posts to the loop.

    start -> loading -> working -> over
    loading -> over  it could not be loaded: `start` raises why
    working -> over  it was stopped, nobody listens any more, or it failed for good
"""

from __future__ import annotations

import asyncio
import gc
import logging
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

from forebay.kit.failure import BackendError, Draining, Failure
from forebay.mlx_service.worker.runtime import leave_thread, mx

log = logging.getLogger(__name__)


class ModelThread(ABC):
    """What engines have in common: the life of their thread.

    Args:
        name: the thread's name.
    """

    def __init__(self, name: str) -> None:
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self._loaded: asyncio.Future[None]
        self._ended: asyncio.Future[None]
        self._stopping = False
        """Whether a stop was asked for. For the event loop."""
        self._stopped = False
        """Whether the thread is to take no further step. For the thread itself."""

    # On the event loop

    async def start(self) -> None:
        """Starts the thread, loads the model and runs it once.

        Raises:
            Exception: whatever loading raised.
        """
        self._loop = asyncio.get_running_loop()
        self._loaded = self._loop.create_future()
        self._ended = self._loop.create_future()
        self._thread.start()
        await asyncio.shield(self._loaded)

    @property
    def has_ended(self) -> bool:
        """Whether the thread has ended, because it was stopped or because it failed for good."""
        return self._ended.done()

    async def stop(self, *, timeout: float) -> None:
        """Ends all that it was asked for, and the thread.

        Raises:
            TimeoutError: the thread is stuck in a step.
        """
        self._stopping = True
        if self._thread.ident is None:
            return
        self._commands.put(self._stop)
        async with asyncio.timeout(timeout):
            await asyncio.shield(self._ended)
        self._thread.join(timeout)

    def _check_running(self) -> None:
        """Refuses what comes when nothing more is begun.

        Raises:
            Draining: the thread stops or has ended.
        """
        if self._stopping or self._ended.done():
            raise why_ended(None)

    def _finish(self, future: asyncio.Future[None], error: BaseException | None) -> None:
        if not future.done():
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    @abstractmethod
    def _fail_rest(self, failure: Failure) -> None:
        """Ends what is not over. Called when the thread has ended and nothing more can come."""

    # On the thread

    @abstractmethod
    def _start_model(self) -> None:
        """Loads the model and runs it once."""

    @abstractmethod
    def _work(self) -> None:
        """Runs commands and takes steps until `_stopped`."""

    @abstractmethod
    def _let_go(self, error: BaseException | None) -> None:
        """Drops every array, whatever became of the thread: None is that it was stopped."""

    def _run(self) -> None:
        error: BaseException | None = None
        is_loaded = False
        try:
            self._start_model()
            is_loaded = True
            self._post(self._finish, self._loaded, None)
            self._work()
        except BaseException as fatal:  # reported: the thread has nobody above it
            error = fatal
            if is_loaded:  # else `start` raises it
                log.error("the engine ended: %s", type(fatal).__name__, exc_info=fatal)
        finally:
            self._end(error)

    def _stop(self) -> None:
        self._stopped = True

    def _post(self, call: Callable[..., None], *arguments: object) -> None:
        """Has the event loop call something."""
        try:
            self._loop.call_soon_threadsafe(partial(call, *arguments))
        except RuntimeError:  # the loop is closed: nobody listens any more
            self._stopped = True

    def _end(self, error: BaseException | None) -> None:
        """Ends what is left and drops every array on this thread, as mlx wants."""
        self._let_go(error)
        self._post(self._finish, self._loaded, error)
        gc.collect()
        mx.clear_cache()
        leave_thread()
        self._post(self._finish, self._ended, None)
        # What came while the thread ended came too late for it to see.
        self._post(self._fail_rest, why_ended(error))


def why_ended(error: BaseException | None) -> Failure:
    """Returns what callers are told when the thread ends under them: None is that it was stopped."""
    if error is None:
        return Draining("this model's worker is stopping")
    return BackendError(f"this model's engine failed: {type(error).__name__}")
