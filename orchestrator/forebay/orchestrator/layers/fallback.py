"""Tries again where that may help: on the next backend, then with the next model.

Only what has told the caller nothing yet can be tried again; the commit gate
knows. What the caller did wrong is wrong everywhere, so it is never tried again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from forebay.kit.commit import CommitGate
from forebay.kit.failure import (
    Attempt,
    BackendBusy,
    BackendError,
    BackendUnavailable,
    BreakerOpen,
    BrokenStream,
    CapabilityUnsupported,
    ContextExceeded,
    Draining,
    Failure,
    Fault,
    FirstEventTimeout,
    MemoryExhausted,
    ModelLoadFailed,
    ModelNotFound,
    ModelQuarantined,
    NoBackend,
    QueueFull,
    QueueTimeout,
    StreamInterrupted,
    StreamStalled,
    UpstreamUnauthenticated,
    WrongModel,
)
from forebay.kit.pipeline import Call, Request, Send, Service
from forebay.orchestrator.backoff import Backoff
from forebay.orchestrator.budget import RetryBudget
from forebay.orchestrator.config import RetrySettings

_TELLING: tuple[type[Failure], ...] = (
    # What waiting cures, for the caller can act on it at once.
    QueueFull,
    BackendBusy,
    MemoryExhausted,
    QueueTimeout,
    # What a person has to mend.
    ModelQuarantined,
    ModelLoadFailed,
    UpstreamUnauthenticated,
    WrongModel,
    ContextExceeded,
    # What broke.
    FirstEventTimeout,
    BrokenStream,
    BackendError,
    BackendUnavailable,
    StreamInterrupted,
    StreamStalled,
    Draining,
    # What was never tried, or could not have worked.
    BreakerOpen,
    NoBackend,
    CapabilityUnsupported,
    ModelNotFound,
)
"""Failures from the most to the least telling: where several attempts failed, the caller hears of the first
kind here that came up."""


class Fallback:
    """Tries a call on one backend after the other, and then with the models the caller named.

    Args:
        inner: makes one attempt, on a backend that is not in `call.tried`. The failures it raises name
            their backend in `metadata["backend"]`; one without it says that no backend is left to try.
        settings: how often to try.
        budget: shared by all calls.
        source: where jitter comes from.
        on_retry: told of each attempt after the first, for metrics.
    """

    def __init__(
        self,
        inner: Service,
        *,
        settings: RetrySettings,
        budget: RetryBudget,
        source: random.Random,
        on_retry: Callable[[Failure], None] | None = None,
    ) -> None:
        self._inner = inner
        self._settings = settings
        self._budget = budget
        self._source = source
        self._on_retry = on_retry

    async def __call__(self, call: Call[Request], send: Send) -> None:
        """Serves a call.

        Raises:
            StreamInterrupted: the backend was lost after part of the answer was sent.
            Failure: the most telling one of the attempts.
        """
        if call.resumption is None:  # going on with a reply is no new call
            self._budget.deposit()
        attempts = _Attempts(self, call, send)
        try:
            await attempts.run()
        except Failure as failure:
            attempts.list_in(failure)
            raise

    async def attempt(self, call: Call[Request], send: Send) -> Failure | None:
        """Makes one attempt and returns the failure that allows for another one, or None when it is served.

        Raises:
            Failure: no other attempt may be made.
        """
        gate = CommitGate(send)
        try:
            await self._inner(call, gate)
        except Failure as failure:
            if gate.committed:
                raise _after_commit(failure) from failure
            # A backend that broke off says that part of the reply was sent. The gate knows that none was.
            is_unsent = isinstance(failure, StreamInterrupted | StreamStalled)
            if not failure.elsewhere and not is_unsent and not _is_refusal(failure):
                raise
            return failure
        return None

    def may_retry(self, failure: Failure) -> bool:
        """Takes a retry from the budget, if there is one."""
        if not self._budget.withdraw():
            return False
        if self._on_retry is not None:
            self._on_retry(failure)
        return True

    def most_attempts(self, request: Request) -> int:
        """Returns how many attempts the call may have."""
        if request.routing.HasField("max_attempt_count"):
            return max(1, request.routing.max_attempt_count)
        return self._settings.max_attempts

    def backoff(self) -> Backoff:
        """Returns the waits of one call."""
        return Backoff(self._settings.backoff_min, self._settings.backoff_max, source=self._source)

    @property
    def longest_wait(self) -> float:
        """Seconds a call may wait before it tries the same backends again."""
        return self._settings.backoff_max.total_seconds()


class _Attempts:
    """The attempts of one call."""

    def __init__(self, fallback: Fallback, call: Call[Request], send: Send) -> None:
        self._fallback = fallback
        self._call = call
        self._send = send
        self._models = _models(call.request)
        self._left = fallback.most_attempts(call.request)
        self._backoff: Backoff | None = None  # most calls never wait
        self._failures: list[Failure] = []  # of attempts that reached a backend
        self._refusals: list[Failure] = []  # of the router, for want of a backend
        self._attempts: list[Attempt] = []
        self._model = ""  # that the last attempt asked for

    async def run(self) -> None:
        while True:
            tried_before = len(self._failures)
            for model in self._models:
                if await self._try_model(_with_model(self._call, model)):
                    return
            if len(self._failures) == tried_before:
                raise self._verdict()  # nobody was there to try
            # Every backend has failed with every model. Only now is one tried twice, and only if it failed
            # in a way that passes.
            await self._wait()

    async def _try_model(self, call: Call[Request]) -> bool:
        """Returns whether the call was served."""
        while True:
            self._model = call.request.model
            failure = await self._fallback.attempt(call, self._send)
            if failure is None:
                return True
            backend = failure.metadata.get("backend")
            if backend is None:
                self._refusals.append(failure)
                return False
            self._failures.append(failure)
            self._attempts.append(Attempt(backend, failure.reason, call.request.model))
            self._left -= 1
            if self._left <= 0 or not self._fallback.may_retry(failure):
                raise self._verdict()
            call = call.with_(tried=call.tried | {backend})

    async def _wait(self) -> None:
        """Waits before the next round.

        Raises:
            Failure: there is no use in another round.
        """
        passing = [failure for failure in self._failures if _is_passing(failure)]
        if not passing:
            raise self._verdict()
        asked = min(
            (f.retry_after.total_seconds() for f in passing if f.retry_after is not None), default=0.0
        )
        # What a backend asks for is a floor, so jitter comes on top of it.
        self._backoff = self._backoff or self._fallback.backoff()
        wait = asked + self._backoff.next()
        remaining = self._call.remaining()
        if asked > self._fallback.longest_wait or (remaining is not None and wait >= remaining):
            raise self._verdict()
        await asyncio.sleep(wait)

    def list_in(self, failure: Failure) -> None:
        """Names every attempt in the failure that the call ends with."""
        backend = failure.metadata.get("backend")
        is_last = failure not in self._failures and failure not in self._refusals
        if is_last and backend is not None:  # it ended the call without a verdict
            reason = failure.metadata.get("cause", failure.reason)
            self._attempts.append(Attempt(backend, reason, self._model))
        if failure.attempts and len(self._attempts) < 2:
            return  # the one backend is an orchestrator itself, and told more
        failure.attempts = tuple(self._attempts)

    def _verdict(self) -> Failure:
        """Returns the most telling failure."""
        failure = min(self._failures or self._refusals, key=_rank)
        if len(self._failures) > 1:
            failure.metadata["attempts"] = "; ".join(
                f"{each.metadata.get('backend', '')}: {each.reason}" for each in self._failures
            )
        return failure


def _rank(failure: Failure) -> int:
    for place, kind in enumerate(_TELLING):
        if isinstance(failure, kind):
            return place
    return len(_TELLING)


def _is_refusal(failure: Failure) -> bool:
    """Whether nobody was found for this model, so that the next backend or model may be tried.

    From a backend that is an orchestrator itself, `NoBackend` speaks for the backends behind it only.
    """
    return isinstance(failure, NoBackend) or (
        isinstance(failure, ContextExceeded) and "backend" not in failure.metadata
    )


def _is_passing(failure: Failure) -> bool:
    """Whether the same backend may succeed a moment later."""
    return failure.retry_after is not None or isinstance(failure, BackendUnavailable)


def _after_commit(failure: Failure) -> Failure:
    """Returns what to tell a caller who has part of an answer: never that trying again helps."""
    if isinstance(failure, StreamInterrupted | StreamStalled):
        return failure
    if failure.fault is Fault.CALLER and not failure.elsewhere:
        return failure
    broken = StreamInterrupted(
        f"the reply broke off: {failure.message}", metadata=failure.metadata | {"cause": failure.reason}
    )
    broken.attempts = failure.attempts
    return broken


def _models(request: Request) -> tuple[str, ...]:
    others = request.routing.fallback_models
    return tuple(dict.fromkeys((request.model, *others))) if others else (request.model,)


def _with_model(call: Call[Request], model: str) -> Call[Request]:
    if model == call.request.model:
        return call
    copy: Request = type(call.request)()
    copy.CopyFrom(call.request)  # type: ignore[arg-type]  # both are of one type, which the union hides
    copy.model = model
    return call.with_(request=copy)
