"""What `forebay status` and `forebay explain` show of speed, shares and how a model was found."""

from __future__ import annotations

import io
import json
import re
import sys
from datetime import timedelta

import pytest

from cli_kit import FakeMesh, backend
from forebay.cli import explain, status
from forebay.cli.app import main
from forebay.fleet.v1 import fleet_pb2 as fleet_pb


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> FakeMesh:
    fake = FakeMesh()
    for module in (status, explain):
        monkeypatch.setattr(module, "connected", fake.connected)
    monkeypatch.delenv("FOREBAY_ADDRESS", raising=False)
    return fake


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Tty:
    tty = Tty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(sys, "stdout", tty)
    return tty


def measured() -> fleet_pb.Backend:
    item = backend("mlx", share=0.45)
    one = item.performance.add(
        model="smol\x1b[2J",
        call_count=12,
        error_ratio=0.25,
        output_tokens_per_second=31.25,
        prefill_tokens_per_second=1234.5,
    )
    for bound, milliseconds in ((256, 85), (0, 2500)):
        first = one.first_deltas.add(max_prompt_token_count=bound, call_count=3)
        first.median_duration.FromTimedelta(timedelta(milliseconds=milliseconds))
    item.performance.add(model="new", call_count=1)
    return item


def test_status_shows_what_was_measured_of_each_model(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    tty = terminal(monkeypatch)
    mesh.fleet += [measured(), backend("ollama")]
    assert main(["status"]) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", tty.getvalue())
    rows = [line.split() for line in text.splitlines()]
    assert [
        "mlx",
        "smol[2J",
        "12",
        "25%",
        "1234",
        "31.2",
        "to",
        "256:",
        "85",
        "ms,",
        "longer:",
        "2.50",
        "s",
    ] in rows
    assert ["mlx", "new", "1", "0%", "-", "-", "-"] in rows
    assert "mlx: comes back with 45% of its share of calls" in text
    assert "ollama: comes back" not in text


def test_status_of_a_fleet_that_did_nothing_has_no_second_table(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    tty = terminal(monkeypatch)
    mesh.fleet.append(backend("ollama"))
    assert main(["status"]) == 0
    assert "first token by length" not in tty.getvalue()


def test_status_in_json_has_what_was_measured(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.fleet.append(measured())
    assert main(["status", "--json"]) == 0
    (item,) = json.loads(capsys.readouterr().out)
    assert item["share"] == 0.45
    assert item["performance"][0]["first_deltas"][0]["median_duration"] == "0.085s"


def routes() -> fleet_pb.ExplainRouteResponse:
    response = fleet_pb.ExplainRouteResponse(request_class="chat")
    response.candidates.add(
        backend="mlx",
        model="mlx-community/smol-4bit",
        match="name",
        match_detail="line, size, variant and quantisation are those of smol",
        scores={"load": 1.0, "latency": 0.5},
        total_score=0.75,
    )
    response.candidates.add(
        backend="ollama", model="smol", match="exact", scores={"load": 1.0, "affinity": 0.25}, total_score=0.5
    )
    response.candidates.add(backend="lmstudio", refused_by="model", refusal_detail="it has no model smol")
    return response


def test_explain_says_how_each_model_was_found_and_what_each_scorer_says(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.explained = routes()
    assert main(["explain"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["→", "mlx", "mlx-community/smol-4bit", "name", "0.750"] in rows
    assert ["ollama", "smol", "exact", "0.500"] in rows
    assert "mlx: line, size, variant and quantisation are those of smol" in out
    assert ["scorer", "mlx", "ollama"] in rows
    assert rows[-3:] == [["affinity", "-", "0.25"], ["latency", "0.50", "-"], ["load", "1.00", "1.00"]]


def test_explain_tells_two_models_of_one_backend_apart(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.explained = routes()
    mesh.explained.candidates[1].backend = "mlx"
    assert main(["explain"]) == 0
    assert "mlx mlx-community/smol-4bit" in capsys.readouterr().out


def test_explain_without_scores_has_one_table(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.explained = routes()
    del mesh.explained.candidates[:2]
    assert main(["explain"]) != 0
    assert "scorer" not in capsys.readouterr().out
