"""`forebay up` before its first process: the plan, the ports, the lock, the fetch; and who is waited for."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from forebay.cli import settings, up
from forebay.cli.app import main
from forebay.cli.problems import ExitCode, Problem
from forebay.cli.supervise import Keeper, Program, State
from forebay.kit.config import load
from forebay.mlx_service.default_model import DEFAULT_MODEL
from forebay.orchestrator.config import OrchestratorSettings


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No configuration and no cache but the test's own."""
    for name in [name for name in os.environ if name.startswith("FOREBAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FOREBAY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def write(text: str) -> Path:
    path = Path("forebay.toml")
    path.write_text(text)
    return path


FREE = """
[mlx]
address = "127.0.0.1:0"
[ollama]
address = "127.0.0.1:0"
[lmstudio]
address = "127.0.0.1:0"
[orchestrator]
address = "127.0.0.1:0"
"""


# The plan.


def test_what_is_harmless_is_started_and_the_orchestrator_is_last() -> None:
    made = up.plan(write(FREE))
    assert made.services == ("mlx", "ollama", "lmstudio", "orchestrator")
    assert [program.name for program in made.programs if program.last] == ["orchestrator"]
    assert all(not address.endswith(":0") for address in made.addresses.values())


def test_the_orchestrator_is_told_where_the_started_backends_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = up.plan(write(FREE + '[openai]\naddress = "127.0.0.1:0"\nbase_url = "http://127.0.0.1:8080"\n'))
    assert made.services == ("mlx", "ollama", "lmstudio", "openai", "orchestrator")
    env = made.programs[-1].env
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    section = load({"orchestrator": OrchestratorSettings}, path=None)["orchestrator"]
    assert isinstance(section, OrchestratorSettings)
    told = {(backend.name, backend.framework, backend.address) for backend in section.backends}
    assert told == {(name, name, made.addresses[name]) for name in ("mlx", "ollama", "lmstudio", "openai")}
    assert section.default_model == DEFAULT_MODEL.id


def test_what_was_measured_is_kept_over_a_restart_where_the_configuration_says_and_else_in_the_cache(
    empty_home: Path,
) -> None:
    key = "FOREBAY_ORCHESTRATOR__PERFORMANCE__STATE_DIR"
    assert up.plan(write(FREE)).programs[-1].env[key] == str(empty_home / "cache" / "state")
    configured = FREE + '[orchestrator.performance]\nstate_dir = "elsewhere"\n'
    assert key not in up.plan(write(configured)).programs[-1].env


def test_backends_and_default_model_that_are_configured_stay() -> None:
    made = up.plan(
        write(
            '[orchestrator]\ndefault_model = "mine"\n'
            '[[orchestrator.backends]]\nname = "far"\naddress = "127.0.0.1:1"\n'
        ),
        ["mlx", "orchestrator"],
    )
    assert set(made.programs[-1].env) == {"FOREBAY_ORCHESTRATOR__PERFORMANCE__STATE_DIR"}


def test_without_an_orchestrator_nobody_is_told_anything() -> None:
    made = up.plan(None, ["ollama"])
    assert made.services == ("ollama",)
    assert "--config" not in made.programs[0].command


@pytest.mark.parametrize(
    ("web", "more", "url"),
    [
        ("127.0.0.1:50350", "", "http://127.0.0.1:50350/"),
        ("localhost:7", "", "http://localhost:7/"),
        ("[::1]:7", "", "http://[::1]:7/"),
        ("0.0.0.0:7", "insecure_listen = true", "http://127.0.0.1:7/"),
        ("[::]:7", "insecure_listen = true", "http://[::1]:7/"),
        ("127.0.0.1:7", 'tls_certificate = "c.pem"\ntls_key = "k.pem"', "https://127.0.0.1:7/"),
    ],
)
def test_where_the_dashboard_is_is_known_as_a_url_that_this_machine_can_open(
    web: str, more: str, url: str
) -> None:
    assert up.plan(write(f'[orchestrator]\nweb_address = "{web}"\n{more}\n')).dashboard == url


def test_a_free_port_for_the_dashboard_is_chosen_before_it_starts() -> None:
    made = up.plan(write(FREE.replace("[orchestrator]", '[orchestrator]\nweb_address = "127.0.0.1:0"')))
    address = made.programs[-1].env["FOREBAY_ORCHESTRATOR__WEB_ADDRESS"]
    assert made.dashboard == f"http://{address}/"
    assert not address.endswith(":0")


def test_without_an_address_for_it_there_is_no_dashboard_and_nothing_else_serves_one() -> None:
    assert up.plan(write(FREE)).dashboard == ""
    text = FREE.replace("[orchestrator]", '[orchestrator]\nweb_address = "127.0.0.1:50350"')
    made = up.plan(write(text), only=["mlx"])
    assert (made.dashboard, made.pages) == ("", {})


def test_the_services_of_the_configuration_are_started() -> None:
    assert up.plan(write('[up]\nservices = ["orchestrator"]')).services == ("orchestrator",)


def test_a_service_nobody_knows_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--only", "mlx, vllm"]) == ExitCode.CONFIG
    assert "there is no service 'vllm': there are mlx, ollama" in capsys.readouterr().err


def test_a_service_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = settings.Service(
        name="mlx", module="x", settings="forebay.gone.config:X", title="MLX", style="red"
    )
    odd = settings.Service(
        name="ollama", module="x", settings="forebay.cli.settings:GONE", title="O", style="red"
    )
    monkeypatch.setattr(settings, "SERVICES", {**settings.SERVICES, "mlx": gone, "ollama": odd})
    assert {"mlx", "ollama"}.isdisjoint(settings.settings_types())
    assert main(["up", "--only", "mlx"]) == ExitCode.UNAVAILABLE
    assert "is not part of this installation" in capsys.readouterr().err


def test_a_module_that_a_service_misses_is_no_partial_installation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "brokenpkg.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    broken = settings.Service(name="mlx", module="x", settings="brokenpkg:X", title="MLX", style="red")
    monkeypatch.setattr(settings, "SERVICES", {"mlx": broken})
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        settings.settings_types()


def test_every_mistake_in_the_configuration_is_a_line_and_nothing_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(
        """
[orchestrator]
addres = "127.0.0.1:50150"
[mlx]
max_rows = 0
grace = "soon"
[log]
level = "loud"
[upp]
x = 1
"""
    )
    for arguments in (["up"], ["config", "check"]):
        assert main(arguments) == 64
        out, err = capsys.readouterr()
        head, *lines = err.splitlines()
        assert out == ""
        assert head == "error: the configuration has 5 mistakes"
        assert len(lines) == 5
        for word in ("did you mean address", "max_rows", "grace", "level", "did you mean up"):
            assert sum(word in line for line in lines) == 1, word
    assert not Path("cache").exists()


def test_one_mistake_is_one_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--config", "nowhere.toml"]) == 64
    assert capsys.readouterr().err.splitlines() == [
        "error: the configuration has 1 mistake",
        "  nowhere.toml: there is no such file",
    ]


# Ports.


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_taken_port_is_reported_with_its_holder_and_nothing_starts(
    taken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(f'[orchestrator]\naddress = "{taken}"\n')
    assert main(["up", "--only", "orchestrator"]) == ExitCode.UNAVAILABLE
    err = capsys.readouterr().err
    assert err.startswith(f"error: orchestrator: {taken} is taken by ")
    assert f"(pid {os.getpid()})" in err
    assert "nothing was started" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("key", ["web_address", "metrics_address"])
def test_the_port_of_a_page_is_looked_at_too(
    taken: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(f'[orchestrator]\naddress = "127.0.0.1:0"\n{key} = "{taken}"\n')
    assert main(["up", "--only", "orchestrator"]) == ExitCode.UNAVAILABLE
    assert capsys.readouterr().err.startswith(f"error: orchestrator.{key}: {taken} is taken by ")


def test_every_taken_port_is_a_line(taken: str) -> None:
    with pytest.raises(Problem) as caught:
        up.check_ports({"mlx": taken, "ollama": taken, "openai": up._fixed("127.0.0.1:0")})
    assert [line.split(":")[0] for line in caught.value.lines] == ["mlx", "ollama"]


def test_a_unix_socket_is_taken_while_somebody_listens(tmp_path: Path) -> None:
    path = tmp_path / "s"
    address = f"unix:{path}"
    assert up._fixed(address) == address
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        assert up.is_taken(address)
    assert path.exists()
    assert not up.is_taken(address)


def test_a_port_that_is_only_seen_by_connecting_is_taken(taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "bind", lambda *_: None)
    monkeypatch.setattr(socket.socket, "listen", lambda *_: None)
    assert up.is_taken(taken)
    assert not up.is_taken("127.0.0.1:1")


def test_an_address_that_cannot_be_resolved_is_a_mistake() -> None:
    with pytest.raises(Problem) as caught:
        up.is_taken("no.such.host.invalid:1")
    assert caught.value.code is ExitCode.CONFIG


# The lock.


async def test_two_that_start_look_at_the_ports_one_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    voice = up.Voice(["mlx"])
    order: list[str] = []
    first_in = asyncio.Event()

    async def start(name: str) -> None:
        async with up.starting_alone(voice, folder=tmp_path / "lock"):
            order.append(f"{name} in")
            first_in.set()
            await asyncio.sleep(0.05)
            order.append(f"{name} out")

    async with asyncio.TaskGroup() as group:
        group.create_task(start("a"))
        await first_in.wait()
        group.create_task(start("b"))
    assert order == ["a in", "a out", "b in", "b out"]
    assert capsys.readouterr().err == "another `forebay up` is starting; waiting for it\n"


async def test_where_no_lock_can_be_kept_it_goes_on_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    async with up.starting_alone(up.Voice([]), folder=tmp_path / "file"):
        pass


# The default model.


def test_the_default_model_is_fetched_only_where_it_is_wanted_usable_and_missing(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ["mlx"]
    monkeypatch.setattr(up.requirements, "missing", lambda: "")
    assert up.plan(None, only).fetch == empty_home / "cache"
    assert up.plan(None, ["ollama"]).fetch is None
    for text in (
        "[up]\nfetch = false",
        "[mlx]\nfetch_default_model = false",
        '[mlx]\ndefault_model = "another"',
    ):
        assert up.plan(write(text), only).fetch is None, text
    Path("forebay.toml").unlink()
    monkeypatch.setattr(up.requirements, "missing", lambda: "no MLX here")
    assert up.plan(None, only).fetch is None
    monkeypatch.setattr(up.requirements, "missing", lambda: "")
    folder = DEFAULT_MODEL.folder(empty_home / "cache")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert up.plan(None, only).fetch is None


def fetcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> str:
    (tmp_path / "a_fetcher.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return "a_fetcher"


async def test_a_fetch_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"what": "downloading", "done": n, "total": 4096} for n in (0, 2048, 4096)]
    body = (
        "import json, sys\nassert '--json' in sys.argv\n"
        f"for line in {lines!r}: print(json.dumps(line))\nprint('[]')"
    )
    module = fetcher(tmp_path, monkeypatch, body)
    await up.fetch_default_model(up.Voice([]), tmp_path, module=module)
    assert capsys.readouterr().err.splitlines() == [
        "fetching the default model: downloading 0% - of 4.0 KiB",
        "fetching the default model: downloading 50% 2.0 KiB of 4.0 KiB",
        "fetching the default model: downloading 100% 4.0 KiB of 4.0 KiB",
    ]


async def test_a_fetch_that_fails_is_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = fetcher(tmp_path, monkeypatch, "raise SystemExit('no network')")
    await up.fetch_default_model(up.Voice([]), tmp_path, module=module)
    assert capsys.readouterr().err == (
        "the default model could not be fetched: no network; going on without it\n"
    )


# Who is waited for.


class Now:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def keepers(**states: State) -> dict[str, Keeper]:
    made = {}
    for name, state in states.items():
        keeper = Keeper(Program(name=name, command=("true",)), say=lambda name, line: None)
        keeper.state = state
        if state is State.LISTENING:
            keeper.address = f"127.0.0.1:{len(made) + 1}"
        made[name] = keeper
    return made


async def test_mlx_is_waited_for_and_a_bridge_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async def serves(channel: object) -> bool:
        return False

    monkeypatch.setattr(up, "_serves", serves)
    now = Now()
    kept = keepers(
        mlx=State.LISTENING, ollama=State.LISTENING, lmstudio=State.REFUSED, orchestrator=State.LISTENING
    )
    readiness = up.Readiness(kept, clock=now)
    await readiness.look()
    assert readiness.waiting(set()) == ["mlx", "ollama"]
    assert not readiness.patience_is_over()
    now.now = up.BRIDGE_SECONDS + 1
    await readiness.look()
    assert readiness.waiting(set()) == ["mlx"]
    assert readiness.waiting({kept["mlx"].address}) == []
    assert readiness.patience_is_over()
    kept["ollama"].address = ""
    await readiness.look()
    assert readiness.waiting(set()) == ["mlx", "ollama"]
    await readiness.close()


def test_the_ways_to_call_name_the_address() -> None:
    assert "forebay chat\n" in up.how_to_call("127.0.0.1:50150")
    text = up.how_to_call("127.0.0.1:7")
    assert "forebay chat --address 127.0.0.1:7\n" in text
    start = text.index("{")
    body = json.loads(text[start : text.index("'", start)])
    assert body["messages"][0]["role"] == "ROLE_USER"
