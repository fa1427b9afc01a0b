"""Logging to standard error, as text for people or JSON for programs, with the ids of the current trace.

No prompt or answer text is logged anywhere. What comes from outside may hold
control characters: they are replaced here, once, so that no message can forge
a line or recolour a terminal.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Literal

import orjson
from opentelemetry import trace
from pydantic import Field

from forebay.kit.config import Settings
from forebay.kit.failure import printable

LINE_BYTES = 8192
"""Most characters of one log message; the rest is cut, with a mark."""


class LogSettings(Settings):
    """How a process logs."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe level logged."
    )
    format: Literal["text", "json"] = Field(
        default="text", description="`text` for people, `json` for programs."
    )


def setup(settings: LogSettings, *, service: str) -> None:
    """Sends this process's logs to standard error.

    Args:
        settings: level and format.
        service: name put on every line.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(service) if settings.format == "json" else _Text(service))
    logging.basicConfig(handlers=[handler], level=settings.level.upper(), force=True)
    # Both talk at INFO about every poll and every connection.
    for chatty in ("asyncio", "aiohttp.access", "grpc._cython.cygrpc"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))


def _message(record: logging.LogRecord) -> str:
    text = printable(record.getMessage())
    return text if len(text) <= LINE_BYTES else text[:LINE_BYTES] + " [cut]"


def _trace_ids() -> tuple[str, str] | None:
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)


class _Text(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).astimezone().strftime("%H:%M:%S.%f")[:-3]
        ids = _trace_ids()
        suffix = f" trace={ids[0]}" if ids else ""
        line = f"{time} {record.levelname:<7} {self._service} {record.name}: {_message(record)}{suffix}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _Json(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": _message(record),
        }
        if ids := _trace_ids():
            entry["trace_id"], entry["span_id"] = ids
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(entry).decode()
