"""Templates and tokens, on a thread of their own.

Templating and tokenising a long conversation takes milliseconds to seconds: too
long for the event loop, and time stolen from every row on the engine's thread.
A Hugging Face tokenizer must not be used by two threads at once, so one thread
owns it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from jinja2.exceptions import TemplateError

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import CapabilityUnsupported, InvalidRequest, printable
from forebay.mlx_service import prompts
from forebay.mlx_service.worker.beginnings import common, shared_length, tokens_within
from forebay.mlx_service.worker.load import load_words
from forebay.mlx_service.worker.runtime import TokenizerWrapper
from forebay.mlx_service.worker.text import Kind, Markers, Spelling, ToolParser, spelling

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """What a model's tokenizer can do. Nothing in it may be changed by another thread."""

    spelling: Spelling
    markers: Markers
    """Of reasoning and of tool calls."""
    end_tokens: frozenset[int]
    think_tokens: tuple[int, int] | None
    """Begin and end of reasoning, where each is one token."""
    tool_parser: ToolParser | None
    """Reads the model's tool calls; None if it has none or its template takes no tools."""
    has_template: bool
    takes_effort: frozenset[str]
    """Names of the template's switches for reasoning: `enable_thinking`, `reasoning_effort`."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as the model reads it."""

    tokens: tuple[int, ...]
    reply_count: int
    """Tokens at the end that belong to the reply already."""
    begins_in: Kind
    """The part of the reply that comes next."""
    ends: Mapping[int, int] = field(default_factory=dict)
    """Of beginnings of so many messages, their tokens, where that was asked and can be told."""


