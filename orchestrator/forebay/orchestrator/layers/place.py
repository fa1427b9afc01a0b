"""Has the model in memory before a call goes to its backend."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeAlias

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.pipeline import Call, Request, Send, Service, Serving
from forebay.models.v1 import models_pb2 as models_pb
from forebay.orchestrator.placement.placement import Tell

Held: TypeAlias = Callable[[str, Tell | None], AbstractAsyncContextManager[None]]
"""Returns what keeps a model in memory for the length of a block, and is told how far the load is."""


class Place:
    """Lets calls wait for their model, tells them how far its load is, and keeps it while they use it.

    Counting tokens passes: it takes no memory worth the name, and many frameworks need no weights for it.

    Args:
        inner: serves the call.
        held: keeps a model in memory.
    """

    def __init__(self, inner: Service, *, held: Held) -> None:
        self._inner = inner
        self._held = held

    def __call__(self, call: Call[Request], send: Send) -> Serving:
        """Serves a call.

        Raises:
            MemoryExhausted: there is no room for its model.
            ModelLoadFailed: its model cannot be loaded.
        """
        if isinstance(call.request, pb.CountTokensRequest):
            return self._inner(call, send)
        return self._serve(call, send)

    async def _serve(self, call: Call[Request], send: Send) -> None:
        request = call.request

        async def tell(event: models_pb.LoadModelResponse) -> None:
            progress = pb.Progress(stage=pb.Progress.STAGE_LOADING)
            if event.progress.HasField("fraction"):
                progress.fraction = event.progress.fraction
            await send(pb.GenerateResponse(progress=progress))

        is_stream = isinstance(request, pb.GenerateRequest)
        async with self._held(request.model, tell if is_stream else None):
            await self._inner(call, send)
