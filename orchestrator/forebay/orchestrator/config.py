"""Settings of the orchestrator: the section `[orchestrator]` of `forebay.toml`."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, StringConstraints, model_validator

from forebay.kit.config import Address, ByteSize, Duration, ServerSettings, Settings, is_local

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9_-]{0,38}[a-z0-9])?$")]
"""A backend's name: it appears in answers, spans and metric labels, so it is short and plain."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class BreakerSettings(Settings):
    """When calls are kept away from a backend that fails, and for how long."""

    consecutive_failures: int = Field(
        default=5,
        ge=1,
        description="Hard failures in a row that open the breaker. Five, as Envoy and Finagle do: one or "
        "two happen to a healthy server that restarts a worker.",
    )
    success_rate: Fraction = Field(
        default=0.5,
        description="Share of calls in the window that must succeed. 0 switches this condition off.",
    )
    window: Duration = Field(
        default=timedelta(seconds=30), description="How far back the success rate looks."
    )
    min_samples: int = Field(
        default=10, ge=1, description="Calls in the window below which the success rate says nothing."
    )
    open_min: Duration = Field(
        default=timedelta(seconds=1), description="How long the breaker opens the first time."
    )
    open_max: Duration = Field(
        default=timedelta(seconds=60),
        description="Longest opening. Each opening in a row lasts twice as long.",
    )
    jitter: Fraction = Field(
        default=0.5,
        description="Share of an opening that is random, so that several callers do not return as one.",
    )

    @model_validator(mode="after")
    def _check_openings(self) -> BreakerSettings:
        if self.open_min <= timedelta(0):
            raise ValueError("open_min must be longer than 0")
        if self.open_max < self.open_min:
            raise ValueError("open_max must not be shorter than open_min")
        return self


class BackendSettings(Settings):
    """One backend behind the orchestrator."""

    name: Name = Field(description="Name of the backend, unique among the backends.")
    framework: str = Field(
        default="", description="Framework behind it: mlx, ollama, lmstudio or openai. Empty takes the name."
    )
    address: Address = Field(description="Address at which its Forebay service listens.")
    enabled: bool = Field(default=True, description="Whether it is used at all.")
    slots: int = Field(
        default=0,
        ge=0,
        description="Calls it may serve at once. 0 leaves the limit to the backend's own service.",
    )
    queue: int = Field(
        default=64,
        ge=0,
        description="Calls that may wait for a slot before others are refused. Only with slots.",
    )
    weight: Fraction = Field(default=1.0, description="How much it is preferred when all else is equal.")
    first_event_timeout: Duration = Field(
        default=timedelta(minutes=2),
        description="Longest silence before the first event. A backend that loads a model or reads a long "
        "prompt sends progress meanwhile, which counts as a sign of life.",
    )
    between_events_timeout: Duration = Field(
        default=timedelta(seconds=30), description="Longest silence between two events. 0 is no limit."
    )
    tls_roots: Path | None = Field(
        default=None, description="PEM file with the roots to trust. Unset connects without TLS."
    )
    token_file: Path | None = Field(
        default=None,
        description="File that holds the bearer token the backend asks for. Over anything but loopback and "
        "unix sockets it needs tls_roots, for a token in plaintext is everyone's.",
    )
    breaker: BreakerSettings = Field(
        default_factory=BreakerSettings, description="When calls are kept away from it."
    )

    @model_validator(mode="after")
    def _check_token(self) -> BackendSettings:
        if self.token_file is None:
            return self
        if self.tls_roots is None and not is_local(self.address):
            raise ValueError("token_file needs tls_roots, since the address is not on this machine")
        try:
            self.token()
        except (OSError, UnicodeError) as error:
            raise ValueError(f"token_file {self.token_file} cannot be read: {error}") from error
        return self

    def token(self) -> SecretStr | None:
        """Returns the token to send; None if there is none.

        Raises:
            OSError: its file cannot be read.
            UnicodeError: its file is not ASCII text, which is all that metadata can carry.
        """
        if self.token_file is None:
            return None
        return SecretStr(self.token_file.read_text(encoding="ascii").strip())


