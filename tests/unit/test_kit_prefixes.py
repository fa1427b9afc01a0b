"""Digests of a conversation's beginnings: a service and a router, wherever they run, get the same."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from google.protobuf import descriptor

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import prefixes

KINDS = [
    field.name
    for field in pb.Part.DESCRIPTOR.oneofs_by_name["kind"].fields
    if isinstance(field, descriptor.FieldDescriptor)
]


def say(role: pb.Role.ValueType, text: str) -> pb.Message:
    return pb.Message(role=role, parts=[pb.Part(text=text)])


def talk(*texts: str, system: str = "", **fields: Any) -> pb.GenerateRequest:
    messages = [say(pb.ROLE_SYSTEM, system)] if system else []
    roles = (pb.ROLE_USER, pb.ROLE_ASSISTANT)
    messages += [say(roles[i % 2], text) for i, text in enumerate(texts)]
    return pb.GenerateRequest(model="m", messages=messages, **fields)


def with_part(part: pb.Part) -> pb.GenerateRequest:
    return pb.GenerateRequest(model="m", messages=[pb.Message(role=pb.ROLE_USER, parts=[part])])


TOOL = pb.Tool(name="look", description="Looks.", parameters_json_schema='{"type":"object"}')


def test_a_longer_conversation_keeps_the_digests_of_its_beginning() -> None:
    short = prefixes.digests(talk("a", system="s"))
    longer = prefixes.digests(talk("a", "b", "c", system="s"))
    assert len(short) == 2
    assert len(longer) == 4
    assert longer[:2] == short
    assert len(set(longer)) == 4


def test_the_first_link_holds_tools_and_all_leading_system_messages() -> None:
    request = talk("a", system="s", tools=[TOOL])
    request.messages.insert(1, say(pb.ROLE_SYSTEM, "more"))
    assert prefixes.beginnings(request) == [2, 3]
    assert prefixes.digests(talk("a", system="s"))[0] != prefixes.digests(request)[0]


def test_tools_alone_are_a_beginning_and_nothing_at_all_is_none() -> None:
    assert prefixes.beginnings(talk("a", tools=[TOOL])) == [0, 1]
    assert prefixes.beginnings(talk("a")) == [1]
    shared = prefixes.digests(talk("a", tools=[TOOL]))[0]
    assert prefixes.digests(talk("quite another", tools=[TOOL]))[0] == shared


def test_tools_that_may_not_be_called_are_not_in_the_prompt() -> None:
    off = pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE)
    assert prefixes.digests(talk("a", tools=[TOOL], tool_choice=off)) == prefixes.digests(talk("a"))


def test_a_system_message_in_the_middle_is_a_link_of_its_own() -> None:
    request = talk("a", system="s")
    request.messages.append(say(pb.ROLE_SYSTEM, "now briefly"))
    assert prefixes.beginnings(request) == [1, 2, 3]


def test_nobody_gets_the_digests_of_another_caller_or_model() -> None:
    request = talk("a", "b", system="s")
    chains = [
        prefixes.digests(request),
        prefixes.digests(request, caller="ann"),
        prefixes.digests(request, caller="bob"),
        prefixes.digests(request, model="other"),
        prefixes.digests(request, model="man", caller="n"),
        prefixes.digests(request, model="ma", caller="nn"),
    ]
    assert len({digest for chain in chains for digest in chain}) == sum(map(len, chains))
    assert prefixes.digests(request, model="m") == prefixes.digests(request)


def test_what_shapes_only_the_reply_changes_nothing() -> None:
    shaped = talk(
        "a",
        system="s",
        request_id="r",
        sampling=pb.Sampling(temperature=1, seed=3),
        limits=pb.GenerationLimits(max_output_token_count=3),
        output_format=pb.OutputFormat(any_json=True),
        logprobs=pb.LogprobOptions(top_logprob_count=2),
        routing=pb.RoutingHints(priority=pb.PRIORITY_BATCH),
        continue_from=pb.ReplyPrefix(text="Well"),
    )
    assert prefixes.digests(shaped) == prefixes.digests(talk("a", system="s"))


def test_effort_and_the_order_and_spelling_of_tools_change_everything() -> None:
    other = pb.Tool(name="ask")
    requests = [
        talk("a", tools=[TOOL, other]),
        talk("a", tools=[other, TOOL]),
        talk("a", tools=[TOOL]),
        talk("a", tools=[pb.Tool(name="lookLooks.", parameters_json_schema='{"type":"object"}')]),
        talk("a", tools=[TOOL], reasoning_effort=pb.REASONING_EFFORT_LOW),
    ]
    chains = [prefixes.digests(request) for request in requests]
    assert len({digest for chain in chains for digest in chain}) == 10


def test_every_kind_of_part_and_every_field_of_it_counts() -> None:
    call, result = pb.ToolCall, pb.ToolResult
    parts = [
        pb.Part(),
        pb.Part(text="x"),
        pb.Part(text=""),
        pb.Part(reasoning="x"),
        pb.Part(image=pb.Blob(media_type="image/png", data=b"x")),
        pb.Part(image=pb.Blob(media_type="image/gif", data=b"x")),
        pb.Part(image=pb.Blob(media_type="image/png", data=b"y")),
        pb.Part(tool_call=call(id="1", name="n", arguments_json="{}")),
        pb.Part(tool_call=call(id="2", name="n", arguments_json="{}")),
        pb.Part(tool_call=call(id="1", name="o", arguments_json="{}")),
        pb.Part(tool_call=call(id="1", name="n", arguments_json="{ }")),
        pb.Part(tool_result=result(id="1", name="n", text="{}")),
        pb.Part(tool_result=result(id="2", name="n", text="{}")),
        pb.Part(tool_result=result(id="1", name="o", text="{}")),
        pb.Part(tool_result=result(id="1", name="n", text="")),
    ]
    assert {part.WhichOneof("kind") for part in parts} == {None, *KINDS}
    assert len({prefixes.digests(with_part(part))[-1] for part in parts}) == len(parts)


def test_where_parts_and_messages_end_counts() -> None:
    def many(*texts: str) -> pb.GenerateRequest:
        message = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=text) for text in texts])
        return pb.GenerateRequest(model="m", messages=[message])

    requests = [many("ab"), many("a", "b"), many("ab", ""), talk("a", "b"), talk("b", "a")]
    assert len({prefixes.digests(request)[-1] for request in requests}) == len(requests)


def test_the_longest_beginning_that_is_held_is_found() -> None:
    chain = prefixes.digests(talk("a", "b", "c", system="s"))
    assert prefixes.longest(chain, []) == 0
    assert prefixes.longest(chain, [1, chain[0], chain[2]]) == 3
    assert prefixes.longest(chain, frozenset(chain)) == 4
    assert prefixes.longest([], chain) == 0


FIXED = [4802909247986499917, 5393100531371322800]
"""What every version of Forebay that speaks of these digests has to compute."""


def test_the_digests_are_an_interface_that_does_not_change() -> None:
    request = talk("Grüß Gott 👋", system="Be brief.", tools=[TOOL])
    assert prefixes.digests(request, caller="ann") == FIXED
    assert all(0 <= digest < 1 << 64 for digest in FIXED)
    assert list(pb.Model(prefix_digests=FIXED).prefix_digests) == FIXED


@pytest.mark.parametrize("seed", ["0", "1"])
def test_another_process_computes_the_same(seed: str) -> None:
    request = talk("Grüß Gott 👋", system="Be brief.", tools=[TOOL])
    program = (
        "import sys; from forebay.kit import prefixes; from forebay.inference.v1 import inference_pb2 as pb;"
        "print(prefixes.digests(pb.GenerateRequest.FromString(sys.stdin.buffer.read()), caller='ann'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=request.SerializeToString(),
        capture_output=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.decode().strip() == str(FIXED)
