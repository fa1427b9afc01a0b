"""What kind of request this is, by rules that can be read out.

The class names the demand that most narrows the choice of backends; the reasons
list every rule that matched, so that a person can follow and dispute it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

MOST_WORDS_PER_TOKEN = 2
"""Tokenizers in use part text at white space before anything else, so a token holds one word at most. Twice
that leaves room for vocabularies that join words, which common pairs of words are joined in."""

SHORT_CHARACTERS = 4_000
"""Text so short fits wherever anything does, and its words are not counted."""

_THOUGHT_END = "</think>"

PLAIN = frozenset({pb.CAPABILITY_GENERATE, pb.CAPABILITY_EMBED, pb.CAPABILITY_COUNT_TOKENS})
"""Capabilities that are no speciality: whoever lists a model for it can do them, or is refused."""

USUAL_OUTPUT_TOKENS = 256.0
"""Tokens of a reply where nobody set a limit, or set one that few replies reach."""

CODE_CHARACTERS = 4_000
"""Characters at the end of a message that are looked at for code. There the question is."""

CODE_LINES = 3
"""Lines that look like code, without which a text is no code: one or two are in many a letter."""

_CODE_STARTS = (
    *("def ", "class ", "func ", "fn ", "import ", "#include", "public ", "private ", "const ", "return "),
    *("async ", "struct ", "impl ", "SELECT ", "INSERT INTO ", "CREATE TABLE "),
)
_CODE_ENDS = ("{", "}", "};", ");", "):", "=> {")
_CODE_FENCE = "```"
_CODE_MARKS = (
    ("diff --git ", "it has a diff"),
    ("Traceback (most recent call last)", "it has a stack trace"),
    ("<|fim_prefix|>", "it asks for a gap in code to be filled"),
)


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
    """Characters of text in it; of several texts to embed, those of the longest."""
    least_tokens: int = 0
    """Tokens that its text has at the very least; of several texts to embed, that of which this is the most.
    0 if the caller accepts that it is cut."""
    extra_characters: int = 0
    """Characters that some part of which is likely to be read too: tools, and the other texts to embed."""
    output_tokens: float = 0.0
    """Tokens that its reply is likely to have."""

    @property
    def specialities(self) -> frozenset[pb.Capability.ValueType]:
        """What it needs beyond plain text."""
        return self.needs - PLAIN

    @property
    def likely_tokens(self) -> float:
        """A guess at its tokens."""
        return self.characters / CHARACTERS_PER_TOKEN

    @property
    def due_tokens(self) -> float:
        """A guess at all tokens that have to be read and written for it."""
        return (self.characters + self.extra_characters) / CHARACTERS_PER_TOKEN + self.output_tokens


def classify(request: Request) -> Traits:
    """Returns what kind of request it is, and why."""
    if isinstance(request, pb.EmbedRequest):
        return _classify_embed(request)
    if isinstance(request, pb.CountTokensRequest):
        return Traits(
            request_class="count_tokens",
            reasons=("it asks for a token count",),
            needs=frozenset({pb.CAPABILITY_COUNT_TOKENS}),
            characters=_Content(request).characters,
        )
    return _classify_generate(request)


def least_tokens(request: pb.GenerateRequest | pb.EmbedRequest) -> int:
    """Returns the tokens that the text of a request has at the very least, a longest text's of several."""
    if isinstance(request, pb.EmbedRequest):
        return max((_least_tokens([text]) for text in request.texts), default=0)
    return _least_tokens(list(_texts(request)))


