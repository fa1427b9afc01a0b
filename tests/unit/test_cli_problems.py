"""Exit codes and remedies: every failure has one, and the line says what to do."""

from __future__ import annotations

from datetime import timedelta

import pytest

from forebay.cli import render
from forebay.cli.problems import ExitCode, Problem, from_failure, unreachable
from forebay.kit import failure


def kinds(root: type[failure.Failure] = failure.Failure) -> list[type[failure.Failure]]:
    return [
        kind
        for sub in root.__subclasses__()
        for kind in (sub, *kinds(sub))
        if kind.__module__ == failure.__name__
    ]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.reason)
def test_every_failure_becomes_a_line_with_its_reason_and_an_exit_code(kind: type[failure.Failure]) -> None:
    problem = from_failure(kind("It went wrong."))
    assert problem.message == f"It went wrong ({kind.reason})"
    assert problem.code is not ExitCode.OK


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (failure.InvalidRequest, 65),
        (failure.ModelNotFound, 66),
        (failure.NoBackend, 69),
        (failure.Internal, 70),
        (failure.StreamInterrupted, 74),
        (failure.QueueFull, 75),
        (failure.BrokenStream, 76),
        (failure.PermissionDenied, 77),
        (failure.ModelLoadFailed, 1),
    ],
)
def test_a_script_can_tell_failures_apart(kind: type[failure.Failure], code: int) -> None:
    assert from_failure(kind("x")).code == code


def test_a_time_to_wait_goes_before_the_general_remedy() -> None:
    assert (
        from_failure(failure.QueueFull("x", retry_after=timedelta(seconds=1.5))).remedy
        == "try again in 1.5 s"
    )


def test_mistakes_in_fields_are_lines_unless_the_message_says_them() -> None:
    violations = [("limits.stop_sequences", "at most 16"), ("model", "name a model")]
    problem = from_failure(failure.InvalidRequest("name a model", violations=violations))
    assert problem.lines == ("limits.stop_sequences: at most 16",)


def test_a_problem_with_several_mistakes_is_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    render.problem(Problem("two mistakes", remedy="put them right", lines=["[red] one\x1b[1m", "two"]))
    assert capsys.readouterr().err.splitlines() == [
        "error: two mistakes",
        "  [red] one[1m",
        "  two",
        "  put them right",
    ]


def test_an_address_that_hangs_up_gets_a_hint() -> None:
    assert unreachable("a:1", hint="it hung up").message == "nothing answers on a:1 (it hung up)"
