"""What the commands show of a mesh: backends, models, routes."""

from __future__ import annotations

import io
import json
import sys
from datetime import timedelta

import pytest

from cli_kit import FakeMesh, backend, model
from forebay.cli import explain, models, status
from forebay.cli.app import main
from forebay.cli.problems import ExitCode
from forebay.cli.render import bytes_text, seconds_text
from forebay.fleet.v1 import fleet_pb2 as fleet_pb
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import failure
from forebay.models.v1 import models_pb2 as models_pb


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> FakeMesh:
    fake = FakeMesh()
    for module in (status, models, explain):
        monkeypatch.setattr(module, "connected", fake.connected)
    monkeypatch.delenv("FOREBAY_ADDRESS", raising=False)
    return fake


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(monkeypatch: pytest.MonkeyPatch, *, width: int = 200) -> Tty:
    """Makes stdout and stderr one terminal."""
    tty = Tty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "stdout", tty)
    monkeypatch.setattr(sys, "stderr", tty)
    return tty


def sick() -> fleet_pb.Backend:
    item = backend(
        "ollama",
        fleet_pb.Backend.STATE_EJECTED,
        queued_call_count=2,
        slot_count=4,
        output_tokens_per_second=31.25,
        detail="it failed five times\x1b[2J",
    )
    item.first_delta_duration.FromTimedelta(timedelta(milliseconds=85))
    whole = item.breakers.add(state=fleet_pb.Breaker.STATE_OPEN, reason="BACKEND_ERROR")
    whole.remaining_duration.FromTimedelta(timedelta(seconds=12))
    item.breakers.add(model="llama", state=fleet_pb.Breaker.STATE_HALF_OPEN, reason="STREAM_STALLED")
    item.models.append(model("llama", state=pb.Model.STATE_AVAILABLE))
    return item


def well() -> fleet_pb.Backend:
    item = backend("mlx")
    item.models.extend([model("smol"), model("big", state=pb.Model.STATE_AVAILABLE)])
    return item


# Status.