def _least_tokens(texts: Sequence[str]) -> int:
    characters = sum(map(len, texts))
    words = sum(len(text.split()) for text in texts) if characters > SHORT_CHARACTERS else 0
    return max(characters // MOST_CHARACTERS_PER_TOKEN, words // MOST_WORDS_PER_TOKEN)


def _texts(request: pb.GenerateRequest) -> Iterator[str]:
    """Yields what a template certainly puts into the prompt. Of earlier answers it may leave out thoughts."""
    for message in request.messages:
        for part in message.parts:
            text = part.text or part.tool_call.arguments_json or part.tool_result.text
            yield text.rpartition(_THOUGHT_END)[2] if message.role == pb.ROLE_ASSISTANT else text


def _classify_embed(request: pb.EmbedRequest) -> Traits:
    reasons = ["it asks for embeddings"]
    if request.routing.priority == pb.PRIORITY_BATCH:
        reasons.append("its priority is batch")
    lengths = [len(text) for text in request.texts]
    longest = max(lengths, default=0)
    return Traits(
        request_class="embedding",
        reasons=tuple(reasons),
        needs=frozenset({pb.CAPABILITY_EMBED}),
        characters=longest,
        least_tokens=0 if _may_be_cut(request) else least_tokens(request),
        extra_characters=sum(lengths) - longest,
    )


def _classify_generate(request: pb.GenerateRequest) -> Traits:
    accepted = set(request.accepted_degradations)
    content = _Content(request)
    matched: list[tuple[str, str]] = []
    needs = {pb.CAPABILITY_GENERATE}

    def need(capability: pb.Capability.ValueType, unless: pb.DegradationKind.ValueType | None = None) -> None:
        # Whoever accepts a shortfall may be sent where it happens.
        if unless is None or unless not in accepted:
            needs.add(capability)

    if content.has_image:
        matched.append(("vision", "it has an image"))
        need(pb.CAPABILITY_VISION, pb.DEGRADATION_KIND_IMAGE_DROPPED)
    tools = () if request.tool_choice.mode == pb.ToolChoice.MODE_NONE else request.tools
    if tools:
        matched.append(("tools", f"it offers {len(tools)} tool(s)"))
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
    if request.limits.stop_token_ids:
        need(pb.CAPABILITY_STOP_TOKEN_IDS, pb.DEGRADATION_KIND_OPTION_IGNORED)
    if content.characters >= LONG_PROMPT_CHARACTERS:
        matched.append(("long_context", f"its text has {content.characters} characters"))
    if content.code:
        matched.append(("code", content.code))
    if request.routing.priority == pb.PRIORITY_BATCH:
        matched.append(("batch", "its priority is batch"))
    if not matched:
        matched.append(("chat", "no other rule matched"))
    limit = request.limits.max_output_token_count
    return Traits(
        request_class=matched[0][0],
        reasons=tuple(reason for _, reason in matched),
        needs=frozenset(needs),
        characters=content.characters,
        least_tokens=0 if _may_be_cut(request) else least_tokens(request),
        extra_characters=sum(len(tool.description) + len(tool.parameters_json_schema) for tool in tools),
        output_tokens=min(limit, USUAL_OUTPUT_TOKENS) if limit else USUAL_OUTPUT_TOKENS,
    )


def _may_be_cut(request: pb.GenerateRequest | pb.EmbedRequest) -> bool:
    return pb.DEGRADATION_KIND_PROMPT_TRUNCATED in request.accepted_degradations


class _Content:
    """What the messages hold, looked through once."""

    def __init__(self, request: pb.GenerateRequest | pb.CountTokensRequest) -> None:
        self.characters = 0
        self.has_image = False
        self.code = ""
        """Why it is taken for code. Empty if it is not."""
        last = ""
        for message in request.messages:
            is_users = message.role == pb.ROLE_USER
            for part in message.parts:
                kind = part.WhichOneof("kind")
                if kind == "text":
                    text = part.text
                    self.characters += len(text)
                    if not self.code and _CODE_FENCE in text:
                        self.code = "it has a fenced code block"
                    last = text if is_users else last
                elif kind == "tool_call":
                    self.characters += len(part.tool_call.arguments_json)
                elif kind == "tool_result":
                    self.characters += len(part.tool_result.text)
                elif kind == "image":
                    self.has_image = True
        self.code = self.code or _why_code(last[-CODE_CHARACTERS:])


def _why_code(text: str) -> str:
    for mark, why in _CODE_MARKS:
        if mark in text:
            return why
    lines = sum(map(_is_code, text.splitlines()))
    return f"{lines} lines of the last message look like code" if lines >= CODE_LINES else ""


def _is_code(line: str) -> bool:
    bare = line.strip()
    return bare.startswith(_CODE_STARTS) or bare.endswith(_CODE_ENDS)
