"""The worker as a process: it loads one model, serves it, and ends cleanly whatever happens around it.

It ends on SIGTERM and SIGINT, when its standard input is a pipe that closes,
and when its parent is gone. Whoever starts a worker holds the other end of its
standard input, so a parent that dies, however suddenly, leaves no orphan.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import stat
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import psutil

from forebay.kit import logs, metrics, process, telemetry
from forebay.kit.config import ConfigError, ServerSettings, load
from forebay.kit.engine import InferenceEngine, ModelEngine
from forebay.kit.failure import ModelLoadFailed, printable
from forebay.kit.logs import LogSettings
from forebay.kit.metrics import Metrics
from forebay.kit.server import Register, Serving, StartError, serving
from forebay.kit.telemetry import Telemetry, TelemetrySettings
from forebay.mlx_service import smg_api
from forebay.mlx_service.host import default_ceiling
from forebay.mlx_service.models.describe import ModelFacts, NotAModelError, describe
from forebay.mlx_service.models.identity import Identity
from forebay.mlx_service.shards import ShardSettings
from forebay.mlx_service.worker import smg
from forebay.mlx_service.worker.adapters import AdapterModels, Adapters, needs_plain_layers
from forebay.mlx_service.worker.batch import Batch
from forebay.mlx_service.worker.cache_layout import Layout
from forebay.mlx_service.worker.control import controlled
from forebay.mlx_service.worker.embedding.engine import EmbeddingEngine
from forebay.mlx_service.worker.embedding.service import assemble
from forebay.mlx_service.worker.embedding.texts import Texts
from forebay.mlx_service.worker.engine import Engine, EngineStats, NewBatch
from forebay.mlx_service.worker.followers import Followers, end_with
from forebay.mlx_service.worker.grammar import Grammars
from forebay.mlx_service.worker.load import load_draft, load_weights
from forebay.mlx_service.worker.memory import metal_memory
from forebay.mlx_service.worker.prefix_cache import PrefixCache
from forebay.mlx_service.worker.prefix_disk import DiskSettings, DiskTier, Post
from forebay.mlx_service.worker.runtime import BLAS, VERSIONS, leave_thread
from forebay.mlx_service.worker.service import Served, WorkerService
from forebay.mlx_service.worker.sharding import Leader
from forebay.mlx_service.worker.speculation import Speculation, SpeculationStats
from forebay.mlx_service.worker.weights import STORED, CpuWeights, Plan, plan
from forebay.mlx_service.worker.words import Words

log = logging.getLogger(__name__)

SERVICE = "mlx-worker"
"""Name of the process in the line that says where it listens."""

EX_LOAD = 3
"""Exit code of a worker whose model could not be loaded. The last line on stderr says why."""

DEFAULT_CONTEXT = 32768
"""Context of a model that does not say its own. Long enough for chats, and its cache fits a laptop."""

STOP_SECONDS = 10.0
"""How long the engine may take to end. A step takes seconds at most; longer is stuck in the driver."""

DIGEST_SECONDS = 1.0
"""How long a loaded model waits for the digest of its weights. Some 2 GB are read by then, and what is
read later becomes known later."""

WATCH_SECONDS = 0.5
"""Time between two looks at the engine and at the parent."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a worker and returns its exit code.

    Args:
        argv: the command line without the program's name; None takes the process's own.
    """
    options = _parse(argv)
    if _is_pipe(0):
        os.environ[process.STDIN_VARIABLE] = "1"
    try:
        sections = load({"log": LogSettings, "telemetry": TelemetrySettings}, path=options.config)
        settings = ServerSettings.model_validate({"address": options.address, "grace": options.grace})
    except (ConfigError, ValueError) as error:
        lines = error.lines if isinstance(error, ConfigError) else [str(error)]
        return _complain("; ".join(lines), process.EX_USAGE)
    logs.setup(cast("LogSettings", sections["log"]), service=SERVICE)
    tracing = telemetry.setup(f"forebay-{SERVICE}", cast("TelemetrySettings", sections["telemetry"]))
    try:
        return asyncio.run(_serve(options, settings, tracing))
    except StartError as error:
        return _complain(str(error), process.EX_UNAVAILABLE)
    except ModelLoadFailed as error:
        return _complain(error.message, EX_LOAD)
    finally:
        tracing.shutdown()
        leave_thread()


async def _serve(options: argparse.Namespace, settings: ServerSettings, tracing: Telemetry) -> int:
    path: Path = options.model
    try:
        facts = describe(path)
    except NotAModelError as error:
        raise ModelLoadFailed(str(error)) from error
    ceiling = options.memory_ceiling or default_ceiling(psutil.virtual_memory().total, metal_memory())
    weights = facts.disk_bytes + _draft_bytes(options.draft_model)
    if weights > ceiling * (len(options.shards.hosts) if options.shards else 1):
        raise ModelLoadFailed(
            f"{path.name}: its weights take {weights} bytes and memory_ceiling is {ceiling}"
        )
    identity = Identity(path, options.digests)
    identity.start()
    how = STORED if options.shards else plan(options.cpu_weights, facts, ceiling=ceiling, blas=BLAS)
    if needs_plain_layers(folder for _, folder in options.adapter):
        how = replace(how, is_blocked=False, is_transposed=False)
    if how.reason:
        log.info("%s: %s; matrix products by %s", options.model_id, how.reason, BLAS or "mlx's own library")
    service, models, engine, words = (
        _embedding(options, facts, identity, how)
        if facts.recipe
        else _chat(options, facts, identity, ceiling, how)
    )
    more = [controlled(engine, ceiling)]
    more += _smg(service) if options.smg and isinstance(service, WorkerService) else []
    _show(engine, options.model_id, tracing.metrics)
    async with process.stop_requests() as stopped:
        async with serving(settings, inference=service, models=models, more=more, telemetry=tracing) as up:
            process.announce(SERVICE, up.address)
            async with _watching(stopped, options.parent_pid):
                loading = asyncio.create_task(_load(words, engine, identity))
                await _first(loading, stopped)
                failure = loading.exception() if loading.done() else None
                if loading.done() and failure is None:
                    log.info("%s is loaded: %s", options.model_id, engine.stats())
                    await up.set_ready(True, "the model is loaded")
                    await _serve_until(stopped, up, engine, options.stall_limit)
                is_loaded = loading.done()
                loading.cancel()
        words.close()
        identity.close()
        code = await _end(engine, is_loaded=is_loaded, is_asked=stopped.is_set())
    if failure is not None:
        raise _load_failure(failure) from failure  # last, so that nothing is said after it
    return code


def _chat(
    options: argparse.Namespace, facts: ModelFacts, identity: Identity, ceiling: int, how: Plan
) -> tuple[InferenceEngine, ModelEngine | None, Engine, Words]:
    """Puts together what generates text."""
    path: Path = options.model
    words = Words(path)
    load: Callable[[], object] = partial(load_weights, path, how)
    new_batch: NewBatch = Batch
    if options.shards:
        leader = _leader(options)
        load, new_batch = partial(leader.load, path, options.shards.kind), leader.new_batch
    is_kept = options.prefix_cache and not options.shards  # each rank has a part of what attention holds
    engine = Engine(
        lambda: (load(), words.wait().end_tokens),
        rows=options.max_rows,
        queue_rows=options.queue,
        prefixes=PrefixCache(max_bytes=options.prefix_cache) if is_kept else None,
        new_batch=new_batch,
        ceiling=ceiling,
        prefill_most=options.prefill_chunk,
        freed_bytes=options.cache_limit,
        wired_bytes=options.wired_limit,
        disk=_disk(options, identity, how) if is_kept else None,
        # Whoever guesses takes steps of which the other ranks of a shared model would not hear.
        speculation=None if options.shards else _speculation(options, ceiling - how.byte_count),
    )
    served = Served(
        model_id=options.model_id,
        backend=options.name,
        facts=facts,
        identity=identity,
        context_token_count=_context(facts.context_token_count, options.context),
        default_max_tokens=options.default_max_tokens,
        rows=options.max_rows,
        isolates_callers=options.isolate_callers,
        detail=how.reason,
    )
    adapters = Adapters(engine, options.model_id, dict(options.adapter))
    models = AdapterModels(adapters, options.name) if options.adapter else None
    return WorkerService(served, engine, words, Grammars(words), adapters), models, engine, words


def _speculation(options: argparse.Namespace, room: int) -> Speculation | None:
    draft: Path | None = options.draft_model
    if draft is None:
        return Speculation() if options.prompt_lookup else None
    how = plan(options.cpu_weights, describe(draft), ceiling=max(room, 0), blas=BLAS)
    return Speculation(lookup=options.prompt_lookup, load_draft=lambda: load_draft(draft, options.model, how))


def _draft_bytes(path: Path | None) -> int:
    if path is None:
        return 0
    try:
        return describe(path).weight_bytes
    except NotAModelError as error:
        raise ModelLoadFailed(f"the draft model cannot be loaded: {error}") from error


def _smg(service: WorkerService) -> list[Register]:
    """Puts together the interface of routers that speak `mlx.grpc.engine.MlxEngine`."""
    found = smg_api.api()
    return [] if found is None else [smg.register(found, *service.parts)]


def _leader(options: argparse.Namespace) -> Leader:
    """Puts together what runs the model with the other ranks."""
    followers = Followers(
        options.shards,
        options.model,
        cache_limit=options.cache_limit,
        on_end=end_with(EX_LOAD, process.EX_SOFTWARE),
    )

    def start() -> Sequence[str]:
        followers.start()
        return followers.addresses

    return Leader(followers.tell, start)


def _disk(
    options: argparse.Namespace, identity: Identity, how: Plan
) -> Callable[[Layout, Post], DiskTier] | None:
    """Returns what makes the second tier of the prefix cache, if there is to be one."""
    if options.prefix_disk is None or not options.prefix_disk_bytes:
        return None
    settings = DiskSettings(
        folder=options.prefix_disk, max_bytes=options.prefix_disk_bytes, write=options.prefix_disk_write
    )

    def whole_identity(layout: Layout) -> str:
        identity.wait(None)
        computed = f"{VERSIONS}, {BLAS or 'no BLAS'}, {'float32' if how.is_float32 else 'as stored'}"
        return f"{identity.digest}, {computed}, {layout!r}" if identity.digest else ""

    return lambda layout, post: DiskTier(
        settings,
        model=options.model,
        identity=lambda: whole_identity(layout),
        is_cuttable=layout.is_cuttable,
        post=post,
    )


def _embedding(
    options: argparse.Namespace, facts: ModelFacts, identity: Identity, how: Plan
) -> tuple[InferenceEngine, ModelEngine | None, EmbeddingEngine, Texts]:
    """Puts together what embeds text."""
    service, engine, texts = assemble(
        options.model,
        facts,
        identity=identity,
        model_id=options.model_id,
        backend=options.name,
        token_count=options.context,
        how=how,
        lanes=_lanes(),
    )
    return service, None, engine, texts


def _lanes() -> int | None:
    """Returns how many parts of a batch are computed at once; None is the engine's own choice."""
    if BLAS is None:
        return None
    BLAS.compute_on_callers()
    return BLAS.threads


