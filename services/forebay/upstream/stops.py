"""Ends a reply at a stop sequence where the server cannot be trusted to.

mlx_lm.server takes a stop sequence that falls between two tokens out of the
text and goes on: the reply loses words in its middle. So it is not told of
stop sequences, and they are found here.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopSplitter:
    """Finds the first stop sequence in streamed text. It may be cut anywhere.

    Args:
        stops: the sequences, none empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = ""
        """The sequence that ended the text. Empty until one did."""

    def feed(self, text: str) -> str:
        """Returns the text that is certain to come before any stop sequence."""
        if self.found:
            return ""
        self._held += text
        places = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            at, self.found = min(places)
            end = at
        else:
            end = len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[:end], "" if self.found else self._held[end:]
        return certain

    def finish(self) -> str:
        """Returns what was held back because a sequence might have begun there."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of `text` may be the start of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
