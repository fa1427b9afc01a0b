"""Tells a model's reasoning from its answer where the server did not: `<think>` in the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

Kind: TypeAlias = Literal["text", "reasoning"]
"""What a piece of a reply belongs to."""

Piece: TypeAlias = tuple[Kind, str]
"""A piece of a reply, never empty."""

TAGS: Final = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))
"""Tags that models in the wild put around their reasoning."""


class ThinkSplitter:
    """Splits streamed text into reasoning and answer. A tag may be cut anywhere.

    A tag opens reasoning only where no answer came yet: later it is text
    about tags. Line ends before reasoning and white space after it are dropped with the tags.

    Args:
        tags: pairs of opening and closing tag.
        opened: whether the prompt already holds the first opening tag, as some chat templates do.
    """

    def __init__(self, *, tags: Sequence[tuple[str, str]] = TAGS, opened: bool = False) -> None:
        self._closing = dict(tags)
        self._close = tags[0][1] if opened else ""
        self._held = ""
        self._answering = False
        self._begun = False
        self._fresh = opened

    def feed(self, text: str) -> list[Piece]:
        """Returns the pieces that are certain by now. What may be the start of a tag is held back."""
        pieces: list[Piece] = []
        self._held += text
        while self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """Returns what was held back. Reasoning that was never closed stays reasoning."""
        held, self._held = self._held, ""
        if self._close:
            return [("reasoning", held)] if held else []
        if not self._answering and not held.strip() and self._begun:
            return []
        return [("text", held)] if held else []

    def _step(self, pieces: list[Piece]) -> bool:
        """Takes one step; returns whether another may follow."""
        if not self._held:
            return False
        if self._answering:
            pieces.append(("text", self._held))
            self._held = ""
            return False
        return self._inside(pieces) if self._close else self._before(pieces)

    def _inside(self, pieces: list[Piece]) -> bool:
        if self._fresh:
            self._held = self._held.lstrip("\n")
            self._fresh = not self._held
        at = self._held.find(self._close)
        end = at if at >= 0 else len(self._held) - _overlap(self._held, self._close)
        piece = self._held[:end]
        if piece:
            pieces.append(("reasoning", piece))
        if at < 0:
            self._held = self._held[end:]
            return False
        self._held = self._held[at + len(self._close) :]
        self._close = ""
        return True

    def _before(self, pieces: list[Piece]) -> bool:
        bare = self._held.lstrip()
        for opening, closing in self._closing.items():
            if bare.startswith(opening):
                self._held = bare[len(opening) :]
                self._fresh = True
                self._close = closing
                self._begun = True
                return True
        if not bare or any(opening.startswith(bare) for opening in self._closing):
            return False
        self._answering = True
        # White space before an answer without reasoning is the model's; after reasoning it is the tag's.
        pieces.append(("text", bare if self._begun else self._held))
        self._held = ""
        return False


def _overlap(text: str, tag: str) -> int:
    """Returns how many characters at the end of `text` may be the start of `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)
