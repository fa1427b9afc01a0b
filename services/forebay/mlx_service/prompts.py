"""Conversations as chat templates want them: plain dictionaries, in the form that all templates share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from forebay.inference.v1 import inference_pb2 as pb

TemplateMessage: TypeAlias = dict[str, object]
"""A message as a chat template reads it."""

_ROLES = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
    pb.ROLE_TOOL: "tool",
}


def image_paths(messages: Sequence[pb.Message]) -> list[str]:
    """Returns the path of every image in the conversation, such as `messages[0].parts[1].image`."""
    return [
        f"messages[{i}].parts[{j}].image"
        for i, message in enumerate(messages)
        for j, part in enumerate(message.parts)
        if part.WhichOneof("kind") == "image"
    ]


def conversation(messages: Iterable[pb.Message]) -> list[TemplateMessage]:
    """Returns the messages for a chat template. Images are left out: the caller has dealt with them."""
    return [entry for message in messages for entry in _entries(message)]


def tool_specs(tools: Iterable[pb.Tool]) -> list[dict[str, object]]:
    """Returns the tools in the form that chat templates read."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": json.loads(
                    tool.parameters_json_schema or '{"type": "object", "properties": {}}'
                ),
            },
        }
        for tool in tools
    ]


def _entries(message: pb.Message) -> list[TemplateMessage]:
    if message.role == pb.ROLE_TOOL:
        return [_result(part.tool_result) for part in message.parts]
    entry: TemplateMessage = {
        "role": _ROLES[message.role],
        "content": "".join(part.text for part in message.parts),
    }
    reasoning = "".join(part.reasoning for part in message.parts)
    if reasoning:
        entry["reasoning_content"] = reasoning
    calls = [_call(part.tool_call) for part in message.parts if part.WhichOneof("kind") == "tool_call"]
    if calls:
        entry["tool_calls"] = calls
    return [entry]


def _call(call: pb.ToolCall) -> dict[str, object]:
    # Templates iterate over the arguments, so they get an object and not its text.
    arguments = json.loads(call.arguments_json or "{}")
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _result(result: pb.ToolResult) -> TemplateMessage:
    entry: TemplateMessage = {"role": "tool", "content": result.text, "tool_call_id": result.id}
    if result.name:
        entry["name"] = result.name
    return entry