def _show(engine: Engine | EmbeddingEngine, model_id: str, to: Metrics) -> None:
    model = {"gen_ai.request.model": to.admit(model_id)}

    def drafts() -> list[tuple[float, dict[str, str]]]:
        stats = engine.stats()
        done = stats.speculation if isinstance(stats, EngineStats) else SpeculationStats()
        return [
            (done.drafted, model | {"forebay.state": "drafted"}),
            (done.accepted, model | {"forebay.state": "accepted"}),
        ]

    to.observe(metrics.DRAFTS, drafts)
    if isinstance(engine, Engine):
        to.observe(
            metrics.PREFIXES,
            lambda: [
                (engine.stats().prefix.bytes, model | {"forebay.tier": "memory"}),
                (engine.stats().disk.bytes, model | {"forebay.tier": "disk"}),
            ],
        )
    to.observe(metrics.MEMORY, lambda: [(engine.stats().memory_bytes, model)])


def _load_failure(error: BaseException) -> ModelLoadFailed:
    if isinstance(error, ModelLoadFailed):
        return error
    return ModelLoadFailed(f"the model is loaded and cannot be run: {type(error).__name__}: {error}")


async def _load(words: Words | Texts, engine: Engine | EmbeddingEngine, identity: Identity) -> None:
    # Side by side, for each takes about as long. Of two failures that of the words is told, each time.
    for failure in await asyncio.gather(words.load(), engine.start(), return_exceptions=True):
        if failure is not None:
            raise failure
    await asyncio.to_thread(identity.wait, DIGEST_SECONDS)


