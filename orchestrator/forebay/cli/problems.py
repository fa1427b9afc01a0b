"""What a command says when it cannot go on, and the code it then exits with.

A command fails by raising `Problem` or one of the kit's failures. `app` turns
either into one line on stderr and an exit code of the table below, so that a
script can tell a full queue from a wrong question without reading the line.
The codes are those of `sysexits.h` where it has a fitting one.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from forebay.kit.failure import Failure


class ExitCode(IntEnum):
    """Codes the command exits with."""

    OK = 0
    """Done."""
    FAILED = 1
    """Failed in a way that has no code of its own, or `doctor` found something broken."""
    USAGE = 2
    """An option or an argument is wrong."""
    CONFIG = 64
    """The configuration is wrong."""
    REQUEST = 65
    """The request is wrong, too long, or asks for what the model cannot do."""
    NOT_FOUND = 66
    """There is no such model or backend."""
    UNAVAILABLE = 69
    """Nothing answers, or nothing can serve."""
    INTERNAL = 70
    """A fault of Forebay's own."""
    INTERRUPTED = 74
    """The answer broke off; what was printed is its beginning."""
    BUSY = 75
    """There is no room or no time now. Trying again later helps."""
    PROTOCOL = 76
    """Events were lost, repeated or reordered on the way."""
    REFUSED = 77
    """The caller may not do that."""
    CANCELLED = 130
    """Ctrl-C."""
    PIPE = 141
    """The reader of a pipe left, as `forebay models list | head -1` makes it. Shells say the same."""


class Problem(Exception):
    """A command cannot go on.

    Args:
        message: what is wrong, for people.
        remedy: what to do about it; may be empty.
        code: what the process exits with.
        lines: several mistakes at once, a line each, shown below the message.
    """

    def __init__(
        self,
        message: str,
        *,
        remedy: str = "",
        code: ExitCode = ExitCode.FAILED,
        lines: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.code = code
        self.lines = tuple(lines)


_CODES: dict[str, ExitCode] = {
    "INVALID_REQUEST": ExitCode.REQUEST,
    "CONTEXT_EXCEEDED": ExitCode.REQUEST,
    "CAPABILITY_UNSUPPORTED": ExitCode.REQUEST,
    "MODEL_NOT_FOUND": ExitCode.NOT_FOUND,
    "BACKEND_NOT_FOUND": ExitCode.NOT_FOUND,
    "UNAUTHENTICATED": ExitCode.REFUSED,
    "PERMISSION_DENIED": ExitCode.REFUSED,
    "QUEUE_FULL": ExitCode.BUSY,
    "QUEUE_TIMEOUT": ExitCode.BUSY,
    "MEMORY_EXHAUSTED": ExitCode.BUSY,
    "BACKEND_BUSY": ExitCode.BUSY,
    "DEADLINE_EXCEEDED": ExitCode.BUSY,
    "FIRST_EVENT_TIMEOUT": ExitCode.BUSY,
    "BACKEND_UNAVAILABLE": ExitCode.UNAVAILABLE,
    "DRAINING": ExitCode.UNAVAILABLE,
    "BREAKER_OPEN": ExitCode.UNAVAILABLE,
    "NO_BACKEND": ExitCode.UNAVAILABLE,
    "STREAM_STALLED": ExitCode.INTERRUPTED,
    "STREAM_INTERRUPTED": ExitCode.INTERRUPTED,
    "BROKEN_STREAM": ExitCode.PROTOCOL,
    "INTERNAL": ExitCode.INTERNAL,
}
"""Exit codes by reason. A reason that is not listed exits with FAILED."""

_REMEDIES: dict[str, str] = {
    "CONTEXT_EXCEEDED": "shorten the conversation (/reset in a chat) or load the model with a longer context",
    "CAPABILITY_UNSUPPORTED": "`forebay explain` shows what each backend can do",
    "MODEL_NOT_FOUND": "`forebay models list` shows what there is",
    "BACKEND_NOT_FOUND": "`forebay status` shows the backends",
    "UNAUTHENTICATED": "set FOREBAY_TOKEN to a token that the orchestrator knows",
    "UPSTREAM_UNAUTHENTICATED": "set the framework's key in forebay.toml",
    "MODEL_LOAD_FAILED": "`forebay models list` shows why",
    "MODEL_QUARANTINED": "`forebay models load MODEL` tries it again",
    "WRONG_MODEL": "check with `forebay models list` what is loaded",
    "MEMORY_EXHAUSTED": "unload a model: `forebay models unload MODEL`",
    "QUEUE_FULL": "try again later",
    "QUEUE_TIMEOUT": "try again later, or give more `slots` in forebay.toml",
    "BACKEND_BUSY": "try again later",
    "DEADLINE_EXCEEDED": "allow more time with --timeout",
    "FIRST_EVENT_TIMEOUT": "`forebay status` shows whether the backend is well",
    "BACKEND_UNAVAILABLE": "`forebay status` shows the backends",
    "DRAINING": "try again when it is back",
    "BREAKER_OPEN": "`forebay status` shows why and for how long",
    "NO_BACKEND": "`forebay status` shows the backends and `forebay doctor` what is missing",
    "STREAM_STALLED": "ask again; `forebay status` shows whether the backend is well",
    "STREAM_INTERRUPTED": "ask again; what was printed is only the beginning of the answer",
    "BROKEN_STREAM": "ask again; what was printed may miss a part",
    "INTERNAL": "this is a fault of Forebay's own; the services' logs say more",
}
"""What to do, by reason, where the failure's own message may not say it."""


def from_failure(failure: Failure) -> Problem:
    """Returns a failed call as a problem: its message, its reason, and what to do."""
    message = f"{failure.message.rstrip('.')} ({failure.reason})"
    remedy = _REMEDIES.get(failure.reason, "")
    if failure.retry_after is not None:
        remedy = f"try again in {max(0.0, failure.retry_after.total_seconds()):.1f} s"
    known = {text for _, text in failure.violations if text and text in failure.message}
    return Problem(
        message,
        remedy=remedy,
        code=_CODES.get(failure.reason, ExitCode.FAILED),
        lines=[f"{path}: {text}" for path, text in failure.violations if text not in known],
    )


def unreachable(address: str, *, hint: str = "") -> Problem:
    """Returns the problem that nothing answers on an address."""
    message = f"nothing answers on {address}"
    return Problem(
        f"{message} ({hint})" if hint else message,
        remedy="start it with `forebay up`, or name another address with --address",
        code=ExitCode.UNAVAILABLE,
    )
