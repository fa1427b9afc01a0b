"""Every way in which a call can fail, and the one place that maps failures to gRPC and back.

Code that finds a fault raises the class that names it. Only this module knows
status codes. A reason survives a hop: `from_rpc_error` gives back the class
that the other process raised.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import ClassVar, Self

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from forebay.inference.v1 import inference_pb2 as pb

DOMAIN = "forebay"
"""`ErrorInfo.domain` of every failure (AIP-193)."""

MESSAGE_BYTES = 1024
"""Most bytes of a message in a status. Clients refuse trailers above 8 to 16 KiB and then report
RESOURCE_EXHAUSTED instead of the real code, so message and details together stay below 4 KiB."""

METADATA_VALUE_BYTES = 256
"""Most bytes of one metadata value in a status, for the same reason."""

DETAIL_ENTRIES = 8
"""Most metadata entries and field violations in a status, for the same reason."""

_ATTEMPTS, _ATTEMPT_BYTES = 6, 48
"""Most attempts in a status, and most bytes of each name in one, for the same reason."""

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Fault(Enum):
    """Whose fault a failure is. Breakers count only `BACKEND`."""

    CALLER = "caller"
    BACKEND = "backend"
    HERE = "here"


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt of a call that failed."""

    backend: str
    """Where it was made."""
    reason: str
    """Reason of its failure."""
    model: str = ""
    """The model that was asked for."""