DEFAULT_BACKENDS = (
    BackendSettings(name="mlx", framework="mlx", address="127.0.0.1:50151"),
    BackendSettings(name="ollama", framework="ollama", address="127.0.0.1:50152"),
    BackendSettings(name="lmstudio", framework="lmstudio", address="127.0.0.1:50153"),
)
"""Used when no backend is configured. The bridge to OpenAI-compatible servers is not among them, for it
has no server to find by itself."""


class RetrySettings(Settings):
    """How often a call may be tried again."""

    max_attempts: int = Field(
        default=3, ge=1, description="Most attempts of one call, the first one included."
    )
    budget_ratio: Fraction = Field(
        default=0.2,
        description="Retries for each call, over all calls. 0.2 lets one call in five be tried again: enough "
        "for a lost backend's calls to move, too little to multiply an overload.",
    )
    budget_per_second: float = Field(
        default=10.0,
        ge=0.0,
        description="Retries a second that are free of that, so that a quiet orchestrator can retry too.",
    )
    backoff_min: Duration = Field(
        default=timedelta(milliseconds=100), description="First wait before the same backend is tried again."
    )
    continue_wait: Duration = Field(
        default=timedelta(seconds=5),
        description="How long a reply that broke off waits for a backend that can go on with it, where the "
        "caller allowed that, and before for a retry where many broke off at once. A backend that restarts "
        "is back sooner.",
    )
    backoff_max: Duration = Field(
        default=timedelta(seconds=5),
        description="Longest wait. A backend that asks for more is not tried again by this call.",
    )


class AdmissionSettings(Settings):
    """How many calls run at once, and how the others wait."""

    concurrency: int = Field(
        default=256,
        ge=1,
        description="Calls at once on a backend whose slots are not known. Known are those of "
        "`backends.slots` and those that a backend lists for a model.",
    )
    queue: int = Field(
        default=256,
        ge=0,
        description="Calls that may wait before others are refused. 256 keep ten people busy for an hour on "
        "one machine; who waits longer has left.",
    )
    queue_bytes: ByteSize = Field(
        default=2**28, description="Bytes that the requests of waiting calls may have together."
    )
    ageing: Duration = Field(
        default=timedelta(seconds=15),
        description="Waiting after which a normal call is aged; batch takes twice as long. Every eighth turn "
        "is that of the oldest aged call, so that nothing waits for ever and the urgent hardly notice.",
    )

    @model_validator(mode="after")
    def _check_ageing(self) -> AdmissionSettings:
        if self.ageing <= timedelta(0):
            raise ValueError("ageing must be longer than 0")
        return self


class CacheSettings(Settings):
    """Where replies and embeddings are kept for callers who ask for that."""

    max_bytes: ByteSize = Field(
        default=2**26, description="Bytes of memory for stored answers. 0 switches the cache off."
    )
    ttl: Duration = Field(default=timedelta(hours=1), description="How long an answer is kept.")
    url: str = Field(
        default="",
        description="Valkey or Redis server that keeps the answers instead of this process, such as "
        "`redis://127.0.0.1:6379/0`. Needs the extra `cache`. If it fails, nothing is found and calls go on.",
    )
    timeout: Duration = Field(
        default=timedelta(milliseconds=50), description="How long that server may take for an answer."
    )
    shared: bool = Field(
        default=False,
        description="Whether callers are given each other's answers. Off, each sees only their own.",
    )

    @model_validator(mode="after")
    def _check_store(self) -> CacheSettings:
        if self.ttl <= timedelta(0):
            raise ValueError("ttl must be longer than 0; max_bytes = 0 switches the cache off")
        if self.url and not re.match(r"(redis|rediss|valkey|valkeys|unix)://", self.url):
            raise ValueError("url begins with redis://, rediss://, valkey://, valkeys:// or unix://")
        if self.url and importlib.util.find_spec("redis") is None:
            raise ValueError("url needs the extra `cache`: pip install 'forebay[cache]'")
        return self


class GatherSettings(Settings):
    """When embedding calls of several callers are sent to a backend as one."""

    window: Duration = Field(
        default=timedelta(milliseconds=3),
        description="How long a call for embeddings waits for others of its kind, while earlier ones are "
        "being served. A call that comes alone never waits. 0 sends each by itself.",
    )
    max_texts: int = Field(default=64, ge=1, description="Most texts that are sent together.")


