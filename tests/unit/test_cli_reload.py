"""`forebay reload`, and what `forebay status --watch` says of backends that were removed."""

from __future__ import annotations

import json

import pytest

from cli_kit import FakeMesh, backend
from forebay.cli import reload as reload_command
from forebay.cli import status
from forebay.cli.app import main
from forebay.cli.problems import ExitCode
from forebay.fleet.v1 import fleet_pb2 as fleet_pb
from forebay.kit.failure import InvalidRequest


@pytest.fixture(name="mesh")
def _mesh(monkeypatch: pytest.MonkeyPatch) -> FakeMesh:
    fake = FakeMesh()
    for module in (reload_command, status):
        monkeypatch.setattr(module, "connected", fake.connected)
    monkeypatch.delenv("FOREBAY_ADDRESS", raising=False)
    return fake


def test_reload_says_what_changed_and_what_takes_a_restart(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.reloaded = fleet_pb.ReloadConfigurationResponse(
        changes=['backend "a": removed'], restart_required=["orchestrator.grace 30s -> 5s"]
    )
    assert main(["reload"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        'backend "a": removed',
        "orchestrator.grace 30s -> 5s  (after a restart)",
    ]
    assert main(["reload", "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changes"] == ['backend "a": removed']
    assert mesh.asked == [("reload", False), ("reload", True)]


def test_reload_says_that_nothing_changed(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reload"]) == 0
    assert capsys.readouterr().out == "nothing changed\n"


def test_a_wrong_configuration_is_told_line_by_line(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["f.toml: orchestrator.picker: wrong", "f.toml: [x]: there is no such section"]
    text = "\n".join(lines)
    mesh.failure = InvalidRequest(
        f"the configuration is wrong, and nothing was changed:\n{text}",
        violations=[("configuration", line) for line in lines],
    )
    assert main(["reload"]) == ExitCode.CONFIG
    error = capsys.readouterr().err
    assert all(error.count(line) == 1 for line in lines)


def test_a_watch_drops_backends_that_were_removed(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.watched.append(backend("mlx"))
    mesh.removed.append("mlx")
    assert main(["status", "--watch"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "mlx  removed"
    assert main(["status", "--watch", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"name": "mlx", "removed": True}