class Words:
    """Renders conversations into tokens.

    Args:
        path: the model's folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mlx-words")
        self._reading: Future[Language]
        self._tokenizer: TokenizerWrapper
        self.language: Language

    async def load(self) -> None:
        """Reads the tokenizer.

        Raises:
            ModelLoadFailed: it cannot be read.
        """
        self._reading = self._pool.submit(self._load)
        self.language = await asyncio.wrap_future(self._reading)

    def wait(self) -> Language:
        """Returns what `load` reads once it has. For another thread, which is told how it failed too."""
        return self._reading.result()

    async def run(self, call: Callable[[], T]) -> T:
        """Runs a call on the tokenizer's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def close(self) -> None:
        """Ends the thread when what it does is done."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def tokenizer(self) -> TokenizerWrapper:
        """The tokenizer. For calls that `run` runs."""
        return self._tokenizer

    async def prompt(
        self,
        messages: Sequence[pb.Message],
        tools: Sequence[pb.Tool] = (),
        *,
        switches: dict[str, object] | None = None,
        prefix: pb.ReplyPrefix | None = None,
        ends: Sequence[int] = (),
    ) -> Prompt:
        """Renders a conversation, and what its reply already holds.

        Args:
            messages: the conversation. Images are left out.
            tools: tools to offer.
            switches: what else the template takes.
            prefix: what the reply already holds.
            ends: beginnings, by their number of messages, whose tokens to count.

        Raises:
            InvalidRequest: the template refuses the conversation.
            CapabilityUnsupported: there is no template.
        """
        if not self.language.has_template:
            raise CapabilityUnsupported(
                "this model has no chat template, so it cannot hold a conversation: use its chat variant",
                metadata={"capability": "generate"},
            )
        conversation = prompts.conversation(messages)
        specs = prompts.tool_specs(tools) or None
        beginnings = {count: prompts.conversation(messages[:count]) for count in ends}

        def work() -> Prompt:
            prompt = self._render(conversation, specs, switches or {}, prefix)
            return replace(prompt, ends=self._ends(prompt, conversation, beginnings, specs, switches or {}))

        return await self.run(work)

    def _ends(
        self,
        prompt: Prompt,
        conversation: list[prompts.TemplateMessage],
        beginnings: Mapping[int, list[prompts.TemplateMessage]],
        tools: list[dict[str, object]] | None,
        switches: dict[str, object],
    ) -> dict[int, int]:
        if not beginnings:
            return {}

        def render(messages: Sequence[prompts.TemplateMessage], *, whole: bool = False) -> str:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tools=tools, add_generation_prompt=whole, tokenize=False, **switches
                )
            )

        text = render(conversation, whole=True)
        encoding = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        # What the reply holds already may have changed how the prompt's last letters are cut into tokens.
        same = common(encoding.ids, list(prompt.tokens))
        found = {}
        for count, beginning in beginnings.items():
            length = shared_length(render, text, beginning)
            if length is not None:
                found[count] = min(same, tokens_within(encoding.offsets, length))
        return found

    def _render(
        self,
        conversation: list[prompts.TemplateMessage],
        tools: list[dict[str, object]] | None,
        switches: dict[str, object],
        prefix: pb.ReplyPrefix | None,
    ) -> Prompt:
        try:
            text: str = self._tokenizer.apply_chat_template(
                conversation, tools=tools, add_generation_prompt=True, tokenize=False, **switches
            )
        except TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template refuses the conversation: {printable(str(error))[:200]}",
                violations=[("messages", "the model's chat template refuses them")],
            ) from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InvalidRequest(
                f"the model's chat template cannot take the conversation: {type(error).__name__}",
                violations=[("messages", "the model's chat template cannot take them")],
            ) from error
        head = self._encode(text)
        markers = self.language.markers
        thinks = bool(markers.think_start) and _ends_open(text, markers.think_start)
        begins_in = Kind.REASONING if thinks else Kind.ANSWER
        if prefix is None or not (prefix.text or prefix.reasoning or prefix.token_ids):
            return Prompt(tuple(head), 0, begins_in)
        if prefix.token_ids:
            return Prompt((*head, *prefix.token_ids), len(prefix.token_ids), begins_in)
        held = prefix.text
        if prefix.reasoning:
            if not markers.think_start:
                raise CapabilityUnsupported(
                    "this model does not reason, so it cannot continue a reply that has reasoning",
                    metadata={"field": "continue_from.reasoning"},
                )
            held = ("" if thinks else markers.think_start) + prefix.reasoning
            begins_in = Kind.REASONING
            if prefix.text:
                held += markers.think_end + prefix.text
                begins_in = Kind.ANSWER
        elif thinks:
            # The answer has begun, so the reasoning that the template opened is over.
            held = markers.think_end + prefix.text
            begins_in = Kind.ANSWER
        tokens = self._encode(text + held)
        return Prompt(tuple(tokens), max(0, len(tokens) - len(head)), begins_in)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _load(self) -> Language:
        tokenizer = self._tokenizer = load_words(self._path)
        template = tokenizer.chat_template
        source = template if isinstance(template, str) else str(template or "")
        takes_tools = tokenizer.has_tool_calling and "tools" in source
        markers = Markers(
            think_start=tokenizer.think_start or "",
            think_end=tokenizer.think_end or "",
            tool_start=(tokenizer.tool_call_start or "") if takes_tools else "",
            tool_end=(tokenizer.tool_call_end or "") if takes_tools else "",
        )
        starts, ends = tokenizer.think_start_tokens, tokenizer.think_end_tokens
        single = starts is not None and len(starts) == 1 and len(ends) == 1
        return Language(
            spelling=_spelling(tokenizer, markers),
            markers=markers,
            end_tokens=frozenset(int(t) for t in tokenizer.eos_token_ids),
            think_tokens=(int(starts[0]), int(ends[0])) if single else None,
            tool_parser=tokenizer.tool_parser if takes_tools else None,
            has_template=bool(tokenizer.has_chat_template) and template != "",
            takes_effort=frozenset(
                name for name in ("enable_thinking", "reasoning_effort") if name in source
            ),
        )


def _ends_open(text: str, marker: str) -> bool:
    """Whether a prompt ends with the marker, so that the reply begins inside what it opens."""
    return text.rstrip().endswith(marker)


def _spelling(tokenizer: TokenizerWrapper, markers: Markers) -> Spelling:
    marks = (markers.think_start, markers.think_end, markers.tool_start, markers.tool_end)
    known = tokenizer.added_tokens_decoder
    backend = tokenizer.backend_tokenizer
    return spelling(
        tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))),
        decoder=backend.decoder.__getstate__().decode() if backend.decoder is not None else "null",
        added={int(token): str(entry) for token, entry in known.items()},
        silent=[
            int(token)
            for token, entry in known.items()
            if entry.special and not any(str(entry) in mark for mark in marks)
        ],
        vocabulary=tokenizer,
    )
