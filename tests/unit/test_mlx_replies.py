"""What a model writes and what the caller gets: stop sequences, characters, reasoning, tools, formats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import pytest

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import CapabilityUnsupported, Failure, InvalidRequest
from forebay.kit.pipeline import Call
from mlx_worker_rig import Reply, ask, rig

pytestmark = pytest.mark.mlx

THINKS = tiny_models.CHAT_TEMPLATE + "{# enable_thinking #}"
THINKS_AT_ONCE = tiny_models.CHAT_TEMPLATE.replace("assistant\n' }}", "assistant\n<think>\n' }}")
CALLS = (
    "{% if tools %}{{ tools | tojson }}<tool_call> tool_call.name{% endif %}" + tiny_models.CHAT_TEMPLATE
).replace("message['content']", "(message['content'] or '')")
TOOL = pb.Tool(name="look", parameters_json_schema='{"type": "object"}')


async def say(
    path: Path, pieces: Sequence[str | bytes], request: pb.GenerateRequest, **model: object
) -> Reply:
    tiny_models.build_scripted(path, pieces, **model)  # type: ignore[arg-type]
    async with rig(path) as running:
        return await running.generate(request)


async def test_text_arrives_as_it_was_written(tmp_path: Path) -> None:
    reply = await say(tmp_path, ["Hel", "lo ", "wörld", "!"], ask(include_token_ids=True))
    assert reply.text == "Hello wörld!"
    assert reply.finished.reason == pb.FINISH_REASON_STOP
    assert reply.finished.usage.output_token_count == 4 == len(reply.token_ids)


async def test_no_delta_holds_half_a_character(tmp_path: Path) -> None:
    reply = await say(tmp_path, ["a", b"\xf0\x9f", b"\x90", b"\x8b", "b"], ask())
    assert [delta.text for delta in reply.deltas if "\ufffd" in delta.text] == []
    assert reply.text == "a\N{WHALE}b"


async def test_a_limit_within_a_character_keeps_its_tokens_and_no_half(tmp_path: Path) -> None:
    reply = await say(
        tmp_path, ["a", b"\xf0\x9f", b"\x90", b"\x8b", "b"], ask(most=3, include_token_ids=True)
    )
    assert reply.text == "a"
    assert reply.finished.reason == pb.FINISH_REASON_LENGTH
    assert len(reply.token_ids) == 3
    rest = await say(
        tmp_path,
        ["a", b"\xf0\x9f", b"\x90", b"\x8b", "b"],
        ask(continue_from=pb.ReplyPrefix(token_ids=reply.token_ids)),
    )
    assert rest.text == "\N{WHALE}b"


async def test_a_stop_sequence_across_tokens_ends_the_reply_before_it(tmp_path: Path) -> None:
    reply = await say(tmp_path, ["one ", "tw", "o th", "ree"], ask(stops=["never", "two"]))
    assert reply.text == "one "
    assert (reply.finished.reason, reply.finished.stop_sequence) == (pb.FINISH_REASON_STOP, "two")


async def test_what_only_looked_like_a_stop_sequence_is_told_at_the_end(tmp_path: Path) -> None:
    reply = await say(tmp_path, ["one ", "tw"], ask(stops=["two"]))
    assert reply.text == "one tw"
    assert not reply.finished.stop_sequence


async def test_a_reply_goes_on_after_the_text_it_holds(tmp_path: Path) -> None:
    pieces = ["One", " two", " three"]
    reply = await say(tmp_path, pieces, ask(continue_from=pb.ReplyPrefix(text="One")))
    assert (
        reply.kinds[-1] == "finished"
    )  # the spelling of "One" differs, so the script is lost; the reply ends


async def test_reasoning_is_told_apart_in_every_delta(tmp_path: Path) -> None:
    pieces = ["<think>", "let me", " see", "</think>", "The", " end"]
    reply = await say(tmp_path, pieces, ask(), markers=["<think>", "</think>"])
    assert (reply.reasoning, reply.text) == ("let me see", "The end")
    assert reply.finished.usage.reasoning_token_count == 3
    assert reply.finished.usage.output_token_count == 6


async def test_a_template_can_open_the_reasoning(tmp_path: Path) -> None:
    pieces = ["so", "</think>", "yes"]
    request = ask()
    reply = await say(
        tmp_path, pieces, request, markers=["<think>", "</think>"], chat_template=THINKS_AT_ONCE
    )
    assert (reply.reasoning, reply.text) == ("so", "yes")


@pytest.mark.parametrize(
    "prefix",
    [pb.ReplyPrefix(reasoning="so"), pb.ReplyPrefix(reasoning="so", text="ye"), pb.ReplyPrefix(text="ye")],
)
@pytest.mark.parametrize("template", [THINKS, THINKS_AT_ONCE])
async def test_a_reply_with_reasoning_can_be_continued(
    tmp_path: Path, prefix: pb.ReplyPrefix, template: str
) -> None:
    tiny_models.build_scripted(tmp_path, ["x"], markers=["<think>", "</think>"], chat_template=template)
    async with rig(tmp_path) as running:
        prompt = await running.words.prompt(ask().messages, prefix=prefix)
        text = running.words.tokenizer.decode(list(prompt.tokens))
    thought = prefix.reasoning or ("\n" if template is THINKS_AT_ONCE else "")
    assert text.count("<think>") == (1 if thought else 0)
    assert text.endswith(
        (prefix.reasoning + "</think>" if thought and prefix.text else prefix.reasoning) + prefix.text
    )
    assert prompt.reply_count > 0


async def test_a_model_that_does_not_reason_cannot_continue_reasoning(tmp_path: Path) -> None:
    with pytest.raises(CapabilityUnsupported):
        await say(tmp_path, ["x"], ask(continue_from=pb.ReplyPrefix(reasoning="so")))


async def test_reasoning_effort_reaches_the_template_or_is_refused(tmp_path: Path) -> None:
    switch = tiny_models.CHAT_TEMPLATE + "{% if enable_thinking is false %}<think></think>{% endif %}"
    marks = ["<think>", "</think>"]
    request = ask(reasoning_effort=pb.REASONING_EFFORT_NONE)
    off = await say(tmp_path / "a", ["x"], request, markers=marks, chat_template=switch)
    on = await say(tmp_path / "b", ["x"], ask(), markers=marks, chat_template=switch)
    assert off.finished.usage.prompt_token_count == on.finished.usage.prompt_token_count + 2
    with pytest.raises(CapabilityUnsupported):
        await say(tmp_path / "c", ["x"], request, markers=marks)
    effort = tiny_models.CHAT_TEMPLATE + "{{ reasoning_effort }}"
    high = ask(reasoning_effort=pb.REASONING_EFFORT_HIGH, most=2)
    reply = await say(tmp_path / "d", ["x"], high, chat_template=effort)
    assert not reply.started.degradations


async def test_a_tool_call_is_parsed_and_ends_the_reply_as_one(tmp_path: Path) -> None:
    pieces = ["Wait. ", "<tool_call>", '{"name": "look", ', '"arguments": {"at": "é"}}', "</tool_call>"]
    reply = await say(tmp_path, pieces, ask(tools=[TOOL]), chat_template=CALLS)
    assert reply.text == "Wait. "
    (call,) = (delta.tool_call for delta in reply.deltas if delta.WhichOneof("content") == "tool_call")
    assert (call.index, call.name, json.loads(call.arguments_json)) == (0, "look", {"at": "é"})
    assert call.id
    assert reply.finished.reason == pb.FINISH_REASON_TOOL_CALLS


@pytest.mark.parametrize(
    "body",
    [
        "{not json",
        '{"arguments": {}}',
        '{"name": "look", "arguments": 3}',
        '{"name": "look", "arguments": "3"}',
        '"x"',
    ],
)
async def test_a_tool_call_that_makes_no_sense_is_passed_on_as_text(tmp_path: Path, body: str) -> None:
    reply = await say(tmp_path, ["<tool_call>", body, "</tool_call>"], ask(tools=[TOOL]), chat_template=CALLS)
    assert reply.text == f"<tool_call>{body}</tool_call>"
    assert reply.finished.reason == pb.FINISH_REASON_STOP


async def test_a_tool_call_cannot_be_forced(tmp_path: Path) -> None:
    request = ask(tools=[TOOL], tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED))
    with pytest.raises(CapabilityUnsupported):
        await say(tmp_path, ["x"], request, chat_template=CALLS)


async def test_no_format_is_enforced_on_replies_that_may_call_tools(tmp_path: Path) -> None:
    request = ask(tools=[TOOL], output_format=pb.OutputFormat(any_json=True))
    with pytest.raises(CapabilityUnsupported):
        await say(tmp_path, ["x"], request, chat_template=CALLS)
    request.accepted_degradations.append(pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED)
    reply = await say(tmp_path, ["x"], request, chat_template=CALLS)
    assert reply.started.degradations[0].field == "output_format"


async def test_a_model_without_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CapabilityUnsupported, match="chat template"):
        await say(tmp_path, ["x"], ask(), chat_template="")


@pytest.mark.parametrize(
    ("template", "said"),
    [("{{ raise_exception('no system role') }}", "no system role"), ("{{ messages + 1 }}", "TypeError")],
)
async def test_a_template_that_refuses_the_conversation_says_why(
    tmp_path: Path, template: str, said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        await say(tmp_path, ["x"], ask(), chat_template=template)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


async def test_a_json_schema_is_followed_next_to_a_free_reply(tmp_path: Path) -> None:
    tiny_models.build_random(tmp_path)
    constrained = ask(most=200, sampling=pb.Sampling(temperature=1, seed=5))
    constrained.output_format.json_schema = json.dumps(SCHEMA)
    async with rig(tmp_path) as running:
        free = ask(most=30, include_token_ids=True)
        alone = (await running.generate(free)).token_ids
        for seed in range(3):
            constrained.sampling.seed = seed
            reply = await running.generate(constrained)
            assert reply.finished.reason == pb.FINISH_REASON_STOP
            jsonschema.validate(json.loads(reply.text), SCHEMA)
        assert (await running.generate(free)).token_ids == alone


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (pb.OutputFormat(regex="(yes|no)"), {"yes", "no"}),
        (pb.OutputFormat(lark_grammar='start: "left" | "right"'), {"left", "right"}),
        (pb.OutputFormat(json_schema='{"enum": ["a", "b"]}'), {'"a"', '"b"'}),
    ],
    ids=["regex", "lark", "enum"],
)
async def test_a_grammar_is_followed_to_its_end(
    tmp_path: Path, wanted: pb.OutputFormat, text: set[str]
) -> None:
    tiny_models.build_random(tmp_path)
    async with rig(tmp_path) as running:
        reply = await running.generate(ask(output_format=wanted))
        assert reply.text in text
        assert reply.finished.reason == pb.FINISH_REASON_STOP


async def test_a_reply_continued_under_a_format_still_follows_it(tmp_path: Path) -> None:
    tiny_models.build_random(tmp_path)
    request = ask(output_format=pb.OutputFormat(regex="abcdefgh"), include_token_ids=True)
    async with rig(tmp_path) as running:
        whole = await running.generate(request)
        request.continue_from.token_ids.extend(whole.token_ids[:3])
        rest = await running.generate(request)
    assert whole.token_ids[3:] == rest.token_ids
    assert (whole.text, rest.text) == ("abcdefgh", whole.text[-len(rest.text) :])


async def test_reasoning_is_free_of_the_format(tmp_path: Path) -> None:
    for name, template in (("a", THINKS), ("b", THINKS_AT_ONCE)):
        pieces = ["<think>", "hm", "</think>", "zzz"][0 if name == "a" else 1 :]
        request = ask(output_format=pb.OutputFormat(regex="(yes|no)"))
        reply = await say(
            tmp_path / name, pieces, request, markers=["<think>", "</think>"], chat_template=template
        )
        assert reply.reasoning == "hm"
        assert reply.text in {"yes", "no"}


@pytest.mark.parametrize(
    "wanted",
    [
        pb.OutputFormat(json_schema='{"type": "wrong"}'),
        pb.OutputFormat(json_schema="{"),
        pb.OutputFormat(regex="("),
        pb.OutputFormat(lark_grammar="start: missing"),
    ],
    ids=["schema", "json", "regex", "lark"],
)
async def test_a_malformed_format_is_refused_before_anything_is_sent(
    tmp_path: Path, wanted: pb.OutputFormat
) -> None:
    tiny_models.build_random(tmp_path)
    async with rig(tmp_path) as running:
        reply = Reply()
        with pytest.raises(InvalidRequest) as caught:
            await running.service.generate(Call(request=ask(output_format=wanted)), reply.send)
        assert caught.value.violations[0][0] == f"output_format.{wanted.WhichOneof('constraint')}"
        assert not reply.events
        assert running.engine.stats().live == 0


@pytest.mark.parametrize(
    "wanted",
    [
        pb.OutputFormat(regex=r"[^\s\S]"),
        pb.OutputFormat(json_schema='{"$ref": "#"}'),
        pb.OutputFormat(json_schema='{"type": "integer", "minimum": 5, "maximum": 2}'),
    ],
    ids=["regex", "loop", "bounds"],
)
async def test_a_format_that_nothing_has_is_the_callers_fault_and_told_at_once(
    tmp_path: Path, wanted: pb.OutputFormat
) -> None:
    tiny_models.build_random(tmp_path)
    async with rig(tmp_path) as running:
        reply = Reply()
        with pytest.raises(InvalidRequest) as caught:
            await running.service.generate(Call(request=ask(output_format=wanted)), reply.send)
        assert caught.value.violations[0][0] == f"output_format.{wanted.WhichOneof('constraint')}"
        assert not reply.events
        assert (await running.generate(ask(most=3))).finished.usage.output_token_count == 3


async def test_a_format_that_takes_seconds_a_step_is_refused_and_holds_nobody_up(
    tmp_path: Path,
) -> None:
    tiny_models.build_random(tmp_path)
    request = ask(output_format=pb.OutputFormat(regex="(a{1000}){1000}{1000}"), most=4)
    async with rig(tmp_path) as running:
        reply = Reply()
        with pytest.raises(CapabilityUnsupported) as caught:
            await running.service.generate(Call(request=request), reply.send)
        assert caught.value.metadata["field"] == "output_format.regex"
        assert not reply.events
        assert running.engine.stats().steps == 0
        request.accepted_degradations.append(pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED)
        free = await running.generate(request)
    assert [each.field for each in free.started.degradations] == ["output_format.regex"]


async def test_a_large_schema_is_not_too_complex(tmp_path: Path) -> None:
    tiny_models.build_random(tmp_path)
    part = {"type": "string", "maxLength": 2000, "pattern": "^[a-z][a-z0-9-]{1,60}$"}
    part = {"type": "object", "properties": {f"q{i}": part for i in range(12)}}
    schema = {"type": "object", "properties": {f"p{i}": {"type": "array", "items": part} for i in range(40)}}
    async with rig(tmp_path) as running:
        wanted = pb.OutputFormat(json_schema=json.dumps(schema))
        reply = await running.generate(ask(output_format=wanted, most=24))
    assert reply.text.startswith("{")


async def test_a_reply_that_already_left_its_format_is_the_callers_fault(tmp_path: Path) -> None:
    tiny_models.build_random(tmp_path)
    request = ask(output_format=pb.OutputFormat(regex="(yes|no)"), most=4)
    request.continue_from.text = "zz"
    async with rig(tmp_path) as running:
        with pytest.raises(InvalidRequest) as caught:
            await running.generate(request)
        assert caught.value.violations[0][0] == "continue_from"
        assert (await running.generate(ask(most=3))).finished.usage.output_token_count == 3


async def test_part_of_a_schema_that_cannot_be_enforced_is_no_secret(tmp_path: Path) -> None:
    tiny_models.build_random(tmp_path)
    wanted = pb.OutputFormat(json_schema='{"type": "string", "not": {"const": "a"}}')
    async with rig(tmp_path) as running:
        with pytest.raises(Failure):
            await running.generate(ask(output_format=wanted))
