"""A mesh that is a script, for tests of the command line: `main([...])` talks to it and not to a channel."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from forebay.fleet.v1 import fleet_pb2 as fleet_pb
from forebay.inference.v1 import inference_pb2 as pb
from forebay.models.v1 import models_pb2 as models_pb


def model(
    name: str,
    *,
    state: pb.Model.State.ValueType = pb.Model.STATE_ACTIVE,
    can: Sequence[pb.Capability.ValueType] = (),
    cannot: Sequence[pb.Capability.ValueType] = (),
    backend: str = "mlx",
) -> pb.Model:
    """Returns a model as a mesh lists it."""
    listed = pb.Model(id=name, backend=backend, state=state)
    for capability in can:
        listed.capabilities.add(capability=capability, support=pb.CapabilityReport.SUPPORT_YES, probed=True)
    for capability in cannot:
        listed.capabilities.add(capability=capability, support=pb.CapabilityReport.SUPPORT_NO)
    return listed


def backend(
    name: str, state: fleet_pb.Backend.State.ValueType = fleet_pb.Backend.STATE_ACTIVE, **more: object
) -> fleet_pb.Backend:
    """Returns a backend as a mesh lists it."""
    return fleet_pb.Backend(
        name=name,
        framework=name,
        state=state,
        address="127.0.0.1:50151",
        **more,  # type: ignore[arg-type]  # the message checks its own fields
    )


def reply(
    *texts: str, reason: pb.FinishReason.ValueType = pb.FINISH_REASON_STOP
) -> list[pb.GenerateResponse]:
    """Returns the events of an answer."""
    events = [pb.GenerateResponse(started=pb.Started(backend="mlx", model="smol"))]
    events += [pb.GenerateResponse(delta=pb.Delta(text=text, token_count=1)) for text in texts]
    usage = pb.Usage(prompt_token_count=3, output_token_count=len(texts))
    return [*events, pb.GenerateResponse(finished=pb.Finished(reason=reason, usage=usage))]


@dataclass
class FakeMesh:
    """What the mesh says, and what it was asked."""

    replies: list[Sequence[pb.GenerateResponse | BaseException]] = field(default_factory=list)
    """Events of each answer to come; an exception ends one."""
    listed: list[pb.Model] = field(default_factory=list)
    fleet: list[fleet_pb.Backend] = field(default_factory=list)
    watched: list[fleet_pb.Backend] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    reloaded: fleet_pb.ReloadConfigurationResponse = field(
        default_factory=fleet_pb.ReloadConfigurationResponse
    )
    explained: fleet_pb.ExplainRouteResponse = field(default_factory=fleet_pb.ExplainRouteResponse)
    embeddings: list[pb.EmbedResponse | BaseException] = field(default_factory=list)
    loads: list[models_pb.LoadModelResponse] = field(default_factory=list)
    pulls: list[models_pb.PullModelResponse] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)
    failure: BaseException | None = None
    """Raised by every question about the mesh."""
    asked: list[object] = field(default_factory=list)
    """Every request, in order."""
    addresses: list[str] = field(default_factory=list)
    """Every address that was connected to."""
    after_reply: Callable[[], Awaitable[None]] | None = None

    @asynccontextmanager
    async def connected(self, address: str) -> AsyncIterator[FakeMesh]:
        """Stands in for `client.connected`."""
        self.addresses.append(address)
        yield self

    def _ask(self, request: object) -> None:
        self.asked.append(request)
        if self.failure is not None:
            raise self.failure

    async def generate(
        self,
        request: pb.GenerateRequest,
        handle: Callable[[pb.GenerateResponse], None],
        *,
        timeout: float | None = None,
    ) -> None:
        """Plays the next answer."""
        self.asked.append(request)
        for item in self.replies.pop(0):
            if isinstance(item, BaseException):
                raise item
            handle(item)
        if self.after_reply is not None:
            await self.after_reply()

    async def embed(self, request: pb.EmbedRequest, *, timeout: float | None = None) -> pb.EmbedResponse:
        """Plays the next embedding."""
        self.asked.append(request)
        item = self.embeddings.pop(0)
        if isinstance(item, BaseException):
            raise item
        return item

    async def models(self, backends: Iterable[str] = ()) -> pb.ListModelsResponse:
        """Lists the models."""
        self._ask(("models", tuple(backends)))
        return pb.ListModelsResponse(models=self.listed, unreachable=self.unreachable)

    async def load(
        self, request: models_pb.LoadModelRequest, handle: Callable[[models_pb.LoadModelResponse], None]
    ) -> None:
        """Plays a load."""
        self._ask(request)
        for event in self.loads:
            handle(event)

    async def pull(
        self, request: models_pb.PullModelRequest, handle: Callable[[models_pb.PullModelResponse], None]
    ) -> None:
        """Plays a fetch."""
        self._ask(request)
        for event in self.pulls:
            handle(event)

    async def unload(self, request: models_pb.UnloadModelRequest) -> models_pb.UnloadModelResponse:
        """Unloads."""
        self._ask(request)
        return models_pb.UnloadModelResponse(model=model(request.model, state=pb.Model.STATE_AVAILABLE))

    async def delete(self, request: models_pb.DeleteModelRequest) -> models_pb.DeleteModelResponse:
        """Removes."""
        self._ask(request)
        return models_pb.DeleteModelResponse()

    async def backends(self) -> list[fleet_pb.Backend]:
        """Lists the backends. Each time it is asked, every backend has one call less."""
        self._ask("backends")
        for item in self.fleet:
            item.active_call_count = max(0, item.active_call_count - 1)
        return list(self.fleet)

    async def watch(
        self,
        handle: Callable[[fleet_pb.Backend], None],
        on_removed: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Plays changes of backends, and then their removal."""
        self._ask("watch")
        for item in self.watched:
            handle(item)
        for name in self.removed:
            on_removed(name)

    async def reload(self, *, validate_only: bool) -> fleet_pb.ReloadConfigurationResponse:
        """Plays a change of the configuration."""
        self._ask(("reload", validate_only))
        return self.reloaded

    async def drain(self, name: str) -> fleet_pb.Backend:
        """Drains."""
        self._ask(("drain", name))
        found = next(item for item in self.fleet if item.name == name)
        found.state = fleet_pb.Backend.STATE_DRAINING
        return found

    async def resume(self, name: str) -> fleet_pb.Backend:
        """Resumes."""
        self._ask(("resume", name))
        found = next(item for item in self.fleet if item.name == name)
        found.state = fleet_pb.Backend.STATE_ACTIVE
        return found

    async def explain(self, request: fleet_pb.ExplainRouteRequest) -> fleet_pb.ExplainRouteResponse:
        """Explains."""
        self._ask(request)
        return self.explained


def seconds(value: float) -> timedelta:
    """Returns a duration."""
    return timedelta(seconds=value)
