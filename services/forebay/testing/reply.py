"""What a scripted model says to a request: the whole reply, before its first event."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import failure
from forebay.testing import tokens
from forebay.testing.script import Script, ScriptedModel


@dataclass(slots=True)
class Plan:
    """A whole reply, known before its first event."""

    deltas: list[pb.Delta] = field(default_factory=list)
    reason: pb.FinishReason.ValueType = pb.FINISH_REASON_STOP
    stop_sequence: str = ""
    stop_token: int | None = None
    reasoning_token_count: int = 0


def compose(
    request: pb.GenerateRequest, model: ScriptedModel, script: Script, *, seed: int, limit: int
) -> Plan:
    """Returns a whole reply.

    Args:
        request: what is asked.
        model: who answers.
        script: how it behaves.
        seed: what the tokens depend on beside prompt and weights.
        limit: most tokens.
    """
    plan = Plan()
    prompt = tokens.prompt_of(request.messages, request.tools)
    begun = bool(request.continue_from.text or request.continue_from.token_ids)
    if can(model, pb.CAPABILITY_REASONING) and request.reasoning_effort != pb.REASONING_EFFORT_NONE:
        thought = tokens.tokens_for(
            model.key, f"{prompt}/reasoning", seed=seed, count=script.reasoning_token_count
        )
        rest = "" if begun else tokens.text_of(thought).removeprefix(request.continue_from.reasoning)
        plan.deltas += [pb.Delta(reasoning=part, token_count=1) for part in re.findall(r" ?\S+", rest)]
        plan.reasoning_token_count = min(limit, len(plan.deltas))
    if calls := _calls(request, model, script):
        plan.reason = pb.FINISH_REASON_TOOL_CALLS
        plan.deltas += calls
    elif request.output_format.WhichOneof("constraint") in ("json_schema", "any_json") and can(
        model, pb.CAPABILITY_JSON_SCHEMA
    ):
        value = tokens.json_for(request.output_format.json_schema).removeprefix(request.continue_from.text)
        plan.deltas += [pb.Delta(text=part, token_count=1) for part in re.findall(r"(?s).{1,4}", value)]
    else:
        answer, plan.stop_token = _answer(request, model, prompt, seed=seed, count=script.token_count)
        plan.deltas += answer
    if len(plan.deltas) + (plan.stop_token is not None) > limit:
        del plan.deltas[limit:]
        plan.reason, plan.stop_token = pb.FINISH_REASON_LENGTH, None
    _stop(plan, request.limits.stop_sequences)
    return plan


def _answer(
    request: pb.GenerateRequest, model: ScriptedModel, prompt: str, *, seed: int, count: int
) -> tuple[list[pb.Delta], int | None]:
    """Returns the words that follow what the reply already holds, and the stop token that ends them."""
    prefix = request.continue_from
    stops = request.limits.stop_token_ids if can(model, pb.CAPABILITY_STOP_TOKEN_IDS) else ()
    ids = tokens.tokens_for(model.key, prompt, seed=seed, count=count)
    whole = tokens.text_of(ids)
    if prefix.token_ids and list(prefix.token_ids) == ids[: len(prefix.token_ids)]:
        done = len(tokens.text_of(prefix.token_ids))
    elif whole.startswith(prefix.text):
        done = len(prefix.text)
    else:  # another model began this reply: it is part of the prompt, and as much follows as is missing
        begun = tokens.words(prefix.text)
        left = max(0, count - begun)
        ids = [0] * begun + tokens.tokens_for(
            model.key, prompt + prefix.text, seed=seed, count=left, first=begun
        )
        done = len(tokens.text_of(ids[:begun]))
    deltas: list[pb.Delta] = []
    end = 0
    for position, token in enumerate(ids):
        part = tokens.piece(token, position)
        end += len(part)
        if end <= done:
            continue
        if token in stops:
            return deltas, token
        delta = pb.Delta(text=part[len(part) - (end - done) :], token_count=1)
        done = end
        if request.include_token_ids and can(model, pb.CAPABILITY_TOKEN_IDS):
            delta.token_ids.append(token)
        if request.HasField("logprobs") and can(model, pb.CAPABILITY_LOGPROBS):
            delta.logprobs.append(
                tokens.logprob_for(token, position, top_count=request.logprobs.top_logprob_count)
            )
        deltas.append(delta)
    return deltas, None


def _calls(request: pb.GenerateRequest, model: ScriptedModel, script: Script) -> list[pb.Delta]:
    mode = request.tool_choice.mode
    if not request.tools or mode == pb.ToolChoice.MODE_NONE or not can(model, pb.CAPABILITY_TOOLS):
        return []
    count = script.tool_call_count or (1 if mode == pb.ToolChoice.MODE_REQUIRED else 0)
    wanted = [tool for tool in request.tools if request.tool_choice.tool_name in ("", tool.name)]
    deltas = []
    for index in range(count if wanted else 0):
        tool = wanted[index % len(wanted)]
        first = pb.ToolCallDelta(index=index, id=f"call_{index}", name=tool.name)
        parts = re.findall(
            r"(?s).{1,8}", tokens.json_for(tool.parameters_json_schema or '{"type": "object"}')
        )
        deltas.append(pb.Delta(tool_call=first, token_count=1))
        deltas += [
            pb.Delta(tool_call=pb.ToolCallDelta(index=index, arguments_json=part), token_count=1)
            for part in parts
        ]
    return deltas


def _stop(plan: Plan, sequences: Sequence[str]) -> None:
    """Cuts the plan where the first stop sequence begins."""
    whole = "".join(delta.text for delta in plan.deltas)
    found = [(at, s) for s in sequences if (at := whole.find(s)) >= 0]
    if not found:
        return
    at, plan.stop_sequence = min(found)
    plan.reason, plan.stop_token = pb.FINISH_REASON_STOP, None
    kept: list[pb.Delta] = []
    for delta in plan.deltas:
        if delta.WhichOneof("content") == "text":
            if at <= 0:
                break
            delta.text, at = delta.text[:at], at - len(delta.text)
        kept.append(delta)
    plan.deltas = kept


def shortfalls(request: pb.GenerateRequest, model: ScriptedModel) -> list[pb.Degradation]:
    """Returns what the model cannot do and the caller accepts.

    Raises:
        CapabilityUnsupported: there is something that the caller does not accept.
    """
    asked: list[tuple[bool, pb.Capability.ValueType, str, pb.DegradationKind.ValueType]] = [
        (
            any(part.HasField("image") for message in request.messages for part in message.parts),
            pb.CAPABILITY_VISION,
            "messages",
            pb.DEGRADATION_KIND_IMAGE_DROPPED,
        ),
        (bool(request.tools), pb.CAPABILITY_TOOLS, "tools", pb.DEGRADATION_KIND_TOOLS_DROPPED),
        (
            request.output_format.WhichOneof("constraint") in ("json_schema", "any_json"),
            pb.CAPABILITY_JSON_SCHEMA,
            "output_format",
            pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED,
        ),
        (
            request.output_format.WhichOneof("constraint") in ("regex", "lark_grammar"),
            pb.CAPABILITY_GRAMMAR,
            "output_format",
            pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED,
        ),
        (
            request.sampling.HasField("seed"),
            pb.CAPABILITY_SEED,
            "sampling.seed",
            pb.DEGRADATION_KIND_OPTION_IGNORED,
        ),
        (
            request.HasField("logprobs"),
            pb.CAPABILITY_LOGPROBS,
            "logprobs",
            pb.DEGRADATION_KIND_OPTION_IGNORED,
        ),
        (
            request.include_token_ids,
            pb.CAPABILITY_TOKEN_IDS,
            "include_token_ids",
            pb.DEGRADATION_KIND_OPTION_IGNORED,
        ),
        (
            bool(request.limits.stop_token_ids),
            pb.CAPABILITY_STOP_TOKEN_IDS,
            "limits.stop_token_ids",
            pb.DEGRADATION_KIND_OPTION_IGNORED,
        ),
        (
            request.reasoning_effort > pb.REASONING_EFFORT_NONE,
            pb.CAPABILITY_REASONING,
            "reasoning_effort",
            pb.DEGRADATION_KIND_OPTION_IGNORED,
        ),
    ]
    require(model, pb.CAPABILITY_GENERATE, "model")
    if request.HasField("continue_from"):
        require(model, pb.CAPABILITY_CONTINUE, "continue_from")
    found: list[pb.Degradation] = []
    for wanted, capability, path, kind in asked:
        if wanted and not can(model, capability):
            if kind not in request.accepted_degradations:
                require(model, capability, path)
            found.append(pb.Degradation(kind=kind, field=path, detail="the model cannot; left out"))
    return found


def require(model: ScriptedModel, capability: pb.Capability.ValueType, path: str) -> None:
    """Raises `CapabilityUnsupported` if the model lacks what the field at `path` asks for."""
    if not can(model, capability):
        name = pb.Capability.Name(capability).removeprefix("CAPABILITY_")
        raise failure.CapabilityUnsupported(
            f"model {model.name} cannot do {name}, which {path} asks for",
            metadata={"capability": name, "field": path, "model": model.name},
        )


def can(model: ScriptedModel, capability: pb.Capability.ValueType) -> bool:
    """Returns whether the model has a capability."""
    return capability in model.capabilities
