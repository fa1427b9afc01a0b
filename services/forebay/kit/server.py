"""One gRPC server, with health, reflection, and an end that takes as long as the last call and no longer."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit import ports
from forebay.kit.auth import TokenGuard
from forebay.kit.channel import SERVER_OPTIONS
from forebay.kit.condition import CAPACITY, QUALITY
from forebay.kit.config import ServerSettings
from forebay.kit.engine import InferenceEngine, ModelEngine
from forebay.kit.rpc import INFERENCE_SERVICE, MODEL_SERVICE, Edge, InferenceServicer, InFlight, ModelServicer
from forebay.kit.telemetry import Telemetry
from forebay.models.v1 import models_pb2_grpc

logger = logging.getLogger(__name__)

Register = Callable[[grpc.aio.Server, Edge], Sequence[str]]
"""Adds services of its own to a server and returns their full names."""


class StartError(Exception):
    """The process cannot start. The message is one readable line."""


class Serving:
    """A server that is up.

    Args:
        server: the server.
        address: where it listens, with the port that was really bound.
        edge: what is around its calls.
        names: full names of its services.
        settings: how it is to end.
        health_servicer: where its health is told.
    """

    def __init__(
        self,
        server: grpc.aio.Server,
        *,
        address: str,
        edge: Edge,
        names: Sequence[str],
        settings: ServerSettings,
        health_servicer: health.aio.HealthServicer,
    ) -> None:
        self.address = address
        self.inflight = edge.inflight
        self._server = server
        self._names = ("", *names)
        self._settings = settings
        self._health = health_servicer
        self._stopped = False
        self._edge = edge
        edge.on_condition = self.tell_condition

    async def tell_condition(self) -> None:
        """Says whether the service is busy, and whether it is degraded, under names of their own."""
        condition = self._edge.condition
        for name, is_good in (
            (CAPACITY, not condition.is_busy),
            (QUALITY, not condition.is_degraded),
        ):
            await self._say(name, is_good)

    async def set_ready(self, ready: bool, detail: str = "") -> None:
        """Says SERVING or NOT_SERVING for every service, to all who watch.

        Args:
            ready: whether calls can be served.
            detail: why, for the log.
        """
        if self._stopped:
            return
        logger.info("%s%s", "SERVING" if ready else "NOT_SERVING", detail and f": {detail}")
        for name in self._names:
            await self._say(name, ready)

    async def _say(self, name: str, is_good: bool) -> None:
        good, bad = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(name, good if is_good else bad)

    async def drain(self) -> None:
        """Stops: says so, gives callers notice, lets calls in progress end, then closes.

        It takes the notice and as long as the last call, at most the grace.
        """
        if self._stopped:
            return
        self._stopped = True
        await self._health.enter_graceful_shutdown()
        if self.inflight.count:
            # Callers that watch our health need a moment to go elsewhere; with nobody here there is no hurry
            # to spare anyone, but a new call may be on its way, so it is still answered.
            await asyncio.sleep(self._settings.notice.total_seconds())
        self.inflight.draining = True
        grace = self._settings.grace.total_seconds()
        if not await self.inflight.wait_idle(grace):
            logger.warning("%d calls did not end within %gs and are cut off", self.inflight.count, grace)
        # Not stop(grace): one open health watch would use up the whole grace.
        await self._server.stop(None)


@asynccontextmanager
async def serving(
    settings: ServerSettings,
    *,
    inference: InferenceEngine | None = None,
    models: ModelEngine | None = None,
    more: Sequence[Register] = (),
    telemetry: Telemetry | None = None,
    model_required: bool = True,
) -> AsyncIterator[Serving]:
    """Serves engines until the block ends, then drains.

    Health is NOT_SERVING for every service, and for `""`, until `set_ready(True)`.

    Args:
        settings: where and how.
        inference: engine behind `InferenceService`, if any.
        models: engine behind `ModelService`, if any.
        more: other services.
        telemetry: tracer of this process.
        model_required: whether requests must name their model.

    Raises:
        StartError: the address cannot be bound; the message says who holds it.
    """
    interceptors = [TokenGuard(settings.auth_token_digests)] if settings.auth_token_digests else []
    server = _new_server(interceptors)
    edge = Edge(InFlight(), telemetry)
    names: list[str] = []
    if inference is not None:
        servicer = InferenceServicer(inference, edge, model_required=model_required)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
        names.append(INFERENCE_SERVICE)
    if models is not None:
        models_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(models, edge), server)
        names.append(MODEL_SERVICE)
    for register in more:
        names.extend(register(server, edge))
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    for name in ("", *names):
        await health_servicer.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
    if settings.reflection:
        reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = _bind(server, settings)
    await server.start()
    up = Serving(
        server, address=address, edge=edge, names=names, settings=settings, health_servicer=health_servicer
    )
    await up.tell_condition()
    try:
        yield up
    finally:
        await up.drain()
        if address.startswith("unix:"):
            _remove_socket(address)


def _new_server(interceptors: Sequence[grpc.aio.ServerInterceptor]) -> grpc.aio.Server:
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=interceptors)
    # Generated code adds its methods twice: as handlers, which is what finds them, and as registered methods,
    # for each of which grpc.aio has a task that waits for the next call. Every call then wakes a wait for all
    # of those tasks. Without them there is one task for all methods.
    server.add_registered_method_handlers = _leave_unregistered  # type: ignore[method-assign]
    return server


def _leave_unregistered(
    service_name: str, method_handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
) -> None:
    """Stands in for the server's own method of the same signature."""


def _bind(server: grpc.aio.Server, settings: ServerSettings) -> str:
    address = settings.address
    old_mask = os.umask(0o177)  # a unix socket is for its owner alone; TCP does not care
    try:
        if settings.tls_certificate is not None and settings.tls_key is not None:
            port = server.add_secure_port(address, _credentials(settings))
        else:
            port = server.add_insecure_port(address)
    except (RuntimeError, OSError) as error:
        holder = ports.holder(address)
        raise StartError(
            f"{address} cannot be bound: {f'it is taken by {holder}' if holder else str(error)}. "
            "Stop that process, or set another address"
        ) from error
    finally:
        os.umask(old_mask)
    if address.startswith("unix:"):
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def _credentials(settings: ServerSettings) -> grpc.ServerCredentials:
    assert settings.tls_certificate is not None
    assert settings.tls_key is not None
    try:
        pair = (settings.tls_key.read_bytes(), settings.tls_certificate.read_bytes())
        roots = settings.tls_client_roots.read_bytes() if settings.tls_client_roots else None
    except OSError as error:
        raise StartError(f"{error.filename} cannot be read: {error.strerror}") from error
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=roots is not None)


def _remove_socket(address: str) -> None:
    Path(address.removeprefix("unix:")).unlink(missing_ok=True)
