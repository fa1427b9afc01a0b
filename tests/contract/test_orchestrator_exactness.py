"""Replies that break off, over real gRPC: a strict prefix and not OK, or gone on with and equal."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import grpc.aio
import pytest

from contract.orchestrator_mesh import WAIT_SECONDS, Mesh, reason, until
from forebay.inference.v1 import inference_pb2 as pb
from forebay.testing import grammar
from forebay.testing.calls import ask
from forebay.testing.script import DEFAULT_CAPABILITIES, Fault, Script, ScriptedModel
from forebay.testing.scripted import Fate, ScriptedEngine

TOKENS = 12
FAULTS = ("UNAVAILABLE", "INTERNAL", "STREAM_INTERRUPTED", "TRUNCATE", "CRASH", "STALL")


def engine(backend: str, **fields: object) -> ScriptedEngine:
    values: dict[str, object] = {"name": "m", "weights": "same", "script": Script(token_count=TOKENS)}
    return ScriptedEngine(name=backend, models=[ScriptedModel(**{**values, **fields})])  # type: ignore[arg-type]  # by name


def request(
    policy: pb.ContinuationPolicy.ValueType = pb.CONTINUATION_POLICY_SAME_WEIGHTS,
) -> pb.GenerateRequest:
    made = ask(model="m")
    made.routing.continuation = policy
    made.routing.backends.extend(["a", "b"])
    return made


def broken(kind: str, at: int | str) -> Script:
    return Script(token_count=TOKENS, fault=Fault.parse(f"{kind}@{at}"))


def mesh(folder: Path, *engines: ScriptedEngine, **settings: object) -> Mesh:
    retry = {"budget_per_second": 1000, **settings.pop("retry", {})}  # type: ignore[dict-item]  # it is a dict
    return Mesh(folder, *engines, backend={"between_events_timeout": "100ms"}, retry=retry, **settings)


async def read(mesh: Mesh, asked: pb.GenerateRequest) -> tuple[list[pb.GenerateResponse], str]:
    """Returns the events, and the reason of the failure or an empty string."""
    events: list[pb.GenerateResponse] = []
    try:
        async for event in mesh.client.Generate(asked, timeout=WAIT_SECONDS):
            events.append(event)  # noqa: PERF401  # those that came before a failure count
    except grpc.aio.AioRpcError as error:
        grammar.check(events, complete=False)
        return events, reason(error)
    grammar.check(events)
    return events, ""


async def test_every_break_at_every_place_is_gone_on_with_and_the_whole_is_equal(tmp_path: Path) -> None:
    a, b = engine("a"), engine("b")
    whole = a.expected(request())
    async with mesh(tmp_path, a, b) as running:
        for kind in FAULTS:
            for at in range(1, TOKENS + 1, 5 if kind == "STALL" else 3):
                a.then(broken(kind, at))
                events, failed = await read(running, request())
                assert (grammar.text(events), failed) == (whole, ""), (kind, at)
                (mark,) = [event.continued for event in events if event.HasField("continued")]
                assert (mark.backend, mark.lost_backend) == ("b", "a")
                usage = events[-1].finished.usage
                assert usage.output_token_count == TOKENS
                assert usage.prompt_token_count == 8
                assert not any(delta.token_ids for delta in grammar.deltas(events))
                running.fleet["a"].breakers.heal()
        a.assert_used()
        await until(lambda: not a.active and not b.active)


async def test_without_leave_to_go_on_a_break_is_a_strict_prefix_and_not_ok(tmp_path: Path) -> None:
    a, b = engine("a"), engine("b")
    whole = a.expected(request())
    async with mesh(tmp_path, a, b) as running:
        for kind in FAULTS:
            a.then(broken(kind, 5))
            events, failed = await read(running, request(pb.CONTINUATION_POLICY_NEVER))
            said = grammar.text(events)
            assert whole.startswith(said)
            assert len(said) < len(whole)
            assert failed in {"STREAM_INTERRUPTED", "STREAM_STALLED"}
            running.fleet["a"].breakers.heal()
        assert not b.records
        await until(lambda: not a.active)


async def test_other_weights_go_on_only_if_any_model_may(tmp_path: Path) -> None:
    a, b = engine("a"), engine("b", weights="other")
    async with mesh(tmp_path, a, b, retry={"continue_wait": "0s"}) as running:
        a.then(broken("INTERNAL", 4), broken("INTERNAL", 4))
        events, failed = await read(running, request(pb.CONTINUATION_POLICY_ANY_MODEL))
        assert not failed
        assert grammar.text(events).split()[:4] == a.expected(request()).split()[:4]
        assert len(grammar.text(events).split()) == TOKENS
        (record,) = b.records
        assert isinstance(record.request, pb.GenerateRequest)
        assert record.request.continue_from.text
        assert not record.request.continue_from.token_ids
        running.fleet["a"].breakers.heal()
        # The only one of the same weights is the one that was lost: it may go on itself.
        events, failed = await read(running, request())
        assert not failed
        assert grammar.text(events) == a.expected(request())
        assert next(e.continued.backend for e in events if e.HasField("continued")) == "a"


async def test_one_that_cannot_go_on_from_a_prefix_is_not_asked_to(tmp_path: Path) -> None:
    able = DEFAULT_CAPABILITIES - {pb.CAPABILITY_CONTINUE}
    a, b = engine("a", capabilities=able), engine("b", capabilities=able)
    async with mesh(tmp_path, a, b, retry={"continue_wait": "0s"}) as running:
        a.then(broken("INTERNAL", 4))
        events, failed = await read(running, request())
        assert failed == "STREAM_INTERRUPTED"
        assert len(grammar.deltas(events)) == 4
        assert not b.records


async def test_the_same_weights_under_another_name_go_on(tmp_path: Path) -> None:
    a, b = engine("a"), engine("b", name="theirs")
    async with mesh(tmp_path, a, b) as running:
        a.then(broken("INTERNAL", 4))
        events, failed = await read(running, request())
        assert not failed
        assert grammar.text(events) == a.expected(request())
        (mark,) = [event.continued for event in events if event.HasField("continued")]
        assert (mark.backend, mark.model) == ("b", "theirs")


async def test_weights_that_changed_since_they_were_listed_do_not_go_on(tmp_path: Path) -> None:
    a, b = engine("a"), engine("b")
    async with mesh(
        tmp_path, a, b, retry={"continue_wait": "0s"}, probe={"models_interval": "1h"}
    ) as running:
        b.models["m"] = dataclasses.replace(b.models["m"], weights="new")
        a.then(broken("INTERNAL", 4), broken("INTERNAL", 2))
        asked = request()
        asked.routing.max_attempt_count = 2
        events, failed = await read(running, asked)
        assert failed == "STREAM_INTERRUPTED"
        assert a.expected(request()).startswith(grammar.text(events))
        assert {e.continued.backend for e in events if e.HasField("continued")} == {"a"}
        assert b.records  # it was asked, and what it said was not taken


@pytest.mark.parametrize("stops", [["{mill} {wheel}"], ["nowhere"]])
async def test_a_stop_sequence_across_the_splice_ends_the_reply_where_it_would_have(
    tmp_path: Path, stops: list[str]
) -> None:
    a, b = engine("a"), engine("b")
    words = a.expected(request()).split()
    asked = request()
    asked.limits.stop_sequences.extend(stop.format(mill=words[5], wheel=words[6]) for stop in stops)
    whole = a.expected(asked)
    async with mesh(tmp_path, a, b) as running:
        for at in range(1, 6):
            a.then(broken("INTERNAL", at))
            events, failed = await read(running, asked)
            assert (grammar.text(events), failed) == (whole, "")
            assert events[-1].finished.stop_sequence == (
                "" if "nowhere" in stops else asked.limits.stop_sequences[0]
            )
            running.fleet["a"].breakers.heal()


async def test_a_stop_token_ends_a_spliced_reply_where_it_would_have(tmp_path: Path) -> None:
    a, b = engine("a"), engine("b")
    shown = request()
    shown.include_token_ids = True
    async with mesh(tmp_path, a, b) as running:
        events, _ = await read(running, shown)
        tokens = [token for delta in grammar.deltas(events) for token in delta.token_ids]
        stop = next(token for i, token in enumerate(tokens) if i > 5 and token not in tokens[:i])
        asked = request()
        asked.limits.stop_token_ids.append(stop)
        whole = a.expected(asked)
        assert len(whole.split()) == tokens.index(stop)
        for at in (1, 3, tokens.index(stop) - 1, "end"):
            a.then(broken("INTERNAL", at))
            events, failed = await read(running, asked)
            assert (grammar.text(events), failed) == (whole, "")
            finished = events[-1].finished
            assert (finished.reason, finished.stop_token_id) == (pb.FINISH_REASON_STOP, stop)
            assert finished.usage.output_token_count == tokens.index(stop)
            assert any(event.HasField("continued") for event in events)
            running.fleet["a"].breakers.heal()


async def test_stop_tokens_are_asked_of_models_that_have_them_and_else_refused(tmp_path: Path) -> None:
    able = DEFAULT_CAPABILITIES - {pb.CAPABILITY_STOP_TOKEN_IDS}
    a, b = engine("a", capabilities=able), engine("b")
    asked = request()
    asked.limits.stop_token_ids.append(1 << 30)
    async with mesh(tmp_path, a, b) as running:
        for _ in range(3):
            events, failed = await read(running, asked)
            assert (grammar.text(events), failed) == (b.expected(request()), "")
        assert not a.records
        asked.routing.backends[:] = ["a"]
        assert await read(running, asked) == ([], "CAPABILITY_UNSUPPORTED")
        asked.accepted_degradations.append(pb.DEGRADATION_KIND_OPTION_IGNORED)
        events, failed = await read(running, asked)
        assert not failed
        (started,) = [event.started for event in events if event.HasField("started")]
        assert [told.field for told in started.degradations] == ["limits.stop_token_ids"]


async def test_a_hedged_reply_is_one_reply_and_the_loser_generates_no_more(tmp_path: Path) -> None:
    a, b = engine("a"), engine("b")
    hedge = {"enabled": True, "min_samples": 1, "delay_min": "20ms"}
    async with mesh(tmp_path, a, b, hedge=hedge) as running:
        first, _ = await read(running, request())  # by which it is known how long that takes
        a.then(Script(token_count=TOKENS, first_delay=60.0))
        events, failed = await read(running, request())
        assert not failed
        assert grammar.text(events) == grammar.text(first)
        assert events[0].started.backend == "b"
        await until(lambda: not a.active)
        assert [record.fate for record in a.records] == [Fate.COMPLETED, Fate.CANCELLED]


async def test_a_reply_that_violates_its_schema_is_not_finished(tmp_path: Path) -> None:
    a = engine("a")
    asked = ask(model="m")
    asked.output_format.json_schema = '{"type": "integer"}'
    async with mesh(tmp_path, a) as running:
        events, failed = await read(running, asked)
        assert not failed
        assert grammar.text(events) == "1"
        # The scripted model claims that it enforces schemas, and knows no `not`.
        asked.output_format.json_schema = '{"type": "integer", "not": {"const": 1}}'
        events, failed = await read(running, asked)
        assert failed == "FORMAT_VIOLATED"
        assert grammar.text(events) == "1"
