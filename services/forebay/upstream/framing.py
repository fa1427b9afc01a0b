r"""Splits a stream of bytes into lines and into server-sent events. Pure: bytes in, lines or events out.

Bytes may be cut anywhere, in the middle of a character or between `\r` and
`\n`. Nothing is decoded before its line is whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from forebay.kit.failure import BrokenStream

LINE_LIMIT = 64 * 1024 * 1024
"""Most bytes of a line. Ollama's own client allows 8 MB, and a reply may hold the base64 of an image."""

_BOM = b"\xef\xbb\xbf"
_LINE_END = re.compile(rb"\r\n|\r|\n")


class LineTooLong(BrokenStream):
    """The backend sent a line that is longer than we hold in memory."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"the backend sent a line of more than {limit} bytes", metadata={"limit_bytes": str(limit)}
        )


class LineSplitter:
    r"""Splits NDJSON at `\n`. A `\r` before it, blank lines and a leading byte order mark are dropped.

    Args:
        limit: most bytes of a line.
    """

    def __init__(self, *, limit: int = LINE_LIMIT) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self._held = 0
        self._first = True

    def feed(self, data: bytes) -> list[bytes]:
        """Returns the lines that `data` completes, without their ends.

        Raises:
            LineTooLong: a line is longer than `limit`.
        """
        head, *rest = data.split(b"\n")
        self._hold(head)
        lines: list[bytes] = []
        for part in rest:
            self._take(lines)
            self._hold(part)
        return lines

    def finish(self) -> list[bytes]:
        """Returns the last line if it came without an end."""
        lines: list[bytes] = []
        self._take(lines)
        return lines

    def _hold(self, part: bytes) -> None:
        self._held += len(part)
        if self._held > self._limit:
            raise LineTooLong(self._limit)
        if part:
            self._parts.append(part)

    def _take(self, lines: list[bytes]) -> None:
        line = b"".join(self._parts)
        self._parts.clear()
        self._held = 0
        if self._first:
            line = line.removeprefix(_BOM)
            self._first = False
        line = line.strip(b" \t\r")
        if line:
            lines.append(line)


@dataclass(frozen=True, slots=True)
class SseEvent:
    """One server-sent event.

    Also made for a block that holds only an `error:` field, which is not in the
    standard and which llama-server wrote until 2025.
    """

    data: str = ""
    """The `data` fields, joined by newlines."""
    event: str = ""
    """The `event` field. Empty is the default, `message`."""
    id: str = ""
    """The `id` field of this event."""
    error: str = ""
    """The `error` fields, joined by newlines."""
    comment: str = ""
    """A comment's text. Comments come alone, and only if they are asked for."""


class SseSplitter:
    r"""Splits a stream of server-sent events. Lines may end in `\n`, `\r\n` or `\r`.

    An event at the end without its blank line is given too, unlike in a
    browser: servers close right after their last line.

    Args:
        limit: most bytes of one event.
        comments: whether to give comments as events of their own. Some servers tell there how far
            they are with the prompt.
    """

    def __init__(self, *, limit: int = LINE_LIMIT, comments: bool = False) -> None:
        self._limit = limit
        self._give_comments = comments
        self._buffer = bytearray()
        self._scanned = 0
        self._skip_newline = False
        self._first = True
        self._fields: dict[str, list[str]] = {}
        self._held = 0
        self.comments = 0
        """Comments seen so far. They are how servers say that they are alive."""

    def feed(self, data: bytes) -> list[SseEvent]:
        """Returns the events that `data` completes.

        Raises:
            LineTooLong: an event is longer than `limit`.
        """
        if not data:
            return []
        if self._skip_newline and data[:1] == b"\n":
            data = data[1:]
        self._skip_newline = False
        self._buffer += data
        events: list[SseEvent] = []
        start = 0
        while match := _LINE_END.search(self._buffer, self._scanned):
            if match.group() == b"\r" and match.end() == len(self._buffer):
                self._skip_newline = True  # the `\n` may still come, and is then no line of its own
            self._line(bytes(self._buffer[start : match.start()]), events)
            start = self._scanned = match.end()
        del self._buffer[:start]
        self._scanned = len(self._buffer)
        if self._held + len(self._buffer) > self._limit:
            raise LineTooLong(self._limit)
        return events

    def finish(self) -> list[SseEvent]:
        """Returns the last event if it came without a blank line."""
        events: list[SseEvent] = []
        if self._buffer:
            self._line(bytes(self._buffer), events)
            self._buffer.clear()
            self._scanned = 0
        self._dispatch(events)
        return events

    def _line(self, line: bytes, events: list[SseEvent]) -> None:
        if self._first:
            line = line.removeprefix(_BOM)
            self._first = False
        if not line:
            self._dispatch(events)
            return
        if line.startswith(b":"):
            self.comments += 1
            if self._give_comments:
                events.append(SseEvent(comment=line[1:].decode("utf-8", "replace").strip()))
            return
        self._held += len(line)
        if self._held > self._limit:
            raise LineTooLong(self._limit)
        name, _, value = line.decode("utf-8", "replace").partition(":")
        self._fields.setdefault(name, []).append(value.removeprefix(" "))

    def _dispatch(self, events: list[SseEvent]) -> None:
        fields, self._fields, self._held = self._fields, {}, 0
        if "data" in fields or "error" in fields:
            events.append(
                SseEvent(
                    data="\n".join(fields.get("data", ())),
                    event=fields.get("event", [""])[-1],
                    id=fields.get("id", [""])[-1],
                    error="\n".join(fields.get("error", ())),
                )
            )
