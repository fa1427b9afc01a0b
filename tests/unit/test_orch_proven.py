"""Capabilities: refused where known to be missing, tried where unknown, preferred where proven."""

from __future__ import annotations

import random

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import CapabilityUnsupported
from forebay.orchestrator.config import ScorerWeights
from forebay.orchestrator.routing.router import Decision, Router
from forebay.orchestrator.routing.view import EndpointView
from forebay.testing.calls import ask

YES, NO = pb.CapabilityReport.SUPPORT_YES, pb.CapabilityReport.SUPPORT_NO
SCHEMA = pb.CAPABILITY_JSON_SCHEMA


def view(name: str, *reports: pb.CapabilityReport) -> EndpointView:
    plain = pb.CapabilityReport(capability=pb.CAPABILITY_GENERATE, support=YES, probed=True)
    return EndpointView(name=name, models=(pb.Model(id="m", capabilities=[plain, *reports]),))


def decide(*views: EndpointView, plain: bool = False) -> Decision:
    request = ask(model="m")
    if not plain:
        request.output_format.json_schema = "{}"
    router = Router(weights=ScorerWeights(), picker="best", source=random.Random(0))
    return router.decide(request, views)


def report(support: pb.CapabilityReport.Support.ValueType, *, probed: bool) -> pb.CapabilityReport:
    return pb.CapabilityReport(capability=SCHEMA, support=support, probed=probed)


def test_what_was_tried_goes_before_what_is_said_and_that_before_what_is_unknown() -> None:
    decision = decide(
        view("unknown"), view("said", report(YES, probed=False)), view("tried", report(YES, probed=True))
    )
    assert [candidate.name for candidate in decision.candidates] == ["tried", "said", "unknown"]
    assert [candidate.scores["proven"] for candidate in decision.candidates] == [1.0, 0.5, 0.0]


def test_what_is_unknown_is_tried_and_what_is_missing_is_refused() -> None:
    decision = decide(view("missing", report(NO, probed=False)), view("unknown"))
    assert decision.chosen is not None
    assert decision.chosen.name == "unknown"
    with pytest.raises(CapabilityUnsupported):
        raise decide(view("missing", report(NO, probed=True))).failure()


def test_a_plain_request_is_not_swayed() -> None:
    decision = decide(view("a"), plain=True)
    assert "proven" not in decision.candidates[0].scores