class Failure(Exception):
    """A call failed in a way that has a name.

    Args:
        message: what is wrong and what to do, for people. No prompt or answer text.
        metadata: whatever varies in the message, for programs.
        retry_after: when trying again may help.
    """

    reason: ClassVar[str] = "INTERNAL"
    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    fault: ClassVar[Fault] = Fault.HERE
    elsewhere: ClassVar[bool] = False
    """Whether another backend may help, as long as nothing was sent."""

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after: timedelta | None = None,
        violations: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after
        self.violations = tuple(violations)
        self.attempts: tuple[Attempt, ...] = ()
        """What was tried before the call was given up, in that order. Empty if that is not known."""

    def __repr__(self) -> str:
        return f"<{self.reason} {self.message!r}>"

    def own(self) -> Self:
        """Returns a copy for one of several callers: whoever passes a failure on adds to its metadata."""
        mine = copy.copy(self)
        mine.metadata = dict(self.metadata)
        mine.__cause__ = self
        return mine

    def to_status(self) -> status_pb2.Status:
        """Returns the failure as a `google.rpc.Status` that fits in trailers."""
        status = status_pb2.Status(
            code=getattr(code_pb2, self.code.name), message=_fit(self.message, MESSAGE_BYTES)
        )
        entries = list(self.metadata.items())[:DETAIL_ENTRIES]
        info = error_details_pb2.ErrorInfo(
            reason=self.reason,
            domain=DOMAIN,
            metadata={key: _fit(value, METADATA_VALUE_BYTES) for key, value in entries},
        )
        _attach(status, info)
        if self.violations:
            bad = error_details_pb2.BadRequest()
            for path, text in self.violations[:DETAIL_ENTRIES]:
                bad.field_violations.add(
                    field=_fit(path, METADATA_VALUE_BYTES // 4),
                    description=_fit(text, METADATA_VALUE_BYTES // 2),
                )
            _attach(status, bad)
        if self.attempts:
            tried = pb.FailedAttempts()
            for attempt in self.attempts[:_ATTEMPTS]:
                tried.attempts.add(
                    backend=_fit(attempt.backend, _ATTEMPT_BYTES),
                    reason=_fit(attempt.reason, _ATTEMPT_BYTES),
                    model=_fit(attempt.model, _ATTEMPT_BYTES),
                )
            _attach(status, tried)
        if self.retry_after is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromTimedelta(self.retry_after)
            _attach(status, retry)
        return status


class InvalidRequest(Failure):
    """The request is malformed. `violations` names each field and its remedy."""

    reason = "INVALID_REQUEST"
    code = grpc.StatusCode.INVALID_ARGUMENT
    fault = Fault.CALLER


class ContextExceeded(Failure):
    """Prompt and reply do not fit the model's context as it is loaded."""

    reason = "CONTEXT_EXCEEDED"
    code = grpc.StatusCode.INVALID_ARGUMENT
    fault = Fault.CALLER


class ModelNotFound(Failure):
    """There is no such model here."""

    reason = "MODEL_NOT_FOUND"
    code = grpc.StatusCode.NOT_FOUND
    fault = Fault.CALLER
    elsewhere = True


class BackendNotFound(Failure):
    """There is no backend of that name."""

    reason = "BACKEND_NOT_FOUND"
    code = grpc.StatusCode.NOT_FOUND
    fault = Fault.CALLER


class CapabilityUnsupported(Failure):
    """The model or the framework cannot do what is asked."""

    reason = "CAPABILITY_UNSUPPORTED"
    code = grpc.StatusCode.UNIMPLEMENTED
    fault = Fault.CALLER
    elsewhere = True


class Unauthenticated(Failure):
    """The caller did not prove who they are."""

    reason = "UNAUTHENTICATED"
    code = grpc.StatusCode.UNAUTHENTICATED
    fault = Fault.CALLER


class PermissionDenied(Failure):
    """The caller may not do that."""

    reason = "PERMISSION_DENIED"
    code = grpc.StatusCode.PERMISSION_DENIED
    fault = Fault.CALLER


class UpstreamUnauthenticated(Failure):
    """The framework refused our credentials: a fault of the bridge's configuration."""

    reason = "UPSTREAM_UNAUTHENTICATED"
    code = grpc.StatusCode.FAILED_PRECONDITION
    fault = Fault.BACKEND
    elsewhere = True


class ModelLoadFailed(Failure):
    """The model is there and could not be loaded."""

    reason = "MODEL_LOAD_FAILED"
    code = grpc.StatusCode.FAILED_PRECONDITION
    fault = Fault.BACKEND
    elsewhere = True


class ModelQuarantined(Failure):
    """The model crashed its worker too often; it is not tried again until it is loaded by name."""

    reason = "MODEL_QUARANTINED"
    code = grpc.StatusCode.FAILED_PRECONDITION
    fault = Fault.BACKEND
    elsewhere = True


class WrongModel(Failure):
    """Another model answered than the one asked for."""

    reason = "WRONG_MODEL"
    code = grpc.StatusCode.FAILED_PRECONDITION
    fault = Fault.BACKEND
    elsewhere = True


class QueueFull(Failure):
    """There is no room to wait in. `retry_after` says when to come back."""

    reason = "QUEUE_FULL"
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    fault = Fault.HERE
    elsewhere = True


class MemoryExhausted(Failure):
    """There is no memory for this now."""

    reason = "MEMORY_EXHAUSTED"
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    fault = Fault.BACKEND
    elsewhere = True


class BackendBusy(Failure):
    """The framework said that it is busy."""

    reason = "BACKEND_BUSY"
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    fault = Fault.BACKEND
    elsewhere = True


class DeadlineExceeded(Failure):
    """The caller's deadline passed."""

    reason = "DEADLINE_EXCEEDED"
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    fault = Fault.CALLER


class QueueTimeout(Failure):
    """The call waited for its turn for as long as it may."""

    reason = "QUEUE_TIMEOUT"
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    fault = Fault.HERE
    elsewhere = True


class FirstEventTimeout(Failure):
    """The backend did not begin to answer in time."""

    reason = "FIRST_EVENT_TIMEOUT"
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    fault = Fault.BACKEND
    elsewhere = True


class BackendUnavailable(Failure):
    """The backend cannot be reached, or went away before it began to answer."""

    reason = "BACKEND_UNAVAILABLE"
    code = grpc.StatusCode.UNAVAILABLE
    fault = Fault.BACKEND
    elsewhere = True


class Draining(Failure):
    """The service is stopping and takes no new calls."""

    reason = "DRAINING"
    code = grpc.StatusCode.UNAVAILABLE
    fault = Fault.BACKEND
    elsewhere = True


class BreakerOpen(Failure):
    """Calls are kept away from this backend for a while, because it failed."""

    reason = "BREAKER_OPEN"
    code = grpc.StatusCode.UNAVAILABLE
    fault = Fault.HERE
    elsewhere = True


class NoBackend(Failure):
    """No backend can take the call. The message says why, for each."""

    reason = "NO_BACKEND"
    code = grpc.StatusCode.UNAVAILABLE
    fault = Fault.HERE


class StreamStalled(Failure):
    """The backend fell silent in the middle of an answer. What was sent is a prefix."""

    reason = "STREAM_STALLED"
    code = grpc.StatusCode.ABORTED
    fault = Fault.BACKEND


class StreamInterrupted(Failure):
    """The backend was lost in the middle of an answer. What was sent is a prefix."""

    reason = "STREAM_INTERRUPTED"
    code = grpc.StatusCode.ABORTED
    fault = Fault.BACKEND


class BrokenStream(Failure):
    """The backend broke the grammar of events: lost, repeated or reordered one, or ended too soon."""

    reason = "BROKEN_STREAM"
    code = grpc.StatusCode.ABORTED
    fault = Fault.BACKEND
    elsewhere = True


class FormatViolated(Failure):
    """The whole reply came, and does not have the format that was asked for."""

    reason = "FORMAT_VIOLATED"
    code = grpc.StatusCode.ABORTED
    fault = Fault.BACKEND


class PromptTruncated(Failure):
    """The reply came, and the backend cannot have read the whole prompt."""

    reason = "PROMPT_TRUNCATED"
    code = grpc.StatusCode.ABORTED
    fault = Fault.BACKEND


class BackendError(Failure):
    """The framework failed inside, in a way that has no better name."""

    reason = "BACKEND_ERROR"
    code = grpc.StatusCode.INTERNAL
    fault = Fault.BACKEND
    elsewhere = True


class Internal(Failure):
    """A fault of ours."""


class CallerLeft(Failure):
    """The caller hung up. Nobody reads this; it is for logs and spans."""

    reason = "CALLER_LEFT"
    code = grpc.StatusCode.CANCELLED
    fault = Fault.CALLER


def _classes(root: type[Failure]) -> list[type[Failure]]:
    return [root, *(c for sub in root.__subclasses__() for c in _classes(sub))]


_BY_REASON: dict[str, type[Failure]] = {c.reason: c for c in _classes(Failure)[1:]}

_BY_CODE: dict[grpc.StatusCode, type[Failure]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: ModelNotFound,
    grpc.StatusCode.UNIMPLEMENTED: CapabilityUnsupported,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.FAILED_PRECONDITION: ModelLoadFailed,
    grpc.StatusCode.RESOURCE_EXHAUSTED: BackendBusy,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: BackendUnavailable,
    grpc.StatusCode.ABORTED: StreamInterrupted,
    grpc.StatusCode.CANCELLED: BackendUnavailable,
}


def from_rpc_error(error: grpc.aio.AioRpcError, *, backend: str) -> Failure:
    """Returns the failure behind an error that a gRPC call raised.

    A `google.rpc.Status` with our domain gives back the class that was raised
    over there. Anything else, such as a dead connection, is classed by its code.

    Args:
        error: what the call raised.
        backend: name of the backend, put into the metadata.
    """
    code = error.code()
    text = error.details() or ""
    metadata = {"backend": backend}
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has the methods of a Call
    except ValueError:  # the status in the trailers contradicts the call's: trust the call
        status = None
    if status is not None:
        failure = from_status(status)
        if failure is not None:
            failure.metadata.setdefault("backend", backend)
            return failure
    kind = _BY_CODE.get(code, BackendError)
    return kind(f"backend {backend}: {printable(text) or code.name}", metadata=metadata)


def from_status(status: status_pb2.Status) -> Failure | None:
    """Returns the failure that a status of ours describes, or None if it is not one of ours."""
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    tried = pb.FailedAttempts()
    retry_after: timedelta | None = None
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(bad.DESCRIPTOR):
            detail.Unpack(bad)
        elif detail.Is(tried.DESCRIPTOR):
            detail.Unpack(tried)
        elif detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
            retry_after = retry.retry_delay.ToTimedelta()
    if info.domain != DOMAIN:
        return None
    failure = _BY_REASON.get(info.reason, BackendError)(
        status.message,
        metadata=dict(info.metadata),
        retry_after=retry_after,
        violations=[(v.field, v.description) for v in bad.field_violations],
    )
    failure.attempts = tuple(Attempt(each.backend, each.reason, each.model) for each in tried.attempts)
    return failure


def printable(text: str) -> str:
    """Returns text from outside without control characters, so that it cannot forge log lines."""
    if text.isprintable():  # nearly always
        return text
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\n", " ").replace("\r", " "))


def _fit(text: str, limit: int) -> str:
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return text
    return data[: limit - 3].decode("utf-8", "ignore") + "\N{HORIZONTAL ELLIPSIS}"


def _attach(
    status: status_pb2.Status,
    detail: error_details_pb2.ErrorInfo
    | error_details_pb2.BadRequest
    | error_details_pb2.RetryInfo
    | pb.FailedAttempts,
) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)
