# ruff: noqa: E501 - servers write long sentences
"""What servers say is classed by what it means, and never passed on."""

import json
from datetime import timedelta

import pytest

from forebay.kit.failure import (
    BackendBusy,
    BackendError,
    BackendUnavailable,
    CapabilityUnsupported,
    ContextExceeded,
    Failure,
    InvalidRequest,
    MemoryExhausted,
    ModelLoadFailed,
    ModelNotFound,
    StreamInterrupted,
    UpstreamUnauthenticated,
)
from forebay.upstream.errors import (
    UpstreamError,
    error_in,
    from_value,
    read_error,
    safe_text,
    to_failure,
    translated,
)


def classed(status: int, body: object) -> Failure:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return to_failure(read_error(status, data), backend="b", model="m")


TABLE = [
    (400, {"error": 'invalid "PROMPT"'}, InvalidRequest),
    (405, b"405 method not allowed", CapabilityUnsupported),
    (411, b"", InvalidRequest),
    (413, b"<html>too large</html>", InvalidRequest),
    (422, {"detail": [{"msg": "bad"}]}, InvalidRequest),
    (401, {"error": {"message": "sk-lm-ABCDEFGH refused"}}, UpstreamUnauthenticated),
    (403, b"", UpstreamUnauthenticated),
    (404, {"error": "model 'x' not found"}, ModelNotFound),
    (404, {"error": 'model "x" not found, try pulling it first'}, ModelNotFound),
    (400, {"error": {"message": "model 'zzz' not found", "code": 400}}, ModelNotFound),
    (200, {"error": "pull model manifest: file does not exist"}, ModelNotFound),
    (404, {"error": {"message": "No models loaded.", "code": None}}, ModelNotFound),
    (404, b"404 page not found", CapabilityUnsupported),
    (404, b"Not Found", CapabilityUnsupported),
    (404, {"error": {"code": 404, "message": "File Not Found"}}, CapabilityUnsupported),
    (200, {"error": "Unexpected endpoint or method. (GET /api/v1/models)"}, CapabilityUnsupported),
    (429, b"", BackendBusy),
    (529, {"error": "overloaded"}, BackendBusy),
    (503, {"error": "server busy, please try again.  maximum pending requests exceeded"}, BackendBusy),
    (503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}, BackendUnavailable),
    (503, b"down for now", BackendUnavailable),
    (502, b"<html>", BackendUnavailable),
    (504, b"", BackendUnavailable),
    (499, {"error": "request canceled"}, BackendUnavailable),
    (501, {"error": {"code": 501}}, CapabilityUnsupported),
    (400, {"error": '"m" does not support thinking'}, CapabilityUnsupported),
    (500, {"error": {"message": "image input is not supported - hint", "type": "server_error"}}, CapabilityUnsupported),
    (500, {"error": 'option "num_ctx" must be of type integer'}, InvalidRequest),
    (500, {"error": 'invalid format: "x"; expected "json" or a valid JSON Schema object'}, InvalidRequest),
    (500, {"error": "model requires more system memory (9 GiB) than is available"}, MemoryExhausted),
    (500, {"error": "llama runner process: cudaMalloc failed: out of memory"}, MemoryExhausted),
    (500, {"error": "error loading model: missing tensor"}, ModelLoadFailed),
    (500, {"error": "model runner has unexpectedly stopped"}, BackendError),
    (500, b"", BackendError),
    (200, {"error": {"message": "Model unloaded."}}, BackendUnavailable),
    (302, b"", BackendError),
    (400, {"error": "Trying to keep the first 9000 tokens when context the overflows. However, the model is loaded with context length of only 4096 tokens"}, ContextExceeded),
    (500, {"error": "input (1802 tokens) is too large to process"}, ContextExceeded),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "kind"), TABLE)
def test_every_answer_has_its_class(status: int, body: object, kind: type[Failure]) -> None:
    failure = classed(status, body)
    assert type(failure) is kind
    assert failure.metadata["backend"] == "b"
    assert failure.metadata["model"] == "m"
    assert "PROMPT" not in failure.message
    assert "sk-lm" not in failure.message


