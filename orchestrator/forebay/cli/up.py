"""`forebay up`: every service of the mesh, with one command, on one machine.

The order is: read the whole configuration, look at every port, fetch what is
missing, and only then start the first process. So a mistake costs a line of
text and never a half-started mesh.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, cast

import grpc
import typer
from grpc_health.v1 import health_pb2
from rich.markup import escape
from rich.status import Status
from rich.text import Text

from forebay.cli import command, problems, render, settings
from forebay.cli import status as status_view
from forebay.cli.chat import Wishes, answer, message
from forebay.cli.client import Client, connected
from forebay.cli.models import Bar, show_bytes
from forebay.cli.problems import ExitCode, Problem
from forebay.cli.settings import SERVICES, UpSettings
from forebay.cli.supervise import Backoff, Child, Keeper, Program, State, Supervisor, python
from forebay.fleet.v1 import fleet_pb2 as fleet_pb
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import ports
from forebay.kit.channel import connect
from forebay.kit.config import ServerSettings, Settings
from forebay.kit.failure import Failure
from forebay.mlx_service import requirements
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.default_model import DEFAULT_MODEL
from forebay.mlx_service.fetch import default_cache_dir, is_complete

ORCHESTRATOR = "orchestrator"

WEB = f"{ORCHESTRATOR}.web_address"
"""The setting that asks for a dashboard."""

FETCH = "forebay.mlx_service.fetch"
"""The program that fetches the embedded default model."""

ALWAYS = ("mlx", "ollama", "lmstudio", ORCHESTRATOR)
"""Started where nothing else is said. The bridges wait quietly for their framework where it is absent."""

LOOK_SECONDS = 0.2
"""Time between two looks at the health of what is starting."""

BRIDGE_SECONDS = 4.0
"""How long a bridge that listens may take to find its framework before nobody waits for it any more: a
framework on this machine answers in milliseconds, and one that is absent never does."""

FIRST = Wishes(temperature=0.0, max_tokens=256)
"""How the first question is asked: greedy, so that everyone's first answer is the same, and not for long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be started, worked out from the configuration before anything is."""

    up: UpSettings
    services: tuple[str, ...]
    """Names of the services, in order."""
    addresses: Mapping[str, str]
    """Where each listens."""
    pages: Mapping[str, str] = field(default_factory=dict)
    """Addresses of web pages, by the setting that asks for each."""
    dashboard: str = ""
    """URL of the orchestrator's dashboard. Empty where it has none."""
    programs: tuple[Program, ...]
    tls_roots: Mapping[str, Path] = field(default_factory=dict)
    """Certificates of the services that have one, by name: we trust what we start."""
    fetch: Path | None
    """Folder to fetch the embedded default model to first. None is not to."""


def plan(path: Path | None, only: Sequence[str] = ()) -> Plan:
    """Reads the configuration and decides what to start.

    Args:
        path: the configuration file; None looks for it.
        only: services to start instead of the configured ones.

    Raises:
        Problem: the configuration is wrong, or a service is not known or not installed.
    """
    sections = settings.read(path)
    up = cast("UpSettings", sections["up"])
    names = _names(sections, only or up.services)
    addresses = {
        name: _fixed(section.address)
        for name in names
        if isinstance(section := sections[name], ServerSettings)
    }
    env = _mesh(sections, addresses)
    pages = _pages(sections, addresses)
    dashboard = ""
    if WEB in pages:
        section = sections[ORCHESTRATOR]
        if pages[WEB] != getattr(section, "web_address", None):
            env["FOREBAY_ORCHESTRATOR__WEB_ADDRESS"] = pages[WEB]
        dashboard = _url(pages[WEB], tls=getattr(section, "tls_certificate", None) is not None)
    config = ("--config", str(path)) if path is not None else ()
    programs = tuple(
        Program(
            name=name,
            command=python(SERVICES[name].module, *config, "--address", addresses[name]),
            env=env if name == ORCHESTRATOR else {},
            last=name == ORCHESTRATOR,
        )
        for name in names
    )
    return Plan(
        up=up,
        services=names,
        addresses=addresses,
        pages=pages,
        dashboard=dashboard,
        programs=programs,
        tls_roots={
            name: section.tls_certificate
            for name in names
            if isinstance(section := sections[name], ServerSettings) and section.tls_certificate
        },
        fetch=_to_fetch(sections["mlx"]) if up.fetch and "mlx" in names else None,
    )


