"""What the worker serves: requests in, rows to the engine, events out."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import prefixes
from forebay.kit.failure import (
    BackendUnavailable,
    CapabilityUnsupported,
    ContextExceeded,
    InvalidRequest,
    ModelNotFound,
)
from forebay.kit.pipeline import Call, Send
from forebay.mlx_service import prompts
from forebay.mlx_service.models.adapter import AdapterFacts
from forebay.mlx_service.models.describe import ModelFacts
from forebay.mlx_service.models.identity import Identity
from forebay.mlx_service.worker.adapters import Adapters
from forebay.mlx_service.worker.engine import (
    Constraint,
    Engine,
    Over,
    Reading,
    Row,
    Ticket,
    Waiting,
    Written,
)
from forebay.mlx_service.worker.grammar import Grammars
from forebay.mlx_service.worker.prefix_cache import Mark
from forebay.mlx_service.worker.sampling import SamplingParams
from forebay.mlx_service.worker.text import Kind, Segment, Splitter
from forebay.mlx_service.worker.words import Prompt, Words

log = logging.getLogger(__name__)

DEFAULT_TEMPERATURE = 0.7
"""Temperature of a request that names none: what most chat models are tuned around."""

PIN_OPTION = "pin_prompt"
"""Option in `backend_options[mlx]`: keeps the prompt in the prefix cache until the model leaves memory."""

LAST_BEGINNINGS = 2
"""Messages, from the last, whose ends a prompt is known by, besides what every conversation shares: the
next turn begins with all of them, and a turn that is asked again with all but the last. Earlier turns have
told the ends of earlier messages."""

LONG_PROMPT = 64
"""Tokens from which reading a prompt may take so long that people want to see progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The model that the worker serves."""

    model_id: str
    """Name under which it is asked for."""
    backend: str
    """Name of the backend it belongs to."""
    facts: ModelFacts
    """What its folder holds."""
    identity: Identity
    """Which weights these are."""
    context_token_count: int
    """Most tokens of prompt and reply together."""
    default_max_tokens: int
    """Most tokens of a reply that sets no limit."""
    rows: int
    """Requests served at once."""
    isolates_callers: bool = False
    """Whether each caller's prompts are kept apart in the prefix cache."""
    detail: str = ""
    """What else is to be said of how it is loaded."""

    @property
    def weights(self) -> pb.WeightIdentity:
        """The weights' identity."""
        return pb.WeightIdentity(
            family=self.facts.family,
            size_label=self.facts.size_label,
            quantization=self.facts.quantization,
            digest=self.identity.digest,
            format=self.facts.format,
            parameter_count=self.facts.parameter_count,
        )


