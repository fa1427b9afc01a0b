"""After how many tokens of a prompt each of its first messages ends.

Templates do not say where they put a message. So the beginning of the
conversation is rendered alone, and what both texts begin with is where the
beginning ends in the whole. Where a template treats the last message apart,
that is less than the beginning's own text, and never more than is shared.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TypeAlias

from jinja2.exceptions import TemplateError

from forebay.mlx_service.prompts import TemplateMessage

Render: TypeAlias = Callable[[Sequence[TemplateMessage]], str]
"""Renders a conversation without the beginning of a reply."""

_STAND_IN: TemplateMessage = {"role": "user", "content": "\N{INVISIBLE SEPARATOR}"}
"""A message that begins as no other does, for templates that want one of the user's."""


def shared_length(render: Render, text: str, beginning: Sequence[TemplateMessage]) -> int | None:
    """Returns how many characters a prompt shares with every prompt that begins with these messages.

    Args:
        render: the template.
        text: the whole prompt.
        beginning: its first messages.

    Returns:
        None if the template cannot tell: it takes no such beginning.
    """
    for conversation in (beginning, [*beginning, _STAND_IN]):
        try:
            alone = render(conversation)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError):
            continue
        return common(text, alone)
    return None


def common(one: Sequence[object], other: Sequence[object]) -> int:
    """Returns how many elements two sequences of one kind both begin with."""
    known, most = 0, min(len(one), len(other))
    while known < most:
        middle = (known + most + 1) // 2
        if one[known:middle] == other[known:middle]:
            known = middle
        else:
            most = middle - 1
    return known


def tokens_within(offsets: Sequence[tuple[int, int]], length: int) -> int:
    """Returns how many tokens lie wholly within the first characters of a text.

    Args:
        offsets: first character of each token and the one after its last.
        length: the characters.
    """
    # A character that is several tokens gives each of them all of it, so ends never fall.
    return bisect_right(offsets, length, key=lambda place: place[1])