def _to_fetch(section: Settings) -> Path | None:
    """Returns the folder for the default model if it is wanted, can be run here, and is missing."""
    assert isinstance(section, MlxSettings)
    wanted = section.fetch_default_model and section.default_model == DEFAULT_MODEL.id
    if not wanted or requirements.missing() or is_complete(DEFAULT_MODEL.folder(section.cache_dir)):
        return None
    return section.cache_dir


def _names(sections: Mapping[str, Settings], wanted: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in wanted if name not in SERVICES]
    if unknown:
        raise Problem(
            f"there is no service {unknown[0]!r}",
            remedy=f"there are {', '.join(SERVICES)}",
            code=ExitCode.CONFIG,
        )
    missing = [name for name in wanted if name not in sections]
    if missing:
        raise Problem(
            f"{SERVICES[missing[0]].title} is not part of this installation", code=ExitCode.UNAVAILABLE
        )
    if not wanted:
        wanted = [name for name in ALWAYS if name in sections]
        if "openai" in sections and "base_url" in sections["openai"].model_fields_set:
            wanted.append("openai")
    return tuple(name for name in SERVICES if name in wanted)


def _fixed(address: str) -> str:
    """Returns the address with port 0 replaced by a free port, for others have to be told it."""
    host, _, port = address.rpartition(":")
    if address.startswith("unix:") or port != "0":
        return address
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host.strip("[]"), 0))
        return f"{host}:{probe.getsockname()[1]}"


def _pages(sections: Mapping[str, Settings], names: Iterable[str]) -> dict[str, str]:
    """Returns the addresses of the web pages that services serve besides gRPC, by their settings."""
    asked = [(name, key) for name in names for key in ("metrics_address", "web_address")]
    found = {f"{name}.{key}": getattr(sections[name], key, None) for name, key in asked}
    return {setting: _fixed(address) for setting, address in found.items() if address}


def _url(address: str, *, tls: bool) -> str:
    """Returns what to open in a browser of this machine for a page that is bound to an address."""
    host, _, port = address.rpartition(":")
    # Whoever listens on all addresses listens on this one, and the other is no name of anybody.
    named = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104  # replaced, not bound
    return f"{'https' if tls else 'http'}://{named}:{port}/"


def _mesh(sections: Mapping[str, Settings], addresses: Mapping[str, str]) -> dict[str, str]:
    """Returns what the orchestrator has to be told that its own section does not say.

    Without `[[orchestrator.backends]]` its backends are what is started here,
    and the embedded model answers requests that name none.
    """
    section = sections.get(ORCHESTRATOR)
    if section is None:
        return {}
    env: dict[str, str] = {}
    if "backends" not in section.model_fields_set:
        backends = [
            {"name": getattr(sections[name], "name", name), "framework": name, "address": address}
            for name, address in addresses.items()
            if name != ORCHESTRATOR
        ]
        if backends:
            env["FOREBAY_ORCHESTRATOR__BACKENDS"] = json.dumps(backends)
    default_model = getattr(sections.get("mlx"), "default_model", "")
    if "mlx" in addresses and default_model and not getattr(section, "default_model", ""):
        env["FOREBAY_ORCHESTRATOR__DEFAULT_MODEL"] = default_model
    if getattr(getattr(section, "performance", None), "state_dir", None) is None:
        # What was measured of the backends is worth as much after a restart.
        env["FOREBAY_ORCHESTRATOR__PERFORMANCE__STATE_DIR"] = str(default_cache_dir() / "state")
    return env


