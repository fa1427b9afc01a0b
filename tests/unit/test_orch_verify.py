"""What `Verify` promises: no reply is called complete that is not what was asked for."""

from __future__ import annotations

import json

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import FormatViolated, InvalidRequest, PromptTruncated
from forebay.kit.pipeline import Call, Request, Send
from forebay.orchestrator.layers.verify import Verify
from forebay.testing.calls import Sink, ask, serve

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "pattern": "^(a+)+$"}, "age": {"type": "integer"}},
        "required": ["name"],
        "additionalProperties": False,
    }
)
STOP, LENGTH = pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH


class Says:
    """A backend that says something in two parts."""

    def __init__(self, said: str, *, reason: pb.FinishReason.ValueType = STOP, prompt: int = 0) -> None:
        self.said = said
        self.finished = pb.Finished(reason=reason, usage=pb.Usage(prompt_token_count=prompt))

    async def __call__(self, call: Call[Request], send: Send) -> None:
        await send(pb.GenerateResponse(started=pb.Started(backend="a")))
        half = len(self.said) // 2
        for part in (self.said[:half], self.said[half:]):
            await send(pb.GenerateResponse(delta=pb.Delta(text=part)))
        await send(pb.GenerateResponse(continued=pb.Continued(backend="b")))
        await send(pb.GenerateResponse(finished=self.finished))


def request(schema: str = SCHEMA) -> pb.GenerateRequest:
    made = ask()
    made.output_format.json_schema = schema
    return made


@pytest.mark.parametrize(
    ("said", "keyword"),
    [
        ("Sure! Here you are.", "json"),
        ('{"name": "x"', "json"),
        ("[" * 100_000, "depth"),
        ('{"age": 3}', "required"),
        ('{"name": 3}', "type"),
        ('{"name": "x", "more": 1}', "additionalProperties"),
    ],
)
async def test_a_reply_that_violates_its_schema_is_never_finished(said: str, keyword: str) -> None:
    sink = Sink()
    with pytest.raises(FormatViolated) as caught:
        await serve(Verify(Says(said)), request(), sink=sink)
    assert "finished" not in sink.kinds
    assert sink.text == said
    assert caught.value.metadata == {"backend": "b", "keyword": keyword}
    assert "more" not in caught.value.message


async def test_a_reply_that_matches_is_passed_on() -> None:
    sink = await serve(Verify(Says('{"name": "not by the pattern", "age": 3}')), request())
    assert sink.kinds == ["started", "delta", "delta", "continued", "finished"]


async def test_what_the_caller_had_already_counts() -> None:
    asked = request()
    asked.continue_from.text = '{"name":'
    await serve(Verify(Says('"x"}')), asked)


async def test_any_json_must_be_json() -> None:
    asked = ask()
    asked.output_format.any_json = True
    await serve(Verify(Says("[1, 2]")), asked)
    with pytest.raises(FormatViolated):
        await serve(Verify(Says("one, two")), asked)
    asked.output_format.any_json = False
    await serve(Verify(Says("one, two")), asked)


async def test_who_accepts_an_unenforced_format_gets_what_comes() -> None:
    asked = request()
    asked.accepted_degradations.append(pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED)
    assert (await serve(Verify(Says("no")), asked)).text == "no"


@pytest.mark.parametrize("reason", [LENGTH, pb.FINISH_REASON_TOOL_CALLS])
async def test_a_reply_that_ended_for_another_reason_is_not_held_against_it(
    reason: pb.FinishReason.ValueType,
) -> None:
    await serve(Verify(Says('{"na', reason=reason)), request())


@pytest.mark.parametrize("schema", ["{", '{"type": "river"}', '{"required": 3}'])
async def test_a_schema_that_is_none_is_refused_before_anything_is_said(schema: str) -> None:
    sink = Sink()
    with pytest.raises(InvalidRequest) as caught:
        await serve(Verify(Says("x")), request(schema), sink=sink)
    assert not sink.events
    assert caught.value.violations[0][0] == "output_format.json_schema"


async def test_references_are_followed_within_the_schema_and_never_over_the_network() -> None:
    inside = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}
    await serve(Verify(Says("3")), request(json.dumps(inside)))
    with pytest.raises(FormatViolated) as caught:
        await serve(Verify(Says("3")), request('{"$ref": "http://127.0.0.1:1/schema.json"}'))
    assert caught.value.metadata["keyword"] == "$ref"


async def test_where_properties_depend_on_expressions_only_the_json_is_checked() -> None:
    asked = request('{"patternProperties": {"^(a+)+$": {"type": "integer"}}, "additionalProperties": false}')
    await serve(Verify(Says('{"aaaa": "x"}')), asked)
    with pytest.raises(FormatViolated):
        await serve(Verify(Says("{")), asked)


async def test_a_prompt_that_cannot_have_been_read_whole_is_an_error() -> None:
    asked = ask("long " * 20_000)
    with pytest.raises(PromptTruncated) as caught:
        await serve(Verify(Says("x", prompt=4096)), asked)
    assert caught.value.metadata["least_token_count"] == "10000"
    for prompt in (0, 10_000):  # not reported, and possible
        await serve(Verify(Says("x", prompt=prompt)), asked)
    asked.accepted_degradations.append(pb.DEGRADATION_KIND_PROMPT_TRUNCATED)
    await serve(Verify(Says("x", prompt=4096)), asked)


async def test_text_without_words_has_a_token_for_each_longest_stretch() -> None:
    asked = ask("-" * 100_000)
    with pytest.raises(PromptTruncated) as caught:
        await serve(Verify(Says("x", prompt=300)), asked)
    assert caught.value.metadata["least_token_count"] == "390"
    await serve(Verify(Says("x", prompt=390)), asked)


async def test_other_calls_pass_untouched() -> None:
    async def count(call: Call[Request], send: Send) -> None:
        await send(pb.CountTokensResponse(token_count=3))

    assert (await serve(Verify(count), pb.CountTokensRequest(model="m"))).kinds == ["CountTokensResponse"]
