"""Embeds many texts over a server that takes a few, and says which one is bad.

Texts are looked up in a cache, made unique, cut into batches, sent, and put
back in order. Where a batch fails, its halves are tried, and so on, until the
text at fault is alone: it is named and the others survive.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, TypeAlias

from cachetools import TTLCache

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendError,
    CapabilityUnsupported,
    ContextExceeded,
    Failure,
    InvalidRequest,
)
from forebay.kit.pipeline import Call

_NORM_TOLERANCE: Final = 1e-3  # float16 engines are this far off
_HOPELESS: Final = 4  # single texts that failed inside the server while none succeeded


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a server answered to one batch."""

    vectors: Sequence[Sequence[float]]
    """One vector a text, in order."""
    prompt_tokens: int = 0
    """Tokens it counted, 0 if it did not say."""


Fetch: TypeAlias = Callable[[Sequence[str]], Awaitable[Batch]]
"""Embeds a batch of texts upstream, or raises a `Failure`."""

_Key: TypeAlias = tuple[str, str, int, bytes]


@dataclass(slots=True)
class _Work:
    """One request on its way."""

    fetch: Fetch
    vectors: dict[str, array[float]] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    fetched: int = 0
    hopeless: int = 0
    prompt_tokens: int = 0
    fatal: Failure | None = None


