"""Downloads: LM Studio is asked how far it is until it is there, once for all who want to know."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Final, TypeAlias

from forebay.kit.engine import SendPull
from forebay.kit.failure import BackendError, InvalidRequest
from forebay.lmstudio_bridge.client import Download, LmStudioClient
from forebay.lmstudio_bridge.config import LmStudioSettings
from forebay.lmstudio_bridge.listing import Entry
from forebay.lmstudio_bridge.memory import Memory
from forebay.models.v1 import models_pb2 as models_pb
from forebay.upstream.singleflight import SingleFlight
from forebay.upstream.tasks import OwnedTasks

# A name of LM Studio's catalogue, or an address at the one other place it fetches from. Nothing else is
# passed on: LM Studio would fetch it with its own rights.
_NAME: Final = re.compile(
    r"(?:https://huggingface\.co/)?[A-Za-z0-9][A-Za-z0-9_.@:+-]*(?:/[A-Za-z0-9][A-Za-z0-9_.@:+-]*){0,5}"
)

_Report: TypeAlias = Callable[[models_pb.PullProgress], None]


class Pulls:
    """Fetches models through LM Studio.

    Args:
        client: LM Studio.
        memory: knows what it has.
        settings: how often to look.
        tasks: owner of the downloads under way.
    """

    def __init__(
        self, client: LmStudioClient, memory: Memory, settings: LmStudioSettings, tasks: OwnedTasks
    ) -> None:
        self._client = client
        self._memory = memory
        self._settings = settings
        self._flights: SingleFlight[tuple[str, str], models_pb.PullProgress, Entry] = SingleFlight(tasks)

    async def pull(self, model: str, quantization: str, send: SendPull) -> Entry:
        """Fetches a model, telling how far it is, and returns it.

        Raises:
            InvalidRequest: it is neither a name nor an address that LM Studio may fetch.
            ModelNotFound: there is no such model.
            BackendError: the download failed.
        """
        if not _NAME.fullmatch(model):
            raise InvalidRequest(
                "model: name a model of LM Studio's catalogue, or give its https://huggingface.co/ address",
                violations=[("model", "is neither a name nor an address at huggingface.co")],
            )

        async def tell(progress: models_pb.PullProgress) -> None:
            await send(models_pb.PullModelResponse(progress=progress))

        async def begin(report: _Report) -> Entry:
            return await self._fetch(model, quantization, report)

        return await self._flights.join((model, quantization), begin, progress=tell)

    async def _fetch(self, model: str, quantization: str, report: _Report) -> Entry:
        before = {entry.key for entry in await self._memory.entries()}
        download = await self._client.download(model, quantization)
        job = download.job_id
        farthest = 0
        while download.status not in {"completed", "already_downloaded"}:
            if download.status == "failed" or not job:
                raise BackendError(
                    f"{self._settings.name} could not download the model; its own window says why",
                    metadata={"backend": self._settings.name, "model": model},
                )
            farthest = max(farthest, download.completed_bytes)
            report(_progress(download, farthest))
            await asyncio.sleep(self._settings.pull_interval.total_seconds())
            download = await self._client.download_status(job)
        report(_progress(download, max(farthest, download.total_bytes)))
        return self._identify(model, before, await self._memory.entries())

    def _identify(self, model: str, before: set[str], after: tuple[Entry, ...]) -> Entry:
        """Returns the model that was fetched. LM Studio does not say under which key it lists it."""
        name = model.removeprefix("https://huggingface.co/").lower()
        last = name.rpartition("/")[2].removesuffix("-gguf")
        exact = [entry for entry in after if entry.key.lower() == name]
        new = [entry for entry in after if entry.key not in before]
        alike = [entry for entry in after if last in entry.key.lower()]
        found = exact or (new if len(new) == 1 else []) or [one for one in new if one in alike] or alike
        return found[0] if found else Entry(key=model, states_known=False)


def _progress(download: Download, done: int) -> models_pb.PullProgress:
    words = {"already_downloaded": "it is here", "completed": "it is here", "paused": "paused in LM Studio"}
    return models_pb.PullProgress(
        detail=words.get(download.status, "downloading"),
        total_bytes=download.total_bytes,
        completed_bytes=done,
    )
