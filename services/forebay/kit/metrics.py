"""What a process counts and measures, and the page on which Prometheus finds it.

Every metric is a line of `CATALOG`: its name, its labels and, for a histogram,
its buckets. The docs' table is made of it, and the dashboard and the alert
rules are tested against it.

Labels are names of ours (backends, methods, reasons) or names of models, which
callers choose. A model's name becomes a label only once that model has
answered, and only for the first `MOST_MODELS`: whoever asks for a thousand
models that do not exist makes no series.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, TypeAlias

from opentelemetry.metrics import CallbackOptions, Meter, NoOpMeterProvider, Observation
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from forebay.kit.hosts import is_ours

logger = logging.getLogger(__name__)

MOST_MODELS = 50
"""Models with series of their own in one process. A machine that serves more has no use for a line each."""

OTHER = "other"
"""Label of what has no series of its own."""

_DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84,
             327.68, 655.36)  # fmt: skip
"""The conventions' buckets end at 82 s; a long answer of a large model on a laptop takes ten minutes."""

_FIRST_TOKEN = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 320)
"""The conventions' end at 10 s; loading a model and reading a long prompt take minutes."""

_TOKEN = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
"""The conventions' begin at 10 ms; a small model writes several tokens in that time."""

_COUNTS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
_RATE = (1, 2, 5, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 300, 500, 1000)

_MODEL = "gen_ai.request.model"
_OPERATION = "gen_ai.operation.name"
_PROVIDER = "gen_ai.provider.name"
_ERROR = "error.type"
_KIND = "gen_ai.token.type"
_BACKEND = "forebay.backend"
_HOST = "forebay.host"
_METHOD = "rpc.method"
_STATUS = "rpc.response.status_code"
_MEMORY = "forebay.memory"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Metric:
    """One metric."""

    name: str
    """Its name in OpenTelemetry."""
    kind: Literal["counter", "gauge", "histogram"]
    """What it is."""
    unit: str
    """Its unit: `s`, `By`, `{token}` and the like, or `1`."""
    meaning: str
    """What it says, for the docs."""
    labels: tuple[str, ...] = ()
    """Its attributes."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets."""

    @property
    def prometheus(self) -> str:
        """Its name on the page for Prometheus, without `_bucket`, `_count` and `_sum`."""
        suffix = {"s": "_seconds", "By": "_bytes", "{token}/s": "_per_second"}.get(self.unit, "")
        if self.kind == "counter":
            suffix += "_total"
        return self.name.replace(".", "_") + suffix

    @property
    def series(self) -> tuple[str, ...]:
        """The names of its series there."""
        if self.kind == "histogram":
            return tuple(f"{self.prometheus}_{part}" for part in ("bucket", "count", "sum"))
        return (self.prometheus,)


