"""What is remembered of a backend's speed: in windows, over restarts, and without anybody's words."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from datetime import timedelta
from pathlib import Path

import pytest

from forebay.fleet.v1 import fleet_pb2
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BackendError, Failure, InvalidRequest
from forebay.kit.layers.measure import Ending, Measure, Outcome
from forebay.kit.pipeline import Call, Request, Send
from forebay.orchestrator.build import Orchestrator
from forebay.orchestrator.config import BackendSettings, OrchestratorSettings, PerformanceSettings
from forebay.orchestrator.fleet.endpoint import Endpoint
from forebay.orchestrator.fleet.history import FILE, History
from forebay.orchestrator.fleet.performance import MODELS, Performance
from forebay.orchestrator.routing.view import BUCKETS, bucket_of
from forebay.testing.calls import Sink
from forebay.testing.clock import now, virtual


class Clock:
    """Time that moves when it is told to."""

    def __init__(self, at: float = 1000.0) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


def outcome(
    *,
    model: str = "m",
    request: Request | None = None,
    ending: Ending = Ending.DONE,
    failure: Failure | None = None,
    first_delta: float | None = 0.5,
    rate: float = 40.0,
    **more: float,
) -> Outcome:
    tokens = 41
    fields: dict[str, object] = {"prompt_token_count": 100, **more}
    return Outcome(
        call=Call(request=pb.GenerateRequest(model=model) if request is None else request),
        ending=ending,
        failure=failure,
        duration=2.0,
        first_delta=first_delta,
        generating=(tokens - 1) / rate,
        token_count=tokens,
        first_token_count=1,
        **fields,  # type: ignore[arg-type]  # the dataclass checks their names
    )


def windows(clock: Clock | None = None, **settings: object) -> tuple[Performance, Clock]:
    clock = clock or Clock()
    return Performance(PerformanceSettings.model_validate(settings), clock=clock), clock


def test_times_to_the_first_delta_are_kept_apart_by_length_of_prompt() -> None:
    performance, _ = windows()
    for tokens, seconds in ((10, 0.1), (256, 0.3), (257, 1.0), (16384, 4.0), (16385, 9.0), (10**6, 11.0)):
        performance.record(outcome(prompt_token_count=tokens, first_delta=seconds))
    assert performance.figures()["m"].first_deltas == (0.1, 1.0, None, 4.0, 9.0)
    [shown] = performance.to_proto()
    assert [(each.max_prompt_token_count, each.call_count) for each in shown.first_deltas] == [
        (256, 2),
        (1024, 1),
        (16384, 1),
        (0, 2),
    ]
    assert shown.first_deltas[0].p95_duration.ToTimedelta() == timedelta(milliseconds=300)


def test_every_length_of_prompt_has_a_bucket() -> None:
    assert [bucket_of(tokens) for tokens in (0, 256, 256.5, 4096, 16384, 16385, 1e9)] == [0, 0, 1, 2, 3, 4, 4]
    assert len(BUCKETS) == 5


def test_medians_are_not_moved_by_one_slow_call() -> None:
    performance, _ = windows()
    for rate in (30.0, 31.0, 32.0, 0.1, 33.0):
        performance.record(outcome(rate=rate))
    rate = performance.figures()["m"].decode_rate
    assert rate == pytest.approx(31.0)


def test_what_a_load_takes_is_not_the_prompts_time() -> None:
    performance, _ = windows()
    performance.record(outcome(first_delta=9.0, load_duration=8.0))
    assert performance.figures()["m"].first_deltas[0] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("fields", "rate"),
    [
        ({"prompt_token_count": 1000, "prefill_duration": 2.0, "first_delta": 5.0}, 500.0),
        ({"prompt_token_count": 1000, "cached_token_count": 800, "prefill_duration": 2.0}, 100.0),
        (
            {"prompt_token_count": 1000, "first_delta": 5.0, "load_duration": 2.0, "queue_duration": 1.0},
            500.0,
        ),
        ({"prompt_token_count": 63, "prefill_duration": 2.0}, None),  # mostly the cost of any call
        ({"prompt_token_count": 1000, "cached_token_count": 990, "prefill_duration": 2.0}, None),
        ({"prompt_token_count": 1000, "first_delta": None}, None),
        ({"prompt_token_count": 1000, "first_delta": 1.0, "load_duration": 2.0}, None),  # clocks disagree
    ],
)
def test_the_rate_of_reading_counts_what_was_read_while_it_was_read(
    fields: dict[str, float], rate: float | None
) -> None:
    performance, _ = windows()
    performance.record(outcome(**fields))
    assert performance.figures()["m"].prefill_rate == rate


def test_only_the_backends_own_failures_count_against_it() -> None:
    performance, _ = windows()
    performance.record(outcome())
    performance.record(outcome(ending=Ending.FAILED, failure=BackendError("broken")))
    performance.record(outcome(ending=Ending.FAILED, failure=InvalidRequest("wrong")))
    performance.record(outcome(ending=Ending.LEFT))
    figures = performance.figures()["m"]
    assert (figures.call_count, figures.error_ratio) == (2, 0.5)
    [shown] = performance.to_proto()
    assert (shown.model, shown.call_count, shown.error_ratio) == ("m", 2, 0.5)
    assert shown.window_duration.ToTimedelta() == timedelta(minutes=30)


def test_what_is_too_old_is_forgotten() -> None:
    performance, clock = windows(window="10m")
    performance.record(outcome(rate=10.0))
    clock.at += 400
    performance.record(outcome(rate=30.0))
    clock.at += 300
    assert performance.figures()["m"].decode_rate == pytest.approx(30.0)
    clock.at += 301
    figures = performance.figures()["m"]
    assert (figures.call_count, figures.decode_rate, figures.first_deltas[0]) == (0, None, None)
    assert performance.to_proto() == []


def test_memory_is_bounded_however_many_calls_and_models_there_are() -> None:
    performance, clock = windows(samples=8)
    for number in range(3 * MODELS):
        for _ in range(20):
            performance.record(outcome(model=f"m{number}"))
        clock.at += 0.01
    kept = performance.keep()
    assert len(kept) == MODELS
    assert f"m{3 * MODELS - 1}" in kept
    assert all(len(pairs) <= 8 for windows in kept.values() for pairs in windows.values())
    clock.at += 2.0
    assert len(performance.figures()) == MODELS


def test_a_model_in_use_is_not_the_one_that_is_forgotten() -> None:
    performance, _ = windows()
    for number in range(2 * MODELS):
        performance.record(outcome(model="used"))
        performance.record(outcome(model=f"m{number}"))
    assert "used" in performance.keep()


def test_counting_tokens_says_nothing_of_a_models_speed() -> None:
    performance, _ = windows()
    performance.record(outcome(request=pb.CountTokensRequest(model="m"), first_delta=None))
    performance.record(outcome(request=pb.EmbedRequest(model="e"), first_delta=None))
    assert set(performance.figures()) == {"e"}


def test_a_picture_of_the_figures_never_changes() -> None:
    performance, _ = windows()
    performance.record(outcome())
    before = performance.figures()
    copy = dict(before)
    performance.record(outcome(rate=1.0))
    assert before == copy
    assert performance.figures() != copy


@virtual
async def test_a_call_is_measured_by_what_its_end_tells() -> None:
    outcomes: list[Outcome] = []

    async def serve(call: Call[Request], send: Send) -> None:
        await send(pb.GenerateResponse(delta=pb.Delta(text="a", token_count=1)))
        end = pb.Finished(
            usage=pb.Usage(prompt_token_count=500, cached_token_count=100, output_token_count=1)
        )
        end.timings.load_duration.FromMilliseconds(1500)
        end.timings.prefill_duration.FromMilliseconds(250)
        end.timings.queue_duration.FromMilliseconds(-5)
        await send(pb.GenerateResponse(finished=end))

    await Measure(serve, record=outcomes.append, clock=now)(Call(request=pb.GenerateRequest()), Sink())
    [seen] = outcomes
    assert (seen.prompt_token_count, seen.cached_token_count) == (500, 100)
    assert (seen.load_duration, seen.prefill_duration, seen.queue_duration) == (1.5, 0.25, 0.0)


@virtual
async def test_a_backend_shows_its_performance_and_its_memory() -> None:
    endpoint = Endpoint(
        BackendSettings(name="mlx", address="127.0.0.1:1"), aliases={}, clock=now, source=random.Random(0)
    )
    endpoint.found_serving()
    endpoint.list_models([pb.Model(id="m")], pb.Memory(total_bytes=8, available_bytes=4))
    endpoint.record(outcome())
    shown = endpoint.to_proto()
    assert isinstance(shown, fleet_pb2.Backend)
    assert [each.model for each in shown.performance] == ["m"]
    assert shown.memory.available_bytes == 4
    view = endpoint.view()
    assert view.figures["m"].call_count == 1
    assert view.memory is not None


# Over a restart.


def restarted(
    folder: Path, *, later: float = 0.0, names: tuple[str, ...] = ("mlx",), window: str = "30m"
) -> dict[str, Performance]:
    """Returns the performance that a new process finds, on a clock with another origin."""
    found = {name: windows(Clock(5.0), window=window)[0] for name in names}
    History(folder, found, now=lambda: 1_000_000.0 + later).load()
    return found


def kept(folder: Path) -> Performance:
    performance, clock = windows()
    performance.record(outcome(rate=10.0, prompt_token_count=5000))
    clock.at += 600
    performance.record(outcome(rate=30.0))
    History(folder, {"mlx": performance, "idle": windows()[0]}, now=lambda: 1_000_000.0).save()
    return performance


def test_what_was_measured_outlives_the_process(tmp_path: Path) -> None:
    before = kept(tmp_path / "new" / "folder")
    after = restarted(tmp_path / "new" / "folder", names=("mlx", "idle"))
    assert after["mlx"].figures() == before.figures()
    assert after["mlx"].to_proto() == before.to_proto()
    assert after["idle"].figures() == {}


def test_measurements_age_while_no_process_runs(tmp_path: Path) -> None:
    kept(tmp_path)
    assert restarted(tmp_path, later=1300.0)["mlx"].figures()["m"].decode_rate == pytest.approx(30.0)
    assert restarted(tmp_path, later=1300.0)["mlx"].figures()["m"].call_count == 1
    assert restarted(tmp_path, later=3000.0)["mlx"].to_proto() == []
    # A clock that was set back makes nothing younger than it is.
    assert restarted(tmp_path, later=-1e6)["mlx"].figures()["m"].call_count == 2


def test_the_file_holds_figures_and_names_and_nothing_else(tmp_path: Path) -> None:
    performance, _ = windows()
    secret = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="a secret")])
    request = pb.GenerateRequest(model="m", messages=[secret])
    performance.record(
        Outcome(
            call=Call(request=request, caller="alice"),
            ending=Ending.DONE,
            failure=None,
            duration=1.0,
            first_delta=0.1,
            generating=0.5,
            token_count=5,
            first_token_count=1,
        )
    )
    History(tmp_path, {"mlx": performance}).save()
    text = (tmp_path / FILE).read_text()
    assert "secret" not in text
    assert "alice" not in text
    assert set(json.loads(text)) == {"version", "time", "backends"}
    assert [path.name for path in tmp_path.iterdir()] == [FILE]  # nothing is left beside it


GOOD = {"version": 1, "time": 1_000_000.0, "backends": {"mlx": {"m": {"failed": [[3.0, 0.0]]}}}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        json.dumps({**GOOD, "version": 2}),
        json.dumps({"version": 1}),
        json.dumps({**GOOD, "time": "noon"}),
        json.dumps({**GOOD, "backends": []}),
        json.dumps({**GOOD, "backends": {"mlx": []}}),
        json.dumps({**GOOD, "backends": {"mlx": {"m": 5}}}),
        json.dumps({**GOOD, "backends": {"mlx": {"m": {"failed": [3.0]}}}}),
        json.dumps({**GOOD, "backends": {"mlx": {"m": {"failed": [[3.0]]}}}}),
        json.dumps({**GOOD, "backends": {"mlx": {"m": {"failed": [[-3.0, 0.0]]}}}}),
        json.dumps({**GOOD, "backends": {"mlx": {"m": {"failed": [[3.0, float("nan")]]}}}}),
        json.dumps({**GOOD, "backends": {"mlx": {"m": {"failed": [[3.0, 0.0], [9.0, 0.0]]}}}}),
    ],
    ids=range(16),
)
def test_a_file_that_cannot_be_read_is_left_out_with_a_warning(
    tmp_path: Path, content: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_bytes(content.encode() if isinstance(content, str) else content)
    with caplog.at_level(logging.WARNING):
        found = restarted(tmp_path)
    assert found["mlx"].figures() == {}
    [record] = caplog.records
    assert "are left out" in record.getMessage()


def test_the_good_file_beside_those_is_read(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps(GOOD))
    assert restarted(tmp_path)["mlx"].figures()["m"].call_count == 1


def test_no_file_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert restarted(tmp_path / "missing")["mlx"].figures() == {}
    assert not caplog.records


def test_a_huge_file_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept(tmp_path)
    monkeypatch.setattr("forebay.orchestrator.fleet.history.MAX_BYTES", 10)
    assert restarted(tmp_path)["mlx"].figures() == {}
    assert "more than 10 bytes" in caplog.text


def test_a_folder_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    kept(tmp_path / "file")
    assert "cannot be kept" in caplog.text


async def test_measurements_are_written_now_and_then_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.orchestrator.fleet.history.INTERVAL", timedelta(milliseconds=1))
    performance, _ = windows()
    history = History(tmp_path, {"mlx": performance})
    keeper = asyncio.create_task(history.keep())
    for name in ("first", "second"):
        performance.record(outcome(model=name))
        async with asyncio.timeout(30):
            while not (tmp_path / FILE).exists() or name not in (tmp_path / FILE).read_text():
                await asyncio.sleep(0.01)
    keeper.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeper
    performance.record(outcome(model="last"))
    await history.close()
    assert "last" in (tmp_path / FILE).read_text()


async def test_an_orchestrator_remembers_over_a_restart_where_it_is_given_a_folder(tmp_path: Path) -> None:
    settings = OrchestratorSettings.model_validate(
        {
            "backends": [{"name": "mlx", "address": f"unix:{tmp_path}/nobody.sock"}],
            "performance": {"state_dir": str(tmp_path)},
        }
    )
    first = Orchestrator(settings)
    async with first.fleet:
        first.fleet["mlx"].record(outcome(rate=20.0))
    second = Orchestrator(settings)
    async with second.fleet:
        rate = second.fleet["mlx"].view().figures["m"].decode_rate
        assert rate == pytest.approx(20.0)