async def _serve_until(
    stopped: asyncio.Event, up: Serving, engine: Engine | EmbeddingEngine, stall_limit: float
) -> None:
    """Serves until a stop is asked for or the engine ends. While a step takes too long, health says so."""
    is_moving = True
    while not stopped.is_set() and not engine.has_ended:
        moves = engine.stats().last_step_age <= stall_limit
        if moves is not is_moving:
            is_moving = moves
            await up.set_ready(moves, "" if moves else f"a step takes longer than {stall_limit:g} s")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WATCH_SECONDS):
                await stopped.wait()


async def _end(engine: Engine | EmbeddingEngine, *, is_loaded: bool, is_asked: bool) -> int:
    try:
        await engine.stop(timeout=STOP_SECONDS)
    except TimeoutError:
        # The thread is in the driver or in the middle of a load, and no Python can get it out. Leaving it to
        # the interpreter's exit would abort; there is nothing left here that needs an orderly one.
        log.error("the engine did not end within %g s", STOP_SECONDS)
        logging.shutdown()
        os._exit(process.EX_SOFTWARE if is_loaded else 0)
    return 0 if is_asked else process.EX_SOFTWARE


@contextlib.asynccontextmanager
async def _watching(stopped: asyncio.Event, parent: int | None) -> AsyncIterator[None]:
    """Sets `stopped` when the parent is gone, as long as the block runs."""
    async with asyncio.TaskGroup() as tasks:
        watch = tasks.create_task(_watch_parent(stopped, parent))
        try:
            yield
        finally:
            watch.cancel()


