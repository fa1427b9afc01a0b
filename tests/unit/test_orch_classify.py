"""What a request is taken for, and what is read out as the reason."""

from __future__ import annotations

import random
from pathlib import Path

import platformdirs
import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.orchestrator.routing.classify import USUAL_OUTPUT_TOKENS, Traits, classify
from forebay.testing.calls import ask


def message(*parts: pb.Part, role: pb.Role.ValueType = pb.ROLE_USER) -> pb.Message:
    return pb.Message(role=role, parts=parts)


def text(words: str) -> pb.Part:
    return pb.Part(text=words)


def taken(*parts: pb.Part, **fields: object) -> Traits:
    return classify(pb.GenerateRequest(messages=[message(*parts)], **fields))  # type: ignore[arg-type]  # the message checks them


CODE = "def f(x):\n    return x\n\nclass A:\n    pass\n"

PROSE = (
    "Dear all,\nwe return to the import of wine next week; please let us know\n"
    "which class you teach. From Monday on, use the new door:\nit is public.\nYours"
)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("What does this do?\n```\nx\n```", "it has a fenced code block"),
        ("diff --git a/x b/x\n--- a/x", "it has a diff"),
        ("Traceback (most recent call last):\n  File", "it has a stack trace"),
        ("<|fim_prefix|>def f(<|fim_suffix|>", "it asks for a gap in code to be filled"),
        (CODE, "3 lines of the last message look like code"),
        ("int main() {\n  f();\n}\n", "3 lines of the last message look like code"),
        (
            "Why is this slow?\nSELECT *\nINSERT INTO t\nCREATE TABLE t",
            "3 lines of the last message look like code",
        ),
    ],
)
def test_code_is_known_by_what_can_be_pointed_at(words: str, reason: str) -> None:
    traits = taken(text(words))
    assert (traits.request_class, traits.reasons) == ("code", (reason,))


@pytest.mark.parametrize("words", [PROSE, "return to me", "a; b; c;", "{}", ""])
def test_prose_is_no_code(words: str) -> None:
    assert taken(text(words)).request_class == "chat"


def test_code_is_looked_for_at_the_end_of_what_the_user_said_last() -> None:
    request = pb.GenerateRequest(
        messages=[message(text(CODE)), message(text(CODE), role=pb.ROLE_ASSISTANT), message(text("Thanks"))]
    )
    assert classify(request).request_class == "chat"
    assert taken(text(CODE + "word " * 2000)).request_class == "chat"


def test_tools_that_may_not_be_used_are_not_needed() -> None:
    tools = [pb.Tool(name="t", description="d" * 100, parameters_json_schema="{}")]
    forbidden = taken(text("hi"), tools=tools, tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE))
    assert (forbidden.request_class, forbidden.extra_characters) == ("chat", 0)
    assert pb.CAPABILITY_TOOLS not in forbidden.needs
    offered = taken(text("hi"), tools=tools)
    assert (offered.request_class, offered.extra_characters) == ("tools", 102)
    assert pb.CAPABILITY_TOOLS in offered.needs


def test_every_kind_of_part_is_counted() -> None:
    call = pb.Part(tool_call=pb.ToolCall(name="f", arguments_json="{}"))
    result = pb.Part(tool_result=pb.ToolResult(name="f", text="12345"))
    reasoning = pb.Part(reasoning="thought")  # most templates leave it out
    assert taken(text("abc"), call, result, reasoning).characters == 10
    assert classify(pb.CountTokensRequest(messages=[message(text("abc"))])).characters == 3


def test_the_narrowest_demand_names_the_class_and_all_are_told() -> None:
    image = pb.Part(image=pb.Blob(media_type="image/png", data=b"x"))
    traits = taken(
        text("x" * 40_000),
        text("```"),
        image,
        tools=[pb.Tool(name="t")],
        output_format=pb.OutputFormat(json_schema="{}"),
        routing=pb.RoutingHints(priority=pb.PRIORITY_BATCH),
    )
    assert traits.request_class == "vision"
    assert traits.reasons == (
        "it has an image",
        "it offers 1 tool(s)",
        "its reply is constrained by json_schema",
        "its text has 40003 characters",
        "it has a fenced code block",
        "its priority is batch",
    )


def test_embeddings_are_measured_by_the_longest_and_weighed_by_all() -> None:
    request = pb.EmbedRequest(
        texts=["a" * 400, "b" * 40], routing=pb.RoutingHints(priority=pb.PRIORITY_BATCH)
    )
    traits = classify(request)
    assert traits.reasons == ("it asks for embeddings", "its priority is batch")
    assert (traits.likely_tokens, traits.due_tokens) == (100.0, 110.0)
    assert classify(pb.EmbedRequest()).due_tokens == 0.0


def test_what_is_due_is_prompt_and_reply() -> None:
    assert taken(text("x" * 400)).due_tokens == 100.0 + USUAL_OUTPUT_TOKENS
    short = pb.GenerationLimits(max_output_token_count=10)
    assert taken(text("x" * 400), limits=short).due_tokens == 110.0
    # Few replies reach a high limit.
    high = pb.GenerationLimits(max_output_token_count=100_000)
    assert taken(text("x" * 400), limits=high).due_tokens == 100.0 + USUAL_OUTPUT_TOKENS


def test_thoughts_of_earlier_answers_which_templates_leave_out_are_no_part_of_the_least() -> None:
    said = "<think>" + "and so on " * 5000 + "</think>" + "yes " * 6000
    messages = [message(text("hi")), message(text(said), role=pb.ROLE_ASSISTANT), message(text("on"))]
    assert classify(pb.GenerateRequest(messages=messages)).least_tokens == 3001
    assert taken(text(said)).least_tokens > 10_000, "whoever asks about thoughts means all of it"


@pytest.mark.parametrize("folder", ["smollm2-135m-instruct", "all-minilm-l6-v2"])
def test_no_text_has_fewer_tokens_than_it_is_said_to_have_at_least(folder: str) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="comes with MLX")
    path = platformdirs.user_cache_path("forebay") / "models" / folder / "tokenizer.json"
    if not path.exists():
        pytest.skip(f"{folder} was not fetched")
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    chance = random.Random(0)
    pieces = [
        "of the",
        "a",
        "antidisestablishmentarianism",
        " ",
        "  ",
        "\n",
        " \n",
        "\t",
        "- ",
        ". . .",
        "==",
        "水 ",
        "9 ",
    ]
    for text in (
        *("".join(chance.choices(pieces, k=4000)) for _ in range(20)),
        *((piece + " ") * 4000 for piece in pieces),
        Path(__file__).read_text() * 3,
    ):
        least = classify(ask(text)).least_tokens
        assert least > 0
        assert len(tokenizer.encode(text, add_special_tokens=False).ids) >= least
