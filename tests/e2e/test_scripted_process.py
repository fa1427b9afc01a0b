"""The scripted engine as a real process: it listens, serves, dies and drains as told, and leaves nothing."""

import asyncio
import json
import re
import signal
from pathlib import Path

import grpc
import psutil
import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.models.v1 import models_pb2 as models_pb
from forebay.testing import grammar
from forebay.testing.calls import ask, with_options
from forebay.testing.client import CallError, Client, client
from forebay.testing.faults import FaultProxy
from forebay.testing.otlp import OtlpReceiver
from forebay.testing.processes import ServiceProcess
from forebay.testing.scripted import ScriptedEngine

MODULE = "forebay.testing.scripted"


def fates(journal: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    return [(line["request_id"], line["fate"]) for line in lines]


async def until_fate(journal: Path, wanted: tuple[str, str]) -> None:
    async with asyncio.timeout(10):
        while wanted not in fates(journal):
            await asyncio.sleep(0.01)


async def test_a_process_serves_what_its_command_line_says(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    arguments = (
        "--name a --models m1,m2 --pullable p --token-count 5 --token-delay 1ms --first-delay 1ms "
        f"--progress-delay 1ms --slots 2 --queue 3 --without tools,seed --journal {journal} --notice 0s"
    ).split()
    async with ServiceProcess(MODULE, arguments) as process:
        assert process.output == f"forebay scripted listening on {process.address}\n"
        async with client(process.address) as peer:
            request = ask(model="m2")
            request.request_id = "one"
            events = await peer.generate(request)
            assert grammar.text(events) == ScriptedEngine(models=["m2"]).expected(
                ask(model="m2", token_count=5)
            )
            assert [model.id for model in await peer.list_models()] == ["m1", "m2"]
            assert (await peer.list_models())[0].slot_count == 2
            request.sampling.seed = 1
            with pytest.raises(CallError) as raised:
                await peer.generate(request)
            assert raised.value.reason == "CAPABILITY_UNSUPPORTED"
            await peer.pull(models_pb.PullModelRequest(model="p"))
            await peer.delete("p")
        assert await process.stop() == 0
    assert fates(journal)[:2] == [("one", "active"), ("one", "completed")]


async def test_a_killed_process_ends_its_streams_and_its_port() -> None:
    async with ServiceProcess(MODULE, ["--token-delay", "20ms", "--token-count", "500"]) as process:
        events: list[pb.GenerateResponse] = []

        async def read(peer: Client) -> None:
            async with peer.stream(ask()) as stream:
                async for event in stream:
                    if event.HasField("delta") and not grammar.deltas(events):
                        process.signal(signal.SIGKILL)
                    events.append(event)

        async with client(process.address) as peer:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await read(peer)
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            assert 0 < len(grammar.deltas(events)) < 500
        assert await process.wait() == -signal.SIGKILL


async def test_a_process_that_ends_itself_is_reported() -> None:
    async with ServiceProcess(MODULE, ["--fault", "EXIT@2"]) as process:
        async with client(process.address) as peer:
            with pytest.raises(CallError) as raised:
                await peer.generate(ask())
            assert raised.value.code is grpc.StatusCode.UNAVAILABLE
        assert await process.wait() == 70


async def test_a_frozen_process_is_noticed_by_pings() -> None:
    async with ServiceProcess(MODULE, ["--token-delay", "20ms", "--token-count", "5000"]) as process:
        async with client(process.address, timeout=30) as peer:
            asyncio.get_running_loop().call_later(0.2, process.freeze)
            with pytest.raises(CallError) as raised:
                await peer.generate(ask())
            assert raised.value.code is grpc.StatusCode.UNAVAILABLE
            assert raised.value.events
        process.thaw()


async def test_a_drained_process_finishes_what_it_began(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    arguments = ["--token-delay", "20ms", "--token-count", "30", "--journal", str(journal)]
    async with ServiceProcess(MODULE, arguments) as process:
        async with client(process.address) as peer, asyncio.TaskGroup() as tasks:
            request = ask()
            request.request_id = "last"
            reply = tasks.create_task(peer.generate(request))
            await until_fate(journal, ("last", "active"))
            assert await process.stop() == 0
        assert len(grammar.deltas(reply.result())) == 30
    assert ("last", "completed") in fates(journal)


async def test_a_caller_who_leaves_leaves_no_orphan_generation(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    arguments = ["--token-delay", "20ms", "--token-count", "5000", "--journal", str(journal)]
    async with ServiceProcess(MODULE, arguments) as process, client(process.address) as peer:
        request = ask()
        request.request_id = "left"
        async with peer.stream(request) as call:
            await call.read()
        await until_fate(journal, ("left", "cancelled"))


async def test_raw_numbers_show_what_was_lost() -> None:
    async with ServiceProcess(MODULE, ["--raw"]) as process, client(process.address) as peer:
        await peer.generate(ask())
        with pytest.raises(grammar.GrammarError, match="event 3: delta with sequence 4"):
            await peer.generate(with_options(ask(), fault="SKIP@2"))


async def test_spans_go_where_the_command_line_says() -> None:
    async with OtlpReceiver() as receiver:
        async with ServiceProcess(MODULE, ["--name", "a", "--otlp", receiver.endpoint]) as process:
            async with client(process.address) as peer:
                await peer.generate(ask())
            await process.stop()
        (span,) = await receiver.wait_for(1)
    assert (span.service, span.kind) == ("forebay-a", "SERVER")
    assert span.attributes["rpc.response.status_code"] == "OK"


async def test_a_stream_cut_at_any_byte_is_a_strict_prefix() -> None:
    async with (
        ServiceProcess(MODULE, ["--token-count", "40"]) as process,
        FaultProxy(process.address) as proxy,
    ):
        async with client(process.address) as peer:
            whole = await peer.text(ask())
        for cut in range(150, 1500, 90):
            proxy.down.cut_after = cut
            async with client(proxy.address, timeout=10) as peer:
                events = await prefix(peer)
            assert whole.startswith(grammar.text(events))
            assert "finished" not in [event.WhichOneof("event") for event in events]


async def prefix(peer: Client) -> list[pb.GenerateResponse]:
    """Returns what came of a reply that broke off."""
    with pytest.raises(CallError) as raised:
        await peer.generate(ask())
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE
    return raised.value.events


async def test_chaos_and_the_other_options_are_understood(tmp_path: Path) -> None:
    options = "--weights w --context 100 --dimensions 4 --unloaded --load-delay 1ms --unwind-delay 1ms"
    more = "--ready-delay 1ms --reasoning-token-count 1 --tool-call-count 1 --grace 1s --chaos 7:1.0:8"
    arguments = [*options.split(), *more.split()]
    async with (
        ServiceProcess(MODULE, arguments, folder=tmp_path) as process,
        client(process.address) as peer,
    ):
        with pytest.raises(CallError):
            await peer.generate(ask())
        response = await peer.embed(pb.EmbedRequest(model="scripted", texts=["a"]))
        assert response.dimension_count == 4


# The helper that starts them.


async def test_a_process_that_cannot_start_fails_the_test_with_its_output() -> None:
    with pytest.raises(AssertionError, match=r"ended with 2(.|\n)*unrecognized arguments: --nonsense"):
        async with ServiceProcess(MODULE, ["--nonsense"]):
            pass


async def test_a_process_that_says_nothing_is_not_waited_for_for_ever() -> None:
    process = ServiceProcess("http.server", ["0"])
    await process.launch()
    try:
        with pytest.raises(AssertionError, match="did not write 'forebay'"):
            await process.wait_for_output(re.compile("forebay"), timeout=0.3)
        with pytest.raises(AssertionError, match="did not end in"):
            await process.wait(timeout=0.1)
    finally:
        await process.kill()
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        process.freeze()


async def test_processes_left_behind_are_killed_and_fail_the_test(tmp_path: Path) -> None:
    (tmp_path / "leaver.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "print('forebay leaver listening on', f'child:{child.pid}', flush=True)\n"
        "time.sleep(600)\n"
    )
    process = ServiceProcess("leaver", environment={"PYTHONPATH": str(tmp_path)})
    await process.start()
    child = psutil.Process(int(process.address.removeprefix("child:")))
    with pytest.raises(AssertionError, match="left processes behind"):
        await process.stop()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_process_that_was_never_started_has_no_number() -> None:
    process = ServiceProcess(MODULE)
    assert (process.pid, process.returncode) == (0, None)
    assert repr(process) == "<ServiceProcess forebay.testing.scripted pid 0 at nowhere yet>"
