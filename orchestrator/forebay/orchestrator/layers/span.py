"""Traces each attempt on a backend."""

from __future__ import annotations

import asyncio

from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import Failure, Fault
from forebay.kit.pipeline import Call, Event, Request, Send, Service

_METHODS: dict[type[Request], str] = {
    pb.GenerateRequest: "Generate",
    pb.EmbedRequest: "Embed",
    pb.CountTokensRequest: "CountTokens",
}


class Span:
    """Wraps each attempt in a client span, which is the parent of the backend's own span.

    However the attempt ends, the span ends with it and says how. It holds
    counts and names, and nothing of what was asked or answered.

    Args:
        inner: the service to trace.
        tracer: makes the spans.
        backend: the backend's name.
        address: where it listens.
    """

    def __init__(self, inner: Service, *, tracer: Tracer, backend: str, address: str) -> None:
        self._inner = inner
        self._tracer = tracer
        self._attributes = {"forebay.backend": backend, "server.address": address}

    async def __call__(self, call: Call[Request], send: Send) -> None:
        """Serves a call."""
        method = f"forebay.inference.v1.InferenceService/{_METHODS[type(call.request)]}"
        span = self._tracer.start_span(
            method,
            kind=SpanKind.CLIENT,
            attributes={
                "rpc.system.name": "grpc",
                "rpc.method": method,
                "gen_ai.request.model": call.request.model,
                "forebay.request.id": call.request_id,
                "forebay.attempt": len(call.tried) + 1,
                **self._attributes,
            },
        )
        if not span.is_recording():
            await self._inner(call, send)
            return
        status = "OK"
        try:
            with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                await self._inner(call, _Watch(span, send))
        except asyncio.CancelledError:
            # No Exception, so the SDK would leave such a span without a word about how it ended.
            status = "CANCELLED"
            span.set_attribute("error.type", status)
            raise
        except Failure as failure:
            status = failure.code.name
            span.set_attribute("error.type", failure.reason)
            if failure.fault is not Fault.CALLER:
                span.set_status(Status(StatusCode.ERROR, failure.reason))
            raise
        except Exception as error:
            status = "INTERNAL"
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(Status(StatusCode.ERROR))
            raise
        finally:
            span.set_attribute("rpc.response.status_code", status)
            span.end()


class _Watch:
    """A `Send` that notes on the span what goes by."""

    def __init__(self, span: trace.Span, send: Send) -> None:
        self._span = span
        self._send = send
        self._has_delta = False

    async def __call__(self, event: Event) -> None:
        if isinstance(event, pb.GenerateResponse):
            kind = event.WhichOneof("event")
            if kind == "delta" and not self._has_delta:
                self._has_delta = True
                self._span.add_event("forebay.first_delta")
            elif kind == "finished":
                usage = event.finished.usage
                self._span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_token_count)
                self._span.set_attribute("gen_ai.usage.output_tokens", usage.output_token_count)
        await self._send(event)
