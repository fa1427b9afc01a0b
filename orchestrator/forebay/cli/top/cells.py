"""The words and figures of `forebay top`, cell by cell. Names come from outside: none is read as markup."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration
from rich.text import Text

from forebay.cli import models as models_command
from forebay.cli import render, status
from forebay.cli.top.picture import Picture
from forebay.fleet.v1 import fleet_pb2 as fleet_pb
from forebay.inference.v1 import inference_pb2 as pb

Cells = tuple[Text, ...]
"""One row."""

BACKENDS = (
    "backend",
    "state",
    "calls",
    "queue",
    "first token",
    "tok/s",
    "ok",
    "failed",
    "memory",
    "in memory",
)
REQUESTS = ("phase", "model", "backend", "class", "age", "first token", "tokens", "tok/s", "tries", "notes")
MODELS = ("model", "backend", "state", "memory", "disk", "context", "notes")
CANDIDATES = ("backend", "model", "score", "why")

_BARS = "▁▂▃▄▅▆▇█"

_A = fleet_pb.RequestActivity
_PHASES = {
    _A.PHASE_QUEUED: "yellow",
    _A.PHASE_ROUTING: "cyan",
    _A.PHASE_LOADING: "yellow",
    _A.PHASE_PREFILL: "cyan",
    _A.PHASE_DECODE: "green",
    _A.PHASE_SUCCEEDED: "green",
    _A.PHASE_FAILED: "red",
    _A.PHASE_CANCELLED: "dim",
}


def text(value: str, style: str = "") -> Text:
    """Returns text from outside as a cell."""
    return Text(render.safe(value) or "-", style=style, overflow="ellipsis", no_wrap=True)


def number(value: str, style: str = "") -> Text:
    """Returns a figure as a cell."""
    return Text(value, style=style, justify="right", no_wrap=True)


def spark(values: Sequence[float]) -> str:
    """Returns a history as bars, the highest of which is full."""
    top = max(values, default=0.0)
    if top <= 0:
        return _BARS[0] * len(values)
    return "".join(_BARS[min(len(_BARS) - 1, int(value / top * (len(_BARS) - 1) + 0.5))] for value in values)


def backend_row(backend: fleet_pb.Backend) -> Cells:
    """Returns the row of a backend."""
    state = status.state_text(backend)
    if 0 < backend.share < 1:
        state += f" {backend.share:.0%}"
    opened = [breaker for breaker in backend.breakers if breaker.state == fleet_pb.Breaker.STATE_OPEN]
    if opened and backend.state == fleet_pb.Backend.STATE_ACTIVE:
        state += f", {len(opened)} breaker{'s' if len(opened) > 1 else ''} open"
    slots = f"/{backend.slot_count}" if backend.slot_count else ""
    return (
        text(backend.name, "bold"),
        Text(state, style=status.STYLES.get(backend.state, "dim")),
        number(f"{backend.active_call_count}{slots}"),
        number(str(backend.queued_call_count)),
        number(_time(backend, "first_delta_duration")),
        number(_rate(backend.output_tokens_per_second)),
        number(str(backend.succeeded_call_count)),
        number(str(backend.failed_call_count), "red" if backend.failed_call_count else ""),
        number(memory_text(backend)),
        text(", ".join(status.loaded(backend))),
    )


def memory_text(backend: fleet_pb.Backend) -> str:
    """Returns the memory of a backend's models, and what they may take."""
    if not backend.HasField("memory"):
        known = sum(model.memory_bytes for model in backend.models if model.state == pb.Model.STATE_ACTIVE)
        return render.bytes_text(known)
    most = backend.memory.limit_bytes or backend.memory.total_bytes
    used = render.bytes_text(backend.memory.used_bytes)
    return f"{used} / {render.bytes_text(most)}" if most else used


def request_row(request: fleet_pb.RequestActivity) -> Cells:
    """Returns the row of a request."""
    return (
        Text(phase_text(request), style=_PHASES.get(request.phase, "")),
        text(request.served_model or request.model),
        text(request.backend),
        text(request.request_class or request.operation),
        number(_time(request, "elapsed_duration")),
        number(_time(request, "first_delta_duration")),
        number(f"{request.input_token_count or '-'} → {request.output_token_count}"),
        number(_rate(request.output_tokens_per_second)),
        number(str(request.attempt_count), "yellow" if request.attempt_count > 1 else ""),
        text(_notes(request), "red" if request.error_reason else "dim"),
    )


def phase_text(request: fleet_pb.RequestActivity) -> str:
    """Returns how far a request is, in a word."""
    return render.enum_text(_A.Phase.Name(request.phase), "PHASE_")


