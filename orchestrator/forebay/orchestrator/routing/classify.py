"""What kind of request this is, by rules that can be read out.

The class names the demand that most narrows the choice of backends; the reasons
list every rule that matched, so that a person can follow and dispute it.
"""

from __future__ import annotations

from dataclasses import dataclass

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.pipeline import Request

LONG_PROMPT_CHARACTERS = 32_000
"""About 8,000 tokens of English: what many models are loaded with by default, so that beyond it the loaded
context begins to matter."""

CHARACTERS_PER_TOKEN = 4.0
"""Rough, for English prose. Only for comparing backends, never for refusing one."""

MOST_CHARACTERS_PER_TOKEN = 256
"""No vocabulary in use has longer tokens (the longest are runs of spaces or dashes). A prompt therefore has
at least one token for each such stretch, which is a certain lower bound and good for refusing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What routing needs to know of a request. It holds no text."""

    request_class: str
    """The narrowest kind that fits: `embedding`, `vision`, `tools`, `schema`, `long_context`, `code`, `batch`
    or `chat`; `count_tokens` for counting."""
    reasons: tuple[str, ...]
    """Every rule that matched, in words for people."""
    needs: frozenset[pb.Capability.ValueType]
    """Capabilities without which the request fails."""
    characters: int
    """Characters of text in it."""

    @property
    def least_tokens(self) -> int:
        """Tokens that its text has at the very least."""
        return self.characters // MOST_CHARACTERS_PER_TOKEN

    @property
    def likely_tokens(self) -> float:
        """A guess at its tokens."""
        return self.characters / CHARACTERS_PER_TOKEN


def classify(request: Request) -> Traits:
    """Returns what kind of request it is, and why."""
    if isinstance(request, pb.EmbedRequest):
        return Traits(
            request_class="embedding",
            reasons=("it asks for embeddings",),
            needs=frozenset({pb.CAPABILITY_EMBED}),
            characters=max((len(text) for text in request.texts), default=0),
        )
    if isinstance(request, pb.CountTokensRequest):
        return Traits(
            request_class="count_tokens",
            reasons=("it asks for a token count",),
            needs=frozenset({pb.CAPABILITY_COUNT_TOKENS}),
            characters=_count_characters(request),
        )
    return _classify_generate(request)


def _classify_generate(request: pb.GenerateRequest) -> Traits:
    accepted = set(request.accepted_degradations)
    characters = _count_characters(request)
    matched: list[tuple[str, str]] = []
    needs = {pb.CAPABILITY_GENERATE}

    def need(capability: pb.Capability.ValueType, unless: pb.DegradationKind.ValueType | None = None) -> None:
        # Whoever accepts a shortfall may be sent where it happens.
        if unless is None or unless not in accepted:
            needs.add(capability)

    if any(part.HasField("image") for message in request.messages for part in message.parts):
        matched.append(("vision", "it has an image"))
        need(pb.CAPABILITY_VISION, pb.DEGRADATION_KIND_IMAGE_DROPPED)
    if request.tools:
        matched.append(("tools", f"it offers {len(request.tools)} tool(s)"))
        need(pb.CAPABILITY_TOOLS, pb.DEGRADATION_KIND_TOOLS_DROPPED)
    constraint = request.output_format.WhichOneof("constraint")
    if constraint is not None:
        matched.append(("schema", f"its reply is constrained by {constraint}"))
        is_grammar = constraint in {"regex", "lark_grammar"}
        need(
            pb.CAPABILITY_GRAMMAR if is_grammar else pb.CAPABILITY_JSON_SCHEMA,
            pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED,
        )
    if request.HasField("continue_from"):
        need(pb.CAPABILITY_CONTINUE)
    if request.HasField("logprobs"):
        need(pb.CAPABILITY_LOGPROBS, pb.DEGRADATION_KIND_OPTION_IGNORED)
    if request.include_token_ids:
        need(pb.CAPABILITY_TOKEN_IDS, pb.DEGRADATION_KIND_OPTION_IGNORED)
    if characters >= LONG_PROMPT_CHARACTERS:
        matched.append(("long_context", f"its text has {characters} characters"))
    if any("```" in part.text for message in request.messages for part in message.parts):
        matched.append(("code", "it has a fenced code block"))
    if request.routing.priority == pb.PRIORITY_BATCH:
        matched.append(("batch", "its priority is batch"))
    if not matched:
        matched.append(("chat", "no other rule matched"))
    return Traits(
        request_class=matched[0][0],
        reasons=tuple(reason for _, reason in matched),
        needs=frozenset(needs),
        characters=characters,
    )


def _count_characters(request: pb.GenerateRequest | pb.CountTokensRequest) -> int:
    count = 0
    for message in request.messages:
        for part in message.parts:
            count += len(part.text) + len(part.tool_call.arguments_json) + len(part.tool_result.text)
    return count
