"""The words of `forebay top`: what each cell says, and what is remembered between two pictures."""

from __future__ import annotations

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from forebay.cli.top import cells
from forebay.cli.top.picture import KEPT, Picture
from forebay.fleet.v1 import fleet_pb2 as fleet_pb
from forebay.inference.v1 import inference_pb2 as pb

Activity = fleet_pb.RequestActivity


def message(second: float, tokens: int, *ended: str) -> fleet_pb.WatchActivityResponse:
    found = fleet_pb.WatchActivityResponse(
        ended_requests=[Activity(request_id=name) for name in ended],
        totals=fleet_pb.ActivityTotals(output_token_count=tokens),
    )
    found.observe_time.CopyFrom(Timestamp(seconds=int(second), nanos=int(second % 1 * 1e9)))
    return found


@pytest.mark.parametrize(
    ("values", "bars"),
    [([], ""), ([0, 0], "▁▁"), ([0, 1, 2], "▁▅█"), ([7], "█"), ([1, 100], "▁█")],
)
def test_a_history_is_bars_of_which_the_highest_is_full(values: list[float], bars: str) -> None:
    assert cells.spark(values) == bars


def test_tokens_a_second_come_from_two_totals_and_survive_a_restart() -> None:
    picture = Picture()
    picture.take_activity(message(10.0, 100))
    picture.take_activity(message(10.5, 150))
    picture.take_activity(message(11.5, 20))
    assert list(picture.rates) == [100.0, 0.0]


def test_the_newest_request_stands_first_and_old_ones_are_forgotten() -> None:
    picture = Picture()
    picture.take_activity(message(1, 0, *(str(number) for number in range(KEPT + 5))))
    picture.take_activity(message(2, 0, "new"))
    assert [picture.ended[0].request_id, picture.ended[1].request_id] == ["new", str(KEPT + 4)]
    assert len(picture.ended) == KEPT


def test_a_new_stream_tells_all_again_and_nothing_is_shown_twice() -> None:
    picture = Picture()
    picture.take_activity(message(1, 0, "a"))
    picture.begin_activity()
    picture.take_activity(message(2, 0, "a", "b"))
    assert [each.request_id for each in picture.ended] == ["b", "a"]


def test_models_in_memory_stand_before_those_on_disk() -> None:
    picture = Picture()
    for name, state in (("a", pb.Model.STATE_AVAILABLE), ("b", pb.Model.STATE_ACTIVE)):
        picture.take_backend(fleet_pb.Backend(name=name, models=[pb.Model(id="m", state=state)]))
    assert [name for name, _ in picture.models()] == ["b", "a"]


def test_a_backend_says_what_keeps_calls_away() -> None:
    breaker = fleet_pb.Breaker(model="m", state=fleet_pb.Breaker.STATE_OPEN)
    backend = fleet_pb.Backend(
        name="a", state=fleet_pb.Backend.STATE_ACTIVE, share=0.25, breakers=[breaker], slot_count=4
    )
    row = [str(cell) for cell in cells.backend_row(backend)]
    assert row[1:3] == ["active 25%, 1 breaker open", "0/4"]


@pytest.mark.parametrize(
    ("memory", "shown"),
    [
        (pb.Memory(used_bytes=2**30, limit_bytes=4 * 2**30), "1.0 GiB / 4.0 GiB"),
        (pb.Memory(used_bytes=2**30, total_bytes=8 * 2**30), "1.0 GiB / 8.0 GiB"),
        (pb.Memory(used_bytes=2**30), "1.0 GiB"),
        (None, "2.0 GiB"),
    ],
)
def test_memory_is_what_the_service_says_and_else_what_its_models_take(
    memory: pb.Memory | None, shown: str
) -> None:
    models = [
        pb.Model(id="m", state=pb.Model.STATE_ACTIVE, memory_bytes=2 * 2**30),
        pb.Model(id="n", state=pb.Model.STATE_AVAILABLE, memory_bytes=2**30),
    ]
    assert cells.memory_text(fleet_pb.Backend(models=models, memory=memory)) == shown


def test_a_request_says_how_it_came_to_its_end() -> None:
    request = Activity(
        phase=Activity.PHASE_FAILED, error_reason="STREAM_STALLED", cached=True, continuation_count=2
    )
    row = [str(cell) for cell in cells.request_row(request)]
    assert (row[0], row[-1]) == ("failed", "STREAM_STALLED, from the cache, continued 2x")


def test_a_model_says_that_it_is_pinned_and_what_ails_it() -> None:
    model = pb.Model(id="m", pinned=True, detail="crashed twice", loaded_context_token_count=4096)
    row = [str(cell) for cell in cells.model_row("a", model)]
    assert (row[5], row[6]) == ("4,096", "pinned, crashed twice")


def test_a_refused_candidate_says_why_and_a_good_one_shows_its_scores() -> None:
    refused = fleet_pb.Candidate(backend="a", refused_by="health", refusal_detail="it is down")
    good = fleet_pb.Candidate(backend="b", model="m", scores={"load": 0.5, "loaded": 1.0}, total_score=0.75)
    assert str(cells.candidate_row(refused, is_chosen=False)[3]) == "health: it is down"
    row = cells.candidate_row(good, is_chosen=True)
    assert [str(cell) for cell in row[2:]] == ["0.750", "loaded 1.00  load 0.50"]
    assert row[0].style == "bold green"


def test_the_summary_tells_of_the_queue_only_while_somebody_waits() -> None:
    picture = Picture()
    assert "the oldest" not in str(cells.summary(picture))
    picture.queue = fleet_pb.Queue(waiting_interactive_count=1, waiting_batch_count=2, permit_count=8)
    picture.queue.oldest_wait_duration.FromSeconds(3)
    picture.queue.expected_wait_duration.FromSeconds(2)
    shown = str(cells.summary(picture))
    assert "waiting 3 (1 interactive, 2 batch, the oldest for 3.00 s)" in shown
    assert "next in 2.00 s" in shown


def test_what_never_happened_is_left_out_of_the_summary_unless_it_is_a_failure() -> None:
    picture = Picture()
    assert "requests 0   failed 0   refused 0\n" in str(cells.summary(picture))
    picture.totals.hedge_count = 3
    assert "refused 0   hedged 3\n" in str(cells.summary(picture))


def test_the_headline_says_what_cannot_be_followed() -> None:
    picture = Picture()
    assert "live" in str(cells.headline(picture, "h:1", is_paused=False))
    assert "paused" in str(cells.headline(picture, "h:1", is_paused=True))
    picture.losses["activity"] = "nothing answers"
    picture.losses["backends"] = "nothing answers"
    assert "◌ nothing answers, trying again" in str(cells.headline(picture, "h:1", is_paused=True))
    picture.losses["backends"] = "it may not"
    assert "◌ nothing answers; it may not, trying again" in str(
        cells.headline(picture, "h:1", is_paused=True)
    )


def test_a_decision_names_its_trace() -> None:
    request = Activity(operation="embed", model="m", trace_id="ab" * 16)
    assert str(cells.decision_title(request)) == f" embed for m   trace {'ab' * 16}"
