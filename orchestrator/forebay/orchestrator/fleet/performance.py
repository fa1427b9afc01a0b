"""How fast one backend has been lately, for each of its models.

Every kind of measurement has a window of its own, bounded in time and in
number: time to the first delta by the length of the prompt, prompt tokens
evaluated a second, tokens a second of one reply, how long calls take, and how
many fail through the backend's fault. Medians, because one cold start or one
stalled call says nothing of the next.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TypeAlias

from forebay.fleet.v1 import fleet_pb2
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import Fault
from forebay.kit.layers.measure import Ending, Outcome
from forebay.orchestrator.clock import Clock
from forebay.orchestrator.config import PerformanceSettings
from forebay.orchestrator.routing.view import BUCKETS, Figures, bucket_of

LEAST_PREFILL = 64
"""Tokens evaluated below which a rate says more about the call's fixed cost than about reading."""

MODELS = 64
"""Most models of one backend that are remembered; that which was used longest ago is forgotten."""

Kept: TypeAlias = dict[str, list[list[float]]]
"""One model's windows by name, as pairs of age in seconds and value, oldest first."""

_FRESH = 1.0
"""Seconds for which figures hold when nothing new is measured. Only ageing changes them then."""


class Window:
    """Measurements of one kind, not too many and not too old.

    Args:
        span: seconds after which one is forgotten.
        most: how many are kept.
    """

    __slots__ = ("_most", "_sorted", "_span", "_values")

    def __init__(self, *, span: float, most: int) -> None:
        self._span = span
        self._most = most
        self._sorted: list[float] = []  # kept in order, for every call adds one and is decided by a quantile
        self._values: deque[tuple[float, float]] = deque()

    def __len__(self) -> int:
        return len(self._values)

    def add(self, at: float, value: float) -> None:
        """Takes a measurement."""
        if len(self._values) >= self._most:
            self._forget()
        self._values.append((at, value))
        insort(self._sorted, value)

    def age(self, now: float) -> None:
        """Forgets what is too old."""
        while self._values and self._values[0][0] <= now - self._span:
            self._forget()

    def _forget(self) -> None:
        _, value = self._values.popleft()
        del self._sorted[bisect_left(self._sorted, value)]

    def pairs(self, now: float) -> list[list[float]]:
        """Returns age and value of each, oldest first."""
        return [[round(now - at, 3), value] for at, value in self._values]

    def quantile(self, share: float) -> float | None:
        """Returns the value below which that share of them is; None if there is none."""
        values = self._sorted
        return values[max(0, math.ceil(share * len(values)) - 1)] if values else None

    def mean(self) -> float:
        """Returns the mean; 0.0 of nothing."""
        return sum(self._sorted) / len(self._sorted) if self._sorted else 0.0


_FIRST_DELTAS = tuple(f"first_delta_{bound or 'more'}" for bound in BUCKETS)
_NAMES = ("failed", "duration", "prefill", "decode", *_FIRST_DELTAS)


class ModelPerformance:
    """The windows of one model.

    Args:
        settings: how long and how many.
    """

    def __init__(self, settings: PerformanceSettings) -> None:
        span, most = settings.window.total_seconds(), settings.samples
        self._windows = {name: Window(span=span, most=most) for name in _NAMES}

    def record(self, outcome: Outcome, now: float) -> None:
        """Takes in what a call took."""
        is_failed = outcome.failure is not None and outcome.failure.fault is Fault.BACKEND
        if outcome.ending is not Ending.DONE and not is_failed:
            return  # it was broken off, or the caller was wrong: neither says anything of the backend
        self._windows["failed"].add(now, float(is_failed))
        if is_failed:
            return
        self._windows["duration"].add(now, outcome.duration)
        if outcome.first_delta is not None and outcome.prompt_token_count:
            # What a load takes is counted apart, since the next call does not pay for it.
            seconds = max(0.0, outcome.first_delta - outcome.load_duration)
            name = _FIRST_DELTAS[bucket_of(outcome.prompt_token_count)]
            self._windows[name].add(now, seconds)
        rate = _prefill_rate(outcome)
        if rate is not None:
            self._windows["prefill"].add(now, rate)
        if outcome.tokens_per_second is not None:
            self._windows["decode"].add(now, outcome.tokens_per_second)

    def figures(self, now: float) -> Figures:
        """Returns what the windows say now."""
        windows = self._windows
        for window in windows.values():
            window.age(now)
        return Figures(
            call_count=len(windows["failed"]),
            error_ratio=windows["failed"].mean(),
            duration=windows["duration"].quantile(0.5),
            prefill_rate=windows["prefill"].quantile(0.5),
            decode_rate=windows["decode"].quantile(0.5),
            first_deltas=tuple(windows[name].quantile(0.5) for name in _FIRST_DELTAS),
        )

    def show(self, shown: fleet_pb2.Performance, now: float) -> None:
        """Fills in what clients see."""
        figures = self.figures(now)
        shown.call_count = figures.call_count
        shown.error_ratio = figures.error_ratio
        shown.output_tokens_per_second = figures.decode_rate or 0.0
        shown.prefill_tokens_per_second = figures.prefill_rate or 0.0
        for name, bound in zip(_FIRST_DELTAS, BUCKETS, strict=True):
            window = self._windows[name]
            median, high = window.quantile(0.5), window.quantile(0.95)
            if median is None or high is None:
                continue
            one = shown.first_deltas.add(max_prompt_token_count=bound, call_count=len(window))
            one.median_duration.FromNanoseconds(int(median * 1e9))
            one.p95_duration.FromNanoseconds(int(high * 1e9))

    def keep(self, now: float) -> Kept:
        """Returns what to keep over a restart."""
        for window in self._windows.values():
            window.age(now)
        return {name: window.pairs(now) for name, window in self._windows.items() if len(window)}

    def restore(self, kept: Mapping[str, Iterable[Iterable[float]]], now: float, *, aged: float) -> None:
        """Takes back what was kept.

        Args:
            kept: as `keep` returned it. Windows of other names are left out.
            now: the time.
            aged: seconds that have gone by since.

        Raises:
            TypeError, ValueError: it is not what `keep` returned.
        """
        for name, window in self._windows.items():
            pairs = [_pair(pair) for pair in kept.get(name, ())]
            if any(later > earlier for (earlier, _), (later, _) in pairwise(pairs)):
                raise ValueError(f"{name} is not in order")
            for age, value in pairs:
                window.add(now - age - aged, value)
            window.age(now)


