"""Relays one streamed reply: opens it, checks who answers, passes it on, and ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from datetime import timedelta
from typing import Final

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendUnavailable,
    Failure,
    InvalidRequest,
    ModelNotFound,
    StreamInterrupted,
    WrongModel,
)
from forebay.kit.pipeline import Call, Send
from forebay.openai_bridge.client import Client, Offer
from forebay.openai_bridge.flavors import MLX_LM, Flavor
from forebay.openai_bridge.translate import Shortfalls
from forebay.upstream.errors import UpstreamError, to_failure
from forebay.upstream.framing import SseEvent
from forebay.upstream.http import Body
from forebay.upstream.openai_chat import DONE, ReplyReader
from forebay.upstream.stops import StopSplitter
from forebay.upstream.values import JsonObject, dump

# What mlx_lm.server says where a model is missing. It answers 404 to all else that fails, too.
_MLX_NO_MODEL: Final = ("repository not found", "no such file", "not a local folder", "offline", "hf_hub")


class Relay:
    """One reply on its way from the server to the caller.

    Args:
        call: the call.
        send: towards the caller.
        offer: the model that is to answer.
        shortfalls: what the reply will lack.
        stops: stop sequences to end the reply at. Empty where the server does that.
        backend: the backend's name.
    """

    def __init__(
        self,
        call: Call[pb.GenerateRequest],
        send: Send,
        *,
        offer: Offer,
        shortfalls: Shortfalls,
        stops: Sequence[str] = (),
        backend: str,
    ) -> None:
        request = call.request
        self._call = call
        self._send = send
        self._offer = offer
        self._shortfalls = shortfalls
        self._backend = backend
        self._reader = ReplyReader(
            backend=backend,
            want_logprobs=request.HasField("logprobs"),
            top_logprobs=request.logprobs.top_logprob_count,
            want_token_ids=request.include_token_ids,
        )
        self._stops = StopSplitter(stops)
        self._text_parts = 0
        self._clock = asyncio.get_running_loop().time
        self._began = self._clock()
        self._first = 0.0
        self._last = 0.0
        self._is_started = False

    @property
    def committed(self) -> bool:
        """Whether part of the answer was passed on."""
        return self._first > 0

    async def run(
        self,
        client: Client,
        body: JsonObject,
        flavor: Flavor,
        *,
        first_byte: float | None,
        between_bytes: float | None,
    ) -> pb.Finished:
        """Sends everything but `finished`, which it returns.

        Raises:
            WrongModel: another model answers than the one asked for, and the caller does not accept that.
            BrokenStream: the reply ended without its end.
            Failure: the server failed.
        """
        try:
            async with (
                client.chat(body, first_byte=first_byte, between_bytes=between_bytes) as stream,
                aclosing(_events(stream, comments=flavor.comment_progress)) as events,
            ):
                async for event in events:
                    await self._take(event)
                    if self._reader.done or self._stops.found:
                        break
        except UpstreamError as error:
            raise self._failure(error, flavor) from error
        except StreamInterrupted as error:
            if self.committed:
                raise
            raise BackendUnavailable(error.message, metadata=error.metadata) from error
        finished = await self._finish()
        if not self._is_started:
            await self._start()
        end = self._last or self._clock()
        first = self._first or end
        finished.timings.first_delta_duration.FromTimedelta(timedelta(seconds=first - self._began))
        finished.timings.generation_duration.FromTimedelta(timedelta(seconds=end - first))
        return finished

    async def _take(self, event: SseEvent) -> None:
        parts = self._reader.feed(event)
        if self._reader.model and not self._is_started:
            await self._start()
        for part in parts:
            await self._pass_on(part)

    async def _pass_on(self, part: pb.Delta | pb.Progress) -> None:
        if isinstance(part, pb.Progress):
            await self._send(pb.GenerateResponse(progress=part))
            return
        if part.WhichOneof("content") == "text" and part.text:
            self._text_parts += 1
            part.text = self._stops.feed(part.text)
            if not part.text and not part.logprobs and not part.token_ids:
                return  # held back: it may be the start of a stop sequence
        await self._send_delta(part)

    async def _send_delta(self, delta: pb.Delta) -> None:
        if not self._is_started:
            await self._start()
        self._last = self._clock()
        self._first = self._first or self._last
        await self._send(pb.GenerateResponse(delta=delta))

    async def _finish(self) -> pb.Finished:
        if not self._stops.found:
            deltas, finished = self._reader.finish()
            for delta in deltas:
                await self._pass_on(delta)
        if self._stops.found:  # maybe only now, if it came with the last piece
            # The server was not heard out, so its own count is missing; it sends a part for each token.
            usage = self._reader.used()
            usage.output_token_count = usage.output_token_count or self._text_parts
            return pb.Finished(reason=pb.FINISH_REASON_STOP, usage=usage, stop_sequence=self._stops.found)
        if rest := self._stops.finish():
            await self._send_delta(pb.Delta(text=rest))
        return finished

    async def _start(self) -> None:
        self._is_started = True
        asked, answers = self._call.request.model, self._reader.model or self._offer.id
        if not self._offer.answers_to(answers):
            if pb.DEGRADATION_KIND_MODEL_SUBSTITUTED not in self._call.request.accepted_degradations:
                raise WrongModel(
                    f"{self._backend} answers with {answers!r} where {asked!r} was asked for",
                    metadata={"backend": self._backend, "model": asked, "answered_by": answers},
                )
            self._shortfalls.found.append(
                pb.Degradation(
                    kind=pb.DEGRADATION_KIND_MODEL_SUBSTITUTED,
                    field="model",
                    detail=f"{answers} answers.",
                )
            )
            model = answers
        else:
            model = asked  # one of the names of the model that answers
        started = pb.Started(
            backend=self._backend,
            model=model,
            request_id=self._call.request_id,
            degradations=self._shortfalls.found,
            weights=self._offer.weights,
        )
        await self._send(pb.GenerateResponse(started=started))

    def _failure(self, error: UpstreamError, flavor: Flavor) -> Failure:
        model = self._call.request.model
        failure = to_failure(error, backend=self._backend, model=model, started=self.committed)
        if flavor is MLX_LM and isinstance(failure, ModelNotFound) and not error.says(*_MLX_NO_MODEL):
            return InvalidRequest(
                f"{self._backend} could not begin the reply: its chat template or its generator refused the "
                "request; its log says why",
                metadata={"backend": self._backend, "model": model, "http_status": str(error.status)},
            )
        return failure


async def _events(stream: Body, *, comments: bool) -> AsyncGenerator[SseEvent, None]:
    """Yields the events of a reply, also of one that came whole because the server does not stream."""
    if stream.content_type == "application/json":
        yield SseEvent(data=dump(await stream.json()).decode())
        yield SseEvent(data=DONE)
        return
    async with aclosing(stream.events(comments=comments)) as events:
        async for event in events:
            yield event