def _notes(request: fleet_pb.RequestActivity) -> str:
    notes = [request.error_reason] if request.error_reason else []
    if request.cached:
        notes.append("from the cache")
    if request.continuation_count:
        notes.append(f"continued {request.continuation_count}x")
    return ", ".join(notes) or "-"


def model_row(backend: str, model: pb.Model) -> Cells:
    """Returns the row of a model."""
    notes = ["pinned"] if model.pinned else []
    if model.detail:
        notes.append(model.detail)
    context = model.loaded_context_token_count or model.context_token_count
    return (
        text(model.id, "bold" if model.state == pb.Model.STATE_ACTIVE else ""),
        text(backend),
        Text(models_command.state_text(model), style=models_command.STYLES.get(model.state, "dim")),
        number(render.bytes_text(model.memory_bytes)),
        number(render.bytes_text(model.disk_bytes)),
        number(f"{context:,}" if context else "-"),
        text(", ".join(notes)),
    )


def candidate_row(candidate: fleet_pb.Candidate, *, is_chosen: bool) -> Cells:
    """Returns the row of a candidate of a decision."""
    if candidate.refused_by:
        why = f"{candidate.refused_by}: {candidate.refusal_detail}"
    else:
        scores = sorted(candidate.scores.items(), key=lambda each: -each[1])
        why = "  ".join(f"{name} {score:.2f}" for name, score in scores)
    style = "bold green" if is_chosen else "dim" if candidate.refused_by else ""
    score = "-" if candidate.refused_by else f"{candidate.total_score:.3f}"
    return (
        text(candidate.backend, style),
        text(candidate.model, style),
        number(score, style),
        text(why, style),
    )


def headline(picture: Picture, address: str, *, is_paused: bool) -> Text:
    """Returns the first line: where this looks, and whether it still sees anything."""
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(" forebay ", style="reverse bold")
    line.append(f" {render.safe(address)}  ")
    if picture.losses:
        losses = "; ".join(dict.fromkeys(picture.losses.values()))  # both streams break for one reason mostly
        line.append(f"◌ {render.safe(losses)}, trying again", style="bold red")
    elif is_paused:
        line.append("‖ paused", style="yellow")
    else:
        line.append("● live", style="green")
    return line


def summary(picture: Picture) -> Text:
    """Returns the figures of the orchestrator as a whole, in three lines."""
    queue, totals = picture.queue, picture.totals
    waiting = queue.waiting_interactive_count + queue.waiting_batch_count
    permits = f"/{queue.permit_count}" if queue.permit_count else ""
    lines = Text(no_wrap=True, overflow="ellipsis")
    lines.append(" running ", style="dim").append(f"{queue.admitted_count}{permits}", style="bold")
    lines.append("   waiting ", style="dim").append(str(waiting), style="bold yellow" if waiting else "bold")
    if waiting:
        lines.append(f" ({queue.waiting_interactive_count} interactive, {queue.waiting_batch_count} batch")
        lines.append(f", the oldest for {_time(queue, 'oldest_wait_duration')})")
    if queue.expected_wait_duration.ToTimedelta().total_seconds() > 0:
        lines.append("   next in ", style="dim").append(_time(queue, "expected_wait_duration"))
    lines.append("\n requests ", style="dim").append(str(totals.request_count))
    for name, count, style in (
        ("failed", totals.failed_request_count, "red"),
        ("refused", totals.refused_request_count, "red"),
        ("retries", totals.retry_count, "yellow"),
        ("continued", totals.continuation_count, "yellow"),
        ("hedged", totals.hedge_count, ""),
        ("cache hits", totals.cache_hit_count, ""),
        ("joined", totals.coalesced_request_count, ""),
    ):
        if count or style == "red":  # what never happened leaves its room to what did, on 80 columns
            lines.append(f"   {name} ", style="dim").append(str(count), style=style if count else "")
    rate = picture.rates[-1] if picture.rates else 0.0
    lines.append("\n tokens/s ", style="dim").append(f"{rate:<6.0f}", style="bold")
    lines.append(spark(picture.rates), style="green")
    return lines


def decision_title(request: fleet_pb.RequestActivity) -> Text:
    """Returns what a decision was about, in a line."""
    title = Text(no_wrap=True, overflow="ellipsis")
    title.append(f" {request.request_class or request.operation} ", style="bold")
    title.append(f"for {render.safe(request.model) or 'any model'}")
    if request.trace_id:
        title.append(f"   trace {request.trace_id}", style="dim")
    return title


def _rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.1f}" if tokens_per_second else "-"


def _time(message: fleet_pb.Backend | fleet_pb.RequestActivity | fleet_pb.Queue, field: str) -> str:
    if not message.HasField(field):  # type: ignore[arg-type]  # one of the three has each
        return "-"
    duration: Duration = getattr(message, field)
    return render.seconds_text(duration.ToTimedelta().total_seconds())