class HedgeSettings(Settings):
    """When a slow call is tried on a second backend at the same time."""

    enabled: bool = Field(
        default=False,
        description="Whether slow calls get a second attempt. Off, because on one machine the second backend "
        "takes its memory and cores from the first.",
    )
    quantile: Fraction = Field(
        default=0.95,
        description="Share of recent calls whose first delta came sooner than a second attempt is made.",
    )
    min_samples: int = Field(
        default=20, ge=1, description="Calls that must have been measured before the share says anything."
    )
    delay_min: Duration = Field(
        default=timedelta(milliseconds=50), description="Shortest wait before a second attempt."
    )


class ScorerWeights(Settings):
    """How much each score counts when backends are compared."""

    preference: float = Field(
        default=100.0,
        ge=0.0,
        description="The order of `routing.backends`. Far above the rest, for the caller said so.",
    )
    loaded: float = Field(
        default=4.0, ge=0.0, description="The model is in memory. Loading one takes longer than most answers."
    )
    load: float = Field(default=3.0, ge=0.0, description="Few calls in progress for its slots.")
    context: float = Field(default=2.0, ge=0.0, description="The request fits the context as it is loaded.")
    proven: float = Field(
        default=2.0,
        ge=0.0,
        description="What the request needs beyond plain text was tried on the running server, and not only "
        "claimed.",
    )
    latency: float = Field(
        default=2.0,
        ge=0.0,
        description="Short expected time to the first delta: of queue, load and what is left of the prompt "
        "to read, as measured.",
    )
    speed: float = Field(default=1.0, ge=0.0, description="Many tokens a second of one reply, as measured.")
    tokens: float = Field(default=1.0, ge=0.0, description="Few tokens due to calls in progress.")
    affinity: float = Field(
        default=5.0,
        ge=0.0,
        description="It holds the beginning of this conversation, evaluated. Fades where calls wait.",
    )
    memory: float = Field(
        default=3.0, ge=0.0, description="Room in memory for a model that is not loaded yet."
    )
    health: float = Field(default=4.0, ge=0.0, description="Few recent failures.")
    weight: float = Field(default=1.0, ge=0.0, description="The backend's configured weight.")


class MatchingSettings(Settings):
    """How a model's name finds the model on backends that spell it in another way."""

    automatic: bool = Field(
        default=True,
        description="Whether a model is found by equal weights, or by what its name says of line, size, "
        "variant and quantisation. Names in `aliases` mean what they say and are left alone.",
    )
    like: bool = Field(
        default=False,
        description="Whether the same model in another quantisation may answer where nobody can serve the "
        "one asked for. Only to callers who accept MODEL_SUBSTITUTED, and marked in the answer.",
    )


class SlowStartSettings(Settings):
    """How a backend that was ejected gets its share of the calls back."""

    window: Duration = Field(
        default=timedelta(seconds=8),
        description="Time from the end of an ejection to the full share. 0 gives it all at once.",
    )
    share: float = Field(default=0.1, gt=0.0, le=1.0, description="Share it begins with.")


class PerformanceSettings(Settings):
    """What is remembered of how fast backends are."""

    window: Duration = Field(
        default=timedelta(minutes=30), description="How far back measurements are looked at."
    )
    samples: int = Field(
        default=64, ge=4, le=4096, description="Most measurements of one kind that are kept, for each model."
    )
    state_dir: Path | None = Field(
        default=None,
        description="Folder in which they are kept over a restart. Unset forgets them, except under `forebay "
        "up`, which keeps them in the cache folder. Figures only: no text, and nothing of callers.",
    )

    @model_validator(mode="after")
    def _check_window(self) -> PerformanceSettings:
        if self.window <= timedelta(0):
            raise ValueError("window must be longer than 0")
        return self


class AffinitySettings(Settings):
    """How long it is remembered which backend holds which conversation."""

    entries: int = Field(
        default=16384,
        ge=0,
        description="Beginnings of conversations that are remembered. 0 goes by what backends list alone.",
    )
    ttl: Duration = Field(
        default=timedelta(minutes=30), description="How long one is remembered after it was last used."
    )


