"""Conversations in the form that chat templates read."""

from __future__ import annotations

from forebay.inference.v1 import inference_pb2 as pb
from forebay.mlx_service import prompts


def test_parts_of_a_message_become_one_content() -> None:
    message = pb.Message(role=pb.ROLE_SYSTEM, parts=[pb.Part(text="a"), pb.Part(text="b")])
    assert prompts.conversation([message]) == [{"role": "system", "content": "ab"}]


def test_reasoning_and_tool_calls_are_kept() -> None:
    message = pb.Message(
        role=pb.ROLE_ASSISTANT,
        parts=[
            pb.Part(reasoning="hm"),
            pb.Part(text="x"),
            pb.Part(tool_call=pb.ToolCall(id="1", name="f", arguments_json='{"a": 1}')),
        ],
    )
    assert prompts.conversation([message]) == [
        {
            "role": "assistant",
            "content": "x",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        }
    ]


def test_every_tool_result_is_a_message_of_its_own() -> None:
    message = pb.Message(
        role=pb.ROLE_TOOL,
        parts=[
            pb.Part(tool_result=pb.ToolResult(id="1", text="r", name="f")),
            pb.Part(tool_result=pb.ToolResult(id="2", text="s")),
        ],
    )
    assert prompts.conversation([message]) == [
        {"role": "tool", "content": "r", "tool_call_id": "1", "name": "f"},
        {"role": "tool", "content": "s", "tool_call_id": "2"},
    ]


def test_tools_keep_the_order_of_their_schema_and_may_have_none() -> None:
    specs = prompts.tool_specs(
        [pb.Tool(name="f", parameters_json_schema='{"b": 1, "a": 2}'), pb.Tool(name="g")]
    )
    assert [list(spec["function"]["parameters"]) for spec in specs] == [["b", "a"], ["type", "properties"]]  # type: ignore[index]


def test_images_are_found_by_their_paths() -> None:
    image = pb.Part(image=pb.Blob(media_type="image/png", data=b"x"))
    messages = [pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="a"), image])]
    assert prompts.image_paths(messages) == ["messages[0].parts[1].image"]
