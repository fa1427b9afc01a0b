"""What the worker of an embedding model serves."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum, sqrt
from pathlib import Path

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendError,
    BackendUnavailable,
    CapabilityUnsupported,
    ContextExceeded,
    Failure,
    InvalidRequest,
    ModelNotFound,
)
from forebay.kit.pipeline import Call, Send
from forebay.mlx_service import prompts
from forebay.mlx_service.models.describe import ModelFacts
from forebay.mlx_service.models.embedding import Recipe, capabilities
from forebay.mlx_service.models.identity import Identity
from forebay.mlx_service.worker.embedding.engine import EmbeddingEngine, Vector
from forebay.mlx_service.worker.embedding.load import load_embedder
from forebay.mlx_service.worker.embedding.texts import Texts
from forebay.mlx_service.worker.weights import STORED, Plan

NORM_TOLERANCE = 1e-3
"""How far from 1 the length of a vector may be that counts as normalised."""

SMALL = 10_000
"""Numbers that are written into a response at once, in less time than another thread takes to begin."""

DEFAULT_TOKEN_COUNT = 8192
"""Longest text of a model that does not say its own: more than most take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeds:
    """The embedding model that a worker serves."""

    model_id: str
    """Name under which it is asked for."""
    backend: str
    """Name of the backend it belongs to."""
    facts: ModelFacts
    """What its folder holds."""
    identity: Identity
    """Which weights these are."""
    token_count: int
    """Most tokens of a text."""
    detail: str = ""
    """What else is to be said of how it is loaded."""

    @property
    def recipe(self) -> Recipe:
        """How it embeds."""
        assert self.facts.recipe is not None
        return self.facts.recipe

    @property
    def weights(self) -> pb.WeightIdentity:
        """The weights' identity."""
        facts = self.facts
        return pb.WeightIdentity(
            family=facts.family,
            size_label=facts.size_label,
            quantization=facts.quantization,
            digest=self.identity.digest,
            format=facts.format,
            parameter_count=facts.parameter_count,
        )


@dataclass(slots=True)
class _Work:
    """A request on its way."""

    texts: Sequence[str]
    tokens: list[bytes]
    failures: dict[int, Failure] = field(default_factory=dict)
    degradations: list[pb.Degradation] = field(default_factory=list)
    dimensions: int = 0
    """Components to cut to; 0 is none."""

    @property
    def wanted(self) -> list[bytes]:
        """Returns what is to be embedded, each once."""
        return list(dict.fromkeys(t for i, t in enumerate(self.tokens) if i not in self.failures))