class ProbeSettings(Settings):
    """How backends are watched."""

    models_interval: Duration = Field(
        default=timedelta(seconds=5), description="Time between two looks at a model list."
    )
    timeout: Duration = Field(default=timedelta(seconds=5), description="How long a model list may take.")
    reconnect_min: Duration = Field(
        default=timedelta(milliseconds=100),
        description="First wait before a lost backend is looked for again.",
    )
    reconnect_max: Duration = Field(default=timedelta(seconds=2), description="Longest such wait.")


class PlacedModel(Settings):
    """A model that is to be in memory."""

    model: str = Field(description="The model, by any of its names.")
    backend: Name | None = Field(
        default=None, description="Backend to load it on. Unset is the first that has it."
    )
    pinned: bool = Field(default=False, description="Whether it never leaves memory for another model.")


class PlacementSettings(Settings):
    """How models of all backends share the memory."""

    enabled: bool = Field(
        default=True,
        description="Whether the orchestrator loads models, and unloads idle ones that are in the way. Off, "
        "each framework does as it likes.",
    )
    memory: ByteSize = Field(
        default=0,
        description="Bytes that models may take on this machine, over all frameworks. 0 is `share` of its "
        "memory; where a graphics card has memory of its own it is no limit.",
    )
    share: Fraction = Field(
        default=0.75,
        description="Share of a host's memory that models may take. Apple's own limit for its graphics is "
        "about as much.",
    )
    wait: Duration = Field(
        default=timedelta(seconds=30),
        description="How long a call waits for room that models in use take, before it is refused or tried "
        "elsewhere.",
    )
    load_timeout: Duration = Field(
        default=timedelta(minutes=10), description="How long a backend may take to load a model."
    )
    models: tuple[PlacedModel, ...] = Field(
        default=(),
        description="Models that are loaded at the start, and again when their backend returns, each in a "
        "table [[orchestrator.placement.models]].",
    )


class ReloadSettings(Settings):
    """How changes of the configuration file take effect without a restart."""

    watch: bool = Field(
        default=True,
        description="Whether the file is looked at for changes. SIGHUP and `forebay reload` work either way.",
    )
    interval: Duration = Field(
        default=timedelta(seconds=1),
        description="Time between two looks. A file is read when it has not changed for that long, so that "
        "one that is half written is left alone.",
    )
    grace: Duration = Field(
        default=timedelta(minutes=5),
        description="How long calls on a backend that was removed may go on.",
    )

    @model_validator(mode="after")
    def _check_interval(self) -> ReloadSettings:
        if self.interval <= timedelta(0):
            raise ValueError("interval must be longer than 0")
        return self


