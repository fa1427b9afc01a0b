"""The tasks that keep one backend known: its health, and what models it has.

Three kinds of life have three alarms. The connection: keepalive ends the health
stream when the peer's machine or process freezes. The process: it says itself
whether it is serving. That answers keep coming is for the watchdog in the
backend's stack, since a wedged generator looks alive from here.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from datetime import timedelta
from typing import Protocol

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit.failure import BackendUnavailable, Failure
from forebay.kit.relay import Pairs, relay_unary
from forebay.kit.rpc import INFERENCE_SERVICE
from forebay.orchestrator.backoff import Backoff
from forebay.orchestrator.config import ProbeSettings
from forebay.orchestrator.fleet.endpoint import Endpoint


class Observer(Protocol):
    """Whoever keeps account of what backends have in memory."""

    def listed(self, endpoint: Endpoint, answer: pb.ListModelsResponse, asked: float) -> None:
        """Takes in a list, and when it was asked for on the loop's clock."""

    def lost(self, backend: str) -> None:
        """Notes that a backend, or the framework behind it, is away."""


class Probe:
    """Watches one backend until it is cancelled. A backend that is absent is no error: it is waited for.

    Args:
        endpoint: told what is found.
        channel: the connection.
        settings: how often to look.
        source: where jitter comes from.
        credentials: metadata that proves who we are. Health needs none.
        observer: told what is listed, and what is lost.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        channel: grpc.aio.Channel,
        settings: ProbeSettings,
        *,
        source: random.Random,
        credentials: Pairs = (),
        observer: Observer | None = None,
    ) -> None:
        self._observer = observer
        self._credentials = credentials
        self._endpoint = endpoint
        self._settings = settings
        self._source = source
        self._health = health_pb2_grpc.HealthStub(channel)
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)
        self._look = asyncio.Event()

    def change(self, settings: ProbeSettings) -> None:
        """Looks as often as other settings say, and at once."""
        self._settings = settings
        self.refresh()

    def refresh(self) -> None:
        """Asks for the models again soon, because they are likely to have changed."""
        self._look.set()

    async def watch_health(self) -> None:
        """Follows the backend's health, and looks for it again when it is lost."""
        backoff = self._backoff()
        # The first try fails at once where nobody listens, which tells why. Later ones wait in the channel,
        # which connects by itself, so that a backend that appears is seen without another wait of ours.
        waits = False
        while True:
            known = self._settings
            detail = await self._follow(backoff, waits=waits)
            self._endpoint.lose(detail)
            self._lose()
            if self._settings is not known:
                backoff = self._backoff()
            await asyncio.sleep(backoff.next())
            waits = True

    def _lose(self) -> None:
        if self._observer is not None:
            self._observer.lost(self._endpoint.name)

    def _backoff(self) -> Backoff:
        return Backoff(self._settings.reconnect_min, self._settings.reconnect_max, source=self._source)

    async def _follow(self, backoff: Backoff, *, waits: bool) -> str:
        """Passes on what the backend says until it is lost. Returns why it was."""
        request = health_pb2.HealthCheckRequest(service=INFERENCE_SERVICE)
        stream = self._health.Watch(  # type: ignore[attr-defined]  # its methods are made at run time
            request, wait_for_ready=waits
        )
        try:
            while True:
                answer = await stream.read()
                if not isinstance(answer, health_pb2.HealthCheckResponse):
                    return "it ended the watch of its health"
                backoff.reset()
                self._take(answer.status)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return "it does not serve grpc.health.v1: it is no Forebay service"
            return self._why(error)
        finally:
            stream.cancel()

    def _why(self, error: grpc.aio.AioRpcError) -> str:
        """Returns why it was lost. gRPC's own sentences are long, and the usual causes are two."""
        details = error.details() or error.code().name
        if "Connection refused" in details:
            return f"nothing listens at {self._endpoint.settings.address}"
        if "ping timeout" in details:
            return "it stopped answering, as if frozen"
        return details

    def _take(self, status: int) -> None:
        if status == health_pb2.HealthCheckResponse.SERVING:
            self._endpoint.found_serving()
        else:
            self._endpoint.found_not_serving()
        self.refresh()  # for what it has now, or for why it has nothing

    async def watch_models(self) -> None:
        """Keeps the list of models fresh."""
        while True:
            if self._endpoint.is_reachable:
                await self._list()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval().total_seconds()):
                    await self._look.wait()
            self._look.clear()

    def _interval(self) -> timedelta:
        """Returns how long to wait before the next look."""
        if self._endpoint.view().are_models_known:
            return self._settings.models_interval
        # Without a first list it gets no calls, so what stands in the way is looked at as often as a lost
        # connection.
        return min(self._settings.models_interval, self._settings.reconnect_max)

    async def _list(self) -> None:
        asked = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._settings.timeout.total_seconds()):
                answer = await relay_unary(
                    self._stub.ListModels,
                    pb.ListModelsRequest(),
                    None,
                    self._endpoint.name,
                    metadata=self._credentials,
                )
        except Failure as failure:
            is_gone = failure.reason == BackendUnavailable.reason
            self._endpoint.fail_to_list(failure.message, is_gone=is_gone)
            if is_gone:
                self._lose()
        except TimeoutError:
            self._endpoint.fail_to_list("it did not answer in time")
        else:
            memory = answer.memory if answer.HasField("memory") else None
            self._endpoint.list_models(answer.models, memory)
            if self._observer is not None:
                self._observer.listed(self._endpoint, answer, asked)