def test_the_size_of_prompt_and_context_is_told_where_it_is_known() -> None:
    words = {"error": "Trying to keep the first 9000 tokens when context the overflows. However, the model is loaded with context length of only 4096 tokens"}  # fmt: skip
    fields = {"error": {"message": "exceed_context_size_error", "n_prompt_tokens": 12, "n_ctx": 8}}
    for body, prompt, room in ((words, "9000", "4096"), (fields, "12", "8")):
        metadata = classed(400, body).metadata
        assert (metadata["prompt_token_count"], metadata["context_token_count"]) == (prompt, room)
    assert "prompt_token_count" not in classed(400, {"error": "context_length_exceeded"}).metadata


def test_json_inside_a_string_is_read_to_its_bottom() -> None:
    inner = {"error": {"code": 400, "message": "request (1204 tokens) exceeds the available context size (256 tokens)", "type": "exceed_context_size_error"}}  # fmt: skip
    error = read_error(500, json.dumps({"error": json.dumps({"error": json.dumps(inner)})}).encode())
    assert (error.code, error.type) == ("400", "exceed_context_size_error")
    assert isinstance(to_failure(error, backend="b"), ContextExceeded)


def test_an_error_nested_without_end_or_cut_in_its_middle_is_read_all_the_same() -> None:
    value: object = "deep"
    for _ in range(50):
        value = {"error": value}
    assert type(classed(500, value)) is BackendError
    assert read_error(500, b'{"error": "{not json"}').text == "{not json"


def test_an_error_under_a_good_status_has_the_status_it_names() -> None:
    assert from_value({"code": 503, "message": "Loading model"}).status == 503
    assert from_value({"code": "invalid_api_key"}).status == 200
    assert from_value({"code": True}).code == ""


@pytest.mark.parametrize(
    "value", [None, [], {}, {"error": None}, {"error": ""}, {"error": {}}, "error", {"a": 1}]
)
def test_a_body_without_an_error_has_none(value: object) -> None:
    assert error_in(value) is None  # type: ignore[arg-type]  # any JSON value


def test_only_words_that_cannot_be_the_callers_are_quoted() -> None:
    safe = classed(500, {"error": 'option "num_ctx" must be of type integer; PROMPT'})
    assert 'option "num_ctx" must be of type integer' in safe.message
    assert "PROMPT" not in safe.message
    assert safe_text(read_error(400, b'{"error": "the prompt was PROMPT"}')) == ""
    odd = read_error(400, b'{"error": {"type": "has spaces PROMPT", "code": "x y"}}')
    assert str(odd) == "HTTP 400"
    failure = to_failure(odd, backend="b")
    assert "upstream_type" not in failure.metadata


def test_the_error_itself_can_be_logged() -> None:
    error = read_error(500, b'{"error": {"message": "PROMPT", "type": "server_error", "code": 500}}')
    assert str(error) == "HTTP 500 server_error 500"
    assert "PROMPT" not in repr(error)


def test_when_to_come_back_is_what_the_server_says() -> None:
    error = read_error(503, b'{"error":"busy"}', retry_after=timedelta(seconds=7))
    assert to_failure(error, backend="b").retry_after == timedelta(seconds=7)
    assert classed(503, {"error": "busy"}).retry_after is not None
    assert classed(503, {"error": "Loading model"}).retry_after is not None


def test_a_failure_in_the_middle_of_a_reply_sends_nobody_elsewhere() -> None:
    busy = to_failure(read_error(503, b'{"error":"busy"}'), backend="b", started=True)
    assert isinstance(busy, StreamInterrupted)
    assert busy.metadata["cause"] == "BACKEND_BUSY"
    assert isinstance(busy.__cause__, BackendBusy)
    invalid = to_failure(read_error(400, b"{}"), backend="b", started=True)
    assert type(invalid) is InvalidRequest


def test_a_block_is_translated() -> None:
    with pytest.raises(ModelNotFound) as raised, translated(backend="b", model="m"):
        raise UpstreamError(404, text="model 'm' not found")
    assert isinstance(raised.value.__cause__, UpstreamError)
    with pytest.raises(ZeroDivisionError), translated(backend="b"):
        raise ZeroDivisionError
