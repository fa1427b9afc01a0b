"""A running orchestrator whose configuration changes: nothing in progress is disturbed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest

import forebay
from forebay.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing import grammar
from forebay.testing.calls import ask, with_options
from forebay.testing.client import CallError, Client, client
from forebay.testing.processes import ServiceProcess
from forebay.testing.script import Script, ScriptedModel
from forebay.testing.scripted import ScriptedEngine

WAIT_SECONDS = 20.0

BACKEND = fleet_pb2.Backend

QUIET = "interval = '100ms'"


def scripted(name: str, *arguments: str) -> ServiceProcess:
    """Returns a backend whose replies last a second, long enough for a change in the middle."""
    return ServiceProcess(
        "forebay.testing.scripted",
        [
            *("--name", name, "--models", "m", "--weights", "same", "--token-count", "100"),
            *("--token-delay", "10ms", *arguments),
        ],
    )


def whole() -> str:
    model = ScriptedModel(name="m", weights="same", script=Script(token_count=100))
    return ScriptedEngine(models=[model]).expected(ask(model="m"))


class Rig:
    """An orchestrator, its file, and a client."""

    def __init__(self, file: Path, process: ServiceProcess, peer: Client) -> None:
        self.file = file
        self.process = process
        self.peer = peer
        self.fleet = fleet_pb2_grpc.FleetServiceStub(peer.channel)

    def write(self, text: str) -> None:
        """Replaces the file as an editor does: aside, and then renamed."""
        aside = self.file.with_suffix(".new")
        aside.write_text(text)
        aside.rename(self.file)

    async def reload(self, *, validate_only: bool = False) -> fleet_pb2.ReloadConfigurationResponse:
        return await self.fleet.ReloadConfiguration(
            fleet_pb2.ReloadConfigurationRequest(validate_only=validate_only), timeout=WAIT_SECONDS
        )

    async def backends(self) -> dict[str, fleet_pb2.Backend]:
        listed = await self.fleet.ListBackends(fleet_pb2.ListBackendsRequest())
        return {backend.name: backend for backend in listed.backends}

    async def until(self, holds: Callable[[dict[str, fleet_pb2.Backend]], bool]) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + WAIT_SECONDS
        while not holds(backends := await self.backends()):
            assert loop.time() < end, f"did not come true: {backends}\n{self.process.log}"
            await asyncio.sleep(0.02)

    async def until_logged(self, text: str) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + WAIT_SECONDS
        while text not in self.process.log:
            assert loop.time() < end, f"{text!r} is not in {self.process.log}"
            await asyncio.sleep(0.02)

    async def read(self, request: pb.GenerateRequest, began: asyncio.Event | None = None) -> str:
        """Reads a reply to its end, and says when its third delta has come."""
        events: list[pb.GenerateResponse] = []
        deltas = 0
        async with self.peer.stream(request) as stream:
            try:
                async for event in stream:
                    events.append(event)
                    deltas += event.HasField("delta")
                    if deltas == 3 and began is not None:
                        began.set()
            except grpc.aio.AioRpcError as error:
                raise CallError(error, events) from error
        grammar.check(events)
        return grammar.text(events)


def configured(*backends: str, top: str = "", reload: str = QUIET) -> str:
    tables = "\n".join(f"[[orchestrator.backends]]\n{backend}" for backend in backends)
    return f"[orchestrator]\naddress = '127.0.0.1:0'\n{top}\n[orchestrator.reload]\n{reload}\n{tables}\n"


def entry(name: str, process: ServiceProcess, more: str = "") -> str:
    return f"name = '{name}'\naddress = '{process.address}'\n{more}"


@asynccontextmanager
async def running(folder: Path, text: str) -> AsyncIterator[Rig]:
    file = folder / "forebay.toml"
    file.write_text(text)
    async with (
        ServiceProcess("forebay.orchestrator", ["--config", str(file)]) as process,
        client(process.address, timeout=WAIT_SECONDS) as peer,
    ):
        yield Rig(file, process, peer)


def active(*names: str) -> Callable[[dict[str, fleet_pb2.Backend]], bool]:
    def holds(backends: dict[str, fleet_pb2.Backend]) -> bool:
        return list(backends) == list(names) and all(
            each.state == BACKEND.STATE_ACTIVE and each.models for each in backends.values()
        )

    return holds


def on(name: str, **options: object) -> pb.GenerateRequest:
    request = with_options(ask(model="m"), **options) if options else ask(model="m")
    request.routing.backends.append(name)
    return request


async def test_streams_go_on_while_backends_are_added_changed_and_removed_over_sighup(tmp_path: Path) -> None:
    async with scripted("a") as a, scripted("b") as b:
        # The file is not watched here, so that only the signal can have done it.
        still = "watch = false\ninterval = '100ms'"
        async with running(tmp_path, configured(entry("a", a), reload=still)) as rig:
            await rig.until(active("a"))
            steps = [
                (configured(entry("a", a), entry("b", b), reload=still), ("a", "b")),
                (
                    configured(
                        entry("a", a, "weight = 0.5\nslots = 1\nfirst_event_timeout = '9s'"),
                        entry("b", b),
                        top="default_model = 'chat'\n[orchestrator.aliases]\nchat = { b = 'm' }",
                        reload=still,
                    ),
                    ("a", "b"),
                ),
                (configured(entry("b", b), reload=still), ("b",)),
            ]
            names = iter(["a", "a", "a"])
            for text, left in steps:
                began = asyncio.Event()
                async with asyncio.TaskGroup() as group:
                    reply = group.create_task(rig.read(on(next(names)), began))
                    await began.wait()
                    rig.write(text)
                    rig.process.signal(signal.SIGHUP)
                    await rig.until(active(*left))
                    assert not reply.done(), "the change came too late to say anything"
                assert reply.result() == whole()
            for line in (
                f'backend "b": added at {b.address}',
                'backend "a": weight 1.0 -> 0.5',
                'backend "a": slots 0 -> 1',
                'backend "a": first_event_timeout 2m -> 9s',
                'alias "chat": unset -> m on b',
                'orchestrator.default_model "" -> "chat"',
                'backend "a": removed',
                "backend a: its connection is closed",
            ):
                await rig.until_logged(line)
            with pytest.raises(CallError) as caught:
                await rig.peer.generate(on("a"))
            assert caught.value.reason == "BACKEND_NOT_FOUND"
            assert await rig.read(on("b")) == whole()


async def test_a_file_that_is_half_written_changes_nothing(tmp_path: Path) -> None:
    async with scripted("a") as a, scripted("b") as b:
        text = configured(entry("a", a), entry("b", b))
        # Cut behind the first backend, so that what is there is valid and would remove the second.
        cut = text.index("[[", text.index("[[") + 1)
        async with running(
            tmp_path, configured(entry("a", a), entry("b", b), reload="interval = '1s'")
        ) as rig:
            await rig.until(active("a", "b"))
            with rig.file.open("w") as file:
                file.write(text[:cut])
                file.flush()
                for character in text[cut:]:
                    await asyncio.sleep(0.01)
                    file.write(character)
                    file.flush()
                    assert set(await rig.backends()) == {"a", "b"}
            await rig.until_logged("orchestrator.reload.interval 1s -> 100ms")
            assert "removed" not in rig.process.log


async def test_a_bad_file_changes_nothing_and_every_mistake_is_told_as_at_the_start(tmp_path: Path) -> None:
    async with scripted("a") as a, running(tmp_path, configured(entry("a", a))) as rig:
        await rig.until(active("a"))
        bad = configured(entry("a", a, "wieght = 0.5"), entry("b", a, "slots = -1"), top="picker = 'worst'")
        rig.write(bad)
        await rig.until_logged("it is wrong, and nothing was changed")
        at_start = await _lines_at_start(tmp_path, rig.file)
        assert len(at_start) == 3
        for line in at_start:
            assert line in rig.process.log
        for validate_only in (True, False):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rig.reload(validate_only=validate_only)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            for line in at_start:
                assert line in (caught.value.details() or "")
        assert set(await rig.backends()) == {"a"}
        assert await rig.read(on("a")) == whole()
        rig.file.unlink()
        await rig.until_logged("the configuration file is gone")
        assert await rig.read(on("a", token_count=3))


async def _lines_at_start(folder: Path, file: Path) -> list[str]:
    """Returns what a process that starts with the file says of it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "forebay.orchestrator", "--config", str(file)),
        stderr=asyncio.subprocess.PIPE,
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(Path(path).parent) for path in forebay.__path__),
        },
    )
    _, errors = await asyncio.wait_for(process.communicate(), WAIT_SECONDS)
    assert process.returncode == 64
    return errors.decode().splitlines()