def test_status_prints_a_line_a_backend_without_colours(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.fleet += [well(), sick(), backend("bare")]
    assert main(["status"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "mlx  active  127.0.0.1:50151  calls 0  smol, +1 on disk",
        (
            "ollama  ejected  127.0.0.1:50151  calls 0  queue 2  1 on disk  it failed five times[2J"
            "  breaker of the whole backend is open (BACKEND_ERROR, 12.00 s left)"
            "  breaker of model llama is half open (STREAM_STALLED)"
        ),
        "bare  active  127.0.0.1:50151  calls 0  -",
    ]


def test_status_is_a_coloured_table_at_a_terminal(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    tty = screen(monkeypatch)
    mesh.fleet += [well(), sick()]
    assert main(["status"]) == 0
    text = tty.getvalue()
    assert "\x1b[32mactive" in text
    assert "\x1b[31mejected" in text
    assert "0/4" in text
    assert "85 ms" in text
    assert "31.2" in text
    assert "ollama: breaker of the whole backend is open (BACKEND_ERROR, 12.00 s left)" in text
    assert "ollama: breaker of model llama is half open (STREAM_STALLED)" in text
    assert "\x1b[2J" not in text


def test_status_on_a_narrow_terminal_is_lines(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    tty = screen(monkeypatch, width=60)
    mesh.fleet.append(well())
    assert main(["status"]) == 0
    assert "mlx  active  127.0.0.1:50151" in tty.getvalue()


def test_status_in_json_leaves_nothing_out(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.fleet.append(sick())
    assert main(["status", "--json"]) == 0
    (item,) = json.loads(capsys.readouterr().out)
    assert item["name"] == "ollama"
    assert item["succeeded_call_count"] == "0"
    assert item["breakers"][0]["remaining_duration"] == "12s"


def test_status_watch_prints_a_line_a_change(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    drained = backend("mlx", fleet_pb.Backend.STATE_DRAINING)
    mesh.watched += [well(), drained]
    assert main(["status", "--watch"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["active", "draining"]
    assert main(["status", "--watch", "--json"]) == 0
    states = [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()]
    assert states == ["STATE_ACTIVE", "STATE_DRAINING"]


def test_status_watch_moves_at_a_terminal(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    tty = screen(monkeypatch)
    mesh.watched += [well(), sick(), backend("mlx", fleet_pb.Backend.STATE_UNREACHABLE)]
    assert main(["status", "-w"]) == 0
    assert "unreachable" in tty.getvalue()


def test_a_failure_of_the_mesh_is_one_line_and_a_code(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.failure = failure.Unauthenticated("send a token")
    assert main(["status"]) == ExitCode.REFUSED
    assert capsys.readouterr().err == (
        "error: send a token (UNAUTHENTICATED): set FOREBAY_TOKEN to a token that the orchestrator knows\n"
    )


def test_drain_and_resume_name_the_new_state(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.fleet.append(well())
    assert main(["drain", "mlx"]) == 0
    assert capsys.readouterr().out.startswith("mlx  draining")
    assert main(["resume", "mlx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "STATE_ACTIVE"
    assert mesh.asked == [("drain", "mlx"), ("resume", "mlx")]


def test_drain_can_wait_for_the_last_call(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.fleet.append(backend("mlx", active_call_count=2))
    assert main(["drain", "mlx", "--wait"]) == 0
    assert "calls 0" in capsys.readouterr().out
    assert mesh.asked.count("backends") == 2


# Models.


def test_models_are_a_table(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    item = model("smol", can=[pb.CAPABILITY_GENERATE, pb.CAPABILITY_JSON_SCHEMA])
    item.context_token_count, item.loaded_context_token_count = 8192, 2048
    item.memory_bytes, item.disk_bytes = 3 * 2**29, 512
    item.weights.size_label, item.weights.quantization, item.weights.format = "135M", "4bit", "safetensors"
    item.detail = "is being looked at"
    mesh.listed += [item, model("none", state=pb.Model.STATE_UNSPECIFIED)]
    mesh.unreachable.append("lmstudio")
    assert main(["models", "list", "-b", "mlx"]) == 0
    out, err = capsys.readouterr()
    assert "135M 4bit safetensors" in out
    assert "2048 of 8192" in out
    assert "1.5 GiB" in out
    assert "512 B" in out
    assert "generate, json schema" in out
    assert "smol: is being looked at" in out
    assert "unknown" in out
    assert all(line == line.rstrip() for line in out.splitlines())
    assert err == "lmstudio could not be asked\n"
    assert mesh.asked == [("models", ("mlx",))]


def test_models_in_json(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.listed.append(model("smol"))
    assert main(["models", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["id"] == "smol"


def test_no_models_says_how_to_get_one(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().err == "there are no models; fetch one with `forebay models pull`\n"


def test_models_are_coloured_at_a_terminal(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    tty = screen(monkeypatch)
    mesh.listed.append(model("smol"))
    assert main(["models", "list"]) == 0
    assert "\x1b[32mactive" in tty.getvalue()


def test_a_load_shows_how_far_it_is_and_how_long_it_took(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [0.01, 0.02, 0.55]
    mesh.loads += [
        models_pb.LoadModelResponse(progress=models_pb.LoadProgress(fraction=step, detail="reading"))
        for step in steps
    ]
    mesh.loads.append(models_pb.LoadModelResponse(progress=models_pb.LoadProgress(detail="warming up")))
    loaded = models_pb.ModelLoaded(model=model("smol"))
    loaded.load_duration.FromTimedelta(timedelta(seconds=1.5))
    mesh.loads.append(models_pb.LoadModelResponse(loaded=loaded))
    assert main(["models", "load", "smol", "--keep", "10m", "--context", "4096", "--pin"]) == 0
    out, err = capsys.readouterr()
    assert out == "smol loaded in 1.50 s on mlx\n"
    assert err.splitlines() == [
        "loading smol: reading 1%",
        "loading smol: reading 55%",
        "loading smol: warming up",
    ]
    request = mesh.asked[0]
    assert isinstance(request, models_pb.LoadModelRequest)
    assert request.keep_alive_duration.ToTimedelta() == timedelta(minutes=10)
    assert (request.context_token_count, request.pinned) == (4096, True)


def test_a_load_of_a_loaded_model_says_so(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "load", "smol", "-b", "mlx"]) == 0
    assert capsys.readouterr().out == "smol was loaded already on mlx\n"


def test_a_load_in_json_prints_its_events(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.loads += [
        models_pb.LoadModelResponse(progress=models_pb.LoadProgress(fraction=0.5)),
        models_pb.LoadModelResponse(loaded=models_pb.ModelLoaded(model=model("smol"))),
    ]
    assert main(["models", "load", "smol", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [next(iter(json.loads(line))) for line in out.splitlines()] == ["progress", "loaded"]
    assert err == ""


def test_a_wrong_duration_is_a_mistake_of_use(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "load", "smol", "--keep", "soon"]) == ExitCode.USAGE
    assert "--keep soon: write a duration" in capsys.readouterr().err


def pulling() -> list[models_pb.PullModelResponse]:
    sizes = [(0, 0), (512, 0), (1024, 4096), (4096, 4096)]
    events = [
        models_pb.PullModelResponse(
            progress=models_pb.PullProgress(detail="fetching", completed_bytes=done, total_bytes=total)
        )
        for done, total in sizes
    ]
    return [*events, models_pb.PullModelResponse(pulled=models_pb.ModelPulled(model=model("smol")))]


def test_a_fetch_shows_bytes(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.pulls += pulling()
    assert main(["models", "pull", "smol"]) == 0
    out, err = capsys.readouterr()
    assert out == "smol is on disk for mlx\n"
    assert err.splitlines() == [
        "fetching smol: fetching",
        "fetching smol: fetching 25% 1.0 KiB of 4.0 KiB",
        "fetching smol: fetching 100% 4.0 KiB of 4.0 KiB",
    ]


def test_a_fetch_is_a_moving_bar_at_a_terminal(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    tty = screen(monkeypatch)
    mesh.pulls += pulling()
    assert main(["models", "pull", "smol"]) == 0
    assert "fetching smol" in tty.getvalue()
    assert "━" in tty.getvalue()


def test_a_fetch_in_json_prints_its_events(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.pulls += pulling()
    assert main(["models", "pull", "smol", "-b", "mlx", "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_unload_and_rm(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "unload", "smol", "--force"]) == 0
    assert main(["models", "unload", "smol", "--json"]) == 0
    assert main(["models", "rm", "smol", "--yes"]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "smol is not in memory"
    assert json.loads(second)["model"]["state"] == "STATE_AVAILABLE"
    assert third == "smol is removed"
    request = mesh.asked[0]
    assert isinstance(request, models_pb.UnloadModelRequest)
    assert request.force


def test_rm_asks_first(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    assert main(["models", "rm", "smol"]) == 1
    assert mesh.asked == []


# Routes.


def routes() -> fleet_pb.ExplainRouteResponse:
    response = fleet_pb.ExplainRouteResponse(request_class="chat", class_reasons=["no tools", "short"])
    response.candidates.add(
        backend="mlx", model="smol", scores={"load": 1.0, "latency": 0.5}, total_score=0.75
    )
    response.candidates.add(
        backend="ollama", model="", refused_by="has-model", refusal_detail="it has no model smol"
    )
    return response


def test_explain_shows_scores_and_refusals(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.explained = routes()
    assert main(["explain", "Why?", "-m", "smol", "-b", "mlx"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "taken for chat: no tools; short"
    assert "→" in out
    assert "0.750" in out
    assert "has-model: it has no model smol" in out
    request = mesh.asked[0]
    assert isinstance(request, fleet_pb.ExplainRouteRequest)
    assert request.request.model == "smol"
    assert list(request.request.routing.backends) == ["mlx"]


def test_explain_of_embeddings_in_json(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.explained = routes()
    assert main(["explain", "text", "--embed", "-b", "mlx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["candidates"][0]["scores"] == {"load": 1.0, "latency": 0.5}
    request = mesh.asked[0]
    assert isinstance(request, fleet_pb.ExplainRouteRequest)
    assert list(request.embed_request.texts) == ["text"]
    assert list(request.embed_request.routing.backends) == ["mlx"]


def test_explain_embeddings_anywhere(mesh: FakeMesh) -> None:
    mesh.explained = routes()
    assert main(["explain", "--embed"]) == 0


def test_explain_fails_where_no_backend_can_take_it(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.explained = routes()
    del mesh.explained.candidates[0]
    mesh.explained.request_class = ""
    assert main(["explain"]) == ExitCode.UNAVAILABLE
    assert capsys.readouterr().err == "no backend can take this request\n"


# Numbers.


def test_sizes_and_times_have_units() -> None:
    assert [bytes_text(n) for n in (0, 512, 2048, 3 * 2**20, 5 * 2**40)] == [
        "-",
        "512 B",
        "2.0 KiB",
        "3.0 MiB",
        "5120.0 GiB",
    ]
    assert [seconds_text(n) for n in (0.0004, 0.085, 1.239, 200.0)] == ["0 ms", "85 ms", "1.24 s", "3 m 20 s"]