class Embedder:
    """Serves embed requests of one backend.

    Args:
        backend: the backend's name.
        batch_texts: most texts sent at once.
        batch_characters: most characters sent at once. A longer text goes alone.
        concurrency: batches on their way at once, over all requests.
        cache_bytes: room for vectors, four bytes a component. 0 keeps none.
        cache_ttl: how long a vector is kept.
    """

    def __init__(
        self,
        *,
        backend: str,
        batch_texts: int = 64,
        batch_characters: int = 65_536,
        concurrency: int = 2,
        cache_bytes: int = 64 * 1024 * 1024,
        cache_ttl: timedelta = timedelta(hours=1),
    ) -> None:
        self._backend = backend
        self._batch_texts = batch_texts
        self._batch_characters = batch_characters
        self._room = asyncio.Semaphore(concurrency)
        self._cache: TTLCache[_Key, array[float]] = TTLCache(
            cache_bytes, cache_ttl.total_seconds(), getsizeof=_size
        )
        self.hits = 0
        """Texts found in the cache so far."""
        self.misses = 0
        """Texts looked for in vain so far."""

    async def embed(
        self, call: Call[pb.EmbedRequest], fetch: Fetch, *, identity: str, model: str = ""
    ) -> pb.EmbedResponse:
        """Embeds the texts of a request.

        Args:
            call: the request. Vectors are kept for its caller alone.
            fetch: embeds a batch upstream, with the dimensions asked for.
            identity: tells the weights apart, such as a digest with the model's name. Empty where
                they are not known: then nothing is looked up or kept.
            model: name of the model that serves. Empty is the one asked for.

        Raises:
            ContextExceeded: a text is too long; violations name each one.
            InvalidRequest: a text was refused; violations name each one.
            CapabilityUnsupported: the vectors do not have the components asked for.
            Failure: the server failed.
        """
        request = call.request
        wanted = request.dimension_count if request.HasField("dimension_count") else 0
        keys: dict[str, _Key] = {
            text: (call.caller, identity, wanted, hashlib.sha256(text.encode()).digest())
            for text in dict.fromkeys(request.texts)
        }
        work = _Work(fetch=fetch)
        if identity:
            for text, key in keys.items():
                if (kept := self._cache.get(key)) is not None:
                    work.vectors[text] = kept
        cached = sum(1 for text in request.texts if text in work.vectors)
        self.hits += cached
        self.misses += len(request.texts) - cached
        await self._run(work, [text for text in keys if text not in work.vectors])
        if identity:
            for text, vector in work.vectors.items():
                if _size(vector) <= self._cache.maxsize:
                    self._cache[keys[text]] = vector
        response = pb.EmbedResponse(
            backend=self._backend,
            model=model or request.model,
            cached_embedding_count=cached,
            usage=pb.Usage(prompt_token_count=work.prompt_tokens),
        )
        self._fill(response, request, work, wanted)
        return response

    async def _run(self, work: _Work, texts: Sequence[str]) -> None:
        async with asyncio.TaskGroup() as group:
            for batch in self._batches(texts):
                group.create_task(self._take_turn(work, batch))
        if work.fatal is not None:
            raise work.fatal

    def _batches(self, texts: Sequence[str]) -> list[list[str]]:
        batches: list[list[str]] = []
        characters = 0
        for text in texts:
            full = not batches or len(batches[-1]) >= self._batch_texts
            if full or characters + len(text) > self._batch_characters:
                batches.append([])
                characters = 0
            batches[-1].append(text)
            characters += len(text)
        return batches

    async def _take_turn(self, work: _Work, texts: Sequence[str]) -> None:
        async with self._room:  # for the halves too: what is bad is found before the next batch is sent
            await self._serve(work, texts)

    async def _serve(self, work: _Work, texts: Sequence[str]) -> None:
        """Embeds `texts`, or finds out which of them cannot be. Raises nothing: the group would cancel."""
        if work.fatal is not None:
            return
        try:
            vectors = self._checked(await work.fetch(texts), texts, work)
        except (InvalidRequest, ContextExceeded, BackendError) as failure:
            if len(texts) > 1:
                middle = len(texts) // 2
                await self._serve(work, texts[:middle])
                await self._serve(work, texts[middle:])
                return
            work.failures[texts[0]] = failure
            if isinstance(failure, BackendError) and not work.fetched:
                work.hopeless += 1
                if work.hopeless >= _HOPELESS:
                    work.fatal = failure  # the fault is not in the texts
        except Failure as failure:
            work.fatal = failure
        else:
            work.fetched += len(texts)
            work.vectors.update(zip(texts, vectors, strict=True))

    def _checked(self, batch: Batch, texts: Sequence[str], work: _Work) -> list[array[float]]:
        if len(batch.vectors) != len(texts):
            raise BackendError(
                f"{self._backend} answered {len(batch.vectors)} vectors to {len(texts)} texts",
                metadata={"backend": self._backend},
            )
        vectors = [array("f", vector) for vector in batch.vectors]
        lengths = {len(v) for v in vectors} | {len(v) for v in work.vectors.values()}
        if 0 in lengths or len(lengths) > 1:
            raise BackendError(
                f"{self._backend} answered vectors of lengths {sorted(lengths)[:4]} to one request",
                metadata={"backend": self._backend},
            )
        if not all(math.isfinite(math.hypot(*v)) for v in vectors):
            raise BackendError(
                f"{self._backend} answered a vector with a component that is no number",
                metadata={"backend": self._backend},
            )
        work.prompt_tokens += batch.prompt_tokens
        return vectors

    def _fill(self, response: pb.EmbedResponse, request: pb.EmbedRequest, work: _Work, wanted: int) -> None:
        bad = [index for index, text in enumerate(request.texts) if text in work.failures]
        failures = [work.failures[request.texts[index]] for index in bad]
        if bad and (not request.allow_partial or not work.vectors):
            raise _named(bad, failures, len(request.texts))
        for index, failure in zip(bad, failures, strict=True):
            response.failures.add(index=index, reason=failure.reason, message=failure.message)
        normalized = True
        for text in request.texts:
            vector = work.vectors.get(text, array("f"))
            response.embeddings.add(values=vector)
            if vector:
                response.dimension_count = len(vector)
                normalized = normalized and abs(math.hypot(*vector) - 1.0) <= _NORM_TOLERANCE
        response.normalized = normalized
        if wanted and response.dimension_count != wanted:
            if pb.DEGRADATION_KIND_OPTION_IGNORED not in request.accepted_degradations:
                raise CapabilityUnsupported(
                    f"{self._backend} gives {response.dimension_count} components and not {wanted}; leave "
                    "dimension_count unset or accept DEGRADATION_KIND_OPTION_IGNORED",
                    metadata={"backend": self._backend, "dimension_count": str(response.dimension_count)},
                )
            response.degradations.add(
                kind=pb.DEGRADATION_KIND_OPTION_IGNORED,
                field="dimension_count",
                detail=f"All {response.dimension_count} components are given.",
            )


def _named(bad: Sequence[int], failures: Sequence[Failure], total: int) -> Failure:
    """Returns the one failure that names every bad text."""
    kinds = {type(failure) for failure in failures}
    kind: type[Failure] = kinds.pop() if len(kinds) == 1 else InvalidRequest
    return kind(
        f"{len(bad)} of {total} texts cannot be embedded, the first of them texts[{bad[0]}]: "
        f"{failures[0].message}",
        metadata=failures[0].metadata,
        violations=[
            (f"texts[{index}]", failure.message) for index, failure in zip(bad, failures, strict=True)
        ],
    )


def _size(vector: array[float]) -> int:
    return len(vector) * vector.itemsize
