"""The point from which an attempt can no longer be taken back.

Until its first delta an attempt has told the client nothing that another
attempt could not tell as well: `started` is held back, and `progress` is true
of any attempt. From the first delta on the client has part of an answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.pipeline import Event, Send


class CommitGate:
    """Passes progress, holds `started`, and opens at the first event that is part of an answer.

    One gate serves one attempt. What a failed attempt leaves in it is never sent.

    Args:
        send: where events go.
        on_commit: called once, before the first event that commits is sent.
    """

    def __init__(self, send: Send, *, on_commit: Callable[[], None] | None = None) -> None:
        self._send = send
        self._on_commit = on_commit
        self._held: list[Event] = []
        self.committed = False
        """Whether the client may have part of an answer."""

    def __call__(self, event: Event) -> Awaitable[None]:
        """Takes the next event of the attempt."""
        return self._send(event) if self.committed else self._decide(event)

    async def _decide(self, event: Event) -> None:
        kind = event.WhichOneof("event") if isinstance(event, pb.GenerateResponse) else "answer"
        if kind == "started":
            self._held.append(event)
            return
        if kind != "progress":
            # Before the send and not after it: a send that is cancelled may have arrived.
            self.committed = True
            if self._on_commit is not None:
                self._on_commit()
            for held in self._held:
                await self._send(held)
        await self._send(event)