class EmbeddingService:
    """An `InferenceEngine` of one embedding model.

    Args:
        served: the model.
        engine: embeds.
        texts: makes tokens.
    """

    def __init__(self, served: Embeds, engine: EmbeddingEngine, texts: Texts) -> None:
        self._served = served
        self._engine = engine
        self._texts = texts
        self._prompts: Mapping[str, str] = dict(served.recipe.prompts)

    async def generate(self, call: Call[pb.GenerateRequest], send: Send) -> None:
        """Refuses: this model embeds."""
        self._check_model(call.request.model)
        raise CapabilityUnsupported(
            f"model {self._served.model_id} embeds text and does not generate it: ask a chat model",
            metadata={"capability": "generate", "model": self._served.model_id},
        )

    async def embed(self, call: Call[pb.EmbedRequest]) -> pb.EmbedResponse:
        """Embeds the texts, together with those of other calls."""
        request = call.request
        self._check_model(request.model)
        work = await self._plan(request)
        wanted = work.wanted
        job = self._engine.submit(wanted, urgency=int(call.urgency), deadline=call.deadline)
        try:
            results = await job.results()
        finally:
            self._engine.leave(job)
        for index, tokens in enumerate(work.tokens):
            if index not in work.failures and isinstance(result := results[tokens], Failure):
                work.failures[index] = result
        if work.failures and (not request.allow_partial or len(work.failures) == len(work.texts)):
            raise _named(work.failures, len(work.texts))
        if len(results) * self._engine.dimensions <= SMALL:
            return self._response(work, results)
        return await asyncio.to_thread(self._response, work, results)

    async def count_tokens(self, call: Call[pb.CountTokensRequest]) -> pb.CountTokensResponse:
        """Counts the tokens of the messages' texts, each as a text to embed."""
        request = call.request
        self._check_model(request.model)
        if images := prompts.image_paths(request.messages):
            raise CapabilityUnsupported(
                f"model {self._served.model_id} does not read images", metadata={"field": images[0]}
            )
        if request.tools:
            raise CapabilityUnsupported(
                f"model {self._served.model_id} takes no tools",
                metadata={"field": "tools", "capability": "tools", "model": self._served.model_id},
            )
        prompt = self._prompts.get(self._served.recipe.default_prompt, "")
        texts = [prompt + "".join(part.text for part in message.parts) for message in request.messages]
        found = await self._texts.tokens(texts)
        return pb.CountTokensResponse(
            token_count=sum(map(_count, found)), backend=self._served.backend, model=self._served.model_id
        )

    async def list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """Lists the one model."""
        served = self._served
        if request.backends and served.backend not in request.backends:
            return pb.ListModelsResponse()
        return pb.ListModelsResponse(
            models=[
                pb.Model(
                    id=served.model_id,
                    backend=served.backend,
                    state=pb.Model.STATE_ACTIVE,
                    context_token_count=served.facts.context_token_count,
                    memory_bytes=self._engine.stats().memory_bytes,
                    loaded_context_token_count=served.token_count,
                    capabilities=capabilities(probed=True),
                    weights=served.weights,
                    disk_bytes=served.facts.disk_bytes,
                    detail=served.detail,
                )
            ]
        )

    def _check_model(self, model: str) -> None:
        if not self._engine.dimensions:
            raise BackendUnavailable(
                f"model {self._served.model_id} is being loaded", metadata={"model": self._served.model_id}
            )
        if model != self._served.model_id:
            raise ModelNotFound(
                f"this worker serves {self._served.model_id}, not {model}", metadata={"model": model}
            )

    # From request to tokens

    async def _plan(self, request: pb.EmbedRequest) -> _Work:
        prompt = self._prompt(request)
        accepted = frozenset(request.accepted_degradations)
        texts = [prompt + text for text in request.texts] if prompt else list(request.texts)
        work = _Work(texts, [])
        self._plan_dimensions(request, work, accepted)
        work.tokens = await self._texts.tokens(texts)
        await self._plan_lengths(work, may_cut=pb.DEGRADATION_KIND_PROMPT_TRUNCATED in accepted)
        return work

    def _prompt(self, request: pb.EmbedRequest) -> str:
        options = request.backend_options["mlx"].fields if "mlx" in request.backend_options else {}
        violations = [
            (f"backend_options[mlx].{name}", "there is no such option")
            for name in sorted(options)
            if name != "prompt"
        ]
        name = self._served.recipe.default_prompt
        if "prompt" in options:
            name = options["prompt"].string_value
            if name not in self._prompts and (name or options["prompt"].WhichOneof("kind") != "string_value"):
                known = ", ".join(sorted(self._prompts)) or "none"
                violations.append(("backend_options[mlx].prompt", f"the model's prompts are: {known}"))
        if violations:
            raise InvalidRequest("; ".join(f"{p}: {t}" for p, t in violations[:3]), violations=violations)
        return self._prompts.get(name, "")

    def _plan_dimensions(
        self,
        request: pb.EmbedRequest,
        work: _Work,
        accepted: frozenset[pb.DegradationKind.ValueType],
    ) -> None:
        there_are = self._engine.dimensions
        wanted = request.dimension_count if request.HasField("dimension_count") else there_are
        if wanted == there_are:
            return
        if wanted < there_are and self._served.recipe.can_cut(wanted):
            work.dimensions = wanted
            return
        cuts = self._served.recipe.cuts
        can = f"; it can be cut to {', '.join(map(str, cuts))}" if cuts else ""
        text = f"model {self._served.model_id} gives {there_are} components and not {wanted}{can}"
        if pb.DEGRADATION_KIND_OPTION_IGNORED not in accepted:
            raise CapabilityUnsupported(
                f"dimension_count: {text}. Leave it unset or accept DEGRADATION_KIND_OPTION_IGNORED",
                metadata={
                    "field": "dimension_count",
                    "dimension_count": str(there_are),
                    "degradation": "DEGRADATION_KIND_OPTION_IGNORED",
                },
            )
        work.degradations.append(
            pb.Degradation(
                kind=pb.DEGRADATION_KIND_OPTION_IGNORED,
                field="dimension_count",
                detail=f"All {there_are} components are given.",
            )
        )

    async def _plan_lengths(self, work: _Work, *, may_cut: bool) -> None:
        most = self._served.token_count
        long = [i for i, tokens in enumerate(work.tokens) if _count(tokens) > most]
        if may_cut and long:
            cut = await self._texts.tokens([work.texts[i] for i in long], cut=True)
            for index, tokens in zip(long, cut, strict=True):
                work.degradations.append(
                    pb.Degradation(
                        kind=pb.DEGRADATION_KIND_PROMPT_TRUNCATED,
                        field=f"texts[{index}]",
                        detail=f"Of its {_count(work.tokens[index])} tokens {_count(tokens)} are embedded.",
                    )
                )
                work.tokens[index] = tokens
        elif long:
            for index in long:
                count = _count(work.tokens[index])
                work.failures[index] = ContextExceeded(
                    f"it has {count} tokens, and the model takes {most}: split it, or accept "
                    "DEGRADATION_KIND_PROMPT_TRUNCATED",
                    metadata={"prompt_token_count": str(count), "context_token_count": str(most)},
                )
        for index, tokens in enumerate(work.tokens):
            if not tokens:  # a tokenizer that adds no special token has none for an empty text
                work.failures[index] = InvalidRequest(
                    "it has no tokens: this model cannot embed an empty text"
                )

    # From vectors to response

    def _response(self, work: _Work, results: Mapping[bytes, Vector | Failure]) -> pb.EmbedResponse:
        served = self._served
        vectors: dict[bytes, Vector] = {}
        is_normalized = True
        for tokens, result in results.items():
            if not isinstance(result, Failure):
                vector = _cut(result, work.dimensions) if work.dimensions else result
                is_normalized = is_normalized and abs(_norm(vector) - 1) <= NORM_TOLERANCE
                vectors[tokens] = vector
        response = pb.EmbedResponse(
            backend=served.backend,
            model=served.model_id,
            dimension_count=work.dimensions or self._engine.dimensions,
            normalized=is_normalized,
            degradations=work.degradations,
            weights=served.weights,
        )
        used = 0
        for index, tokens in enumerate(work.tokens):
            failure = work.failures.get(index)
            if failure is None:
                used += _count(tokens)
                response.embeddings.add(values=vectors[tokens], token_count=_count(tokens))
            else:
                response.embeddings.add()
                response.failures.add(index=index, reason=failure.reason, message=failure.message)
        response.usage.prompt_token_count = used
        return response


