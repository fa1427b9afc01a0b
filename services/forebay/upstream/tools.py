"""Puts tool calls together from pieces as servers really send them.

Indexes come interleaved, repeated for different calls, or not at all;
identifiers come empty; names come again with every piece. What goes out keeps
to the contract: indexes 0, 1, 2, ... in order of first appearance, identifier
and name in a call's first part only.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BrokenStream
from forebay.upstream.values import parse


@dataclass(slots=True)
class _Open:
    """A call that is being put together."""

    position: int
    id: str
    given_id: str
    name: str = ""
    held: str = ""
    sent: bool = False
    arguments: str = ""


class ToolCalls:
    """The tool calls of one reply.

    The parts of a call go out together: a call waits until the one before it
    is whole, or until the end.

    Args:
        backend: name of the backend, for messages.
    """

    def __init__(self, *, backend: str) -> None:
        self._backend = backend
        self._calls: list[_Open] = []
        self._by_index: dict[int, _Open] = {}
        self._current = 0

    def __len__(self) -> int:
        return len(self._calls)

    def feed(
        self,
        index: int | None,
        *,
        call_id: str = "",
        name: str = "",
        arguments: str = "",
    ) -> list[pb.ToolCallDelta]:
        """Takes a piece of a call and returns the parts to pass on.

        Args:
            index: the server's index of the call; None continues the latest call, or begins one if
                the piece has a name of its own.
            call_id: the server's identifier. Empty where it gave none.
            name: name of the tool. Empty where it gave none.
            arguments: next piece of the JSON arguments.
        """
        call = self._find(index, call_id, name)
        call.name = call.name or name
        call.held += arguments
        call.arguments += arguments
        return self._release(ended=False)

    def whole(self, *, name: str, arguments: str, call_id: str = "") -> list[pb.ToolCallDelta]:
        """Takes a call that came whole and returns the parts to pass on."""
        return self.feed(self._unused(), call_id=call_id, name=name, arguments=arguments or "{}")

    def finish(self, *, cut: bool = False) -> list[pb.ToolCallDelta]:
        """Ends the calls. Arguments that never came become `{}`.

        Args:
            cut: whether a limit cut the reply, so that its last call may well be incomplete.

        Raises:
            BrokenStream: a call has no name, or its arguments are no JSON object.
        """
        for call in self._calls:
            if not call.name:
                raise BrokenStream(
                    f"{self._backend} sent a tool call without a name", metadata={"backend": self._backend}
                )
            if not call.arguments.strip():
                call.arguments += "{}"
                call.held += "{}"
            elif not _is_whole(call) and not (cut and call is self._calls[-1]):
                raise BrokenStream(
                    f"{self._backend} sent tool call {call.position} with arguments that are no JSON object",
                    metadata={"backend": self._backend, "tool_call": str(call.position)},
                )
        return self._release(ended=True)

    def _release(self, *, ended: bool) -> list[pb.ToolCallDelta]:
        parts: list[pb.ToolCallDelta] = []
        while self._current < len(self._calls):
            call = self._calls[self._current]
            if not call.name:
                break  # the first part must hold the name
            if call.held or not call.sent:
                part = pb.ToolCallDelta(index=call.position, arguments_json=call.held)
                if not call.sent:
                    part.id, part.name = call.id, call.name
                parts.append(part)
                call.sent, call.held = True, ""
            is_last = self._current + 1 == len(self._calls)
            if is_last or not (ended or _is_whole(call)):
                break
            self._current += 1
        return parts

    def _find(self, index: int | None, given_id: str, name: str) -> _Open:
        if index is None:
            last = self._calls[-1] if self._calls else None
            if last is not None and self._goes_on(last, given_id, name):
                return last
            return self._begin(self._unused(), given_id)
        known = self._by_index.get(index)
        if known is None:
            return self._begin(index, given_id)
        if given_id and known.given_id and given_id != known.given_id:
            return self._begin(index, given_id)  # one index for all calls: the identifiers tell them apart
        known.given_id = known.given_id or given_id
        return known

    def _goes_on(self, last: _Open, given_id: str, name: str) -> bool:
        """Returns whether a piece without an index belongs to the latest call."""
        if given_id and given_id != last.given_id:
            return False
        return not name or (name == last.name and not _is_whole(last))

    def _begin(self, index: int, given_id: str) -> _Open:
        call = _Open(
            position=len(self._calls), id=given_id or f"call_{uuid.uuid4().hex[:24]}", given_id=given_id
        )
        self._calls.append(call)
        self._by_index[index] = call
        return call

    def _unused(self) -> int:
        return max(self._by_index, default=-1) + 1


def _is_whole(call: _Open) -> bool:
    """Returns whether the arguments are a JSON object. None of its prefixes is one."""
    try:
        return isinstance(parse(call.arguments), dict)
    except ValueError:
        return False
