"""From tokens to text: bytes of tokens, whole characters, and the parts of a reply.

Written here rather than taken from mlx-lm, because its detokenisers drop the
space that a continued reply may begin with, and its stop words are matched by
token, so that a word that is spelled with other tokens slips through.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

_NO_BYTE = 0x100
"""A character that Latin-1 cannot write."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary(Protocol):
    """What of a Hugging Face tokenizer is needed here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Returns the tokens as text."""


class TextStream(Protocol):
    """Turns one reply's tokens into text."""

    def add(self, token: int) -> str:
        """Takes a token and returns the characters that are complete now."""

    def end(self) -> str:
        """Returns what is left, with U+FFFD for a character that never became complete."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a tokenizer spells its tokens."""

    tokens: tuple[bytes, ...] | None
    """Bytes of every token; None if a token's text depends on its neighbours."""
    strips_first_space: bool
    """Whether a text's first space is the tokenizer's and not the text's."""
    vocabulary: Vocabulary
    """The tokenizer itself, for those without bytes of their own."""

    def stream(self, *, at_start: bool = True) -> TextStream:
        """Returns a stream for one reply.

        Args:
            at_start: whether the reply begins with it. A continued reply keeps its first space.
        """
        if self.tokens is None:
            return _Decoded(self.vocabulary)
        return _Bytes(self.tokens, strip=at_start and self.strips_first_space)

    def bytes_of(self, token: int) -> bytes:
        """Returns a token's bytes."""
        if self.tokens is None:
            return self.vocabulary.decode([token]).encode()
        return self.tokens[token] if token < len(self.tokens) else b""


def spelling(
    pieces: Sequence[str | None],
    *,
    decoder: str,
    added: dict[int, str],
    silent: Collection[int],
    vocabulary: Vocabulary,
) -> Spelling:
    """Returns how a tokenizer spells its tokens.

    Args:
        pieces: every token as the vocabulary writes it.
        decoder: the tokenizer's decoder, as JSON.
        added: tokens that are spelled as they are, such as `<think>`.
        silent: tokens that are no text, such as those that separate messages.
        vocabulary: the tokenizer itself.
    """
    rules = list(_rules(json.loads(decoder)))
    kinds = {rule["type"] for rule in rules}
    if "ByteLevel" in kinds:
        # A vocabulary has up to a quarter of a million pieces, and a worker that starts spells them all.
        letters = dict.fromkeys(range(256), _NO_BYTE)
        letters |= {ord(char): byte for byte, char in _byte_alphabet().items()}

        def spell(piece: str) -> bytes:
            try:
                return piece.translate(letters).encode("latin-1")
            except UnicodeEncodeError:  # it has a character that stands for no byte
                return piece.encode()

        strips = False
    elif "Metaspace" in kinds or {"Replace", "ByteFallback"} <= kinds:

        def spell(piece: str) -> bytes:
            found = _BYTE_TOKEN.fullmatch(piece)
            return bytes([int(found[1], 16)]) if found else piece.replace("\u2581", " ").encode()

        strips = any(
            (rule["type"] == "Strip" and rule.get("start"))
            or (rule["type"] == "Metaspace" and rule.get("prepend_scheme", "always") != "never")
            for rule in rules
        )
    else:
        return Spelling(None, False, vocabulary)
    table = [spell(piece or "") for piece in pieces]
    for token, content in added.items():
        table[token] = content.encode()
    for token in silent:
        table[token] = b""
    return Spelling(tuple(table), strips, vocabulary)


def _rules(decoder: object) -> list[dict[str, object]]:
    if not isinstance(decoder, dict):
        return []
    if decoder.get("type") == "Sequence":
        return [rule for one in decoder.get("decoders", ()) for rule in _rules(one)]
    return [decoder]


def _byte_alphabet() -> dict[int, str]:
    """The printable stand-in of each byte in byte-level vocabularies."""
    printable = {b for b in range(256) if chr(b).isprintable() and b not in {0x20, 0xA0, 0xAD}}
    alphabet = {b: chr(b) for b in printable}
    alphabet |= {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - printable))}
    return alphabet


