"""Gives stored answers again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from opentelemetry import trace

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BrokenStream
from forebay.kit.pipeline import Call, Event, Request, Send, Service, Serving
from forebay.orchestrator import replies
from forebay.orchestrator.replies import Recording, Store


@dataclass(frozen=True, slots=True)
class Lookup:
    """What the cache had for one call."""

    call: Call[Request]
    """The call."""
    hits: int
    """Answers found: 1 for a reply, and one for each text's embedding."""
    misses: int
    """Answers not found."""


class Remember:
    """Replays replies and embeddings that the caller allowed to be kept.

    Args:
        inner: the service that answers what is not known.
        store: where answers are kept.
        weights: returns what is known of the weights behind a model's name.
        is_shared: whether callers are given each other's answers.
        on_lookup: told of each look into the store, for metrics.
    """

    def __init__(
        self,
        inner: Service,
        *,
        store: Store,
        weights: Callable[[str], str] = lambda model: "",
        is_shared: bool = False,
        on_lookup: Callable[[Lookup], None] | None = None,
    ) -> None:
        self._inner = inner
        self._store = store
        self._weights = weights
        self._is_shared = is_shared
        self._on_lookup = on_lookup

    def __call__(self, call: Call[Request], send: Send) -> Serving:
        """Serves a call."""
        request = call.request
        if replies.is_asked_for(request):
            if isinstance(request, pb.GenerateRequest) and replies.is_repeatable(request):
                return self._generate(call, request, send)
            if isinstance(request, pb.EmbedRequest):
                return self._embed(call, request, send)
        return self._inner(call, send)

    async def _generate(self, call: Call[Request], request: pb.GenerateRequest, send: Send) -> None:
        key = replies.reply_key(request, caller=self._caller(call), weights=self._weights(request.model))
        stored = None
        if request.routing.cache == pb.CACHE_POLICY_USE:
            (value,) = await self._store.get([key])
            stored = replies.events(value) if value is not None else None
            self._tell(call, 1 if stored else 0, 0 if stored else 1)
        if stored is not None:
            stored[0].started.request_id = call.request_id
            for event in stored:
                await send(event)
            return
        recording = Recording(largest=self._store.largest)

        async def record(event: Event) -> None:
            recording.take(cast("pb.GenerateResponse", event))
            await send(event)

        await self._inner(call, record)
        value = recording.value()
        if value is not None:
            await self._store.put({key: value})

    async def _embed(self, call: Call[Request], request: pb.EmbedRequest, send: Send) -> None:
        keys = replies.embedding_keys(
            request, caller=self._caller(call), weights=self._weights(request.model)
        )
        texts = dict(zip(keys, request.texts, strict=True))  # a text that comes twice is embedded once
        known: dict[bytes, pb.EmbedResponse] = {}
        if request.routing.cache == pb.CACHE_POLICY_USE:
            known = await self._known(list(texts))
            hits = sum(key in known for key in keys)
            self._tell(call, hits, len(keys) - hits)
        missing = [key for key in texts if key not in known]
        fresh = await self._ask(call, request, [texts[key] for key in missing]) if missing else None
        if fresh is not None and known:
            sample = next(iter(known.values()))
            if replies.origin(fresh) != replies.origin(sample):
                # Other weights answer now, and embeddings of two kinds in one answer are of no use.
                known, missing = {}, list(texts)
                fresh = await self._ask(call, request, list(texts.values()))
        if fresh is not None:
            await self._keep(fresh, missing)
        await send(_answer(keys, known, missing, fresh))

    async def _known(self, keys: list[bytes]) -> dict[bytes, pb.EmbedResponse]:
        """Returns the embeddings that are stored, all of one origin."""
        known: dict[bytes, pb.EmbedResponse] = {}
        for key, value in zip(keys, await self._store.get(keys), strict=True):
            found = replies.embedding(value) if value is not None else None
            if found is None:
                continue
            if known and replies.origin(found) != replies.origin(next(iter(known.values()))):
                continue
            known[key] = found
        return known

    async def _ask(
        self, call: Call[Request], request: pb.EmbedRequest, texts: Sequence[str]
    ) -> pb.EmbedResponse:
        part = pb.EmbedRequest()
        part.CopyFrom(request)
        part.ClearField("texts")
        part.texts.extend(texts)
        answers: list[pb.EmbedResponse] = []

        async def take(event: Event) -> None:
            answers.append(cast("pb.EmbedResponse", event))

        await self._inner(call.with_(request=part), take)
        if len(answers) != 1 or len(answers[0].embeddings) != len(texts):
            raise BrokenStream(f"a backend did not answer with {len(texts)} embeddings for as many texts")
        return answers[0]

    async def _keep(self, fresh: pb.EmbedResponse, keys: Sequence[bytes]) -> None:
        if fresh.degradations:
            return
        failed = {failure.index for failure in fresh.failures}
        values = {key: replies.single(fresh, place) for place, key in enumerate(keys) if place not in failed}
        await self._store.put(values)

    def _caller(self, call: Call[Request]) -> str:
        return "" if self._is_shared else f"caller {call.caller}"

    def _tell(self, call: Call[Request], hits: int, misses: int) -> None:
        trace.get_current_span().add_event(
            "forebay.cache", {"forebay.cache.hits": hits, "forebay.cache.misses": misses}
        )
        if self._on_lookup is not None:
            self._on_lookup(Lookup(call, hits, misses))


def _answer(
    keys: Sequence[bytes],
    known: dict[bytes, pb.EmbedResponse],
    missing: Sequence[bytes],
    fresh: pb.EmbedResponse | None,
) -> pb.EmbedResponse:
    """Puts stored and fresh embeddings together, in the order of the texts."""
    frame = fresh if fresh is not None else next(iter(known.values()))
    answer = pb.EmbedResponse()
    answer.CopyFrom(frame)
    answer.ClearField("embeddings")
    answer.ClearField("failures")
    places = {key: place for place, key in enumerate(missing)}
    failures = {failure.index: failure for failure in fresh.failures} if fresh is not None else {}
    for index, key in enumerate(keys):
        if key in known:
            answer.embeddings.append(known[key].embeddings[0])
            answer.cached_embedding_count += 1
            continue
        assert fresh is not None, "what is not known was asked for"
        place = places[key]
        answer.embeddings.append(fresh.embeddings[place])
        if place in failures:
            answer.failures.add(index=index, reason=failures[place].reason, message=failures[place].message)
    return answer
