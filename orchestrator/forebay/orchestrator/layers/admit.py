"""Lets calls run when it is their turn."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from opentelemetry import trace

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import Failure
from forebay.kit.pipeline import Call, Event, Request, Send, Service, Serving
from forebay.orchestrator.admission import Admission, Outlook, Ticket, Turn

NEWS_PERIOD = 0.5
"""Seconds between two looks of a waiting call at its place: often enough for a person, and a queue of
hundreds costs little."""

_CHARACTERS_PER_TOKEN = 4
"""Of English text; other scripts have fewer, and the measured count corrects what was charged."""

_IMAGE_TOKENS = 1000
"""What an image takes, about, in the models that read them."""

_PROMPT_SHARE = 0.125
"""Work in reading a token, as a share of that in writing one: prompts are read in batches, so small local
machines read about ten times as fast as they write."""

_TYPICAL_REPLY = 256.0
"""Tokens of a reply, before any was seen."""

_WEIGHT = 0.1
"""Weight of the latest reply in the typical one."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """What the queue made of one call."""

    call: Call[Request]
    """The call."""
    waited: float
    """Seconds from its coming to its turn, or to its refusal."""
    failure: Failure | None
    """How it was refused, if it was."""


class Admit:
    """Keeps calls in one queue for all backends, and tells those who wait where they stand.

    A permit is held until the inner service returns, over all attempts.
    Counting tokens takes no slot anywhere, so such calls pass.

    Args:
        inner: the service to protect.
        admission: decides who goes next.
        pool: returns the pool that calls for a model belong to. Unset, each name is one.
        foresee: asked once of each call that has to wait; returns how it would fail at its turn, whatever
            happens until then, or None.
        on_admitted: told once of each call that the queue let run or refused, for metrics.
    """

    def __init__(
        self,
        inner: Service,
        *,
        admission: Admission,
        pool: Callable[[str], str] = lambda model: model,
        foresee: Callable[[Call[Request]], Failure | None] = lambda call: None,
        on_admitted: Callable[[Admitted], None] | None = None,
    ) -> None:
        self._inner = inner
        self._admission = admission
        self._pool = pool
        self._foresee = foresee
        self._on_admitted = on_admitted
        self._typical = _TYPICAL_REPLY

    def __repr__(self) -> str:
        return f"<Admit {self._admission!r}>"

    def __call__(self, call: Call[Request], send: Send) -> Serving:
        """Serves a call when it is its turn.

        Raises:
            QueueFull: there is no room to wait in.
            QueueTimeout: its turn would come after its deadline.
            Failure: it would have to wait, and nobody could serve it then.
        """
        request = call.request
        if isinstance(request, pb.CountTokensRequest):
            return self._inner(call, send)
        return self._serve(call, request, send)

    async def _serve(
        self, call: Call[Request], request: pb.GenerateRequest | pb.EmbedRequest, send: Send
    ) -> None:
        moved = asyncio.Event()
        try:
            ticket = self._admission.arrive(
                urgency=call.urgency,
                caller=call.caller,
                pool=self._pool(request.model),
                cost=self._expected(request),
                size=request.ByteSize(),
                remaining=call.remaining(),
                on_turn=moved.set,
            )
        except Failure as failure:
            self._tell(call, 0.0, failure)
            raise
        meter = _Meter(send)
        waited = 0.0
        try:
            if ticket.turn is not Turn.RUNNING:
                if (hopeless := self._foresee(call)) is not None:
                    raise hopeless
                clock = asyncio.get_running_loop().time
                since = clock()
                await self._wait(ticket, call, send, moved)
                waited = clock() - since
            if ticket.turn is Turn.DROPPED:
                dropped = self._admission.full(ticket.pool)
                self._tell(call, waited, dropped)
                raise dropped
            self._tell(call, waited, None)
            await self._inner(call, meter)
        finally:
            if meter.reply_tokens is not None:
                self._typical += _WEIGHT * (meter.reply_tokens - self._typical)
            self._admission.leave(ticket, tokens=meter.tokens, aside=meter.loading)

    async def _wait(self, ticket: Ticket, call: Call[Request], send: Send, moved: asyncio.Event) -> None:
        """Returns when the call's turn has come, or it was dropped."""
        told = -1
        while ticket.turn is Turn.WAITING:
            outlook = self._admission.outlook(ticket)
            if outlook.ahead != told and isinstance(call.request, pb.GenerateRequest):
                told = outlook.ahead
                await send(_queued(outlook))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(NEWS_PERIOD):
                    await moved.wait()
            # Nobody tells the queue that a backend came back.
            self._admission.pump()

    def _tell(self, call: Call[Request], waited: float, failure: Failure | None) -> None:
        if waited > 0.0 or failure is not None:
            trace.get_current_span().add_event(
                "forebay.admit",
                {"forebay.queue.seconds": waited, "forebay.queue.refused": failure.reason if failure else ""},
            )
        if self._on_admitted is not None:
            self._on_admitted(Admitted(call, waited, failure))

    def _expected(self, request: pb.GenerateRequest | pb.EmbedRequest) -> float:
        """Returns the tokens that a request is expected to take, in units of written ones."""
        if isinstance(request, pb.EmbedRequest):
            return sum(map(len, request.texts)) / _CHARACTERS_PER_TOKEN * _PROMPT_SHARE
        characters = 0
        images = 0
        for message in request.messages:
            for part in message.parts:
                characters += len(part.text) + len(part.tool_result.text)
                images += part.HasField("image")
        prompt = characters / _CHARACTERS_PER_TOKEN + images * _IMAGE_TOKENS
        reply = self._typical
        if request.limits.HasField("max_output_token_count"):
            reply = min(reply, request.limits.max_output_token_count)
        return prompt * _PROMPT_SHARE + reply


class _Meter:
    """A `Send` that notes what the answer took."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.tokens: float | None = None
        """Tokens of the whole call, in units of written ones. None until it is done."""
        self.reply_tokens: int | None = None
        """Tokens of the reply. None until it is done."""
        self.loading = 0.0
        """Seconds in which the model was loaded."""

    def __call__(self, event: Event) -> Awaitable[None]:
        if isinstance(event, pb.GenerateResponse):
            if event.HasField("finished"):
                usage = event.finished.usage
                self.reply_tokens = usage.output_token_count
                self.loading = event.finished.timings.load_duration.ToTimedelta().total_seconds()
                self._measure(usage)
        elif isinstance(event, pb.EmbedResponse):
            self._measure(event.usage)
        return self._send(event)

    def _measure(self, usage: pb.Usage) -> None:
        # Frameworks that tell no usage leave zeros; what was expected is better than that.
        fresh = max(0, usage.prompt_token_count - usage.cached_token_count)
        self.tokens = (fresh * _PROMPT_SHARE + usage.output_token_count) or None


def _queued(outlook: Outlook) -> pb.GenerateResponse:
    event = pb.GenerateResponse(
        progress=pb.Progress(stage=pb.Progress.STAGE_QUEUED, queue_position=outlook.ahead)
    )
    if outlook.seconds is not None:
        event.progress.remaining_duration.FromNanoseconds(int(outlook.seconds * 1e9))
    return event