class OrchestratorSettings(ServerSettings):
    """The orchestrator."""

    address: Address = Field(
        default="127.0.0.1:50150", description="Address to listen on. Port 0 picks a free one."
    )
    backends: tuple[BackendSettings, ...] = Field(
        default=DEFAULT_BACKENDS,
        description="Backends, each in a table [[orchestrator.backends]]. "
        "Unset is mlx, ollama and lmstudio at their default addresses.",
    )
    default_model: str = Field(
        default="", description="Model of requests that name none. Empty makes such requests an error."
    )
    aliases: dict[str, dict[str, str]] = Field(
        default_factory=dict,
        description="Names of your own for models: for each name, the model it means on each backend.",
    )
    default_deadline: Duration = Field(
        default=timedelta(minutes=10), description="Deadline of calls that come without one."
    )
    max_deadline: Duration = Field(default=timedelta(hours=1), description="Longest deadline of a call.")
    deadline_margin: Duration = Field(
        default=timedelta(milliseconds=50),
        description="Time kept back from a deadline, so that the typed error arrives before the caller's own "
        "timer fires. At most a tenth of what is left.",
    )
    retry: RetrySettings = Field(
        default_factory=RetrySettings, description="How often calls are tried again."
    )
    admission: AdmissionSettings = Field(
        default_factory=AdmissionSettings, description="How calls wait for their turn."
    )
    cache: CacheSettings = Field(
        default_factory=CacheSettings, description="Where answers are kept to be given again."
    )
    coalesce: Literal["asked", "always", "never"] = Field(
        default="asked",
        description="Which identical calls in flight share one reply, if it is greedy or seeded: those that "
        "`routing.cache` allows to be kept, all, or none.",
    )
    gather: GatherSettings = Field(
        default_factory=GatherSettings, description="How small calls for embeddings are put together."
    )
    hedge: HedgeSettings = Field(
        default_factory=HedgeSettings, description="When slow calls are tried twice at the same time."
    )
    scorers: ScorerWeights = Field(default_factory=ScorerWeights, description="How backends are compared.")
    picker: Literal["best", "two"] = Field(
        default="best",
        description="How one of the scored backends is taken: `best` takes the best one; `two` takes the "
        "better of two at random, which suits several orchestrators before the same backends.",
    )
    matching: MatchingSettings = Field(
        default_factory=MatchingSettings, description="How models are found by name."
    )
    affinity: AffinitySettings = Field(
        default_factory=AffinitySettings, description="How conversations return to who holds them."
    )
    slow_start: SlowStartSettings = Field(
        default_factory=SlowStartSettings, description="How ejected backends return."
    )
    performance: PerformanceSettings = Field(
        default_factory=PerformanceSettings, description="How the speed of backends is remembered."
    )
    probe: ProbeSettings = Field(default_factory=ProbeSettings, description="How backends are watched.")
    placement: PlacementSettings = Field(
        default_factory=PlacementSettings, description="How models share the memory."
    )
    reload: ReloadSettings = Field(
        default_factory=ReloadSettings, description="How changes of the file take effect."
    )
    web_address: Address | None = Field(
        default=None,
        description="Address of the dashboard, such as `127.0.0.1:50350`: a page that shows backends, queue "
        "and requests, and changes nothing. Unset has none. Where `address` uses TLS or asks for a token, so "
        "does it. By convention its port is that of `address` plus 200.",
    )
    web_hosts: tuple[str, ...] = Field(
        (),
        description="Names by which the dashboard may be asked for, besides those of this machine. Any other "
        "`Host` is refused, so that no web page can read it through a browser.",
    )
    trace_url: str = Field(
        default="",
        description="Where a request's trace is shown, such as `http://127.0.0.1:16686/trace/{trace_id}`. "
        "The dashboard links there. Empty links nowhere.",
    )

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with values that are right by themselves, a sentence each."""
        yield from super().problems()
        yield from self._web_problems()
        yield from self._backend_problems()
        if self.default_deadline > self.max_deadline:
            yield "default_deadline must not be longer than max_deadline"

    def _web_problems(self) -> Iterator[str]:
        address = self.web_address
        if address is not None and address.startswith("unix:"):
            yield f"web_address {address}: a browser needs a port, not a socket"
        elif (
            address is not None and not is_local(address) and not self.is_guarded and not self.insecure_listen
        ):
            yield (
                f"web_address {address} can be reached from other machines, and the dashboard shows backends "
                "and requests to whoever opens it: set tls_certificate, tls_key and auth_token_digests (or "
                "tls_client_roots), or insecure_listen = true to serve it without protection"
            )
        is_link = re.match(r"https?://[^\s/]", self.trace_url)
        if self.trace_url and not (is_link and "{trace_id}" in self.trace_url):
            yield (
                "trace_url begins with http:// or https:// and holds {trace_id}, such as "
                "http://127.0.0.1:16686/trace/{trace_id}"
            )

    def _backend_problems(self) -> Iterator[str]:
        names = [backend.name for backend in self.backends]
        for double in sorted({name for name in names if names.count(name) > 1}):
            yield f"backends: two backends are called {double}; names must differ"
        if not any(backend.enabled for backend in self.backends):
            yield "backends: at least one backend must be enabled"
        for alias, spellings in self.aliases.items():
            for unknown in sorted(set(spellings) - set(names)):
                yield f"aliases.{alias}: there is no backend {unknown}; there are {', '.join(names)}"
        for placed in self.placement.models:
            if placed.backend is not None and placed.backend not in names:
                yield f"placement.models: there is no backend {placed.backend}; there are {', '.join(names)}"
