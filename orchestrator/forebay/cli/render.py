"""How things look: consoles, answers as they come, tables' cells, and numbers with units.

What is asked for goes to stdout, everything about it to stderr, so that
`forebay chat ... > answer.txt` holds the answer and nothing else. Colours and
moving lines appear only where stdout or stderr is a terminal.
"""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from google.protobuf import json_format
from google.protobuf.message import Message
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from forebay.cli.problems import Problem
from forebay.inference.v1 import inference_pb2 as pb

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def out() -> Console:
    """Returns the console for what was asked for. Made anew, so that it follows a replaced `sys.stdout`."""
    return Console(file=sys.stdout, highlight=False)


def err() -> Console:
    """Returns the console for everything about it."""
    return Console(file=sys.stderr, highlight=False)


def note(text: str, *, style: str = "dim") -> None:
    """Prints a remark on stderr."""
    err().print(escape(safe(text)), style=style, soft_wrap=True)


def problem(trouble: Problem) -> None:
    """Prints a problem on stderr: one line with its remedy, and a line for each mistake of several."""
    text = safe(trouble.message)
    if trouble.remedy and not trouble.lines:
        text = f"{text}: {safe(trouble.remedy)}"
    console = err()
    console.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)
    for line in trouble.lines:
        console.print(f"  {escape(safe(line))}", soft_wrap=True)
    if trouble.remedy and trouble.lines:
        console.print(f"  {escape(safe(trouble.remedy))}", soft_wrap=True, style="dim")


def safe(text: str) -> str:
    """Returns text from outside without control characters, so that it cannot move a cursor or fake a line.

    Line ends and tabs stay.
    """
    return _CONTROL.sub("", text)


def as_json(message: Message) -> dict[str, object]:
    """Returns a message as JSON for programs: the proto's own field names, nothing left out."""
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def bytes_text(count: float) -> str:
    """Returns a size such as `1.5 GiB`, or a dash where it is not known."""
    if count <= 0:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def seconds_text(seconds: float) -> str:
    """Returns a time span such as `85 ms`, `1.24 s` or `3 m 20 s`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} m {rest} s"


def grid() -> Table:
    """Returns an empty table in the house's look."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)


def show_table(console: Console, table: Table) -> None:
    """Prints a table: in colour on a terminal, else as wide as it needs and without trailing blanks."""
    if console.is_terminal:
        console.print(table)
        return
    plain = Console(file=io.StringIO(), width=1000, color_system=None)
    with plain.capture() as captured:
        plain.print(table)
    for row in captured.get().splitlines():
        console.print(row.rstrip(), markup=False, soft_wrap=True)


def enum_text(name: str, prefix: str) -> str:
    """Returns `active` for `STATE_ACTIVE`, and `unknown` for what was not said."""
    word = name.removeprefix(prefix).lower()
    return "unknown" if word == "unspecified" else word.replace("_", " ")


@dataclass(slots=True)
class Reply:
    """What is known of one answer so far."""

    began: float
    """When it was asked for, on the clock of `AnswerView`."""
    backend: str = ""
    model: str = ""
    text: str = ""
    first: float | None = None
    """Seconds to the first part of the answer or of its reasoning."""
    last: float = 0.0
    """Seconds to the latest part."""
    first_tokens: int = 0
    """Tokens that came with the first part."""
    tokens: int = 0
    """Tokens so far, as far as the parts say."""
    finished: pb.Finished | None = None
    tool_calls: dict[int, list[str]] = field(default_factory=dict)
    """Name and arguments of each tool call, in pieces."""

    def rate(self) -> float | None:
        """Returns tokens a second after the first part, or None where it cannot be known."""
        tokens = self.count() - self.first_tokens
        span = self.last - (self.first or 0.0)
        return tokens / span if tokens > 0 and span > 0 else None

    def count(self) -> int:
        """Returns the tokens generated."""
        reported = self.finished.usage.output_token_count if self.finished is not None else 0
        return reported or self.tokens

    def summary(self) -> str:
        """Returns one line: who answered, how fast, how much."""
        parts = [self.backend or "?", self.model or "?"]
        if self.first is not None:
            parts.append(f"first token {seconds_text(self.first)}")
        rate = self.rate()
        if rate is not None:
            parts.append(f"{rate:.1f} tokens/s")
        count = self.count()
        parts.append(f"{count} token{'' if count == 1 else 's'}")
        if self.finished is not None and self.finished.usage.cached_token_count:
            usage = self.finished.usage
            parts.append(f"{usage.cached_token_count} of {usage.prompt_token_count} prompt tokens cached")
        if self.finished is not None and self.finished.reason == pb.FINISH_REASON_LENGTH:
            parts.append("stopped at the token limit")
        return " · ".join(parts)