class _Bytes:
    """A stream over tokens that have bytes of their own."""

    def __init__(self, tokens: Sequence[bytes], *, strip: bool) -> None:
        self._tokens = tokens
        self._strip = strip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        # A model's vocabulary may be padded beyond the tokenizer's: such tokens are no text.
        text = self._decoder.decode(self._tokens[token] if token < len(self._tokens) else b"")
        if text and self._strip:
            self._strip = False
            text = text.removeprefix(" ")
        return text

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Decoded:
    """A stream for tokenizers whose tokens depend on their neighbours: decodes a sliding window twice."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._window: list[int] = []
        self._told = ""

    def add(self, token: int) -> str:
        self._window.append(token)
        text = self._vocabulary.decode(self._window)
        if text.endswith("\ufffd"):
            return ""
        fresh = text[len(self._told) :]
        self._window = self._window[-1:]  # the next token's text can depend on this one, no more
        self._told = self._vocabulary.decode(self._window)
        return fresh

    def end(self) -> str:
        return self._vocabulary.decode(self._window)[len(self._told) :]


class Kind(Enum):
    """What a part of a reply is."""

    ANSWER = "answer"
    REASONING = "reasoning"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a reply. A tool call comes whole."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class Markers:
    """What separates the parts of a model's replies. Empty strings are not used."""

    think_start: str = ""
    think_end: str = ""
    tool_start: str = ""
    tool_end: str = ""
    """Empty with a `tool_start`: a call goes on to the end of the reply."""


class Splitter:
    """Splits a reply's text into its parts and finds the stop sequence that ends it.

    Text that might be the beginning of a marker or of a stop sequence is held
    back until it is known. Stop sequences count in the answer only.

    Args:
        markers: what separates parts.
        stops: stop sequences.
        begins_in: the part that the reply begins in.
    """

    def __init__(self, markers: Markers, stops: Sequence[str] = (), *, begins_in: Kind = Kind.ANSWER) -> None:
        self.stopped: str | None = None
        self._kind = begins_in
        self._held = ""
        self._call = ""
        edges: dict[Kind, dict[str, Kind | None]] = {kind: {} for kind in Kind}
        if markers.think_start:
            edges[Kind.ANSWER][markers.think_start] = Kind.REASONING
            edges[Kind.REASONING][markers.think_end] = Kind.ANSWER
        if markers.tool_start:
            edges[Kind.ANSWER][markers.tool_start] = Kind.TOOL
            edges[Kind.REASONING][markers.tool_start] = Kind.TOOL
            if markers.tool_end:
                edges[Kind.TOOL][markers.tool_end] = Kind.ANSWER
        edges[Kind.ANSWER] |= dict.fromkeys(stops)
        self._edges = edges

    @property
    def kind(self) -> Kind:
        """The part that the reply is in now."""
        return self._kind

    def feed(self, text: str) -> list[Segment]:
        """Takes text and returns the parts that are certain now. After a stop sequence it returns nothing."""
        segments: list[Segment] = []
        self._held += text
        while self.stopped is None:
            edges = self._edges[self._kind]
            at, marker = _earliest(self._held, edges)
            if marker is None:
                certain = len(self._held) - _beginning(self._held, edges)
                self._take(self._held[:certain], segments)
                self._held = self._held[certain:]
                break
            self._take(self._held[:at], segments)
            self._held = self._held[at + len(marker) :]
            after = edges[marker]
            if after is None:
                self.stopped = marker
                self._held = ""
                break
            if self._kind is Kind.TOOL:
                segments.append(Segment(Kind.TOOL, self._call))
                self._call = ""
            self._kind = after
        return segments

    def end(self) -> list[Segment]:
        """Returns what was held back. An unfinished tool call is returned as one, for the caller to judge."""
        segments: list[Segment] = []
        if self.stopped is None:
            self._take(self._held, segments)
            self._held = ""
            if self._kind is Kind.TOOL:
                segments.append(Segment(Kind.TOOL, self._call))
                self._call = ""
        return segments

    def _take(self, text: str, segments: list[Segment]) -> None:
        if not text:
            return
        if self._kind is Kind.TOOL:
            self._call += text
        elif segments and segments[-1].kind is self._kind:
            segments[-1] = Segment(self._kind, segments[-1].text + text)
        else:
            segments.append(Segment(self._kind, text))


def _earliest(text: str, markers: Collection[str]) -> tuple[int, str | None]:
    """Finds the marker that begins first; of two that begin together, the longer."""
    best: tuple[int, int, str] | None = None
    for marker in markers:
        at = text.find(marker)
        if at >= 0 and (best is None or (at, -len(marker)) < best[:2]):
            best = (at, -len(marker), marker)
    return (best[0], best[2]) if best else (-1, None)


def _beginning(text: str, markers: Collection[str]) -> int:
    """Length of the longest end of the text that is the beginning of a marker."""
    most = min(len(text), max((len(m) - 1 for m in markers), default=0))
    return next((n for n in range(most, 0, -1) if any(m.startswith(text[-n:]) for m in markers)), 0)


ToolParser = Callable[[str, object], object]
"""mlx-lm's parser of a model's tool calls: text and tools in, one call or a list of calls out."""
