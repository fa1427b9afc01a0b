"""Failures: what reaches the wire, and what comes back from it."""

from __future__ import annotations

from datetime import timedelta

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from forebay.kit import failure
from forebay.kit.failure import (
    BackendBusy,
    BackendError,
    BackendUnavailable,
    CapabilityUnsupported,
    ContextExceeded,
    Failure,
    Fault,
    Internal,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    StreamInterrupted,
)


def classes(root: type[Failure] = Failure) -> list[type[Failure]]:
    mine = [sub for sub in root.__subclasses__() if sub.__module__ == failure.__name__]
    return [root, *(c for sub in mine for c in classes(sub))]


def details(status: status_pb2.Status) -> dict[str, object]:
    return {detail.TypeName(): detail for detail in status.details}


def rpc_error(
    code: grpc.StatusCode, text: str, status: status_pb2.Status | None = None
) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata()
    if status is not None:
        trailing.add("grpc-status-details-bin", status.SerializeToString())
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=text)


@pytest.mark.parametrize("kind", [c for c in classes() if c is not Failure])
def test_a_reason_survives_the_hop(kind: type[Failure]) -> None:
    sent = kind("what", metadata={"a": "b"}, retry_after=timedelta(seconds=2), violations=[("f", "v")])
    got = failure.from_status(sent.to_status())
    assert type(got) is kind
    assert got is not None
    assert (got.message, got.metadata, got.retry_after) == ("what", {"a": "b"}, timedelta(seconds=2))
    assert got.violations == (("f", "v"),)


def test_reasons_are_unique_and_fit_the_rules() -> None:
    reasons = [c.reason for c in classes() if c is not Failure]
    assert len(set(reasons)) == len(reasons)
    assert all(reason.isupper() and len(reason) <= 63 for reason in reasons)


def test_a_status_stays_small_whatever_is_put_in() -> None:
    big = InvalidRequest(
        "ä" * 5000,
        metadata={f"k{i}": "ü" * 5000 for i in range(100)},
        violations=[("f" * 5000, "ö" * 5000)] * 100,
        retry_after=timedelta(seconds=1),
    )
    status = big.to_status()
    assert status.ByteSize() < 4096 + 1024
    assert status.message.endswith("\N{HORIZONTAL ELLIPSIS}")


def test_only_invalid_requests_of_the_caller_and_a_lost_answer_stay_where_they_are() -> None:
    assert not ContextExceeded.elsewhere
    assert not StreamInterrupted.elsewhere
    assert ModelNotFound.elsewhere
    assert StreamInterrupted.code is grpc.StatusCode.ABORTED
    assert QueueFull.fault is Fault.HERE
    assert BackendUnavailable.fault is Fault.BACKEND


def test_our_own_error_comes_back_as_its_class_and_names_the_backend() -> None:
    status = ContextExceeded("too long", metadata={"limit": "8"}).to_status()
    got = failure.from_rpc_error(
        rpc_error(grpc.StatusCode.INVALID_ARGUMENT, "too long", status), backend="mlx"
    )
    assert isinstance(got, ContextExceeded)
    assert got.metadata == {"limit": "8", "backend": "mlx"}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, BackendUnavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, BackendBusy),
        (grpc.StatusCode.UNIMPLEMENTED, CapabilityUnsupported),
        (grpc.StatusCode.CANCELLED, BackendUnavailable),
        (grpc.StatusCode.DATA_LOSS, BackendError),
        (grpc.StatusCode.ABORTED, StreamInterrupted),
    ],
)
def test_a_foreign_error_is_classed_by_its_code(code: grpc.StatusCode, kind: type[Failure]) -> None:
    got = failure.from_rpc_error(rpc_error(code, "Socket\x1b[31m closed\nforged"), backend="b")
    assert type(got) is kind
    assert "\x1b" not in got.message
    assert "\n" not in got.message
    assert got.message.startswith("backend b: Socket")


def test_an_error_without_text_says_its_code() -> None:
    got = failure.from_rpc_error(rpc_error(grpc.StatusCode.UNAVAILABLE, ""), backend="b")
    assert got.message == "backend b: UNAVAILABLE"


def test_a_status_that_contradicts_its_call_is_not_believed() -> None:
    status = ContextExceeded("x").to_status()
    got = failure.from_rpc_error(rpc_error(grpc.StatusCode.UNAVAILABLE, "gone", status), backend="b")
    assert isinstance(got, BackendUnavailable)


def test_another_domains_details_are_not_ours() -> None:
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason="CONTEXT_EXCEEDED", domain="elsewhere"))
    status = status_pb2.Status(code=code_pb2.UNAVAILABLE, message="m", details=[info])
    assert failure.from_status(status) is None
    got = failure.from_rpc_error(rpc_error(grpc.StatusCode.UNAVAILABLE, "m", status), backend="b")
    assert isinstance(got, BackendUnavailable)


def test_a_reason_from_the_future_is_a_backend_error() -> None:
    status = Internal("x").to_status()
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason="NOT_YET_INVENTED", domain=failure.DOMAIN))
    del status.details[:]
    status.details.append(info)
    assert isinstance(failure.from_status(status), BackendError)


def test_a_failure_shows_its_reason() -> None:
    assert repr(QueueFull("no room")) == "<QUEUE_FULL 'no room'>"