def assemble(
    path: Path,
    facts: ModelFacts,
    *,
    identity: Identity,
    model_id: str,
    backend: str,
    token_count: int | None,
    how: Plan = STORED,
    lanes: int | None = None,
) -> tuple[EmbeddingService, EmbeddingEngine, Texts]:
    """Puts a worker for an embedding model together. Nothing is loaded yet.

    Args:
        path: the model's folder.
        facts: what it holds: a model that embeds.
        identity: which weights these are.
        model_id: name under which it is asked for.
        backend: name of the backend it belongs to.
        token_count: most tokens of a text. None is what the model takes.
        how: how weights are held.
        lanes: parts of a batch that are computed at once; see `EmbeddingEngine`.
    """
    assert facts.recipe is not None
    recipe = facts.recipe
    most = recipe.token_count or token_count or DEFAULT_TOKEN_COUNT
    most = min(most, token_count) if token_count else most
    texts = Texts(path, most)
    engine = EmbeddingEngine(lambda: load_embedder(path, recipe, how), longest=most, lanes=lanes)
    served = Embeds(
        model_id=model_id,
        backend=backend,
        facts=facts,
        identity=identity,
        token_count=most,
        detail=how.reason,
    )
    return EmbeddingService(served, engine, texts), engine, texts


def _named(failures: Mapping[int, Failure], total: int) -> Failure:
    """Returns the one failure that names every bad text."""
    bad = sorted(failures)
    kinds = {type(failure) for failure in failures.values()}
    first = failures[bad[0]]
    # Of several kinds ours is the graver, and it is not the texts' fault.
    kind = kinds.pop() if len(kinds) == 1 else (BackendError if BackendError in kinds else InvalidRequest)
    return kind(
        f"{len(bad)} of {total} texts cannot be embedded, the first of them texts[{bad[0]}]: {first.message}",
        metadata={**first.metadata, "index": str(bad[0])},
        violations=[(f"texts[{index}]", failures[index].message) for index in bad],
    )


def _cut(vector: Vector, dimensions: int) -> Vector:
    """Returns the first components, with length 1."""
    head = vector[:dimensions]
    norm = _norm(head) or 1.0
    return [value / norm for value in head]


def _norm(vector: Vector) -> float:
    return sqrt(fsum(value * value for value in vector))


def _count(tokens: bytes) -> int:
    return len(tokens) // 4
