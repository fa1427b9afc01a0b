"""A backend whose service answers, and whose framework does not: what is shown of it, and logged."""

from __future__ import annotations

import asyncio
import logging
import random
from pathlib import Path

import pytest
from pydantic import ValidationError

from forebay.inference.v1 import inference_pb2 as pb
from forebay.orchestrator.config import BackendSettings
from forebay.orchestrator.fleet.endpoint import Endpoint, State
from forebay.testing.clock import now, virtual

GONE = "cannot reach ollama at http://127.0.0.1:11434: connection refused"


def endpoint() -> Endpoint:
    settings = BackendSettings(name="ollama", address="127.0.0.1:1")
    return Endpoint(settings, aliases={}, clock=now, source=random.Random(0))


@virtual
async def test_an_absent_framework_is_shown_with_its_reason_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    made = endpoint()
    made.found_not_serving()
    for _ in range(5):
        made.fail_to_list(GONE, is_gone=True)
        await asyncio.sleep(5)
    assert (made.state, made.detail) == (State.UNREACHABLE, GONE)
    assert made.view().detail == GONE
    assert caplog.messages == [f"backend ollama is UNREACHABLE: {GONE}"]


@virtual
async def test_a_framework_that_goes_and_comes_back_is_logged_once_each_way(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    made = endpoint()
    made.found_serving()
    made.list_models([pb.Model(id="m")])
    made.found_not_serving()
    made.fail_to_list(GONE, is_gone=True)
    made.found_serving()
    made.list_models([pb.Model(id="m")])
    assert (made.state, made.detail) == (State.ACTIVE, "")
    assert caplog.messages == [
        "backend ollama is ACTIVE",
        f"backend ollama is UNREACHABLE: {GONE}",
        "backend ollama is ACTIVE",
    ]


@virtual
async def test_another_reason_for_its_absence_is_news(caplog: pytest.LogCaptureFixture) -> None:
    made = endpoint()
    made.found_not_serving()
    made.fail_to_list(GONE, is_gone=True)
    made.fail_to_list("it does not answer", is_gone=True)
    assert len(caplog.messages) == 2
    assert made.detail == "it does not answer"


@virtual
async def test_a_real_drain_stays_draining_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    made = endpoint()
    made.found_serving()
    made.found_not_serving()
    assert made.state is State.DRAINING
    assert not caplog.messages  # why is not known yet
    made.fail_to_list("this service is stopping")
    assert (made.state, made.detail) == (State.DRAINING, "this service is stopping")
    assert caplog.messages == ["backend ollama is DRAINING: this service is stopping"]


@virtual
async def test_one_that_lists_its_models_and_does_not_serve_is_draining() -> None:
    made = endpoint()
    made.found_not_serving()
    made.fail_to_list(GONE, is_gone=True)
    made.list_models([pb.Model(id="m")])
    assert (made.state, made.detail) == (State.DRAINING, "it says that it is not serving")


def test_a_token_is_never_sent_in_plaintext_over_a_network(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    with pytest.raises(ValidationError, match="token_file needs tls_roots"):
        BackendSettings(name="a", address="10.0.0.1:50151", token_file=token)
    settings = BackendSettings(name="a", address="127.0.0.1:50151", token_file=token)
    assert "secret" not in repr(settings) + repr(settings.token())
    with pytest.raises(ValidationError, match="cannot be read"):
        BackendSettings(name="a", address="127.0.0.1:50151", token_file=tmp_path / "none")
