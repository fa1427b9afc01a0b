"""A bridge over a fake LM Studio, for the tests of the bridge."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import Failure
from forebay.kit.pipeline import Call
from forebay.lmstudio_bridge.client import LmStudioClient
from forebay.lmstudio_bridge.config import LmStudioSettings
from forebay.lmstudio_bridge.engine import LmStudioEngine
from forebay.models.v1 import models_pb2 as models_pb
from forebay.testing import grammar
from forebay.testing.calls import Sink, message
from forebay.testing.fake_lmstudio import CatalogueEntry, FakeLmStudio, FakeModel, FakeOptions, Recorded
from forebay.testing.fake_lmstudio_script import Reply

CHAT = "/v1/chat/completions"
EMBED = "/v1/embeddings"
LOAD = "/api/v1/models/load"
UNLOAD = "/api/v1/models/unload"
DOWNLOAD = "/api/v1/models/download"
TOKEN = "sk-lm-AbCdEf12:AbCdEfGhIjKlMnOpQrSt"

MODELS = (
    FakeModel(key="tiny"),
    FakeModel(key="other"),
    FakeModel(key="seeing", vision=True, format="mlx", quantization="4bit"),
    FakeModel(key="embedder", type="embedding"),
    FakeModel(key="thinker", reasoning="reasoning"),
    FakeModel(key="thinker-content", reasoning="reasoning_content"),
    FakeModel(key="thinker-inline", reasoning="inline"),
    FakeModel(key="broken", load_error="Error: engine protocol startup failed"),
)
CATALOGUE = {
    "new/model": CatalogueEntry(model=FakeModel(key="new/model"), total=1000),
    "bad/model": CatalogueEntry(model=FakeModel(key="bad/model"), total=1000, fails_at=500),
    "none/total": CatalogueEntry(model=FakeModel(key="none/total"), total=0),
    "https://huggingface.co/org/Repo-GGUF@Q8_0": CatalogueEntry(model=FakeModel(key="repo"), total=500),
    "tiny": CatalogueEntry(model=FakeModel(key="tiny")),
}


def environment() -> dict[str, str]:
    """Returns the environment of a process that imports what this one imports."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@dataclass(kw_only=True)
class Rig:
    """A bridge and the fake behind it."""

    fake: FakeLmStudio
    client: LmStudioClient
    engine: LmStudioEngine
    settings: LmStudioSettings
    sinks: list[Sink] = field(default_factory=list)

    async def generate(self, request: pb.GenerateRequest, *, complete: bool = True) -> Sink:
        """Serves a request, checks the grammar of its events, and returns who took them."""
        sink = Sink()
        self.sinks.append(sink)
        try:
            await self.engine.generate(Call(request=request), sink)
        except Failure:
            complete = False
            raise
        finally:
            grammar.check(sink.events, complete=complete, numbered=False)
        return sink

    async def text(self, request: pb.GenerateRequest) -> str:
        """Returns the text of a reply."""
        return (await self.generate(request)).text

    async def fails(self, request: pb.GenerateRequest) -> Failure:
        """Returns the failure of a request that must fail."""
        try:
            await self.generate(request)
        except Failure as failure:
            return failure
        raise AssertionError("it was served")

    async def embed(
        self, texts: Sequence[str], *, model: str = "embedder", **more: object
    ) -> pb.EmbedResponse:
        """Embeds texts."""
        request = pb.EmbedRequest(model=model, texts=texts, **more)  # type: ignore[arg-type]  # tests name fields
        return await self.engine.embed(Call(request=request))

    async def load(self, model: str, **more: object) -> list[models_pb.LoadModelResponse]:
        """Loads a model and returns the events."""
        events: list[models_pb.LoadModelResponse] = []

        async def send(event: models_pb.LoadModelResponse) -> None:
            events.append(event)

        request = models_pb.LoadModelRequest(model=model, **more)  # type: ignore[arg-type]  # tests name fields
        await self.engine.load_model(request, send)
        return events

    async def pull(self, model: str, *, quantization: str = "") -> list[models_pb.PullModelResponse]:
        """Fetches a model and returns the events."""
        events: list[models_pb.PullModelResponse] = []

        async def send(event: models_pb.PullModelResponse) -> None:
            events.append(event)

        request = models_pb.PullModelRequest(model=model)
        if quantization:
            request.backend_options["lmstudio"].update({"quantization": quantization})
        await self.engine.pull_model(request, send)
        return events

    async def unload(self, model: str, *, force: bool = False) -> pb.Model:
        """Unloads a model."""
        reply = await self.engine.unload_model(models_pb.UnloadModelRequest(model=model, force=force))
        return reply.model

    async def models(self) -> dict[str, pb.Model]:
        """Returns what is listed, by key."""
        return {model.id: model for model in (await self.engine.list_models(pb.ListModelsRequest())).models}

    async def model(self, key: str) -> pb.Model:
        """Returns one model."""
        return (await self.engine.get_model(models_pb.GetModelRequest(model=key))).model

    async def script(self, *replies: Reply, path: str = CHAT, load: str = "tiny") -> None:
        """Loads a model and scripts replies to the next requests."""
        if load and self.fake.studio.find(load) is None:
            await self.fake.load(load)
        self.fake.script("POST", path, *replies)

    def chats(self) -> list[dict[str, object]]:
        """Returns the bodies of the chats so far."""
        return self.fake.calls(CHAT)

    def seen(self, path: str) -> list[Recorded]:
        """Returns the requests to a path."""
        return [one for one in self.fake.requests if one.path == path]


@contextlib.asynccontextmanager
async def rig(
    *models: FakeModel,
    token: str = "",
    settings: dict[str, object] | None = None,
    **options: object,
) -> AsyncIterator[Rig]:
    """Gives a bridge over a fake with these options. No scripted reply may be left over."""
    fake = FakeLmStudio(
        models or MODELS,
        catalogue=CATALOGUE,
        options=FakeOptions(**options),  # type: ignore[arg-type]  # tests name fields
    )
    async with fake:
        made = LmStudioSettings.model_validate(
            {"base_url": fake.url, "pull_interval": 0.001, "probe_interval": 0.01, **(settings or {})}
        )
        async with (
            LmStudioClient(made, token=token) as client,
            LmStudioEngine(made, client) as engine,
        ):
            try:
                yield Rig(fake=fake, client=client, engine=engine, settings=made)
            finally:
                fake.gates.release_all()
        assert fake.unused() == []


def ask(text: str = "Tell me about the river.", *, model: str = "tiny", **more: object) -> pb.GenerateRequest:
    """Returns a request for a reply to one message."""
    return pb.GenerateRequest(model=model, messages=[message(text)], **more)  # type: ignore[arg-type]  # tests name fields


def chunk(
    content: str | None = None, *, finish: str | None = None, model: str = "tiny", **more: object
) -> dict[str, object]:
    """Returns a chunk of a streamed chat completion."""
    delta: dict[str, object] = {} if content is None else {"role": "assistant", "content": content}
    delta |= more.pop("delta", {})  # type: ignore[call-overload]  # tests give a dict
    choice = {"index": 0, "delta": delta, "logprobs": more.pop("logprobs", None), "finish_reason": finish}
    return {"id": "x", "object": "chat.completion.chunk", "model": model, "choices": [choice], **more}


async def until(condition: Callable[[], object], *, seconds: float = 5.0) -> None:
    """Returns when a condition holds, which it must soon."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