def check_ports(addresses: Mapping[str, str]) -> None:
    """Looks whether every address is free.

    Raises:
        Problem: with a line for each that is taken, and by whom.
    """
    lines = []
    for name, address in addresses.items():
        if is_taken(address):
            holder = ports.holder(address) or "a process that cannot be seen from here"
            lines.append(f"{name}: {address} is taken by {holder}")
    if lines:
        raise Problem(
            "nothing was started" if len(lines) > 1 else f"{lines[0]}; nothing was started",
            remedy="stop that process (another `forebay up`?) or set another address in forebay.toml",
            code=ExitCode.UNAVAILABLE,
            lines=lines if len(lines) > 1 else (),
        )


def is_taken(address: str) -> bool:
    """Returns whether something listens on an address."""
    if address.startswith("unix:"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            # What a dead process left of its socket refuses.
            return probe.connect_ex(address.removeprefix("unix:")) == 0
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise Problem(f"{address}: {error.strerror or error}", code=ExitCode.CONFIG) from error
    for kind, _, _, _, target in found:
        with socket.socket(kind, socket.SOCK_STREAM) as probe:
            # As gRPC does: a port whose last connections are still cooling down is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(target)
                probe.listen(1)
            except OSError:
                return True
        with socket.socket(kind, socket.SOCK_STREAM) as probe:
            # On macOS a bind succeeds beside a process that listens on all addresses.
            probe.settimeout(1.0)
            if probe.connect_ex(target) == 0:
                return True
    return False


class Voice:
    """Prints what the services say, each line with its service's name in its colour, on stderr.

    Args:
        names: the services, so that their names take the same width.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._console = render.err()
        self._width = max((len(name) for name in names), default=0)
        self._held: list[tuple[str, str]] | None = None
        self._status: Status | None = None

    def line(self, name: str, text: str) -> None:
        """Prints a line of a service, now or when an answer in progress has ended."""
        if self._held is not None:
            self._held.append((name, text))
            return
        style = SERVICES[name].style if name in SERVICES else "white"
        label = Text(f"{name:<{self._width}} | ", style=style)
        self._console.print(label.append(render.safe(text), style="default"), soft_wrap=True)

    def say(self, text: str, *, style: str = "bold") -> None:
        """Prints a line of our own."""
        self._console.print(escape(render.safe(text)), style=style, soft_wrap=True)

    def doing(self, text: str) -> None:
        """Shows what is going on in a line that moves, on a terminal."""
        if not self._console.is_terminal:
            return
        if self._status is None:
            self._status = self._console.status(escape(text))
            self._status.start()
        else:
            self._status.update(escape(text))

    def still(self) -> None:
        """Takes the moving line away."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keeps the services' lines back, so that they do not break an answer apart."""
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
            for name, text in held:
                self.line(name, text)

    def backends(self, backends: Sequence[fleet_pb.Backend]) -> None:
        """Prints the backends."""
        status_view.show(self._console, list(backends))


@contextlib.asynccontextmanager
async def starting_alone(voice: Voice, *, folder: Path | None = None) -> AsyncIterator[None]:
    """Lets one `forebay up` at a time look at the ports and bind them.

    Two that start together would otherwise find every port free and then take
    some each. It is a lock on a file, which ends with its process.
    """
    folder = folder or default_cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file: IO[str] = (folder / "up.lock").open("w")
    except OSError:  # a read-only home: the services' own bind is then the only referee
        yield
        return
    with file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    voice.say("another `forebay up` is starting; waiting for it", style="dim")
                    told = True
                await asyncio.sleep(LOOK_SECONDS)
        yield


class Up:
    """One run of `forebay up`.

    Args:
        plan: what to start.
        question: what to ask once something can serve; may be empty.
        once: whether to end after the answer.
    """

    def __init__(self, plan: Plan, *, question: str = "", once: bool = False) -> None:
        self._plan = plan
        self._question = question
        self._once = once
        self._voice = Voice(plan.services)
        self._interrupted = False
        self._task: asyncio.Task[object] | None = None
        self._supervisor = Supervisor(
            plan.programs,
            say=self._voice.line,
            backoff=Backoff(first=plan.up.restart_delay, limit=plan.up.restart_delay_limit),
            kill_after=plan.up.kill_after,
        )

    async def run(self) -> ExitCode:
        """Starts everything, serves until it is asked to stop, and leaves no process behind.

        Raises:
            Problem: it cannot start, or nothing can serve.
        """
        loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signal)
        try:
            return await self._interruptible(self._start)
        finally:
            self._voice.still()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _signal(self) -> None:
        """Asks to stop, gently the first time."""
        assert self._task is not None
        if self._interrupted:
            self._voice.say("killing what is left", style="yellow")
            self._supervisor.kill()
            return
        self._interrupted = True
        self._voice.still()
        self._voice.say("stopping: calls in progress may end; once more kills them", style="yellow")
        self._task.cancel()

    async def _interruptible(self, work: Callable[[], Awaitable[ExitCode]]) -> ExitCode:
        """Does work that a signal may end."""
        try:
            return await work()
        except asyncio.CancelledError:
            assert self._task is not None
            if not self._interrupted or self._task.uncancel():
                raise
            return ExitCode.OK

    async def _start(self) -> ExitCode:
        if self._plan.fetch is not None:
            await fetch_default_model(self._voice, self._plan.fetch)
        async with contextlib.AsyncExitStack() as alone:
            await alone.enter_async_context(starting_alone(self._voice))
            check_ports({**self._plan.addresses, **self._plan.pages})
            code = await self._supervisor.run(lambda: self._interruptible(lambda: self._serve(alone)))
        if self._interrupted:
            self._voice.say("stopped", style="dim")
        return code

    async def _serve(self, alone: contextlib.AsyncExitStack) -> ExitCode:
        self._voice.doing("starting")
        while any(keeper.state is State.STARTING for keeper in self._supervisor.keepers.values()):
            await self._supervisor.changed()
        await alone.aclose()
        address = self._plan.addresses.get(ORCHESTRATOR, "")
        if not address:
            return await self._without_orchestrator()
        async with connected(address, tls_roots=self._plan.tls_roots.get(ORCHESTRATOR)) as client:
            backends = await self._until_ready(client)
            self._voice.still()
            self._voice.say(f"forebay is up on {address}", style="bold green")
            if self._plan.dashboard:
                self._voice.say(f"its dashboard is at {self._plan.dashboard}", style="bold green")
            self._voice.backends(backends)
            self._refusals()
            code = ExitCode.OK
            if self._question:
                code = await self._ask(client)
            if self._once:
                return code
        self._voice.say(how_to_call(address), style="dim")
        return await self._until_orchestrator_ends()

    async def _without_orchestrator(self) -> ExitCode:
        keepers = self._supervisor.keepers.values()
        serving = await self._until_serving()
        self._voice.still()
        for keeper in keepers:
            if keeper.address:
                word = "serves" if keeper.address in serving else "listens, and does not serve yet,"
                self._voice.say(f"{keeper.program.name} {word} on {keeper.address}", style="bold green")
        self._refusals()
        if self._question:
            self._voice.say("without an orchestrator there is nobody to ask", style="yellow")
        while not all(keeper.ended for keeper in keepers):
            await self._supervisor.changed()
        raise Problem("no service is left", code=ExitCode.UNAVAILABLE, lines=self._reasons())

    async def _until_serving(self) -> set[str]:
        """Waits until the services say by themselves that they serve, and returns the addresses of those."""
        loop = asyncio.get_running_loop()
        readiness = Readiness(self._supervisor.keepers, clock=loop.time, tls_roots=self._plan.tls_roots)
        deadline = loop.time() + self._plan.up.ready_timeout.total_seconds()
        try:
            while True:
                serving = await readiness.look()
                waiting = readiness.waiting(serving)
                if not waiting or loop.time() >= deadline:
                    return serving
                self._voice.doing(f"waiting for {', '.join(waiting)}")
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            await readiness.close()

    async def _until_orchestrator_ends(self) -> ExitCode:
        keeper = self._supervisor.keepers[ORCHESTRATOR]
        while not keeper.ended:
            await self._supervisor.changed()
        raise Problem("the orchestrator has ended", code=ExitCode.UNAVAILABLE, lines=self._reasons())

    async def _until_ready(self, client: Client) -> list[fleet_pb.Backend]:
        """Waits until what can serve does, and returns the backends.

        Raises:
            Problem: nothing can serve, or the orchestrator has ended.
        """
        loop = asyncio.get_running_loop()
        readiness = Readiness(self._supervisor.keepers, clock=loop.time, tls_roots=self._plan.tls_roots)
        deadline = loop.time() + self._plan.up.ready_timeout.total_seconds()
        backends: list[fleet_pb.Backend] = []
        try:
            while True:
                if self._supervisor.keepers[ORCHESTRATOR].ended:
                    raise Problem(
                        "the orchestrator cannot run", code=ExitCode.UNAVAILABLE, lines=self._reasons()
                    )
                backends = await _backends(client)
                await readiness.look()
                active = {b.address for b in backends if b.state == fleet_pb.Backend.STATE_ACTIVE}
                waiting = readiness.waiting(active)
                stocked = any(b.models for b in backends if b.address in active)
                if backends and not waiting and (stocked or not self._plan.up.require_backend):
                    return backends
                if loop.time() >= deadline or (backends and not waiting and readiness.patience_is_over()):
                    break
                self._voice.doing(f"waiting for {', '.join(waiting) or 'a backend'}")
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            await readiness.close()
        if active:
            return backends
        raise Problem(
            "no backend can serve",
            remedy="`forebay doctor` says what is missing; [up] require_backend = false waits for one",
            code=ExitCode.UNAVAILABLE,
            lines=self._reasons() + [text for b in backends for text in status_view.remarks(b)],
        )

    def _reasons(self) -> list[str]:
        return [
            f"{keeper.program.name}: {keeper.last_line or keeper.state.value}"
            for keeper in self._supervisor.keepers.values()
            if keeper.ended
        ]

    def _refusals(self) -> None:
        for text in self._reasons():
            self._voice.say(text, style="yellow")

    async def _ask(self, client: Client) -> ExitCode:
        self._voice.say(f"> {self._question}")
        try:
            with self._voice.hold():
                await answer(client, [message(pb.ROLE_USER, self._question)], FIRST)
        except Failure as failure:
            trouble = problems.from_failure(failure)
        except Problem as problem:
            trouble = problem
        else:
            return ExitCode.OK
        if self._once:
            raise trouble
        render.problem(trouble)
        return trouble.code


