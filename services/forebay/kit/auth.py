"""Bearer tokens: checked before a method is looked up, so that a stranger learns nothing."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from grpc_status import rpc_status

from forebay.kit.failure import Unauthenticated

_OPEN = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
"""Methods anyone may call: a load balancer has no token, and health says nothing of anyone."""


def encoded(digests: Sequence[str]) -> list[bytes]:
    """Returns digests as `is_known` takes them."""
    return [digest.encode() for digest in digests]


def is_known(token: str, digests: Sequence[bytes]) -> bool:
    """Returns whether a token has one of the digests."""
    digest = hashlib.sha256(token.encode()).hexdigest().encode()
    # Every digest is compared, in constant time each, so that time tells nothing.
    return any([hmac.compare_digest(digest, known) for known in digests])  # noqa: C419


class TokenGuard(grpc.aio.ServerInterceptor):
    """Refuses calls without one of the configured tokens.

    Args:
        digests: SHA-256 of each token, in hexadecimal. Tokens themselves are never stored.
    """

    def __init__(self, digests: Sequence[str]) -> None:
        self._digests = encoded(digests)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Passes the call on, or answers it with UNAUTHENTICATED."""
        if handler_call_details.method in _OPEN or self._may_pass(handler_call_details):
            return await continuation(handler_call_details)
        return grpc.unary_unary_rpc_method_handler(_refuse)  # one kind serves all four arities

    def _may_pass(self, details: grpc.HandlerCallDetails) -> bool:
        for key, value in details.invocation_metadata or ():
            if key == "authorization" and isinstance(value, str) and value.startswith("Bearer "):
                return is_known(value.removeprefix("Bearer "), self._digests)
        return False


async def _refuse(request: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    failure = Unauthenticated(
        "send the metadata `authorization: Bearer TOKEN` with a token this service knows"
    )
    await context.abort_with_status(rpc_status.to_status(failure.to_status()))