class AnswerView:
    """Shows one answer as it comes: its text on stdout, everything else on stderr.

    Args:
        quiet: leave out notices and progress.
        clock: seconds, for the figures of the summary.
    """

    def __init__(self, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._quiet = quiet
        self._clock = clock
        self._console = err()
        self._status: Status | None = None
        self._reasoning = False
        self._raw = not sys.stdout.isatty()
        self.reply = Reply(began=clock())

    def show(self, event: pb.GenerateResponse) -> None:
        """Shows the next event."""
        kind = event.WhichOneof("event")
        if kind == "started":
            self._begin(event.started)
        elif kind == "progress":
            self._progress(event.progress)
        elif kind == "delta":
            self._delta(event.delta)
        elif kind == "continued":
            self._continued(event.continued)
        elif kind == "finished":
            self.reply.finished = event.finished

    def note_only(self, event: pb.GenerateResponse) -> None:
        """Remembers an event that is shown some other way."""
        if event.HasField("started"):
            self.reply.backend, self.reply.model = event.started.backend, event.started.model

    def close(self) -> None:
        """Ends the last line and takes the moving one away."""
        self._still()
        if self._reasoning:
            self._console.print()
            self._reasoning = False
        if self.reply.text and not self.reply.text.endswith("\n"):
            sys.stdout.write("\n")
        sys.stdout.flush()
        for pieces in self.reply.tool_calls.values():
            self._notice(f"tool call: {pieces[0]}({''.join(pieces[1:])})", style="cyan")

    def _begin(self, started: pb.Started) -> None:
        self.reply.backend, self.reply.model = started.backend, started.model
        if started.replayed:
            self._notice("replayed from the cache")
        for item in started.degradations:
            self._notice(f"falls short: {_degradation(item)}", style="yellow")

    def _progress(self, progress: pb.Progress) -> None:
        if self._quiet or not self._console.is_terminal:
            return
        text = progress_text(progress)
        if self._status is None:
            self._status = self._console.status(text, spinner="dots")
            self._status.start()
        else:
            self._status.update(text)

    def _delta(self, delta: pb.Delta) -> None:
        self._still()
        now = self._clock() - self.reply.began
        if self.reply.first is None:
            self.reply.first, self.reply.first_tokens = now, delta.token_count
        self.reply.last = now
        self.reply.tokens += delta.token_count
        if delta.HasField("tool_call"):
            pieces = self.reply.tool_calls.setdefault(delta.tool_call.index, [""])
            pieces[0] += delta.tool_call.name
            pieces.append(delta.tool_call.arguments_json)
        elif delta.HasField("reasoning"):
            if not self._quiet:
                self._reasoning = True
                self._console.print(escape(safe(delta.reasoning)), style="dim italic", end="", soft_wrap=True)
        elif delta.text:
            if self._reasoning:
                self._console.print("\n")
                self._reasoning = False
            self.reply.text += delta.text
            sys.stdout.write(delta.text if self._raw else safe(delta.text))
            sys.stdout.flush()

    def _continued(self, continued: pb.Continued) -> None:
        lost = continued.lost_backend or self.reply.backend
        self.reply.backend, self.reply.model = continued.backend, continued.model
        if self.reply.text and not self._raw:
            sys.stdout.write("\n")
            sys.stdout.flush()
        self._notice(
            f"{lost} was lost ({continued.reason}); {continued.backend} goes on with {continued.model}",
            style="yellow",
        )
        for item in continued.degradations:
            self._notice(f"falls short from here on: {_degradation(item)}", style="yellow")

    def _notice(self, text: str, *, style: str = "dim") -> None:
        if not self._quiet:
            self._still()
            self._console.print(escape(safe(text)), style=style, soft_wrap=True)

    def _still(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


def progress_text(progress: pb.Progress) -> str:
    """Returns what is going on before the first token, in a few words."""
    stage = {
        pb.Progress.STAGE_QUEUED: "waiting for a turn",
        pb.Progress.STAGE_LOADING: "loading the model",
        pb.Progress.STAGE_PREFILLING: "reading the prompt",
    }.get(progress.stage, "working")
    if progress.HasField("queue_position"):
        stage += f", {progress.queue_position} ahead"
    if progress.HasField("fraction"):
        stage += f", {progress.fraction:.0%}"
    if progress.HasField("remaining_duration"):
        stage += f", about {seconds_text(progress.remaining_duration.ToTimedelta().total_seconds())} left"
    return stage


def _degradation(item: pb.Degradation) -> str:
    kind = enum_text(pb.DegradationKind.Name(item.kind), "DEGRADATION_KIND_")
    where = f" ({item.field})" if item.field else ""
    return f"{kind}{where}: {item.detail}" if item.detail else f"{kind}{where}"