class Performance:
    """What was measured of one backend.

    Args:
        settings: how long and how many.
        clock: gives the time in seconds.
    """

    def __init__(self, settings: PerformanceSettings, *, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._models: OrderedDict[str, ModelPerformance] = OrderedDict()
        self._figures: Mapping[str, Figures] = {}
        self._stale_at = -math.inf

    def record(self, outcome: Outcome) -> None:
        """Takes in what a call took."""
        request = outcome.call.request
        if isinstance(request, pb.CountTokensRequest):
            return  # a tokenizer's speed is not the model's
        model, now = request.model, self._clock()
        self._of(model).record(outcome, now)
        self._figures = {**self._figures, model: self._models[model].figures(now)}

    def figures(self) -> Mapping[str, Figures]:
        """Returns what is known of each model. What is returned is never changed in place."""
        now = self._clock()
        if now >= self._stale_at:
            self._figures = {name: model.figures(now) for name, model in self._models.items()}
            self._stale_at = now + _FRESH
        return self._figures

    def to_proto(self) -> list[fleet_pb2.Performance]:
        """Returns what is known of each model as clients see it."""
        now, shown = self._clock(), []
        for name, model in self._models.items():
            one = fleet_pb2.Performance(model=name)
            one.window_duration.FromTimedelta(self._settings.window)
            model.show(one, now)
            if one.call_count:
                shown.append(one)
        return shown

    def keep(self) -> dict[str, Kept]:
        """Returns what to keep over a restart, by model."""
        now = self._clock()
        kept = {name: model.keep(now) for name, model in self._models.items()}
        return {name: windows for name, windows in kept.items() if windows}

    def restore(self, kept: Mapping[str, Mapping[str, Iterable[Iterable[float]]]], *, aged: float) -> None:
        """Takes back what was kept.

        Args:
            kept: as `keep` returned it.
            aged: seconds that have gone by since.

        Raises:
            AttributeError, TypeError, ValueError: it is not what `keep` returned. Nothing is taken then.
        """
        now = self._clock()
        models: OrderedDict[str, ModelPerformance] = OrderedDict()
        for name, windows in list(kept.items())[-MODELS:]:
            models[name] = ModelPerformance(self._settings)
            models[name].restore(windows, now, aged=aged)
        self._models = models
        self._stale_at = -math.inf

    def _of(self, model: str) -> ModelPerformance:
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = ModelPerformance(self._settings)
            if len(self._models) > MODELS:
                self._models.popitem(last=False)
        else:
            self._models.move_to_end(model)
        return found


def _prefill_rate(outcome: Outcome) -> float | None:
    """Returns prompt tokens evaluated a second, as told, or else as seen from here."""
    evaluated = outcome.prompt_token_count - outcome.cached_token_count
    if evaluated < LEAST_PREFILL:
        return None
    seconds = outcome.prefill_duration
    if not seconds and outcome.first_delta is not None:
        seconds = outcome.first_delta - outcome.load_duration - outcome.queue_duration
    return evaluated / seconds if seconds > 0.0 else None


def _pair(pair: Iterable[float]) -> tuple[float, float]:
    age, value = pair
    age, value = float(age), float(value)
    if not (math.isfinite(age) and math.isfinite(value) and age >= 0.0 and value >= 0.0):
        raise ValueError(f"{age}, {value} was never measured")
    return age, value