class Readiness:
    """Looks at the health of started services.

    Args:
        keepers: the services, by name.
        clock: seconds.
        tls_roots: by service, the roots to trust. A service that is not named has no TLS.
    """

    def __init__(
        self,
        keepers: Mapping[str, Keeper],
        *,
        clock: Callable[[], float],
        tls_roots: Mapping[str, Path] | None = None,
    ) -> None:
        self._keepers = keepers
        self._clock = clock
        self._tls_roots = tls_roots or {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._since: dict[str, float] = {}

    async def look(self) -> set[str]:
        """Asks every service that listens for its health, and returns the addresses of those that serve."""
        serving = set()
        for name, keeper in self._keepers.items():
            if not keeper.address:
                self._since.pop(name, None)
                continue
            self._since.setdefault(name, self._clock())
            channel = self._channels.get(keeper.address)
            if channel is None:
                channel = connect(keeper.address, tls_roots=self._tls_roots.get(name))
                self._channels[keeper.address] = channel
            if await _serves(channel):
                serving.add(keeper.address)
        return serving

    def waiting(self, active: set[str]) -> list[str]:
        """Returns the services that may still become able to serve.

        Args:
            active: addresses of those that are able already.
        """
        names = []
        for name, keeper in self._keepers.items():
            if keeper.ended or keeper.address in active or (name == ORCHESTRATOR and keeper.address):
                continue
            since = self._since.get(name)
            is_bridge = name not in ("mlx", ORCHESTRATOR)
            if is_bridge and since is not None and self._clock() - since > BRIDGE_SECONDS:
                continue
            names.append(name)
        return names

    def patience_is_over(self) -> bool:
        """Returns whether everything that listens has had its time."""
        now = self._clock()
        return all(now - since > BRIDGE_SECONDS for since in self._since.values())

    async def close(self) -> None:
        """Closes the channels."""
        for channel in self._channels.values():
            await channel.close()


async def _serves(channel: grpc.aio.Channel) -> bool:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    try:
        response = await check(health_pb2.HealthCheckRequest(), timeout=2.0)
    except grpc.aio.AioRpcError:
        return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def _backends(client: Client) -> list[fleet_pb.Backend]:
    try:
        return await client.backends()
    except (Failure, Problem):  # it is not up yet; if it never is, its own process says why
        return []


async def fetch_default_model(voice: Voice, folder: Path, *, module: str = FETCH) -> None:
    """Fetches the embedded default model. Where that fails, says so: the other backends can still serve.

    Args:
        voice: says so.
        folder: where the models are kept.
        module: the program that fetches, and prints how far it is as JSON lines.
    """
    bar = Bar(render.err(), "fetching the default model")
    last = ""

    def show(line: str) -> None:
        nonlocal last
        last = line or last
        with contextlib.suppress(ValueError):
            report = json.loads(line)
            if isinstance(report, dict):
                last = str(report.get("what", last))
                show_bytes(bar, last, int(report.get("done", 0)), int(report.get("total", 0)))

    program = Program(name="fetch", command=python(module, "--json", "--cache-dir", str(folder)))
    child = await Child.spawn(program)
    try:
        code = await child.follow(show)
    finally:
        child.kill()
        bar.close()
    if code != 0:
        voice.say(f"the default model could not be fetched: {last}; going on without it", style="yellow")


def how_to_call(address: str) -> str:
    """Returns how to call the mesh from a terminal, from any language, and from Python."""
    body = '{"messages":[{"role":"ROLE_USER","parts":[{"text":"Hello"}]}]}'
    return f"""
Call it:
  forebay chat{"" if address.endswith(":50150") else f" --address {address}"}
  buf curl --protocol grpc --http2-prior-knowledge -d '{body}' \\
      http://{address}/forebay.inference.v1.InferenceService/Generate
  grpcurl -plaintext -d '{body}' {address} forebay.inference.v1.InferenceService/Generate
  python: channel = grpc.insecure_channel("{address}")
          for event in InferenceServiceStub(channel).Generate(GenerateRequest(messages=[...])): ...
Ctrl-C stops everything."""


@command.command
def up(
    config: command.Config = None,
    only: Annotated[
        str, typer.Option("--only", metavar="NAMES", help="Services to start, such as mlx,orchestrator.")
    ] = "",
    ask: Annotated[
        str, typer.Option("--ask", metavar="TEXT", help="Ask this once something can serve.")
    ] = "",
    once: Annotated[bool, typer.Option("--once", help="Stop after the answer to --ask.")] = False,
    debug: command.Debug = False,
) -> ExitCode:
    """Start every service and keep it running until Ctrl-C."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    return command.run(Up(plan(config, names), question=ask, once=once).run())
