"""The grammar of a reply: `progress* started (progress | delta | continued)* finished`.

Every test of every stream goes through `check`, so that a lost, repeated or
reordered event is found wherever it happens. The errors say at which position
what came; they quote no text of the reply.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.pipeline import Event, Send


class GrammarError(AssertionError):
    """A stream is not a reply."""


class Grammar:
    """Checks a stream event by event. It is a `Send` that can stand in front of another.

    Args:
        send: where to pass the events that are in order.
        numbered: whether `sequence` must count 0, 1, 2, ... Events below the gRPC edge are not
            numbered yet.
    """

    def __init__(self, send: Send | None = None, *, numbered: bool = True) -> None:
        self._send = send
        self._numbered = numbered
        self._position = 0
        self._tool = -1
        self.started = False
        self.finished = False

    async def __call__(self, event: Event) -> None:
        """Checks an event and passes it on."""
        self.feed(event)
        if self._send is not None:
            await self._send(event)

    def feed(self, event: Event) -> None:
        """Takes the next event.

        Raises:
            GrammarError: it may not come here.
        """
        if not isinstance(event, pb.GenerateResponse):
            raise self._error(f"a {type(event).__name__}, which is no event of a reply")
        kind = event.WhichOneof("event")
        if kind is None:
            raise self._error("an empty event")
        if self.finished:
            raise self._error(f"{kind} after finished")
        if self._numbered and event.sequence != self._position:
            raise self._error(f"{kind} with sequence {event.sequence}")
        if kind == "started":
            if self.started:
                raise self._error("a second started")
            self.started = True
        elif kind != "progress" and not self.started:
            raise self._error(f"{kind} before started")
        if kind == "progress" and not 0.0 <= event.progress.fraction <= 1.0:
            raise self._error(f"progress with fraction {event.progress.fraction}")
        if kind == "delta" and event.delta.WhichOneof("content") == "tool_call":
            self._tool_part(event.delta.tool_call)
        self.finished = kind == "finished"
        self._position += 1

    def end(self) -> None:
        """Takes the end of the stream.

        Raises:
            GrammarError: the reply is not complete.
        """
        if not self.finished:
            raise self._error("the end, and no finished")

    def _tool_part(self, part: pb.ToolCallDelta) -> None:
        if part.index == self._tool + 1:
            if not part.id or not part.name:
                raise self._error(f"a first part of tool call {part.index} without id or name")
            self._tool = part.index
        elif part.index != self._tool or self._tool < 0:
            raise self._error(f"a part of tool call {part.index} while at tool call {self._tool}")
        elif part.id or part.name:
            raise self._error(f"a later part of tool call {part.index} with id or name")

    def _error(self, what: str) -> GrammarError:
        return GrammarError(f"event {self._position}: {what}")


def check(events: Sequence[Event], *, complete: bool = True, numbered: bool = True) -> None:
    """Checks a whole stream.

    Args:
        events: the events, in the order in which they came.
        complete: whether `finished` must have come. A failed call's events are a prefix.
        numbered: whether `sequence` must count 0, 1, 2, ... False for events that have not passed
            the gRPC edge.

    Raises:
        GrammarError: the stream is not a reply, or not a prefix of one.
    """
    grammar = Grammar(numbered=numbered)
    for event in events:
        grammar.feed(event)
    if complete:
        grammar.end()


def text(events: Iterable[Event]) -> str:
    """Returns the answer's text."""
    return "".join(delta.text for delta in deltas(events))


def reasoning(events: Iterable[Event]) -> str:
    """Returns the text of the reasoning."""
    return "".join(delta.reasoning for delta in deltas(events))


def tool_calls(events: Iterable[Event]) -> list[pb.ToolCall]:
    """Returns the tool calls, put together from their parts."""
    calls: list[pb.ToolCall] = []
    for delta in deltas(events):
        if delta.WhichOneof("content") == "tool_call":
            part = delta.tool_call
            if part.index == len(calls):
                calls.append(pb.ToolCall(id=part.id, name=part.name))
            calls[part.index].arguments_json += part.arguments_json
    return calls


def deltas(events: Iterable[Event]) -> list[pb.Delta]:
    """Returns the deltas among the events."""
    return [
        e.delta for e in events if isinstance(e, pb.GenerateResponse) and e.WhichOneof("event") == "delta"
    ]
