"""Requests: what is malformed, and how it is said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from google.protobuf import struct_pb2

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import validation


def user(text: str = "hi") -> pb.Message:
    return pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=text)])


def good() -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        model="m",
        messages=[
            pb.Message(role=pb.ROLE_SYSTEM, parts=[pb.Part(text="be brief")]),
            pb.Message(
                role=pb.ROLE_USER,
                parts=[
                    pb.Part(text="what is it?"),
                    pb.Part(image=pb.Blob(media_type="image/png", data=b"x")),
                ],
            ),
            pb.Message(
                role=pb.ROLE_ASSISTANT,
                parts=[
                    pb.Part(reasoning="hm"),
                    pb.Part(tool_call=pb.ToolCall(id="1", name="look", arguments_json='{"a": 1}')),
                ],
            ),
            pb.Message(role=pb.ROLE_TOOL, parts=[pb.Part(tool_result=pb.ToolResult(id="1", text="a cat"))]),
        ],
        sampling=pb.Sampling(
            temperature=0, top_p=1, top_k=1, min_p=0, typical_p=1, repetition_penalty=1, presence_penalty=-2,
            frequency_penalty=2, logit_bias={3: -100.0},
        ),
        limits=pb.GenerationLimits(max_output_token_count=1, stop_sequences=["x"], stop_token_ids=[0]),
        tools=[pb.Tool(name="look", parameters_json_schema='{"type": "object"}'), pb.Tool(name="b")],
        tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED, tool_name="look"),
        output_format=pb.OutputFormat(json_schema="{}"),
        logprobs=pb.LogprobOptions(top_logprob_count=20),
        request_id="7f9c",
        routing=pb.RoutingHints(fallback_models=["n"], max_attempt_count=1),
    )  # fmt: skip
    request.backend_options["mlx"].CopyFrom(struct_pb2.Struct())
    return request


def test_a_full_and_good_request_passes() -> None:
    assert validation.violations(good()) == []


Change = Callable[[pb.GenerateRequest], object]

CASES: list[tuple[str, Change]] = [
    ("model", lambda r: r.ClearField("model")),
    ("request_id", lambda r: setattr(r, "request_id", "a b")),
    ("request_id", lambda r: setattr(r, "request_id", "x" * 129)),
    ("messages", lambda r: r.ClearField("messages")),
    ("messages[0].role", lambda r: r.messages[0].ClearField("role")),
    ("messages[0].role", lambda r: setattr(r.messages[0], "role", 99)),
    ("messages[0].parts", lambda r: r.messages[0].ClearField("parts")),
    ("messages[0].parts[1]", lambda r: r.messages[0].parts.add()),
    ("messages[0].parts[1]", lambda r: r.messages[0].parts.add(tool_result=pb.ToolResult(id="1"))),
    ("messages[1].parts[1].image.data", lambda r: r.messages[1].parts[1].image.ClearField("data")),
    (
        "messages[1].parts[1].image.media_type",
        lambda r: setattr(r.messages[1].parts[1].image, "media_type", "a/b"),
    ),
    ("messages[2].parts[1].tool_call.id", lambda r: r.messages[2].parts[1].tool_call.ClearField("id")),
    ("messages[2].parts[1].tool_call.name", lambda r: r.messages[2].parts[1].tool_call.ClearField("name")),
    (
        "messages[2].parts[1].tool_call.arguments_json",
        lambda r: setattr(r.messages[2].parts[1].tool_call, "arguments_json", "[1]"),
    ),
    ("messages[3].parts[0].tool_result.id", lambda r: r.messages[3].parts[0].tool_result.ClearField("id")),
    ("sampling.temperature", lambda r: setattr(r.sampling, "temperature", 2.1)),
    ("sampling.temperature", lambda r: setattr(r.sampling, "temperature", float("nan"))),
    ("sampling.temperature", lambda r: setattr(r.sampling, "temperature", -0.1)),
    ("sampling.top_p", lambda r: setattr(r.sampling, "top_p", 0)),
    ("sampling.typical_p", lambda r: setattr(r.sampling, "typical_p", 1.5)),
    ("sampling.min_p", lambda r: setattr(r.sampling, "min_p", 1.1)),
    ("sampling.repetition_penalty", lambda r: setattr(r.sampling, "repetition_penalty", 0)),
    ("sampling.presence_penalty", lambda r: setattr(r.sampling, "presence_penalty", 3)),
    ("sampling.frequency_penalty", lambda r: setattr(r.sampling, "frequency_penalty", -3)),
    ("sampling.top_k", lambda r: setattr(r.sampling, "top_k", 0)),
    ("sampling.logit_bias[-1]", lambda r: r.sampling.logit_bias.update({-1: 0.0})),
    ("sampling.logit_bias[5]", lambda r: r.sampling.logit_bias.update({5: 101.0})),
    ("sampling.logit_bias[5]", lambda r: r.sampling.logit_bias.update({5: float("inf")})),
    ("limits.max_output_token_count", lambda r: setattr(r.limits, "max_output_token_count", 0)),
    ("limits.stop_sequences", lambda r: r.limits.stop_sequences.extend(["x"] * 16)),
    ("limits.stop_token_ids", lambda r: r.limits.stop_token_ids.extend([7] * 16)),
    ("limits.stop_token_ids[1]", lambda r: r.limits.stop_token_ids.append(-1)),
    ("limits.stop_sequences[1]", lambda r: r.limits.stop_sequences.append("")),
    ("tools[2].name", lambda r: r.tools.add(name="no spaces")),
    ("tools[2].name", lambda r: r.tools.add(name="look")),
    ("tools[2].parameters_json_schema", lambda r: r.tools.add(name="c", parameters_json_schema="nope")),
    ("tools", lambda r: r.tools.extend(pb.Tool(name=f"t{i}") for i in range(127))),
    ("tool_choice.tool_name", lambda r: setattr(r.tool_choice, "tool_name", "hear")),
    ("tool_choice.tool_name", lambda r: setattr(r.tool_choice, "mode", pb.ToolChoice.MODE_AUTO)),
    ("output_format.json_schema", lambda r: setattr(r.output_format, "json_schema", "[]")),
    ("output_format.json_schema", lambda r: setattr(r.output_format, "json_schema", "x" * (256 * 1024 + 1))),
    ("output_format.regex", lambda r: setattr(r.output_format, "regex", "")),
    ("output_format.lark_grammar", lambda r: setattr(r.output_format, "lark_grammar", "")),
    ("output_format.any_json", lambda r: setattr(r.output_format, "any_json", False)),
    ("logprobs.top_logprob_count", lambda r: setattr(r.logprobs, "top_logprob_count", 21)),
    ("routing.max_attempt_count", lambda r: setattr(r.routing, "max_attempt_count", 0)),
    ("routing.fallback_models[1]", lambda r: r.routing.fallback_models.append("")),
    ("backend_options[olama]", lambda r: r.backend_options["olama"].update({})),
]


@pytest.mark.parametrize(("path", "change"), CASES, ids=[f"{i}-{path}" for i, (path, _) in enumerate(CASES)])
def test_a_malformed_field_is_named(path: str, change: Change) -> None:
    request = good()
    change(request)
    found = validation.violations(request)
    assert [name for name, _ in found] == [path]
    assert found[0][1]


def test_a_required_call_needs_tools() -> None:
    request = good()
    request.ClearField("tools")
    request.tool_choice.ClearField("tool_name")
    assert [name for name, _ in validation.violations(request)] == ["tool_choice"]


def test_every_mistake_is_found_at_once() -> None:
    request = pb.GenerateRequest(
        sampling=pb.Sampling(temperature=9), limits=pb.GenerationLimits(stop_sequences=[""])
    )
    names = [name for name, _ in validation.violations(request)]
    assert names == ["model", "messages", "sampling.temperature", "limits.stop_sequences[0]"]


def test_a_model_may_be_left_out_where_there_is_a_default() -> None:
    request = good()
    request.ClearField("model")
    assert validation.violations(request, model_required=False) == []


def test_embeddings_are_checked() -> None:
    assert validation.violations(pb.EmbedRequest(model="m", texts=["", "a"], dimension_count=3)) == []
    found = validation.violations(pb.EmbedRequest(model="m", dimension_count=0))
    assert [name for name, _ in found] == ["texts", "dimension_count"]
    found = validation.violations(pb.EmbedRequest(model="m", texts=["x"] * 10_001))
    assert [name for name, _ in found] == ["texts"]


def test_token_counts_are_checked() -> None:
    assert validation.violations(pb.CountTokensRequest(model="m", messages=[user()])) == []
    found = validation.violations(pb.CountTokensRequest(model="m", tools=[pb.Tool(name="")]))
    assert [name for name, _ in found] == ["messages", "tools[0].name"]


def test_fields_from_the_future_are_no_mistake() -> None:
    data = good().SerializeToString() + b"\xfa\x3e\x03new"  # field 1007, length-delimited
    assert validation.violations(pb.GenerateRequest.FromString(data)) == []
