"""What a changed configuration means, how the file is watched, and limits that change while calls wait."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.config import ConfigError
from forebay.kit.failure import BackendUnavailable, CapabilityUnsupported, InvalidRequest, ModelLoadFailed
from forebay.kit.layers.limit import Limit
from forebay.kit.logs import LogSettings
from forebay.kit.pipeline import Call, Request, Send
from forebay.kit.process import Configuration
from forebay.orchestrator.config import BackendSettings, BreakerSettings, OrchestratorSettings
from forebay.orchestrator.fleet.breaker import BreakerState
from forebay.orchestrator.fleet.breakers import Breakers
from forebay.orchestrator.fleet.endpoint import Endpoint
from forebay.orchestrator.reload import Reload, differences, replaces
from forebay.testing.calls import ask, serve
from forebay.testing.clock import now, virtual


def settings(**values: object) -> OrchestratorSettings:
    return OrchestratorSettings.model_validate(values)


def backend(name: str, **values: object) -> dict[str, object]:
    return {"name": name, "address": "127.0.0.1:1", **values}


class Rig:
    """A reload over a real file, whose settings are applied to nothing."""

    def __init__(self, folder: Path, text: str = "") -> None:
        self.file = folder / "forebay.toml"
        self.file.write_text(text)
        self.configuration = Configuration(
            {"orchestrator": OrchestratorSettings, "log": LogSettings}, self.file
        )
        read = self.configuration.read()["orchestrator"]
        assert isinstance(read, OrchestratorSettings)
        self.settings = read
        self.applied: list[OrchestratorSettings] = []
        self.fault: Exception | None = None
        self.reload = Reload(self.configuration, settings=lambda: self.settings, apply=self.apply)

    def apply(self, new: OrchestratorSettings) -> list[str]:
        if self.fault is not None:
            raise self.fault
        self.settings = new
        self.applied.append(new)
        return []


def test_every_change_is_a_line_for_people() -> None:
    old = settings(
        backends=[backend("a"), backend("b", token_file=None), backend("c")],
        aliases={"chat": {"a": "m"}, "old": {"b": "n"}},
    )
    new = settings(
        backends=[
            backend("c", breaker={"open_max": "2m"}, enabled=False),
            backend("a", weight=0.5, tls_roots="/roots.pem"),
            backend("d", address="unix:/d"),
        ],
        aliases={"chat": {"a": "m2", "c": "m"}},
        hedge={"enabled": True},
        auth_token_digests=["0" * 64],
        insecure_listen=True,
    )
    assert differences(old, new) == [
        'backend "b": removed',
        'backend "c": enabled true -> false',
        'backend "c": breaker.open_max 1m -> 2m',
        'backend "a": weight 1.0 -> 0.5',
        'backend "a": tls_roots unset -> "/roots.pem"',
        'backend "d": added at unix:/d',
        "orchestrator.backends: order a, b, c -> c, a, d",
        'alias "chat": m on a -> m2 on a, m on c',
        'alias "old": n on b -> unset',
        "orchestrator.insecure_listen false -> true",
        "orchestrator.auth_token_digests changed",
        "orchestrator.hedge.enabled false -> true",
    ]
    assert differences(old, old) == []


def test_a_backend_that_moved_is_reached_anew_and_any_other_change_is_not() -> None:
    old = BackendSettings.model_validate(backend("a"))
    assert not replaces(old, BackendSettings.model_validate(backend("a", slots=3, weight=0.1)))
    assert replaces(old, BackendSettings.model_validate(backend("a", address="127.0.0.1:2")))


def test_what_only_a_restart_changes_is_told_and_stays(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.file.write_text(
        "[orchestrator]\naddress = '127.0.0.1:9'\ndefault_model = 'm'\n[orchestrator.cache]\nttl = '1m'\n"
        "[log]\nlevel = 'debug'\n"
    )
    checked = rig.reload.serve(validate_only=True)
    assert rig.applied == []
    assert rig.reload.serve(validate_only=False) == checked
    assert checked.changes == ('orchestrator.default_model "" -> "m"',)
    assert checked.restart_required == (
        'orchestrator.address "127.0.0.1:50150" -> "127.0.0.1:9"',
        "orchestrator.cache.ttl 1h -> 1m",
        'log.level "info" -> "debug"',
    )
    assert rig.settings.address == "127.0.0.1:50150"
    assert rig.settings.cache.ttl == timedelta(hours=1)
    assert rig.settings.default_model == "m"


def test_a_bad_file_changes_nothing_and_all_of_it_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(tmp_path)
    rig.file.write_text("[orchestrator]\npicker = 'x'\ndefault_deadline = 'soon'\n")
    with pytest.raises(ConfigError) as caught:
        rig.configuration.read()
    for validate_only in (True, False):
        with pytest.raises(InvalidRequest) as refused:
            rig.reload.serve(validate_only=validate_only)
        for line in caught.value.lines:
            assert line in refused.value.message
    rig.reload.attempt("a test")
    assert all(line in caplog.text for line in caught.value.lines)
    assert rig.applied == []


def test_a_file_that_a_backend_needs_and_cannot_be_read_is_a_mistake_too(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.file.write_text("[orchestrator]\ndefault_model = 'm'\n")
    rig.fault = FileNotFoundError(2, "no such file", "roots.pem")
    with pytest.raises(ConfigError, match=r"roots\.pem"):
        rig.reload.reload()


def test_a_fault_of_ours_is_logged_and_the_process_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(tmp_path)
    rig.fault = RuntimeError("boom")
    rig.reload.attempt("a test")
    assert "fault of our own" in caplog.text
    rig.fault = None
    with caplog.at_level(logging.INFO):
        rig.reload.attempt("a test")
    assert "nothing changed" in caplog.text


def test_without_a_configuration_there_is_nothing_to_read() -> None:
    reload = Reload(None, settings=OrchestratorSettings, apply=lambda new: [])
    with pytest.raises(CapabilityUnsupported):
        reload.reload()
    assert reload._signature() is None


def test_a_closed_terminal_ends_the_process_and_any_other_sighup_reads_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path)
    raised: list[int] = []
    monkeypatch.setattr("forebay.orchestrator.reload.signal.raise_signal", raised.append)
    has_terminal = True
    monkeypatch.setattr("forebay.orchestrator.reload.os.isatty", lambda descriptor: has_terminal)
    rig.reload._take_signal(True)
    assert (len(rig.applied), raised) == (1, [])
    has_terminal = False
    rig.reload._take_signal(False)
    assert (len(rig.applied), raised) == (2, [])
    rig.reload._take_signal(True)
    assert (len(rig.applied), raised) == (2, [signal.SIGTERM])


@virtual
async def test_a_file_is_read_when_it_has_been_the_same_for_an_interval(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.settings = settings(reload={"interval": "1s"})
    task = asyncio.create_task(rig.reload._watch())

    async def after(seconds: float, text: str | None = None) -> int:
        await asyncio.sleep(seconds)
        if text is not None:
            rig.file.write_text(f"[orchestrator]\ndefault_model = '{text}'\n[orchestrator.reload]\n{more}")
        return len(rig.applied)

    more = "interval = '1s'"
    assert await after(10.5, "m") == 0
    assert await after(1.0, "mm") == 0, "it was seen, and may not be complete"
    assert await after(1.0, "mmm") == 0, "and grew meanwhile"
    assert await after(1.0) == 0
    assert await after(1.0) == 1
    assert rig.settings.default_model == "mmm"
    more = "watch = false\ninterval = '1s'"
    assert await after(5.0, "n") == 1
    assert await after(5.0, "off") == 2, "it was told not to look, and looks no more"
    assert await after(5.0) == 2
    rig.settings = settings(reload={"interval": "1s"})
    rig.file.unlink()
    assert await after(5.0) == 2, "a file that is gone changes nothing"
    assert await after(0.0, "back") == 2
    assert await after(5.0) == 3
    task.cancel()
    await asyncio.wait([task])


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than 0"):
        settings(reload={"interval": "0s"})


# Limits.


def crowd(limit: Limit, group: asyncio.TaskGroup, count: int) -> None:
    for _ in range(count):
        group.create_task(serve(limit, ask(model="m")))


async def a_second(call: Call[Request], send: Send) -> None:
    await asyncio.sleep(1.0)


@virtual
async def test_a_limit_that_grows_lets_waiting_calls_run_at_once() -> None:
    limit = Limit(a_second, slots=1, queue=9)
    async with asyncio.TaskGroup() as group:
        crowd(limit, group, 5)
        await asyncio.sleep(0.5)
        assert (limit.active, limit.waiting) == (1, 4)
        limit.resize(slots=4, queue=9)
        assert (limit.active, limit.waiting) == (4, 1)
    assert (limit.active, limit.waiting, now()) == (0, 0, 2.0)


@virtual
async def test_a_limit_that_shrinks_breaks_nothing_off_and_holds_when_calls_have_ended() -> None:
    seen: list[int] = []

    async def inner(call: Call[Request], send: Send) -> None:
        seen.append(limit.active)
        await asyncio.sleep(1.0)

    limit = Limit(a_second, slots=4, queue=9)
    async with asyncio.TaskGroup() as group:
        crowd(limit, group, 7)
        await asyncio.sleep(0.5)
        limit.resize(slots=1, queue=9, inner=inner)
        assert (limit.active, limit.waiting) == (4, 3)
    assert seen == [1, 1, 1]
    assert (limit.active, now()) == (0, 4.0)


# Endpoints.


def test_breakers_keep_what_they_saw_and_go_by_the_new_numbers() -> None:
    breakers = Breakers("a", BreakerSettings(), clock=lambda: 0.0, source=random.Random(0))

    def fail(failure: Exception, times: int) -> None:
        for _ in range(times):
            with pytest.raises(type(failure)), breakers.admit("m"):
                raise failure

    fail(ModelLoadFailed("x"), 1)
    fail(BackendUnavailable("x"), 2)
    assert breakers.whole.state is BreakerState.CLOSED
    breakers.change(BreakerSettings(consecutive_failures=3))
    breakers.change(BreakerSettings(consecutive_failures=3))
    fail(BackendUnavailable("x"), 1)
    assert breakers.whole.state is BreakerState.OPEN


def endpoint(told: Callable[[str], None]) -> Endpoint:
    made = Endpoint(
        BackendSettings.model_validate(backend("a")),
        aliases={"chat": "m"},
        clock=lambda: 0.0,
        source=random.Random(0),
        on_change=told,
    )
    made.found_serving()
    made.list_models([pb.Model(id="m"), pb.Model(id="n")])
    return made


def test_aliases_move_without_a_new_list() -> None:
    told: list[str] = []
    made = endpoint(told.append)
    told.clear()
    made.change(BackendSettings.model_validate(backend("a", weight=0.3)), aliases={"chat": "n"})
    found = made.find("chat")
    assert found is not None
    assert found.id == "n"
    assert made.view().weight == 0.3
    assert told, "watchers are told"


@virtual
async def test_a_backend_is_idle_when_neither_a_call_nor_a_load_uses_its_connection() -> None:
    made = endpoint(lambda name: None)
    made.service = a_second
    idle = asyncio.create_task(made.wait_idle())
    await idle

    async def load() -> None:
        with made.held():
            await asyncio.sleep(2.0)

    async with asyncio.TaskGroup() as group:
        group.create_task(serve(made, ask(model="m")))
        group.create_task(load())
        await asyncio.sleep(0)
        await made.wait_idle()
        assert now() == 2.0
