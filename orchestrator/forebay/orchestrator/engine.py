"""What the orchestrator serves to clients: the same two interfaces as its backends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias, TypeVar, cast

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.engine import SendLoad, SendPull
from forebay.kit.failure import BackendUnavailable, BrokenStream, InvalidRequest, ModelNotFound
from forebay.kit.pipeline import Call, Event, Request, Send, Service
from forebay.models.v1 import models_pb2 as models_pb
from forebay.orchestrator.fleet.endpoint import Endpoint
from forebay.orchestrator.fleet.fleet import Fleet
from forebay.orchestrator.fleet.management import Management
from forebay.orchestrator.placement.host import LOCAL
from forebay.orchestrator.placement.room import ROOMY, estimate

Load: TypeAlias = Callable[[Endpoint, models_pb.LoadModelRequest, SendLoad], Awaitable[None]]
"""Loads a model on a backend, in the backend's spelling."""

R = TypeVar("R", pb.GenerateRequest, pb.EmbedRequest, pb.CountTokensRequest)
A = TypeVar("A", pb.EmbedResponse, pb.CountTokensResponse)


class Engine:
    """Serves inference by sending every call down the request stack.

    Args:
        fleet: the backends.
        service: the request stack.
        default_model: model of requests that name none. Empty makes them an error.
    """

    def __init__(self, *, fleet: Fleet, service: Service, default_model: str) -> None:
        self._fleet = fleet
        self._service = service
        self._default_model = default_model

    def change(self, *, service: Service, default_model: str) -> None:
        """Sends the calls that come from now on down another stack."""
        self._service, self._default_model = service, default_model

    async def generate(self, call: Call[pb.GenerateRequest], send: Send) -> None:
        """Sends a reply of the backend that suits best."""
        await self._service(self._with_model(call), send)

    async def embed(self, call: Call[pb.EmbedRequest]) -> pb.EmbedResponse:
        """Embeds the texts on the backend that suits best."""
        return await self._ask(call, pb.EmbedResponse)

    async def count_tokens(self, call: Call[pb.CountTokensRequest]) -> pb.CountTokensResponse:
        """Counts tokens on the backend that suits best."""
        return await self._ask(call, pb.CountTokensResponse)

    async def list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """Merges the lists of all backends, as they were when last looked at."""
        names = list(request.backends) or self._fleet.names
        answer = pb.ListModelsResponse()
        for endpoint in [self._fleet[name] for name in names]:
            if not endpoint.is_reachable:
                answer.unreachable.append(endpoint.name)
            elif endpoint.is_listed:
                answer.models.extend(endpoint.models)
        memories = [memory for name in names if (memory := self._fleet[name].memory()) is not None]
        if len({memory.host for memory in memories}) == 1:
            answer.memory.CopyFrom(memories[0])
            if answer.memory.host == LOCAL:
                answer.memory.ClearField("host")  # whoever is elsewhere knows better what to call it
        return answer

    async def _ask(self, call: Call[R], kind: type[A]) -> A:
        answers: list[A] = []

        async def send(event: Event) -> None:
            answers.append(cast("A", event))

        await self._service(self._with_model(call), send)
        if len(answers) != 1:
            raise BrokenStream(f"a backend sent {len(answers)} answers where one {kind.__name__} was due")
        return answers[0]

    def _with_model(self, call: Call[R]) -> Call[Request]:
        untyped = cast("Call[Request]", call)
        if call.request.model:
            return untyped
        if not self._default_model:
            raise InvalidRequest(
                "model: name a model, or set orchestrator.default_model; ListModels lists them",
                violations=[("model", "name a model, or set orchestrator.default_model")],
            )
        request = type(call.request)()
        request.CopyFrom(call.request)
        request.model = self._default_model
        return untyped.with_(request=request)


