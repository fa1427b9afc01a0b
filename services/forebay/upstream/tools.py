"""Puts tool calls together from pieces as servers really send them.

Indexes come interleaved, repeated for different calls, or not at all;
identifiers come empty; names come again with every piece. What goes out keeps
to the contract: indexes 0, 1, 2, ... in order of first appearance, identifier
and name in a call's first part only.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

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
    arguments: list[str] = field(default_factory=list)


class ToolCalls:
    """The tool calls of one reply.

    Args:
        backend: name of the backend, for messages.
    """

    def __init__(self, *, backend: str) -> None:
        self._backend = backend
        self._calls: list[_Open] = []
        self._by_index: dict[int, _Open] = {}

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
        if not call.name:
            return []  # the first part must hold the name
        part = pb.ToolCallDelta(index=call.position, arguments_json=call.held)
        if not call.sent:
            part.id, part.name = call.id, call.name
            call.sent = True
        elif not call.held:
            return []
        call.arguments.append(call.held)
        call.held = ""
        return [part]

    def whole(self, *, name: str, arguments: str, call_id: str = "") -> list[pb.ToolCallDelta]:
        """Takes a call that came whole and returns the parts to pass on."""
        return self.feed(self._unused(), call_id=call_id, name=name, arguments=arguments)

    def finish(self, *, cut: bool = False) -> list[pb.ToolCallDelta]:
        """Ends the calls. Arguments that never came become `{}`.

        Args:
            cut: whether a limit cut the reply, so that its last call may well be incomplete.

        Raises:
            BrokenStream: a call has no name, or its arguments are not JSON.
        """
        parts: list[pb.ToolCallDelta] = []
        for call in self._calls:
            if not call.name:
                raise BrokenStream(
                    f"{self._backend} sent a tool call without a name", metadata={"backend": self._backend}
                )
            whole = "".join(call.arguments)
            if not whole.strip():
                parts.append(pb.ToolCallDelta(index=call.position, arguments_json="{}"))
                continue
            try:
                parse(whole)
            except ValueError as error:
                if not cut:
                    raise BrokenStream(
                        f"{self._backend} sent tool call {call.position} with arguments that are not JSON",
                        metadata={"backend": self._backend, "tool_call": str(call.position)},
                    ) from error
        return parts

    def _find(self, index: int | None, given_id: str, name: str) -> _Open:
        if index is None:
            last = self._calls[-1] if self._calls else None
            goes_on = last is not None and (not name or name == last.name) and given_id in {"", last.given_id}
            if last is not None and goes_on and not (name and last.arguments and _is_whole(last)):
                return last
            return self._begin(self._unused(), given_id)
        known = self._by_index.get(index)
        if known is None:
            return self._begin(index, given_id)
        if given_id and known.given_id and given_id != known.given_id:
            return self._begin(index, given_id)  # one index for all calls: the identifiers tell them apart
        known.given_id = known.given_id or given_id
        return known

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
    try:
        parse("".join(call.arguments))
    except ValueError:
        return False
    return True
