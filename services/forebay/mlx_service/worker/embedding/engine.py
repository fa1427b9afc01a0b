"""The embedding engine: one thread owns the model and every array, and embeds all callers' texts together.

Callers live on an event loop: they hand in tokens, get a `Job`, and wait for
its vectors. Between any two batches the thread takes in what came and forgets
what was cancelled. What a batch gave reaches the loop in one hop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TypeAlias

from forebay.kit.failure import BackendError, DeadlineExceeded, Failure, QueueFull
from forebay.mlx_service.worker.embedding.batcher import Batcher, Pending, padded
from forebay.mlx_service.worker.memory import read_memory
from forebay.mlx_service.worker.model_thread import ModelThread
from forebay.mlx_service.worker.runtime import mx
from forebay.mlx_service.worker.sampling import Array

log = logging.getLogger(__name__)

BUDGETS = (512, 1024, 2048, 4096, 8192, 16384)
"""Tokens that a batch may have. Fewer do not fill a processor; more make none faster."""

BATCH_SECONDS = 0.25
"""How long a batch of short texts may take. Whoever comes next, or leaves, waits for it."""

PROBE = (4, 32)
"""Texts and tokens of the batch by which the device is measured."""

MOST_LANES = 8
"""Most parts of a batch that are computed at once. More leave too little for each."""

LEAST_PART = 32
"""Tokens that are worth a lane of their own."""

PROBE_SECONDS = 0.5
"""A device that takes longer for that batch is too slow for compiling to matter."""

QUEUE_TOKENS = 4_000_000
"""Tokens that may wait: 16 MB. They are minutes of work for a laptop."""

GATHER_SHARE = 0.5
"""Share of the last batch's time that the next one waits for those whom that one answered."""

GATHER_SECONDS = 0.02
"""The longest such wait."""

IDLE_SECONDS = 1.0
"""Idle time after which freed buffers go back to the system."""

Vector: TypeAlias = list[float]

Loader: TypeAlias = Callable[[], Callable[[Array, Array], Array]]
"""Loads a model on the engine's thread: what gives a vector a text for identifiers and a mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedStats:
    """What the engine is doing. Cheap to ask from any thread."""

    waiting: int
    """Texts that wait."""
    steps: int
    """Batches so far."""
    texts: int
    """Texts embedded so far. Equal ones that were embedded once count once."""
    last_step_age: float
    """Seconds since the batch that runs began; 0 if none runs."""
    memory_bytes: int
    """Memory that mlx holds in use: weights and temporaries."""
    faults: int
    """Batches that failed."""
    weights_bytes: int = 0
    """Bytes of the model's weights."""
    freed_bytes: int = 0
    """Memory that mlx has freed and keeps for the next batch."""
    peak_bytes: int = 0
    """Most memory that was in use at once since the model was loaded."""