class WorkerService:
    """An `InferenceEngine` of one model.

    Args:
        served: the model.
        engine: generates.
        words: templates and tokens.
        grammars: output formats.
        adapters: views of the model, each served under a name of its own. None has none.
    """

    def __init__(
        self,
        served: Served,
        engine: Engine,
        words: Words,
        grammars: Grammars,
        adapters: Adapters | None = None,
    ) -> None:
        self._served = served
        self._engine = engine
        self._words = words
        self._grammars = grammars
        self._adapters = adapters or Adapters(engine, served.model_id, {})

    @property
    def parts(self) -> tuple[Served, Engine, Words, Path]:
        """What another interface to the same model is made of: it, its engine, its words and its folder."""
        return self._served, self._engine, self._words, self._served.facts.path

    async def generate(self, call: Call[pb.GenerateRequest], send: Send) -> None:
        """Generates a reply."""
        began = time.monotonic()
        self._check_model(call.request.model)
        if call.request.model in self._adapters:
            async with self._adapters.using(call.request.model) as adapter:
                await self._generate(call, send, began, adapter)
        else:
            await self._generate(call, send, began, None)

    async def _generate(
        self, call: Call[pb.GenerateRequest], send: Send, began: float, adapter: AdapterFacts | None
    ) -> None:
        request = call.request
        plan = await self._plan(call, adapter)
        ticket = self._engine.submit(plan.row)
        try:
            await send(
                pb.GenerateResponse(
                    started=pb.Started(
                        backend=self._served.backend,
                        model=request.model,
                        request_id=call.request_id,
                        degradations=plan.degradations,
                        weights=self._weights(adapter),
                    )
                )
            )
            await _Reply(plan, ticket, self._words, request, began).run(send)
        finally:
            ticket.cancel()

    async def embed(self, call: Call[pb.EmbedRequest]) -> pb.EmbedResponse:
        """Refuses: this worker generates."""
        self._check_model(call.request.model)
        raise CapabilityUnsupported(
            f"model {self._served.model_id} generates text and does not embed it: ask an embedding model",
            metadata={"capability": "embed", "model": self._served.model_id},
        )

    async def count_tokens(self, call: Call[pb.CountTokensRequest]) -> pb.CountTokensResponse:
        """Counts the tokens of the prompt that a conversation makes."""
        request = call.request
        self._check_model(request.model)
        images = prompts.image_paths(request.messages)
        if images:
            raise CapabilityUnsupported(
                f"model {self._served.model_id} does not read images", metadata={"field": images[0]}
            )
        if request.tools and self._words.language.tool_parser is None:
            raise self._no_tools()
        prompt = await self._words.prompt(request.messages, request.tools)
        return pb.CountTokensResponse(
            token_count=len(prompt.tokens), backend=self._served.backend, model=request.model
        )

    async def list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """Lists the model and its adapters."""
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
                    loaded_context_token_count=served.context_token_count,
                    slot_count=served.rows,
                    capabilities=self._capabilities(),
                    weights=served.weights,
                    disk_bytes=served.facts.disk_bytes,
                    prefix_digests=self._engine.marks,
                    detail=served.detail,
                ),
                *(self._describe(name, adapter) for name, adapter in self._adapters.open.items()),
            ]
        )

    def _describe(self, name: str, adapter: AdapterFacts | None) -> pb.Model:
        """Describes an adapter, which is None while it is not open."""
        model = pb.Model(id=name, backend=self._served.backend, state=pb.Model.STATE_AVAILABLE)
        if adapter is not None:
            model.state = pb.Model.STATE_ACTIVE
            model.memory_bytes = adapter.disk_bytes
            model.loaded_context_token_count = self._served.context_token_count
            model.slot_count = self._served.rows
            model.capabilities.extend(self._capabilities())
            model.weights.CopyFrom(self._weights(adapter))
        return model

    def _weights(self, adapter: AdapterFacts | None) -> pb.WeightIdentity:
        weights = self._served.weights
        if adapter is not None:
            # Empty is unknown yet, and must not become a digest that all unknown weights would share.
            weights.digest = adapter.weights_digest(weights.digest) if weights.digest else ""
        return weights

    def _capabilities(self) -> list[pb.CapabilityReport]:
        language = self._words.language
        chats = language.has_template
        formats = chats and not (language.markers.think_start and language.think_tokens is None)
        can = {
            pb.CAPABILITY_GENERATE: chats,
            pb.CAPABILITY_EMBED: False,
            pb.CAPABILITY_VISION: False,
            pb.CAPABILITY_TOOLS: chats and language.tool_parser is not None,
            pb.CAPABILITY_REASONING: chats and bool(language.markers.think_start),
            pb.CAPABILITY_JSON_SCHEMA: formats,
            pb.CAPABILITY_GRAMMAR: formats,
            pb.CAPABILITY_SEED: chats,
            pb.CAPABILITY_LOGPROBS: chats,
            pb.CAPABILITY_CONTINUE: chats,
            pb.CAPABILITY_COUNT_TOKENS: chats,
            pb.CAPABILITY_TOKEN_IDS: chats,
            pb.CAPABILITY_STOP_TOKEN_IDS: chats,
        }
        return [
            pb.CapabilityReport(
                capability=capability,
                support=pb.CapabilityReport.SUPPORT_YES if yes else pb.CapabilityReport.SUPPORT_NO,
                probed=True,  # the loaded model's own template, tokenizer and engine say so
            )
            for capability, yes in can.items()
        ]

    def _check_model(self, model: str) -> None:
        if not self._engine.vocabulary_size:
            raise BackendUnavailable(
                f"model {self._served.model_id} is being loaded", metadata={"model": self._served.model_id}
            )
        if model != self._served.model_id and model not in self._adapters:
            raise ModelNotFound(
                f"this worker serves {self._served.model_id}, not {model}", metadata={"model": model}
            )

    def _no_tools(self) -> CapabilityUnsupported:
        return CapabilityUnsupported(
            f"model {self._served.model_id} has no chat template for tools",
            metadata={"field": "tools", "capability": "tools", "model": self._served.model_id},
        )

    # From request to row

    async def _plan(self, call: Call[pb.GenerateRequest], adapter: AdapterFacts | None) -> _Plan:
        request = call.request
        shortfalls = _Shortfalls(frozenset(request.accepted_degradations))
        self._check_options(request)
        for path in prompts.image_paths(request.messages):
            shortfalls.note(
                pb.DEGRADATION_KIND_IMAGE_DROPPED, path, f"model {self._served.model_id} does not read images"
            )
        tools = self._tools(request, shortfalls)
        switches = self._switches(request, shortfalls)
        prefix = request.continue_from if request.HasField("continue_from") else None
        counts = prefixes.beginnings(request) if self._engine.keeps_prefixes else []
        ends = [*counts[:1], *counts[1:][-LAST_BEGINNINGS:]]
        prompt = await self._words.prompt(
            request.messages, tools, switches=switches, prefix=prefix, ends=ends
        )
        most = self._most(request, len(prompt.tokens))
        constraint = await self._constraint(request, prompt, tools, shortfalls)
        row = Row(
            tokens=prompt.tokens,
            reply_count=prompt.reply_count,
            most=most,
            sampling=self._sampling(request.sampling, shortfalls),
            constraint=constraint,
            top_logprobs=request.logprobs.top_logprob_count if request.HasField("logprobs") else None,
            urgency=int(call.urgency),
            deadline=call.deadline,  # the loop's clock is time.monotonic, as the engine's is
            cache_key=self._cache_key(call, adapter),
            pin=_flag(request, PIN_OPTION),
            beginnings=self._marks(call, adapter, counts, prompt) if prompt.ends else (),
            view="" if adapter is None else request.model,
        )
        return _Plan(row, prompt, tools, shortfalls.found)

    def _cache_key(self, call: Call[pb.GenerateRequest], adapter: AdapterFacts | None) -> str:
        """Whom a prompt's beginnings are shared with: calls of the same weights and, maybe, caller alone."""
        caller = call.caller if self._served.isolates_callers else ""
        return "\0".join((self._served.facts.outline, "" if adapter is None else adapter.digest, caller))

    def _marks(
        self,
        call: Call[pb.GenerateRequest],
        adapter: AdapterFacts | None,
        counts: Sequence[int],
        prompt: Prompt,
    ) -> tuple[Mark, ...]:
        """Digests of the prompt's beginnings whose end in tokens is known."""
        caller = call.caller if self._served.isolates_callers else ""
        model = self._served.model_id if adapter is None else call.request.model
        chain = prefixes.digests(call.request, model=model, caller=caller)
        return tuple((chain[i], prompt.ends[n]) for i, n in enumerate(counts) if n in prompt.ends)

    def _check_options(self, request: pb.GenerateRequest) -> None:
        options = request.backend_options["mlx"].fields if "mlx" in request.backend_options else {}
        violations = [
            (f"backend_options[mlx].{name}", "there is no such option")
            for name in sorted(set(options) - {PIN_OPTION})
        ]
        if PIN_OPTION in options and options[PIN_OPTION].WhichOneof("kind") != "bool_value":
            violations.append((f"backend_options[mlx].{PIN_OPTION}", "must be true or false"))
        vocabulary = self._engine.vocabulary_size
        violations += [
            (f"sampling.logit_bias[{token}]", f"the model's vocabulary has {vocabulary} tokens")
            for token in request.sampling.logit_bias
            if token >= vocabulary
        ]
        violations += [
            (f"limits.stop_token_ids[{i}]", f"the model's vocabulary has {vocabulary} tokens")
            for i, token in enumerate(request.limits.stop_token_ids)
            if token >= vocabulary
        ]
        violations += [
            (f"continue_from.token_ids[{i}]", f"must be in [0, {vocabulary})")
            for i, token in enumerate(request.continue_from.token_ids)
            if not 0 <= token < vocabulary
        ][:1]
        if violations:
            raise InvalidRequest("; ".join(f"{p}: {t}" for p, t in violations[:3]), violations=violations)

    def _tools(self, request: pb.GenerateRequest, shortfalls: _Shortfalls) -> Sequence[pb.Tool]:
        mode = request.tool_choice.mode
        if not request.tools or mode == pb.ToolChoice.MODE_NONE:
            return ()
        if self._words.language.tool_parser is None:
            shortfalls.note(
                pb.DEGRADATION_KIND_TOOLS_DROPPED,
                "tools",
                f"model {self._served.model_id} has no chat template for tools",
            )
            return ()
        if mode == pb.ToolChoice.MODE_REQUIRED:
            shortfalls.note(
                pb.DEGRADATION_KIND_OPTION_IGNORED,
                "tool_choice",
                "the model may call tools and cannot be made to",
            )
        return request.tools

    def _switches(self, request: pb.GenerateRequest, shortfalls: _Shortfalls) -> dict[str, object]:
        effort = request.reasoning_effort
        if effort == pb.REASONING_EFFORT_UNSPECIFIED:
            return {}
        language = self._words.language
        if effort == pb.REASONING_EFFORT_NONE:
            if not language.markers.think_start:
                return {}
            if "enable_thinking" in language.takes_effort:
                return {"enable_thinking": False}
        elif "reasoning_effort" in language.takes_effort:
            return {"reasoning_effort": pb.ReasoningEffort.Name(effort).rpartition("_")[2].lower()}
        shortfalls.note(
            pb.DEGRADATION_KIND_OPTION_IGNORED,
            "reasoning_effort",
            f"model {self._served.model_id} takes no such effort",
        )
        return {}

    def _most(self, request: pb.GenerateRequest, prompt_count: int) -> int:
        """How many tokens the reply may have. Nothing is ever cut to make it fit."""
        context = self._served.context_token_count
        room = context - prompt_count
        limits = request.limits
        wanted = limits.max_output_token_count if limits.HasField("max_output_token_count") else None
        if room < (wanted or 1):
            asked = "any reply" if wanted is None else f"a reply of up to {wanted}"
            raise ContextExceeded(
                f"the prompt has {prompt_count} tokens, the context {context}: there is no room for {asked}",
                metadata={
                    "prompt_token_count": str(prompt_count),
                    "max_output_token_count": str(wanted or 0),
                    "context_token_count": str(context),
                },
            )
        return min(self._served.default_max_tokens, room) if wanted is None else wanted

    async def _constraint(
        self,
        request: pb.GenerateRequest,
        prompt: Prompt,
        tools: Sequence[pb.Tool],
        shortfalls: _Shortfalls,
    ) -> Constraint | None:
        kind = request.output_format.WhichOneof("constraint")
        if kind is None or (kind == "any_json" and not request.output_format.any_json):
            return None
        if tools:
            shortfalls.note(
                pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED,
                "output_format",
                "an output format is not enforced on replies that may call tools",
            )
            return None
        try:
            return await self._grammars.compile(
                request.output_format, is_thinking=prompt.begins_in is Kind.REASONING
            )
        except CapabilityUnsupported as failure:
            shortfalls.note(pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED, f"output_format.{kind}", failure.message)
            return None

    def _sampling(self, sampling: pb.Sampling, shortfalls: _Shortfalls) -> SamplingParams:
        if sampling.HasField("typical_p") and sampling.typical_p < 1.0:
            shortfalls.note(
                pb.DEGRADATION_KIND_OPTION_IGNORED, "sampling.typical_p", "it is not supported with mlx"
            )
        off = SamplingParams()
        return SamplingParams(
            temperature=sampling.temperature if sampling.HasField("temperature") else DEFAULT_TEMPERATURE,
            top_p=sampling.top_p if sampling.HasField("top_p") else off.top_p,
            top_k=sampling.top_k if sampling.HasField("top_k") else off.top_k,
            min_p=sampling.min_p if sampling.HasField("min_p") else off.min_p,
            seed=sampling.seed if sampling.HasField("seed") else None,
            repetition_penalty=(
                sampling.repetition_penalty
                if sampling.HasField("repetition_penalty")
                else off.repetition_penalty
            ),
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=tuple(sorted(sampling.logit_bias.items())),
        )