async def _watch_parent(stopped: asyncio.Event, parent: int | None) -> None:
    while parent is not None and not stopped.is_set():
        if os.getppid() != parent:
            stopped.set()
        await asyncio.sleep(WATCH_SECONDS)


async def _first(task: asyncio.Task[None], stopped: asyncio.Event) -> None:
    waiting = asyncio.create_task(stopped.wait())
    await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


def _context(made_for: int, wanted: int | None) -> int:
    """The context to serve: what is wanted, but never more than the model was made for."""
    most = made_for or wanted or DEFAULT_CONTEXT
    return min(most, wanted) if wanted else most


def _is_pipe(descriptor: int) -> bool:
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:  # it is closed: there is nobody to watch
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _complain(text: str, code: int) -> int:
    print(f"forebay {SERVICE}: {printable(text)}", file=sys.stderr, flush=True)  # noqa: T201 - the front reads it
    return code


def _adapter(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError("must be NAME=FOLDER")
    return name, Path(folder)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"forebay-{SERVICE}", description="Loads one model and serves it.")
    parser.add_argument("--model", type=Path, required=True, help="the model's folder")
    parser.add_argument("--model-id", required=True, help="name under which it is asked for")
    parser.add_argument("--address", required=True, help="where to listen, such as unix:/path/to.sock")
    parser.add_argument("--name", default="mlx", help="name of the backend in answers")
    parser.add_argument("--max-rows", type=int, default=8, help="most requests served at once")
    parser.add_argument("--queue", type=int, default=64, help="most requests that wait for their turn")
    parser.add_argument("--context", type=int, help="most tokens of prompt and reply together")
    parser.add_argument(
        "--default-max-tokens", type=int, default=4096, help="most tokens of a reply that sets no limit"
    )
    parser.add_argument(
        "--prefix-cache", type=int, default=0, help="bytes for what was read of prompts; 0 keeps nothing"
    )
    parser.add_argument("--prefix-disk", type=Path, help="folder for what leaves the prefix cache")
    parser.add_argument("--prefix-disk-bytes", type=int, default=0, help="most bytes in it; 0 keeps nothing")
    parser.add_argument(
        "--prefix-disk-write", choices=("evicted", "finished"), default="evicted", help="when to write to it"
    )
    parser.add_argument("--digests", type=Path, help="folder in which digests of weights are remembered")
    parser.add_argument(
        "--memory-ceiling", type=int, help="bytes that weights and requests may take; else by the machine's"
    )
    parser.add_argument(smg_api.WORKER_FLAG, action="store_true", help="serve mlx.grpc.engine.MlxEngine too")
    parser.add_argument(
        "--shards", type=ShardSettings.model_validate_json, help="how the model is shared, as JSON"
    )
    parser.add_argument(
        "--prefill-chunk", type=int, default=512, help="most tokens of a prompt read in one step"
    )
    parser.add_argument(
        "--cache-limit", type=int, default=2 << 30, help="bytes of freed memory that mlx keeps"
    )
    parser.add_argument("--wired-limit", type=int, default=0, help="bytes not to be paged out; 0 wires none")
    parser.add_argument(
        "--isolate-callers", action="store_true", help="keep each caller's prompts apart in the prefix cache"
    )
    parser.add_argument(
        "--prompt-lookup",
        action="store_true",
        help="guess what a row that runs alone writes next from what was there before",
    )
    parser.add_argument("--draft-model", type=Path, help="folder of a small model that guesses ahead")
    parser.add_argument(
        "--adapter",
        type=_adapter,
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="an adapter of the model, served under that name; may be given again",
    )
    parser.add_argument(
        "--cpu-weights",
        type=CpuWeights,
        default=CpuWeights.AUTO,
        help="how weights are held on a CPU: auto, stored or float32",
    )
    parser.add_argument("--parent-pid", type=int, help="process whose end ends this one")
    parser.add_argument("--config", type=Path, help="configuration file, for [log] and [telemetry]")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds that calls may go on after a stop")
    parser.add_argument(
        "--stall-limit",
        type=float,
        default=60.0,
        help="seconds of one step after which health is NOT_SERVING",
    )
    return parser.parse_args(argv)