SERVER_CALL = Metric(
    name="rpc.server.call.duration", kind="histogram", unit="s", labels=(_METHOD, _STATUS), buckets=_DURATION,
    meaning="Calls that this process served, by method and status.",
)  # fmt: skip
CLIENT_CALL = Metric(
    name="rpc.client.call.duration", kind="histogram", unit="s", labels=(_METHOD, _STATUS, _BACKEND),
    buckets=_DURATION, meaning="Attempts on a backend or a worker, by how they ended.",
)  # fmt: skip
REQUEST = Metric(
    name="gen_ai.server.request.duration", kind="histogram", unit="s",
    labels=(_OPERATION, _PROVIDER, _MODEL, _ERROR), buckets=_DURATION,
    meaning="Inference calls from the edge to the last event; `error.type` is empty where all went well.",
)  # fmt: skip
FIRST_TOKEN = Metric(
    name="gen_ai.server.time_to_first_token", kind="histogram", unit="s", labels=(_PROVIDER, _MODEL),
    buckets=_FIRST_TOKEN, meaning="From the edge to the first delta: queue, load and prefill included.",
)  # fmt: skip
PER_TOKEN = Metric(
    name="gen_ai.server.time_per_output_token", kind="histogram", unit="s", labels=(_PROVIDER, _MODEL),
    buckets=_TOKEN, meaning="Time per token after the first delta, of calls that ended well.",
)  # fmt: skip
OPERATION = Metric(
    name="gen_ai.client.operation.duration", kind="histogram", unit="s",
    labels=(_OPERATION, _PROVIDER, _MODEL, _ERROR), buckets=_DURATION,
    meaning="Requests at the orchestrator with all attempts; the provider is the framework that answered.",
)  # fmt: skip
FIRST_CHUNK = Metric(
    name="gen_ai.client.operation.time_to_first_chunk", kind="histogram", unit="s",
    labels=(_PROVIDER, _MODEL), buckets=_FIRST_TOKEN,
    meaning="From the request to the first delta that left the orchestrator, failed attempts included.",
)  # fmt: skip
USAGE = Metric(
    name="gen_ai.client.token.usage", kind="histogram", unit="{token}",
    labels=(_OPERATION, _PROVIDER, _MODEL, _KIND), buckets=_COUNTS,
    meaning="Tokens of a request: `input` and `output`.",
)  # fmt: skip
TOKENS = Metric(
    name="forebay.tokens", kind="counter", unit="{token}", labels=(_MODEL, _KIND),
    meaning="Tokens read (`input`), of these found in a cache (`input_cached`), and written (`output`). "
    "Its rate is tokens per second.",
)  # fmt: skip
RATE = Metric(
    name="forebay.generation.rate", kind="histogram", unit="{token}/s", labels=(_MODEL,), buckets=_RATE,
    meaning="Tokens per second of one answer after its first delta.",
)  # fmt: skip
QUEUE_WAIT = Metric(
    name="forebay.queue.duration", kind="histogram", unit="s", labels=(_MODEL,), buckets=_FIRST_TOKEN,
    meaning="Waiting for a slot, as the service that has the slots tells it.",
)  # fmt: skip
PREFILL = Metric(
    name="forebay.prefill.duration", kind="histogram", unit="s", labels=(_MODEL,), buckets=_FIRST_TOKEN,
    meaning="Reading the prompt.",
)  # fmt: skip
LOAD = Metric(
    name="forebay.model.load.duration", kind="histogram", unit="s", labels=(_MODEL,), buckets=_FIRST_TOKEN,
    meaning="From the start of a worker of mlx-service until its model serves.",
)  # fmt: skip
ACTIVE = Metric(
    name="forebay.calls.active", kind="gauge", unit="1", meaning="Calls that this process serves now."
)
DEGRADATIONS = Metric(
    name="forebay.degradations", kind="counter", unit="1", labels=("forebay.degradation",),
    meaning="Shortfalls that callers had accepted and got.",
)  # fmt: skip
CACHE = Metric(
    name="forebay.cache.lookups", kind="counter", unit="1", labels=("forebay.cache", "forebay.cache.result"),
    meaning="Lookups by result: of prompts in a framework's `prefix` cache, of answers in `replies`.",
)  # fmt: skip
GATHERED = Metric(
    name="forebay.embed.gathered", kind="histogram", unit="{call}", buckets=(1, 2, 4, 8, 16, 32, 64),
    meaning="Calls for embeddings that went to a backend as one.",
)  # fmt: skip
DECISIONS = Metric(
    name="forebay.route.decisions", kind="counter", unit="1", labels=(_BACKEND, "forebay.route.class"),
    meaning="Where the router sent attempts; the backend is empty where none could serve.",
)  # fmt: skip
RETRIES = Metric(
    name="forebay.retries", kind="counter", unit="1", labels=(_BACKEND, _ERROR),
    meaning="Further attempts, by the backend that failed before and why.",
)  # fmt: skip
CONTINUATIONS = Metric(
    name="forebay.continuations", kind="counter", unit="1", labels=(_BACKEND, _ERROR),
    meaning="Replies that broke off and that another backend was asked to go on with, by the one that was "
    "lost.",
)  # fmt: skip
HEDGES = Metric(
    name="forebay.hedges", kind="counter", unit="1", labels=(_BACKEND,),
    meaning="Second attempts beside a slow first one, by the backend that answered first.",
)  # fmt: skip
HEDGE_WASTE = Metric(
    name="forebay.hedge.wasted", kind="histogram", unit="s", buckets=_DURATION,
    meaning="Work of the attempts that lost such a race.",
)  # fmt: skip
COALESCED = Metric(
    name="forebay.coalesced", kind="counter", unit="1",
    meaning="Requests that joined the reply to an identical one in flight.",
)  # fmt: skip
ADMISSION_WAIT = Metric(
    name="forebay.admission.duration", kind="histogram", unit="s", labels=("forebay.priority",),
    buckets=_FIRST_TOKEN, meaning="Waiting for a turn in the queue before all backends; 0 for most.",
)  # fmt: skip
REFUSALS = Metric(
    name="forebay.admission.refusals", kind="counter", unit="1", labels=("forebay.priority", _ERROR),
    meaning="Requests that the queue turned away, and why.",
)  # fmt: skip
FALLBACKS = Metric(
    name="forebay.fallbacks", kind="counter", unit="1", labels=(_BACKEND,),
    meaning="Calls that a backend served after another one had failed them.",
)  # fmt: skip
BACKEND_STATE = Metric(
    name="forebay.backend.state", kind="gauge", unit="1", labels=(_BACKEND, "forebay.state"),
    meaning="1 for the state a backend is in: `active`, `draining`, `ejected` or `unreachable`; else 0.",
)  # fmt: skip
BACKEND_ACTIVE = Metric(
    name="forebay.backend.calls.active", kind="gauge", unit="1", labels=(_BACKEND,),
    meaning="Calls in progress on a backend.",
)  # fmt: skip
BACKEND_QUEUED = Metric(
    name="forebay.backend.calls.queued", kind="gauge", unit="1", labels=(_BACKEND,),
    meaning="Calls that wait in the orchestrator for a slot of a backend.",
)  # fmt: skip
BREAKER = Metric(
    name="forebay.breaker.state", kind="gauge", unit="1", labels=(_BACKEND,),
    meaning="A backend's breaker: 0 closed, 1 half-open, 2 open.",
)  # fmt: skip
MODEL_BREAKERS = Metric(
    name="forebay.breaker.models", kind="gauge", unit="1", labels=(_BACKEND,),
    meaning="Models of a backend whose own breaker is not closed.",
)  # fmt: skip
WAITING = Metric(
    name="forebay.admission.waiting", kind="gauge", unit="1",
    meaning="Calls that wait in the orchestrator's own queue, before any backend was chosen.",
)  # fmt: skip
HOST_LIMIT = Metric(
    name="forebay.host.memory.limit", kind="gauge", unit="By", labels=(_HOST,),
    meaning="Memory that models of all backends may take on a host. 0 is no limit.",
)  # fmt: skip
HOST_USED = Metric(
    name="forebay.host.memory.used", kind="gauge", unit="By", labels=(_HOST,),
    meaning="Memory that models take on a host, by the orchestrator's account.",
)  # fmt: skip
HOST_RESERVED = Metric(
    name="forebay.host.memory.reserved", kind="gauge", unit="By", labels=(_HOST,),
    meaning="Memory that is set aside for loads in progress.",
)  # fmt: skip
HOST_LOADS = Metric(
    name="forebay.host.loads", kind="gauge", unit="1", labels=(_HOST, "forebay.state"),
    meaning="Loads that the orchestrator ordered on a host: `active`, or `waiting` for room.",
)  # fmt: skip
EVICTIONS = Metric(
    name="forebay.evictions", kind="counter", unit="1", labels=(_BACKEND,),
    meaning="Idle models that the orchestrator unloaded to make room for another.",
)  # fmt: skip
RESTARTS = Metric(
    name="forebay.worker.restarts", kind="counter", unit="1", labels=(_MODEL,),
    meaning="Workers of mlx-service that were lost and had to be started again.",
)  # fmt: skip
LOADED = Metric(
    name="forebay.models.loaded", kind="gauge", unit="1", meaning="Models that mlx-service has in memory."
)
ROWS = Metric(
    name="forebay.worker.rows", kind="gauge", unit="1", labels=(_MODEL, "forebay.state"),
    meaning="Replies that a worker writes (`live`) and keeps waiting (`waiting`), as it said last.",
)  # fmt: skip
HOST_MEMORY = Metric(
    name="forebay.memory", kind="gauge", unit="By", labels=(_MEMORY,),
    meaning="Of mlx-service: the `ceiling` for all models, what they have in use (`used`), what is set aside "
    "for loads and requests and not in use yet (`reserved`), and what the machine could give (`available`).",
)  # fmt: skip
MODEL_MEMORY = Metric(
    name="forebay.model.memory", kind="gauge", unit="By", labels=(_MODEL, _MEMORY),
    meaning="Of a model in memory: what it may take (`share`), its `weights`, what its requests can come to "
    "need (`reserved`) and hold (`cache`), prompts kept (`prefix`), and the most it ever held (`peak`).",
)  # fmt: skip
PREEMPTIONS = Metric(
    name="forebay.preemptions", kind="counter", unit="1", labels=(_MODEL,),
    meaning="Replies that a worker set aside for want of memory and went on with later.",
)  # fmt: skip
MODEL_EVICTIONS = Metric(
    name="forebay.model.evictions", kind="counter", unit="1", labels=(_MODEL, "forebay.reason"),
    meaning="Models that left mlx-service by themselves: to make `room`, or `unused` for too long.",
)  # fmt: skip
PREFIXES = Metric(
    name="forebay.worker.prefixes", kind="gauge", unit="By", labels=(_MODEL, "forebay.tier"),
    meaning="What a worker keeps of prompts for those that begin the same, in `memory` and on `disk`. "
    "Pushed over OTLP only.",
)  # fmt: skip
MEMORY = Metric(
    name="forebay.worker.memory", kind="gauge", unit="By", labels=(_MODEL,),
    meaning="Memory that MLX holds in a worker: weights, caches and temporaries. Pushed over OTLP only.",
)  # fmt: skip
DRAFTS = Metric(
    name="forebay.worker.drafts", kind="gauge", unit="{token}", labels=(_MODEL, "forebay.state"),
    meaning="Tokens that a worker guessed ahead since it started (`drafted`), and those that were right "
    "(`accepted`). Pushed over OTLP only.",
)  # fmt: skip