class Models:
    """Serves model management by forwarding each request to the backend that has the model.

    Args:
        fleet: the backends.
        management: forwards to one of them.
        load: loads a model on one of them, where there is room for it.
    """

    def __init__(self, *, fleet: Fleet, management: Callable[[str], Management], load: Load) -> None:
        self._load = load
        self._fleet = fleet
        self._management = management

    async def get_model(self, request: models_pb.GetModelRequest) -> models_pb.GetModelResponse:
        """Describes the model on a backend that has it."""
        endpoint = self._holders(request.model, request.backend)[0]
        answer = await self._management(endpoint.name).get(_spelling(endpoint, request.model))
        answer.model.backend = endpoint.name
        return answer

    async def load_model(self, request: models_pb.LoadModelRequest, send: SendLoad) -> None:
        """Loads the model on a backend that has it: where it is loaded, has room, or is least in the way."""
        holders = self._holders(request.model, request.backend)
        endpoint = min(holders, key=lambda holder: _reluctance(holder, request.model))
        copy = models_pb.LoadModelRequest()
        copy.CopyFrom(request)
        copy.model = _spelling(endpoint, request.model)
        copy.backend = ""

        async def name(event: models_pb.LoadModelResponse) -> None:
            if event.HasField("loaded"):
                event.loaded.model.backend = endpoint.name
            await send(event)

        await self._load(endpoint, copy, name)

    async def pull_model(self, request: models_pb.PullModelRequest, send: SendPull) -> None:
        """Fetches a model to the backend that is named, or to the only one there is."""
        endpoint = self._target(request.backend)
        copy = models_pb.PullModelRequest()
        copy.CopyFrom(request)
        copy.backend = ""

        async def name(event: models_pb.PullModelResponse) -> None:
            if event.HasField("pulled"):
                event.pulled.model.backend = endpoint.name
            await send(event)

        await self._management(endpoint.name).pull(copy, name)

    async def unload_model(self, request: models_pb.UnloadModelRequest) -> models_pb.UnloadModelResponse:
        """Removes the model from memory on the backend that is named, or on every one that has it loaded."""
        holders = self._holders(request.model, request.backend)
        if not request.backend:
            # Where a framework does not say whether a model is loaded, asking does no harm. Nobody having it
            # loaded is no error either, and somebody has to say what the model is now.
            holders = [holder for holder in holders if _may_be_loaded(holder, request.model)] or holders[:1]
        answer = models_pb.UnloadModelResponse()
        for endpoint in holders:
            answer = await self._management(endpoint.name).unload(
                _spelling(endpoint, request.model), force=request.force
            )
            answer.model.backend = endpoint.name
        return answer

    async def delete_model(self, request: models_pb.DeleteModelRequest) -> models_pb.DeleteModelResponse:
        """Removes the model from the disk of the backend that is named, or of the only one that has it."""
        holders = self._holders(request.model, request.backend)
        if len(holders) > 1:
            raise _ambiguous([holder.name for holder in holders], "has the model")
        endpoint = holders[0]
        return await self._management(endpoint.name).delete(_spelling(endpoint, request.model))

    def _holders(self, model: str, backend: str) -> list[Endpoint]:
        """Returns the backends that have the model; one that is named need not have listed it."""
        if backend:
            return [_up(self._fleet[backend])]
        holders = [endpoint for endpoint in self._fleet if endpoint.find(model) is not None]
        up = [endpoint for endpoint in holders if endpoint.is_reachable]
        if up:
            return up
        if holders:
            return [_up(holders[0])]
        raise ModelNotFound(f"no backend has a model {model}", metadata={"model": model})

    def _target(self, backend: str) -> Endpoint:
        if backend:
            return _up(self._fleet[backend])
        names = self._fleet.names
        if len(names) > 1:
            raise _ambiguous(names, "could take the model")
        return _up(self._fleet[names[0]])


def _up(endpoint: Endpoint) -> Endpoint:
    if not endpoint.is_reachable:
        raise BackendUnavailable(
            f"backend {endpoint.name} cannot be reached: {endpoint.detail}",
            metadata={"backend": endpoint.name},
        )
    return endpoint


def _ambiguous(names: Sequence[str], what: str) -> InvalidRequest:
    text = f"name the backend, for more than one {what}: {', '.join(names)}"
    return InvalidRequest(f"backend: {text}", violations=[("backend", text)])


def _spelling(endpoint: Endpoint, model: str) -> str:
    found = endpoint.find(model)
    return model if found is None else found.id


def _reluctance(endpoint: Endpoint, model: str) -> tuple[bool, bool, bool, int]:
    """Returns how little a backend suits for a load, the weightiest reason first."""
    found = endpoint.find(model)
    is_loaded = found is not None and found.state == pb.Model.STATE_ACTIVE
    need, room = (estimate(found), endpoint.room(found.id)) if found is not None else (0, ROOMY)
    return not is_loaded, need > room.free, need > room.free + room.evictable, endpoint.active


def _may_be_loaded(endpoint: Endpoint, model: str) -> bool:
    found = endpoint.find(model)
    return found is not None and found.state not in (pb.Model.STATE_AVAILABLE, pb.Model.STATE_FAILED)
