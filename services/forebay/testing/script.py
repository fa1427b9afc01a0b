"""What a scripted engine is told to do: models, their behaviour, and what goes wrong."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import failure
from forebay.kit.config import parse_duration

BEFORE = -1
"""`Fault.at` before `started`."""

END = 2**31
"""`Fault.at` after the last delta, in place of `finished`."""

ALL = frozenset(value for name, value in pb.Capability.items() if value != pb.CAPABILITY_UNSPECIFIED and name)
"""Every capability there is."""

DEFAULT_CAPABILITIES = ALL - {pb.CAPABILITY_VISION, pb.CAPABILITY_GRAMMAR}
"""What a scripted model can do unless it is told otherwise: two things it cannot, so that there is always
something to refuse."""

_FAULT = re.compile(r"(?P<kind>[A-Z_]+)(@(?P<at>before|end|\d+))?(x(?P<times>\d+))?")

_POINTS = {"before": BEFORE, "end": END, None: BEFORE}

OPTION = "scripted"
"""Our key in `backend_options`."""


class Trick(Enum):
    """Faults that are no `Failure`."""

    STALL = "STALL"
    """Falls silent for ever."""
    CRASH = "CRASH"
    """Raises an exception that nobody expects."""
    EXIT = "EXIT"
    """Ends the process at once, as a crash in native code would."""
    TRUNCATE = "TRUNCATE"
    """Returns without `finished`."""
    SKIP = "SKIP"
    """Loses the next event."""
    REPEAT = "REPEAT"
    """Sends the latest event again."""
    ENCORE = "ENCORE"
    """Sends `finished` twice."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong in a call.

    Written `KIND@POINTxTIMES`, such as `UNAVAILABLE@3`, `STALL@before` or `BACKEND_BUSYx2`.
    """

    kind: type[failure.Failure] | Trick
    """What goes wrong. In writing: a `Trick`, the reason of a failure, or a status code."""
    at: int = BEFORE
    """Deltas sent before it; `BEFORE` is before `started`, and more than there are, or `END`, is in place
    of `finished`."""
    times: int | None = None
    """How many of a model's calls it meets. None is all."""

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Reads a written fault.

        Raises:
            ValueError: there is no such kind, or the form is wrong.
        """
        match = _FAULT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no fault: write KIND, KIND@3, KIND@before, KIND@end or KIND@3x2")
        kind = _KINDS.get(match["kind"])
        if kind is None:
            raise ValueError(f"there is no fault {match['kind']}; there are {', '.join(sorted(_KINDS))}")
        at = _POINTS[match["at"]] if match["at"] in _POINTS else int(match["at"])
        return cls(kind, at, int(match["times"]) if match["times"] else None)

    def __str__(self) -> str:
        name = self.kind.value if isinstance(self.kind, Trick) else self.kind.reason
        point = {BEFORE: "before", END: "end"}.get(self.at, str(self.at))
        return f"{name}@{point}" + (f"x{self.times}" if self.times else "")


def _kinds() -> dict[str, type[failure.Failure] | Trick]:
    classes = [c for c in vars(failure).values() if isinstance(c, type) and issubclass(c, failure.Failure)]
    known: dict[str, type[failure.Failure] | Trick] = {}
    for kind in reversed(classes):  # of several with one code the first in the file has it
        known[kind.code.name] = kind
    known.update((kind.reason, kind) for kind in classes)
    known["UNAVAILABLE"] = failure.BackendUnavailable
    known.update((trick.value, trick) for trick in Trick)
    return known


_KINDS = _kinds()


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """How a model behaves. Durations are in seconds."""

    token_count: int = 8
    """Tokens after which a reply ends by itself."""
    reasoning_token_count: int = 0
    """Tokens of reasoning before the answer."""
    tool_call_count: int = 0
    """Tools called where tools are offered. `ToolChoice` can ask for one more or for none."""
    token_delay: float = 0.0
    """Time before each token but the first."""
    first_delay: float = 0.0
    """Time from `started` to the first token."""
    progress_delay: float | None = None
    """Time between `progress` events before the first token. None sends none."""
    load_delay: float = 0.0
    """Time that loading the model takes."""
    unwind_delay: float = 0.0
    """Time that a call takes to let go when it is cancelled."""
    fault: Fault | None = None
    """What goes wrong."""

    def changed(self, options: Mapping[str, object]) -> Script:
        """Returns the script with some fields changed, as given in a request's options.

        Raises:
            InvalidRequest: a field is unknown or its value makes no sense.
        """
        kinds = {entry.name: str(entry.type) for entry in dataclasses.fields(Script)}
        try:
            values: dict[str, Any] = {name: _read(kinds[name], value) for name, value in options.items()}
            return dataclasses.replace(self, **values)
        except (KeyError, TypeError, ValueError) as error:
            field_path = f'backend_options["{OPTION}"]'
            raise failure.InvalidRequest(
                f"{field_path} cannot be read: {error}", violations=[(field_path, str(error))]
            ) from error


def _read(kind: str, value: object) -> int | float | Fault:
    if kind.startswith("Fault"):
        return Fault.parse(str(value))
    if kind == "int":
        return int(str(value).removesuffix(".0"))  # numbers of a Struct are floats
    return parse_duration(value).total_seconds()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedModel:
    """A model of a scripted engine."""

    name: str
    """Its identifier."""
    script: Script = Script()
    """How it behaves."""
    capabilities: frozenset[pb.Capability.ValueType] = DEFAULT_CAPABILITIES
    """What it can do. The rest it cannot."""
    context_token_count: int = 4096
    """Most tokens of prompt and reply together."""
    dimension_count: int = 8
    """Components of its embeddings."""
    weights: str = ""
    """Models of equal weights say the same. Empty is the name."""
    aliases: tuple[str, ...] = ()
    """Other names for it."""
    loaded: bool = True
    """Whether it is in memory from the start."""

    @property
    def key(self) -> str:
        """What its tokens depend on."""
        return self.weights or self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Chaos:
    """Faults by chance, the same ones for the same seed."""

    seed: int
    """Chooses the schedule."""
    rate: float
    """Fraction of calls that meet a fault, in [0.0, 1.0]."""
    faults: Sequence[str] = ("UNAVAILABLE", "INTERNAL", "BACKEND_BUSY", "STREAM_INTERRUPTED")
    """Kinds to choose from, as `Fault` writes them, without a point."""
    deltas: int = 8
    """The point is before `started` or within that many deltas."""

    def fault_for(self, number: int) -> Fault | None:
        """Returns what the call of that number meets."""
        chance = random.Random(f"{self.seed}/{number}")  # noqa: S311  # a schedule and no secret
        if chance.random() >= self.rate:
            return None
        return dataclasses.replace(
            Fault.parse(chance.choice(list(self.faults))), at=chance.randint(BEFORE, self.deltas)
        )


def model_of(given: ScriptedModel | str) -> ScriptedModel:
    """Returns a model; a string is the name of one with the default script."""
    return given if isinstance(given, ScriptedModel) else ScriptedModel(name=given)