CATALOG = tuple(each for each in list(globals().values()) if isinstance(each, Metric))
"""Every metric, in the order of the docs."""

Labels: TypeAlias = Mapping[str, str]
"""Attributes of a measurement. They may be shared by many, so nobody changes them."""

Samples: TypeAlias = Callable[[], Iterable[tuple[float, Mapping[str, str]]]]
"""Returns a gauge's values with their labels. It is called on a thread of its own, so it only reads."""


class Metrics:
    """The metrics of a process.

    Args:
        meter: makes the instruments. None records nothing.
    """

    def __init__(self, meter: Meter | None = None) -> None:
        self.enabled = meter is not None
        """Whether anything is recorded."""
        self._meter = meter or NoOpMeterProvider().get_meter("forebay")
        self._counters = {
            each: self._meter.create_counter(each.name, unit=each.unit, description=each.meaning)
            for each in CATALOG
            if each.kind == "counter"
        }
        self._histograms = {
            each: self._meter.create_histogram(
                each.name,
                unit=each.unit,
                description=each.meaning,
                explicit_bucket_boundaries_advisory=each.buckets,
            )
            for each in CATALOG
            if each.kind == "histogram"
        }
        self._gauges: dict[Metric, list[Samples]] = {}
        self._models: set[str] = set()

    def add(self, metric: Metric, labels: Labels, value: int = 1) -> None:
        """Adds to a counter."""
        self._counters[metric].add(value, labels)

    def record(self, metric: Metric, value: float, labels: Labels) -> None:
        """Adds a value to a histogram."""
        self._histograms[metric].record(max(0.0, value), labels)

    def observe(self, metric: Metric, samples: Samples) -> None:
        """Has a gauge read from now on."""
        if metric in self._gauges:
            self._gauges[metric].append(samples)
            return
        sources = self._gauges[metric] = [samples]

        def read(options: CallbackOptions) -> Iterable[Observation]:
            return [Observation(value, labels) for source in list(sources) for value, labels in source()]

        self._meter.create_observable_gauge(metric.name, [read], unit=metric.unit, description=metric.meaning)

    def admit(self, model: str) -> str:
        """Returns the label of a model that answered."""
        if model and len(self._models) < MOST_MODELS:
            self._models.add(model)
        return self.label(model)

    def label(self, model: str) -> str:
        """Returns the label of a model that somebody asked for."""
        return model if model in self._models else OTHER


