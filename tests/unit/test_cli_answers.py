"""`forebay chat` and `embed`: the answer on stdout, everything about it on stderr, and the right code."""

from __future__ import annotations

import io
import json
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from cli_kit import FakeMesh, model, reply
from forebay.cli import chat
from forebay.cli.app import main
from forebay.cli.problems import ExitCode, unreachable
from forebay.cli.render import progress_text
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import failure


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> FakeMesh:
    fake = FakeMesh()
    monkeypatch.setattr(chat, "connected", fake.connected)
    monkeypatch.delenv("FOREBAY_ADDRESS", raising=False)
    return fake


class Tty(io.StringIO):
    """A terminal, as far as a program can tell."""

    def isatty(self) -> bool:
        return True


def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> tuple[Tty, Tty]:
    """Makes stdout and stderr terminals. Not a fixture: pytest puts its own in place after set-up."""
    out, err = Tty(), Tty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    return out, err


def request_of(mesh: FakeMesh, index: int = -1) -> pb.GenerateRequest:
    request = mesh.asked[index]
    assert isinstance(request, pb.GenerateRequest)
    return request


def test_the_answer_goes_to_stdout_and_the_figures_to_stderr(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.replies.append(reply("Pa", "ris"))
    assert main(["chat", "What is the capital of France?"]) == 0
    out, err = capsys.readouterr()
    assert out == "Paris\n"
    assert err.startswith("mlx · smol · first token ")
    assert "2 tokens" in err
    assert "\x1b" not in out + err
    assert mesh.addresses == ["127.0.0.1:50150"]


def test_options_reach_the_request(mesh: FakeMesh, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("the notes")
    mesh.replies.append(reply("x"))
    arguments = (
        "chat Summarise -m smol -b mlx -s Be-brief -t 0.5 -n 7 --seed 3 --stop END --stop FIN "
        f"--fallback other --continue --timeout 5 -a 127.0.0.1:1 -q --file {tmp_path / 'notes.txt'}"
    )
    assert main(arguments.split()) == 0
    assert mesh.addresses == ["127.0.0.1:1"]
    request = request_of(mesh)
    assert request.model == "smol"
    assert [(m.role, m.parts[0].text) for m in request.messages] == [
        (pb.ROLE_SYSTEM, "Be-brief"),
        (pb.ROLE_USER, "Summarise\n\nthe notes"),
    ]
    assert request.sampling.temperature == 0.5
    assert request.sampling.seed == 3
    assert not request.sampling.HasField("top_p")
    assert request.limits.max_output_token_count == 7
    assert list(request.limits.stop_sequences) == ["END", "FIN"]
    assert list(request.routing.backends) == ["mlx"]
    assert list(request.routing.fallback_models) == ["other"]
    assert request.routing.continuation == pb.CONTINUATION_POLICY_SAME_WEIGHTS
    assert request.routing.priority == pb.PRIORITY_INTERACTIVE


def test_quiet_prints_the_answer_only(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.replies.append(reply("yes\n"))
    assert main(["chat", "-q", "hi"]) == 0
    assert capsys.readouterr() == ("yes\n", "")


def test_a_pipe_is_the_prompt(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    mesh.replies.append(reply("ok"))
    assert main(["chat"]) == 0
    assert request_of(mesh).messages[0].parts[0].text == "from a pipe"
    assert capsys.readouterr().out == "ok\n"


def test_an_empty_pipe_is_a_mistake_of_use(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert main(["chat"]) == ExitCode.USAGE
    assert "nothing on standard input" in capsys.readouterr().err


def test_a_file_alone_is_the_prompt(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", Tty())
    (tmp_path / "q.txt").write_text("from a file")
    mesh.replies.append(reply("ok"))
    assert main(["chat", "--file", str(tmp_path / "q.txt")]) == 0
    assert request_of(mesh).messages[0].parts[0].text == "from a file"


def test_json_prints_each_event_as_a_line(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.replies.append(reply("é"))
    assert main(["chat", "hi", "--json"]) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [next(iter(set(line) - {"sequence"})) for line in lines] == ["started", "delta", "finished"]
    assert lines[1]["delta"]["text"] == "é"
    assert err == ""


def test_json_ends_a_failed_answer_with_the_error(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    events = reply("half")[:-1]
    mesh.replies.append([*events, failure.StreamInterrupted("mlx was lost", metadata={"backend": "mlx"})])
    assert main(["chat", "hi", "-m", "smol", "--json"]) == ExitCode.INTERRUPTED
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1]) == {
        "error": {"reason": "STREAM_INTERRUPTED", "message": "mlx was lost", "metadata": {"backend": "mlx"}}
    }
    assert err.count("\n") == 1


def test_a_broken_answer_is_kept_and_marked(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.replies.append([*reply("The cap", "ital")[:-1], failure.StreamStalled("mlx fell silent.")])
    assert main(["chat", "hi"]) == ExitCode.INTERRUPTED
    out, err = capsys.readouterr()
    assert out == "The capital\n"
    assert err.splitlines() == [
        "[the answer stops here: it is not complete]",
        (
            "error: mlx fell silent (STREAM_STALLED): ask again; "
            "`forebay status` shows whether the backend is well"
        ),
    ]


def test_nothing_that_answers_is_one_line_with_a_remedy(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.replies.append([unreachable("127.0.0.1:50150")])
    assert main(["chat", "hi"]) == ExitCode.UNAVAILABLE
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error: nothing answers on 127.0.0.1:50150: start it with `forebay up`, "
        "or name another address with --address\n"
    )


def test_a_traceback_is_shown_with_debug_only(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.replies += [[RuntimeError("a bug")], [RuntimeError("a bug")]]
    assert main(["chat", "hi"]) == ExitCode.INTERNAL
    err = capsys.readouterr().err
    assert err == "error: unexpected RuntimeError: a bug: --debug shows where\n"
    assert main(["chat", "hi", "--debug"]) == ExitCode.INTERNAL
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_ends_with_130_and_keeps_what_came(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.replies.append([*reply("begin")[:-1], KeyboardInterrupt()])
    assert main(["chat", "hi"]) == ExitCode.CANCELLED
    assert capsys.readouterr().out == "begin\n"


def test_a_pipe_whose_reader_left_ends_quietly(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mesh.replies.append([BrokenPipeError()])
    monkeypatch.setattr("os.dup2", lambda *_: None)
    assert main(["chat", "hi"]) == ExitCode.PIPE
    assert capfd.readouterr() == ("", "")


# Which model.


def no_model() -> failure.Failure:
    return failure.InvalidRequest("model: name a model", violations=[("model", "name a model")])


def test_without_a_model_the_orchestrator_s_default_answers(mesh: FakeMesh) -> None:
    mesh.replies.append(reply("x"))
    assert main(["chat", "hi"]) == 0
    assert request_of(mesh).model == ""
    assert len(mesh.asked) == 1


@pytest.mark.parametrize("refusal", [no_model(), failure.ModelNotFound("no model ''")])
def test_where_no_model_is_refused_one_in_memory_that_can_generate_is_picked(
    mesh: FakeMesh, refusal: failure.Failure
) -> None:
    generate, embed = pb.CAPABILITY_GENERATE, pb.CAPABILITY_EMBED
    mesh.listed += [
        model("embedder", can=[embed], cannot=[generate]),
        model("old-embedder", can=[embed]),
        model("cold", state=pb.Model.STATE_AVAILABLE, can=[generate]),
        model("broken", state=pb.Model.STATE_FAILED, can=[generate]),
        model("warm", can=[generate]),
    ]
    mesh.replies += [[refusal], reply("x")]
    assert main(["chat", "hi", "-b", "mlx"]) == 0
    assert mesh.asked[1] == ("models", ("mlx",))
    assert request_of(mesh).model == "warm"


def test_the_only_model_is_picked_though_it_is_not_loaded(mesh: FakeMesh) -> None:
    mesh.listed.append(model("cold", state=pb.Model.STATE_AVAILABLE))
    mesh.replies += [[no_model()], reply("x")]
    assert main(["chat", "hi"]) == 0
    assert request_of(mesh).model == "cold"


def test_several_models_and_none_loaded_are_listed(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.listed += [model(name, state=pb.Model.STATE_AVAILABLE) for name in ("b", "a")]
    mesh.replies.append([no_model()])
    assert main(["chat", "hi"]) == ExitCode.REQUEST
    assert capsys.readouterr().err.splitlines() == [
        "error: there are 2 models and none is loaded; name one with --model",
        "  a",
        "  b",
    ]


def test_no_model_at_all_says_how_to_get_one(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.replies.append([no_model()])
    assert main(["chat", "hi"]) == ExitCode.NOT_FOUND
    assert "no model that can generate: fetch one with `forebay models pull`" in capsys.readouterr().err


def test_another_mistake_in_the_request_is_not_taken_for_a_missing_model(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.replies.append(
        [failure.InvalidRequest("it is wrong", violations=[("limits", "too many stop sequences")])]
    )
    assert main(["chat", "hi"]) == ExitCode.REQUEST
    assert capsys.readouterr().err.splitlines() == [
        "error: it is wrong (INVALID_REQUEST)",
        "  limits: too many stop sequences",
    ]


# At a terminal.


def progress(stage: pb.Progress.Stage.ValueType, **more: float) -> pb.GenerateResponse:
    event = pb.GenerateResponse(progress=pb.Progress(stage=stage))
    if "position" in more:
        event.progress.queue_position = int(more["position"])
    if "fraction" in more:
        event.progress.fraction = more["fraction"]
    if "left" in more:
        event.progress.remaining_duration.FromTimedelta(timedelta(seconds=more["left"]))
    return event


def test_progress_shows_at_a_terminal_only(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = at_a_terminal(monkeypatch)
    waiting = [
        progress(pb.Progress.STAGE_QUEUED, position=3, left=12.0),
        progress(pb.Progress.STAGE_LOADING, fraction=0.5),
    ]
    mesh.replies.append([*waiting, *reply("done")])
    assert main(["chat", "hi"]) == 0
    assert out.getvalue() == "done\n"
    assert "loading the model, 50%" in err.getvalue()
    assert progress_text(waiting[0].progress) == "waiting for a turn, 3 ahead, about 12.00 s left"
    assert "\x1b[" in err.getvalue()


def test_notices_of_shortfalls_and_of_a_backend_that_took_over_go_to_stderr(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    short = pb.Degradation(
        kind=pb.DEGRADATION_KIND_OPTION_IGNORED, field="sampling.seed", detail="the seed has no effect"
    )
    begin, *rest, end = reply("one ", "two")
    begin.started.degradations.append(short)
    begin.started.replayed = True
    lost = pb.Continued(
        backend="ollama",
        model="smol:135m",
        reason="STREAM_INTERRUPTED",
        lost_backend="mlx",
        degradations=[short],
    )
    mesh.replies.append([begin, rest[0], pb.GenerateResponse(continued=lost), rest[1], end])
    assert main(["chat", "hi"]) == 0
    out, err = capsys.readouterr()
    assert out == "one two\n"
    lines = err.splitlines()
    assert lines[:4] == [
        "replayed from the cache",
        "falls short: option ignored (sampling.seed): the seed has no effect",
        "mlx was lost (STREAM_INTERRUPTED); ollama goes on with smol:135m",
        "falls short from here on: option ignored (sampling.seed): the seed has no effect",
    ]
    assert lines[4].startswith("ollama · smol:135m")


def test_reasoning_and_tool_calls_are_shown_apart_from_the_answer(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    begin, answer, end = reply("42")
    thought = pb.GenerateResponse(delta=pb.Delta(reasoning="hmm", token_count=1))
    call = pb.ToolCallDelta(index=0, id="1", name="add", arguments_json='{"a":')
    more = pb.ToolCallDelta(index=0, arguments_json="1}")
    calls = [pb.GenerateResponse(delta=pb.Delta(tool_call=part)) for part in (call, more)]
    end.finished.reason = pb.FINISH_REASON_LENGTH
    end.finished.usage.cached_token_count = 2
    mesh.replies += [[begin, thought, answer, *calls, end], [begin, thought, end]]
    assert main(["chat", "hi"]) == 0
    out, err = capsys.readouterr()
    assert out == "42\n"
    assert err.startswith("hmm")
    assert 'tool call: add({"a":1})' in err
    assert "2 of 3 prompt tokens cached" in err
    assert "stopped at the token limit" in err
    assert main(["chat", "hi"]) == 0
    assert capsys.readouterr().err.startswith("hmm\nmlx")


def test_control_characters_of_a_model_cannot_reach_a_terminal_and_a_pipe_gets_every_byte(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "a\x1b[2Jb\tc\nd"
    mesh.replies += [reply(hostile), reply(hostile)]
    assert main(["chat", "-q", "hi"]) == 0
    assert capsys.readouterr().out == hostile + "\n"
    screen = Tty()
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["chat", "-q", "hi"]) == 0
    assert screen.getvalue() == "a[2Jb\tc\nd\n"


def test_on_a_terminal_a_takeover_begins_a_line(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_a_terminal(monkeypatch)
    begin, first, second, end = reply("one", "two")
    mesh.replies.append([begin, first, pb.GenerateResponse(continued=pb.Continued(backend="b")), second, end])
    assert main(["chat", "hi"]) == 0
    assert terminal[0].getvalue() == "one\ntwo\n"


# A conversation.


def chatting(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    pending = list(lines)

    def read(prompt: str) -> str:
        line = pending.pop(0) if pending else EOFError
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", Tty())


def test_a_conversation_remembers_what_was_said(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    chatting(monkeypatch, "hello", "", "and then?", "/exit", "never read")
    mesh.replies += [reply("hi"), reply("more")]
    assert main(["chat"]) == 0
    assert [(m.role, m.parts[0].text) for m in request_of(mesh).messages] == [
        (pb.ROLE_USER, "hello"),
        (pb.ROLE_ASSISTANT, "hi"),
        (pb.ROLE_USER, "and then?"),
    ]
    assert len(mesh.addresses) == 1


def test_slash_commands_steer_a_conversation(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ("one", "/reset", "/system Be kind", "/system", "/model other", "/model", "/what", "two")
    chatting(monkeypatch, *lines)
    mesh.replies += [reply("1"), reply("2")]
    assert main(["chat"]) == 0
    request = request_of(mesh)
    assert request.model == "other"
    assert [m.parts[0].text for m in request.messages] == ["Be kind", "two"]
    err = capsys.readouterr().err
    assert "the conversation is forgotten" in err
    assert "system: Be kind" in err
    assert "model: other" in err
    assert "/reset         forget the conversation" in err


def test_a_failed_turn_is_told_and_forgotten_and_the_conversation_goes_on(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chatting(monkeypatch, "one", "two", "three", "four", KeyboardInterrupt)
    mesh.replies += [
        [failure.QueueFull("the queue is full", retry_after=timedelta(seconds=2))],
        [unreachable("127.0.0.1:50150")],
        [*reply("par")[:-1], KeyboardInterrupt()],
        reply("ok"),
    ]
    assert main(["chat"]) == 0
    err = capsys.readouterr().err
    assert "the queue is full (QUEUE_FULL): try again in 2.0 s" in err
    assert "nothing answers" in err
    assert "stopped" in err
    assert [m.parts[0].text for m in request_of(mesh).messages] == ["four"]


# Embeddings.


def test_embeddings_are_summed_up(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.embeddings.append(
        pb.EmbedResponse(
            embeddings=[pb.Embedding(values=[0.6, 0.8]), pb.Embedding(values=[1.0] + [0.0] * 7)],
            backend="mlx",
            model="smol",
            usage=pb.Usage(prompt_token_count=9),
        )
    )
    assert main(["embed", "short", "long " * 20, "--dimensions", "8", "-b", "mlx"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "2 components, norm 1.0000  [+0.6000 +0.8000]  short"
    assert lines[1].startswith("8 components, norm 1.0000  [+1.0000 +0.0000")
    assert lines[1].endswith("…")
    assert err == "mlx · smol, 9 tokens\n"
    request = mesh.asked[0]
    assert isinstance(request, pb.EmbedRequest)
    assert request.dimension_count == 8
    assert list(request.routing.backends) == ["mlx"]


def test_embeddings_in_json_are_complete(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.listed.append(model("vec", can=[pb.CAPABILITY_EMBED]))
    mesh.embeddings += [no_model(), pb.EmbedResponse(embeddings=[pb.Embedding(values=[1.0])])]
    assert main(["embed", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["embeddings"] == [{"values": [1.0], "token_count": 0}]
    request = mesh.asked[-1]
    assert isinstance(request, pb.EmbedRequest)
    assert request.model == "vec"


def test_a_cancelled_answer_leaves_no_moving_line(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_a_terminal(monkeypatch)
    mesh.replies.append([progress(pb.Progress.STAGE_UNSPECIFIED), KeyboardInterrupt()])
    assert main(["chat", "hi"]) == ExitCode.CANCELLED
    assert "working" in terminal[1].getvalue()
    assert terminal[1].getvalue().rstrip().endswith("\x1b[2K") or "\x1b[?25h" in terminal[1].getvalue()