async def test_a_removed_backend_that_froze_holds_its_caller_only_for_the_grace(tmp_path: Path) -> None:
    async with scripted("a", "--token-count", "5", "--fault", "STALL@3") as a, scripted("b") as b:
        grace = f"{QUIET}\ngrace = '300ms'"
        start = configured(entry("a", a, "between_events_timeout = '0s'"), entry("b", b), reload=grace)
        async with running(tmp_path, start) as rig:
            await rig.until(active("a", "b"))
            began = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                reply = group.create_task(_failure(rig, on("a"), began))
                await began.wait()
                rig.write(configured(entry("b", b), reload=grace))
            assert reply.result() == "STREAM_INTERRUPTED"
            await rig.until_logged("1 calls on it are broken off")
            await rig.until_logged("backend a: its connection is closed")


async def _failure(rig: Rig, request: pb.GenerateRequest, began: asyncio.Event) -> str:
    try:
        await rig.read(request, began)
    except CallError as error:
        return error.reason
    return "none"


async def test_a_changed_file_is_read_by_itself_and_watchers_hear_of_it(tmp_path: Path) -> None:
    async with scripted("a") as a, scripted("b") as b, running(tmp_path, configured(entry("a", a))) as rig:
        await rig.until(active("a"))
        stream = rig.fleet.WatchBackends(fleet_pb2.WatchBackendsRequest(), timeout=WAIT_SECONDS)

        async def until(holds: Callable[[fleet_pb2.WatchBackendsResponse], bool]) -> None:
            async for event in stream:
                if holds(event):
                    return
            raise AssertionError("the watch ended")

        await until(lambda event: event.backend.name == "a")
        rig.write(configured(entry("b", b)))
        seen: set[str] = set()

        def both(event: fleet_pb2.WatchBackendsResponse) -> bool:
            seen.add(f"{event.backend.name} {'removed' if event.removed else 'here'}")
            return {"a removed", "b here"} <= seen

        await until(both)
        stream.cancel()
        rig.write(configured(entry("b", b), reload="watch = false"))
        await rig.until_logged("orchestrator.reload.watch true -> false")
        rig.write(configured(entry("b", b, "weight = 0.5"), top="grace = '5s'", reload="watch = false"))
        checked = await rig.reload(validate_only=True)
        assert await rig.reload() == checked, "the check changed nothing"
        assert 'backend "b": weight 1.0 -> 0.5' in checked.changes
        assert list(checked.restart_required) == ["orchestrator.grace 30s -> 5s"]
        assert list((await rig.reload()).changes) == []
