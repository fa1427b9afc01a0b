"""The two ends of a call in a test: what is asked, and who takes the events."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.pipeline import Call, Event, Request, Service
from forebay.testing import grammar

R = TypeVar("R", pb.GenerateRequest, pb.EmbedRequest, pb.CountTokensRequest)


def message(text: str, role: pb.Role.ValueType = pb.ROLE_USER) -> pb.Message:
    """Returns a message of one text."""
    return pb.Message(role=role, parts=[pb.Part(text=text)])


def ask(
    text: str = "Tell me of the river.", *, model: str = "scripted", token_count: int | None = None
) -> pb.GenerateRequest:
    """Returns a request for a reply to one message."""
    request = pb.GenerateRequest(model=model, messages=[message(text)])
    if token_count is not None:
        request.limits.max_output_token_count = token_count
    return request


def with_options(request: R, **options: str | float) -> R:
    """Returns the request with options for a scripted engine, such as `token_delay="10ms"`, set."""
    changed = type(request)()
    changed.CopyFrom(request)
    if not isinstance(changed, pb.CountTokensRequest):
        changed.backend_options["scripted"].update(options)
    return changed


class Sink:
    """A client: takes events and keeps them.

    Args:
        delay: seconds it takes for each event, as a slow client does.
        error: what it raises, as a client does who left.
        error_at: events it takes before that.
    """

    def __init__(self, *, delay: float = 0.0, error: BaseException | None = None, error_at: int = 0) -> None:
        self.events: list[Event] = []
        self.delay = delay
        self._error = error
        self._error_at = error_at

    async def __call__(self, event: Event) -> None:
        """Takes an event."""
        if self._error is not None and len(self.events) >= self._error_at:
            raise self._error
        self.events.append(event)
        if self.delay:
            await asyncio.sleep(self.delay)

    @property
    def text(self) -> str:
        """The answer so far."""
        return grammar.text(self.events)

    @property
    def kinds(self) -> list[str]:
        """The kinds of the events so far, such as `started`."""
        return [
            str(event.WhichOneof("event")) if isinstance(event, pb.GenerateResponse) else type(event).__name__
            for event in self.events
        ]


async def serve(service: Service, request: Request, *, sink: Sink | None = None, **fields: object) -> Sink:
    """Calls a service, and returns who took its events.

    Args:
        service: the service.
        request: what is asked.
        sink: who takes the events; a new one if None.
        fields: further fields of the `Call`.
    """
    sink = sink or Sink()
    await service(Call(request=request).with_(**fields), sink)
    return sink