class Job:
    """What the event loop holds of one request."""

    def __init__(
        self, texts: Sequence[bytes], deadline: float | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.texts = texts
        """Tokens of each text, four bytes each. No text twice."""
        self.deadline = deadline
        self.is_over = False
        self._results: dict[bytes, Vector | Failure] = {}
        self._done: asyncio.Future[None] = loop.create_future()
        if not texts:
            self._done.set_result(None)

    async def results(self) -> dict[bytes, Vector | Failure]:
        """Waits until every text is embedded or failed, and returns what became of each.

        Raises:
            Failure: the whole request failed.
        """
        await self._done
        return self._results

    def tell(self, results: Sequence[tuple[bytes, Vector | Failure]]) -> None:
        """Adds results. Called on the event loop."""
        self._results.update(results)
        if len(self._results) == len(self.texts) and not self._done.done():
            self._done.set_result(None)

    def fail(self, failure: Failure) -> None:
        """Ends it. Called on the event loop."""
        if not self._done.done():
            self._done.set_exception(failure)
            self._done.exception()  # nobody may be waiting any more


class EmbeddingEngine(ModelThread):
    """Embeds texts on a thread of its own.

    Args:
        load: loads the model, on the engine's thread.
        longest: most tokens of a text.
        budget: tokens of a batch. None measures what the device can do.
        queue_tokens: tokens that may wait. A request that finds less waiting is taken whatever its size.
        lanes: parts of a batch that are computed at once. None is one on a GPU, and one a core on a CPU.
    """

    def __init__(
        self,
        load: Loader,
        *,
        longest: int,
        budget: int | None = None,
        queue_tokens: int = QUEUE_TOKENS,
        lanes: int | None = None,
    ) -> None:
        super().__init__("mlx-embedding")
        self._load = load
        self._longest = longest
        self._budget = budget
        self._queue_tokens = queue_tokens
        self._lanes = lanes
        # On the event loop:
        self._jobs: set[Job] = set()
        self._waiting_tokens = 0
        self._token_seconds = 1e-4
        self.dimensions = 0
        """Components of a vector; 0 until the model is loaded."""
        # On the engine's thread:
        self._embed: Callable[[Array, Array], Array]
        self._streams: list[mx.Stream] = []
        self._batcher: Batcher[Job] = Batcher(budget or BUDGETS[0])
        self._steps = 0
        self._texts = 0
        self._faults = 0
        self._began: float | None = None
        self._memory_bytes = 0
        self._weights_bytes = 0
        self._freed_bytes = 0
        self._peak_bytes = 0
        self._answered = 0
        self._step_seconds = 0.0

    # On the event loop

    def submit(self, texts: Sequence[bytes], *, urgency: int = 1, deadline: float | None = None) -> Job:
        """Queues the texts of a request.

        Args:
            texts: tokens of each, four bytes each; no text twice, none empty.
            urgency: lower goes first.
            deadline: when to give up, in seconds of `time.monotonic`.

        Raises:
            QueueFull: too much waits.
            Draining: the engine stops.
        """
        self._check_running()
        if self._waiting_tokens >= self._queue_tokens:
            wait = min(max(self._waiting_tokens * self._token_seconds / 2, 0.5), 60.0)
            raise QueueFull(
                f"{self._waiting_tokens} tokens wait to be embedded; try again later",
                metadata={"waiting_tokens": str(self._waiting_tokens)},
                retry_after=timedelta(seconds=round(wait, 1)),
            )
        job = Job(texts, deadline, self._loop)
        self._jobs.add(job)
        self._waiting_tokens += _tokens(texts)
        self._commands.put(partial(self._add, job, urgency))
        return job

    def leave(self, job: Job) -> None:
        """Forgets what a job still waits for, before the next batch. Call it for every job, in the end."""
        if job in self._jobs:
            self._jobs.remove(job)
            self._waiting_tokens -= _tokens(job.texts)
            job.is_over = True
            self._commands.put(partial(self._remove, job))

    def stats(self) -> EmbedStats:
        """Returns what the engine is doing."""
        began = self._began
        return EmbedStats(
            waiting=len(self._batcher),
            steps=self._steps,
            texts=self._texts,
            last_step_age=0.0 if began is None else time.monotonic() - began,
            memory_bytes=self._memory_bytes,
            faults=self._faults,
            weights_bytes=self._weights_bytes,
            freed_bytes=self._freed_bytes,
            peak_bytes=self._peak_bytes,
        )

    def limit(self, ceiling: int) -> int:
        """Bounds what mlx keeps of freed memory by a ceiling, and returns it."""
        self._commands.put(partial(self._limit, ceiling))
        return ceiling

    def _deliver(self, results: list[tuple[Job, list[tuple[bytes, Vector | Failure]]]], rate: float) -> None:
        self._token_seconds += 0.2 * (rate - self._token_seconds)
        for job, news in results:
            job.tell(news)

    def _fail_rest(self, failure: Failure) -> None:
        for job in self._jobs:
            job.fail(failure)

    # On the engine's thread

    def _work(self) -> None:
        while not self._stopped:
            self._drain()
            self._gather()
            batch = self._live(self._batcher.take())
            if batch and not self._stopped:
                self._step(batch)

    def _start_model(self) -> None:
        before = int(mx.get_active_memory())
        self._embed = self._load()
        self._weights_bytes = int(mx.get_active_memory()) - before
        mx.reset_peak_memory()
        lanes = self._lanes or _cores()
        self._streams = [mx.default_stream(mx.default_device())]
        self._streams += [mx.new_stream(mx.default_device()) for _ in range(lanes - 1)]
        self.dimensions = len(self._forward([pack([0])])[0])
        texts, tokens = PROBE
        tokens = min(tokens, self._longest)
        probe = [pack([0] * tokens)] * texts
        took = self._timed(probe)
        if took <= PROBE_SECONDS:  # what the first run of a shape compiles does not count
            took = self._timed(probe)
        self._token_seconds = took / (texts * tokens)
        if self._budget is None:
            fits = [budget for budget in BUDGETS if budget * self._token_seconds <= BATCH_SECONDS]
            self._batcher.budget = max(fits, default=BUDGETS[0])
        mx.clear_cache()
        self._measure()

    def _limit(self, ceiling: int) -> None:
        room = max(0, ceiling - self._weights_bytes)
        mx.set_memory_limit(ceiling)
        mx.set_cache_limit(room // 2)  # a batch makes and frees much more than it keeps
        self._measure()

    def _measure(self) -> None:
        held = read_memory()
        self._memory_bytes, self._freed_bytes = held.used, held.freed
        self._peak_bytes = int(mx.get_peak_memory())

    def _timed(self, texts: Sequence[bytes]) -> float:
        """Embeds texts and returns the seconds that took."""
        began = time.monotonic()
        self._forward(texts)
        return time.monotonic() - began

    def _drain(self) -> None:
        """Runs the commands that came. With nothing to embed it sleeps until one does."""
        if not len(self._batcher):
            try:
                self._commands.get(timeout=IDLE_SECONDS)()
            except queue.Empty:
                mx.clear_cache()
                self._measure()
                self._commands.get()()
        while True:
            try:
                self._commands.get_nowait()()
            except queue.Empty:
                return

    def _gather(self) -> None:
        """Waits a moment for those who were just answered: who asked for a text at a time asks again.

        Without it the first who is back goes alone, at the price of a whole batch.
        """
        until = time.monotonic() + min(self._step_seconds * GATHER_SHARE, GATHER_SECONDS)
        while 0 < len(self._batcher) < self._answered and not self._stopped:
            try:
                self._commands.get(timeout=max(until - time.monotonic(), 0))()
            except queue.Empty:
                return

    def _add(self, job: Job, urgency: int) -> None:
        if not job.is_over:
            self._batcher.add(job, job.texts, urgency=urgency)

    def _remove(self, job: Job) -> None:
        self._batcher.remove(job, job.texts)

    def _live(self, batch: list[Pending[Job]]) -> list[Pending[Job]]:
        """Returns the texts for which somebody still waits, and tells those whose time is up."""
        now = time.monotonic()
        late = {
            job
            for entry in batch
            for job in entry.waiters
            if job.deadline is not None and job.deadline <= now
        }
        for job in late:
            self._post(job.fail, DeadlineExceeded("the deadline passed before all texts were embedded"))
            self._batcher.remove(job, job.texts)
        return [entry for entry in batch if not entry.waiters <= late]

    def _step(self, batch: list[Pending[Job]]) -> None:
        began = self._began = time.monotonic()
        try:
            results = self._run_batch(batch)
        finally:
            self._began = None
        self._steps += 1
        self._texts += len(batch)
        self._measure()
        news: dict[Job, list[tuple[bytes, Vector | Failure]]] = {}
        for entry, result in zip(batch, results, strict=True):
            for job in entry.waiters:
                news.setdefault(job, []).append((entry.tokens, result))
        self._answered = len(news)
        self._step_seconds = time.monotonic() - began
        tokens = sum(entry.length for entry in batch)
        self._post(self._deliver, list(news.items()), self._step_seconds / tokens)

    def _run_batch(self, batch: Sequence[Pending[Job]]) -> Sequence[Vector | Failure]:
        """Embeds a batch; if that fails its halves, and so on, so that one text cannot fail another."""
        try:
            return self._forward([entry.tokens for entry in batch])
        except Exception as error:
            self._faults += 1
            log.error("embedding %d texts failed: %s", len(batch), type(error).__name__, exc_info=error)
            if len(batch) == 1:
                failure: Failure = BackendError(f"embedding the text failed: {type(error).__name__}")
                failure.__cause__ = error
                return [failure]
        middle = len(batch) // 2
        return [*self._run_batch(batch[:middle]), *self._run_batch(batch[middle:])]

    def _forward(self, texts: Sequence[bytes]) -> list[Vector]:
        """Embeds texts. Those of like length are best next to each other."""
        vectors: list[Array] = []
        for stream, part in zip(self._streams, _parts(texts, len(self._streams)), strict=False):
            with mx.stream(stream):
                vectors.append(self._embed(*self._arrays(part)))
        mx.eval(vectors)
        if not all(mx.isfinite(part).all().item() for part in vectors):
            raise ArithmeticError("a vector has a component that is no number")
        return [vector for part in vectors for vector in part.tolist()]

    def _arrays(self, texts: Sequence[bytes]) -> tuple[Array, Array]:
        """Returns identifiers, padded on the right, and which of them are tokens."""
        longest = max(len(tokens) for tokens in texts) // 4
        width = min(padded(longest), max(longest, self._longest))
        rows = b"".join(tokens.ljust(4 * width, b"\0") for tokens in texts)
        buffer: Array = memoryview(rows).cast(
            "i", [len(texts), width]
        )  # mlx takes buffers and does not say so
        lengths = mx.array([len(tokens) // 4 for tokens in texts])
        return mx.array(buffer), mx.arange(width)[None] < lengths[:, None]

    def _let_go(self, error: BaseException | None) -> None:
        if hasattr(self, "_embed"):
            del self._embed
        self._streams.clear()


def _cores() -> int:
    """Returns how many parts of a batch can be computed at once: on a CPU mlx uses a core for each stream."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return 1
    return min(os.cpu_count() or 1, MOST_LANES)


def _parts(texts: Sequence[bytes], lanes: int) -> list[Sequence[bytes]]:
    """Cuts a batch into neighbouring parts of about the same number of tokens, at most one a lane."""
    share = max(_tokens(texts) / lanes, LEAST_PART)
    parts: list[Sequence[bytes]] = []
    begin = total = 0
    for index, tokens in enumerate(texts):
        total += len(tokens) // 4
        if total >= share * (len(parts) + 1) and len(parts) < lanes - 1:
            parts.append(texts[begin : index + 1])
            begin = index + 1
    if begin < len(texts):
        parts.append(texts[begin:])
    return parts


def pack(tokens: Sequence[int]) -> bytes:
    """Returns tokens as the engine takes them."""
    return array("i", tokens).tobytes()


def _tokens(texts: Sequence[bytes]) -> int:
    return sum(map(len, texts)) // 4
