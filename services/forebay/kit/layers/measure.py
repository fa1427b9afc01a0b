"""What a call took, told once when it is over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from google.protobuf.duration_pb2 import Duration

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import Failure
from forebay.kit.pipeline import Call, Event, Request, Send, Service


class Ending(Enum):
    """How a call ended."""

    DONE = "done"
    FAILED = "failed"
    """The service raised a `Failure`."""
    LEFT = "left"
    """The call was cancelled, or its events could not be sent on: not the service's doing."""
    CRASHED = "crashed"
    """The service raised something that is no `Failure`: a fault in our code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one call took. All times are in seconds and leave out waiting for the client."""

    call: Call[Request]
    """The call."""
    ending: Ending
    """How it ended."""
    failure: Failure | None
    """What the service raised, if it failed."""
    duration: float
    """From the call to its end."""
    first_delta: float | None
    """From the call to its first delta. None if none came, so always for a unary call."""
    generating: float
    """From the first delta to the last."""
    token_count: int
    """Tokens generated, as told by `finished` and else by the deltas."""
    first_token_count: int
    """Tokens in the first delta."""
    prompt_token_count: int = 0
    """Tokens in the prompt, as told at the end. 0 is not known."""
    cached_token_count: int = 0
    """Tokens of the prompt that were found in a cache, as told at the end."""
    queue_duration: float = 0.0
    """Waiting for a slot of the backend's own, as told at the end."""
    load_duration: float = 0.0
    """Loading the model, as told at the end."""
    prefill_duration: float = 0.0
    """Reading the prompt, as told at the end. 0 is not known."""

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first delta in a second; None if there were too few to tell."""
        tokens = self.token_count - self.first_token_count
        return tokens / self.generating if tokens > 0 and self.generating > 0 else None


def loop_time() -> float:
    """Returns the running loop's time in seconds."""
    return asyncio.get_running_loop().time()


class Measure:
    """Measures each call and reports it exactly once, however it ends.

    Args:
        inner: the service to measure.
        record: takes the outcome. It is called in the call's own context and must not raise.
        clock: seconds from any origin.
    """

    def __init__(
        self, inner: Service, *, record: Callable[[Outcome], None], clock: Callable[[], float] = loop_time
    ) -> None:
        self._inner = inner
        self._record = record
        self._clock = clock

    async def __call__(self, call: Call[Request], send: Send) -> None:
        """Serves a call."""
        meter = _Meter(self._clock, send)
        ending, failure = Ending.CRASHED, None
        try:
            await self._inner(call, meter)
            ending = Ending.DONE
        except asyncio.CancelledError:
            ending = Ending.LEFT
            raise
        except Failure as error:
            ending, failure = Ending.FAILED, error
            raise
        finally:
            if ending is not Ending.DONE and meter.unsent:
                ending, failure = Ending.LEFT, None
            self._record(
                Outcome(
                    call=call,
                    ending=ending,
                    failure=failure,
                    duration=meter.elapsed(),
                    first_delta=meter.first_delta,
                    generating=meter.last_delta - (meter.first_delta or 0.0),
                    token_count=meter.token_count,
                    first_token_count=meter.first_token_count,
                    prompt_token_count=meter.finished.usage.prompt_token_count,
                    cached_token_count=meter.finished.usage.cached_token_count,
                    queue_duration=_seconds(meter.finished.timings.queue_duration),
                    load_duration=_seconds(meter.finished.timings.load_duration),
                    prefill_duration=_seconds(meter.finished.timings.prefill_duration),
                )
            )


class _Meter:
    """A `Send` that watches what goes by, on a clock that stands still while the client is slow."""

    def __init__(self, clock: Callable[[], float], send: Send) -> None:
        self._clock = clock
        self._send = send
        self._since = clock()
        self.first_delta: float | None = None
        self.last_delta = 0.0
        self.first_token_count = 0
        self.token_count = 0
        self.finished = pb.Finished()
        self.unsent = False

    def elapsed(self) -> float:
        return self._clock() - self._since

    async def __call__(self, event: Event) -> None:
        before = self._clock()
        if isinstance(event, pb.GenerateResponse):
            self._note(event, before)
        try:
            await self._send(event)
        except BaseException:
            self.unsent = True
            raise
        finally:
            self._since += self._clock() - before

    def _note(self, event: pb.GenerateResponse, now: float) -> None:
        kind = event.WhichOneof("event")
        if kind == "delta":
            self.last_delta = now - self._since
            self.token_count += event.delta.token_count
            if self.first_delta is None:
                self.first_delta = self.last_delta
                self.first_token_count = event.delta.token_count
        elif kind == "finished":
            self.finished = event.finished
            self.token_count = event.finished.usage.output_token_count or self.token_count


def _seconds(duration: Duration) -> float:
    return max(0.0, duration.seconds + duration.nanos * 1e-9)
