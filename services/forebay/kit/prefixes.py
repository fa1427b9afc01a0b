"""Digests of the beginnings of a conversation, by which a service and a router speak of the same ones.

A service that keeps what it has evaluated lists the digests of the beginnings
it holds (`Model.prefix_digests`), and a router computes those of a request and
sends it to whoever holds the longest. Both call `digests`, so the function is
an interface: it depends on nothing but the content of the request. No order of
serialisation, version of Python or machine changes its result, and whoever
changes it changes `_VERSION`.

The digests form a chain: each covers all that came before it, so a digest that
matches says that everything up to there is the same. What a reply may look
like (sampling, limits, the output format, log probabilities) is no part of the
prompt and so of no digest.

They are no secret and no proof: whoever can guess a whole conversation can
compute its digests. Where callers must not learn of one another's
conversations, the caller's name is part of every digest, and a name that
nobody else can guess, such as one derived from a token, keeps it so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from forebay.inference.v1 import inference_pb2 as pb

_VERSION = b"forebay prefix 1"
"""Part of every digest, so that two versions of this function never match by accident."""

_LINK_BYTES = 8
"""Bytes of a digest: those of the proto's `fixed64`. A false match costs one detour in 2**64."""

_KINDS = {"text": b"t", "reasoning": b"r", "image": b"i", "tool_call": b"c", "tool_result": b"o"}
"""One byte for each kind of part."""


def digests(request: pb.GenerateRequest, *, model: str = "", caller: str = "") -> list[int]:
    """Returns the digests of the request's beginnings, shortest first.

    The first link covers the model, the caller, what the template puts before the messages (tools, how much
    to reason) and all system messages that the conversation begins with. Every other message adds one link.
    Where there are neither tools nor system messages, nothing is shared before the first message, and the
    list begins with that one.

    Args:
        request: the conversation.
        model: identifier under which its server lists the model; else the one in the request.
        caller: whom the state is kept for. Empty if callers share it.

    Returns:
        Numbers in [0, 2**64), one for each beginning, as `beginnings` counts them.
    """
    tools = () if request.tool_choice.mode == pb.ToolChoice.MODE_NONE else request.tools
    link = _link(b"", _head(model or request.model, caller, request.reasoning_effort, tools))
    found = []
    ends = beginnings(request)
    begin = 0
    for end in ends:
        for message in request.messages[begin:end]:
            link = _link(link, _message(message))
        begin = end
        found.append(int.from_bytes(link))
    return found


def beginnings(request: pb.GenerateRequest) -> list[int]:
    """Returns how many messages each beginning holds, in the order of `digests`."""
    count = 0
    for message in request.messages:
        if message.role != pb.ROLE_SYSTEM:
            break
        count += 1
    has_tools = bool(request.tools) and request.tool_choice.mode != pb.ToolChoice.MODE_NONE
    first = [count] if count or has_tools else []
    return [*first, *range(count + 1, len(request.messages) + 1)]


def longest(chain: Sequence[int], held: Iterable[int]) -> int:
    """Returns how many beginnings of a chain are covered by what is held: 0 is none, len(chain) is all."""
    known = held if isinstance(held, set | frozenset) else frozenset(held)
    return next((count for count in range(len(chain), 0, -1) if chain[count - 1] in known), 0)


def _link(before: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(_fields(_VERSION, before, content), digest_size=_LINK_BYTES).digest()


def _head(model: str, caller: str, effort: int, tools: Sequence[pb.Tool]) -> bytes:
    return _fields(
        model.encode(),
        caller.encode("utf-8", "surrogatepass"),
        str(effort).encode(),
        *(
            _fields(tool.name.encode(), tool.description.encode(), tool.parameters_json_schema.encode())
            for tool in tools
        ),
    )


def _message(message: pb.Message) -> bytes:
    return _fields(str(message.role).encode(), *map(_part, message.parts))


def _part(part: pb.Part) -> bytes:
    kind = part.WhichOneof("kind")
    if kind is None:
        return b""
    if kind == "image":
        content = [part.image.media_type.encode(), hashlib.blake2b(part.image.data).digest()]
    elif kind == "tool_call":
        call = part.tool_call
        content = [call.id.encode(), call.name.encode(), call.arguments_json.encode()]
    elif kind == "tool_result":
        result = part.tool_result
        content = [result.id.encode(), result.name.encode(), result.text.encode()]
    else:
        content = [(part.text if kind == "text" else part.reasoning).encode()]
    return _fields(_KINDS[kind], *content)


def _fields(*fields: bytes) -> bytes:
    """Joins fields so that no two different lists of them give the same bytes."""
    return b"".join(b"%d:%b" % (len(field), field) for field in (b"%d" % len(fields), *fields))