class _Shortfalls:
    """Shortfalls of a reply: those accepted are listed, any other is refused."""

    def __init__(self, accepted: frozenset[pb.DegradationKind.ValueType]) -> None:
        self._accepted = accepted
        self.found: list[pb.Degradation] = []

    def note(self, kind: pb.DegradationKind.ValueType, path: str, detail: str) -> None:
        """Lists a shortfall.

        Raises:
            CapabilityUnsupported: the caller did not accept this kind.
        """
        if kind not in self._accepted:
            raise CapabilityUnsupported(
                f"{path}: {detail}. Accept {pb.DegradationKind.Name(kind)} to go on without it",
                metadata={"field": path, "degradation": pb.DegradationKind.Name(kind)},
            )
        self.found.append(pb.Degradation(kind=kind, field=path, detail=detail))


@dataclass(frozen=True, slots=True)
class _Plan:
    """A request, checked and ready."""

    row: Row
    prompt: Prompt
    tools: Sequence[pb.Tool]
    degradations: list[pb.Degradation]


@dataclass(slots=True)
class _Pending:
    """Tokens that no delta has carried yet."""

    count: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)


class _Reply:
    """Turns what happens to one row into events."""

    def __init__(
        self, plan: _Plan, ticket: Ticket, words: Words, request: pb.GenerateRequest, began: float
    ) -> None:
        language = words.language
        row = plan.row
        self._ticket = ticket
        self._tools = plan.tools
        self._parser = language.tool_parser
        self._spelling = language.spelling
        self._markers = language.markers
        self._include_ids = request.include_token_ids
        self._stop_tokens = frozenset(request.limits.stop_token_ids)
        self._stop_token: int | None = None
        self._prompt_count = len(row.tokens)
        self._began = began
        self._stream = language.spelling.stream(at_start=not row.reply_count)
        self._splitter = Splitter(
            language.markers, tuple(request.limits.stop_sequences), begins_in=plan.prompt.begins_in
        )
        if request.continue_from.token_ids:
            # What these tokens say was sent before; whatever they leave open is still to come.
            for token in request.continue_from.token_ids:
                self._splitter.feed(self._stream.add(token))
        self._pending = _Pending()
        self._cached_count = 0
        self._output_count = 0
        self._reasoning_count = 0
        self._drafted_count = 0
        self._accepted_count = 0
        self._calls = 0
        self._admitted: float | None = None
        self._first_token: float | None = None
        self._first_delta: float | None = None
        self._last_delta = began

    async def run(self, send: Send) -> None:
        """Sends the row's events up to `finished`.

        Raises:
            Failure: the row failed.
        """
        while True:
            segments: list[Segment] = []
            reason: str | None = None
            for happening in await self._ticket.next():
                if isinstance(happening, Written):
                    if happening.token in self._stop_tokens:
                        reason, self._stop_token = "stop", happening.token
                        break
                    segments += self._write(happening)
                    if self._splitter.stopped is not None:
                        reason = "stop"
                        break
                elif isinstance(happening, Over):
                    if happening.failure is not None:
                        await self._deltas(segments, send)
                        raise happening.failure
                    reason = happening.reason
                else:
                    await self._progress(happening, send)
            if reason is not None:
                segments += self._end(reason)
            await self._deltas(segments, send)
            if reason is not None:
                if self._splitter.stopped is None and (self._pending.ids or self._pending.logprobs):
                    # Tokens whose text never became whole, such as half a character at the limit.
                    await self._deltas([Segment(Kind.ANSWER, "")], send)
                await self._finish(reason, send)
                return

    def _write(self, written: Written) -> list[Segment]:
        self._output_count += 1
        self._drafted_count += written.drafted
        self._accepted_count += written.accepted
        if self._first_token is None:
            self._first_token = written.at
        self._pending.count += 1
        if self._include_ids:
            self._pending.ids.append(written.token)
        if written.logprob is not None:
            self._pending.logprobs.append(self._logprob(written, written.logprob))
        if self._splitter.kind is Kind.REASONING:
            self._reasoning_count += 1
        return self._splitter.feed(self._stream.add(written.token))

    def _end(self, reason: str) -> list[Segment]:
        """What was held back, now that nothing more comes."""
        if self._splitter.stopped is not None:
            return []
        # At the limit half a character is dropped: the next token would have completed it.
        text = "" if reason == "length" else self._stream.end()
        return self._splitter.feed(text) + self._splitter.end()

    def _logprob(self, written: Written, logprob: float) -> pb.TokenLogprob:
        spelled = self._spelling.bytes_of(written.token)
        entry = pb.TokenLogprob(
            token=spelled.decode(errors="replace"),
            raw_bytes=spelled,
            token_id=written.token,
            logprob=min(0.0, logprob),
        )
        for token, value in written.top:
            spelled = self._spelling.bytes_of(token)
            entry.top_logprobs.add(
                token=spelled.decode(errors="replace"),
                raw_bytes=spelled,
                token_id=token,
                logprob=min(0.0, value),
            )
        return entry

    async def _progress(self, happening: Waiting | Reading, send: Send) -> None:
        if isinstance(happening, Waiting):
            progress = pb.Progress(stage=pb.Progress.STAGE_QUEUED, queue_position=happening.position)
        else:
            if self._admitted is None:
                self._admitted = happening.since
            self._cached_count = happening.cached
            if happening.total <= LONG_PROMPT:
                return
            progress = pb.Progress(
                stage=pb.Progress.STAGE_PREFILLING, fraction=min(1.0, happening.done / happening.total)
            )
        await send(pb.GenerateResponse(progress=progress))

    async def _deltas(self, segments: Sequence[Segment], send: Send) -> None:
        """Sends the segments, those of one kind together, however many steps a slow reader missed."""
        deltas: list[pb.Delta] = []
        for segment in segments:
            if segment.kind is Kind.TOOL:
                deltas += self._tool_deltas(segment.text)
            elif segment.kind is Kind.REASONING:
                if deltas and deltas[-1].WhichOneof("content") == "reasoning":
                    deltas[-1].reasoning += segment.text
                else:
                    deltas.append(pb.Delta(reasoning=segment.text))
            elif deltas and deltas[-1].WhichOneof("content") == "text":
                deltas[-1].text += segment.text
            else:
                deltas.append(pb.Delta(text=segment.text))
        if not deltas:
            return
        pending, self._pending = self._pending, _Pending()
        deltas[-1].token_count = pending.count
        deltas[-1].token_ids.extend(pending.ids)
        deltas[-1].logprobs.extend(pending.logprobs)
        for delta in deltas:
            self._last_delta = time.monotonic()
            if self._first_delta is None:
                self._first_delta = self._last_delta
            await send(pb.GenerateResponse(delta=delta))

    def _tool_deltas(self, text: str) -> list[pb.Delta]:
        calls = self._parse(text)
        if calls is None:
            log.info("a tool call could not be parsed and is passed on as text")
            return [pb.Delta(text=self._markers.tool_start + text + self._markers.tool_end)]
        deltas = []
        for name, arguments in calls:
            deltas.append(
                pb.Delta(
                    tool_call=pb.ToolCallDelta(
                        index=self._calls,
                        id=f"call_{uuid.uuid4().hex[:24]}",
                        name=name,
                        arguments_json=arguments,
                    )
                )
            )
            self._calls += 1
        return deltas

    def _parse(self, text: str) -> list[tuple[str, str]] | None:
        """Names and JSON arguments of the calls, or None if the text is none."""
        if self._parser is None or not self._tools:
            return None
        try:
            parsed = self._parser(text, prompts.tool_specs(self._tools))
            calls = parsed if isinstance(parsed, list) else [parsed]
            return [(_name(call), _arguments(call)) for call in calls] or None
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, SyntaxError):
            return None  # parsers raise as they please on what a model made up

    async def _finish(self, reason: str, send: Send) -> None:
        now = time.monotonic()
        finish = pb.FINISH_REASON_LENGTH if reason == "length" else pb.FINISH_REASON_STOP
        if self._splitter.stopped is not None:
            self._stop_token = None  # what was held back when it came had a stop sequence in it
        is_stopped = self._splitter.stopped is not None or self._stop_token is not None
        if self._calls and reason == "stop" and not is_stopped:
            finish = pb.FINISH_REASON_TOOL_CALLS
        admitted = self._admitted if self._admitted is not None else now
        finished = pb.Finished(
            reason=finish,
            stop_sequence=self._splitter.stopped or "",
            stop_token_id=self._stop_token,
            usage=pb.Usage(
                prompt_token_count=self._prompt_count,
                cached_token_count=self._cached_count,
                output_token_count=self._output_count,
                reasoning_token_count=self._reasoning_count,
                drafted_token_count=self._drafted_count,
                accepted_token_count=self._accepted_count,
            ),
        )
        timings = finished.timings
        timings.queue_duration.FromTimedelta(_seconds(admitted - self._ticket.submitted_at))
        if self._first_token is not None:
            timings.prefill_duration.FromTimedelta(_seconds(self._first_token - admitted))
        if self._first_delta is not None:
            timings.first_delta_duration.FromTimedelta(_seconds(self._first_delta - self._began))
            timings.generation_duration.FromTimedelta(_seconds(self._last_delta - self._first_delta))
        await send(pb.GenerateResponse(finished=finished))


def _flag(request: pb.GenerateRequest, name: str) -> bool:
    """An option of this backend, which has been checked to be a flag."""
    if "mlx" not in request.backend_options or name not in request.backend_options["mlx"].fields:
        return False
    return request.backend_options["mlx"].fields[name].bool_value


def _seconds(value: float) -> timedelta:
    return timedelta(seconds=max(0.0, value))


def _name(call: object) -> str:
    name = call["name"] if isinstance(call, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError("a call has no name")
    return name


def _arguments(call: object) -> str:
    arguments = call.get("arguments", {}) if isinstance(call, dict) else {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("arguments are no object")
    return json.dumps(arguments, ensure_ascii=False)