class Page:
    """The page for Prometheus, served by a thread of its own.

    A thread, so that the page answers when the event loop does not: then it is
    needed most. It answers `GET /metrics`, and only where the `Host` header
    names this machine or a host that was allowed: a web page that makes a
    browser ask here under a name of its own gets nothing.

    Args:
        registry: what to show.
        address: where to listen, as `host:port`.
        hosts: further names by which the page may be asked for.

    Raises:
        OSError: the address cannot be bound.
    """

    def __init__(self, registry: CollectorRegistry, address: str, hosts: Sequence[str] = ()) -> None:
        host, _, port = address.rpartition(":")
        handler = type("_Bound", (_Handler,), {"registry": registry, "hosts": frozenset(hosts)})
        self._server = _Server((host.strip("[]"), int(port)), handler)
        self.address = f"{host}:{self._server.server_address[1]}"
        """Where it listens, with the port that was really bound."""
        threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="metrics-page", daemon=True
        ).start()
        logger.info("metrics are at http://%s/metrics", self.address)

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # The default would let a second process take the port where the first one's connections linger.
    allow_reuse_address = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A scraper that left is no news."""


class _Handler(BaseHTTPRequestHandler):
    registry: CollectorRegistry
    hosts: frozenset[str]
    timeout = 10  # seconds: a client that sends nothing must not hold a thread for ever

    def do_GET(self) -> None:
        """Answers a scrape."""
        if self.headers.get("Origin") is not None or not is_ours(self.headers.get("Host", ""), self.hosts):
            self._answer(HTTPStatus.FORBIDDEN, b"this page is for scrapers of this machine\n")
        elif self.path.partition("?")[0] != "/metrics":
            self._answer(HTTPStatus.NOT_FOUND, b"there is only /metrics\n")
        else:
            self._answer(HTTPStatus.OK, generate_latest(self.registry), CONTENT_TYPE_LATEST)

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        """Says no version."""
        return "forebay"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        """Logs no scrapes."""
