"""Serves `mlx.grpc.engine.MlxEngine` for the worker's model: tokens in, tokens out.

How it maps to the engine: unset sampling values mean what they mean there
(temperature 1, everything else off); a limit that is not set is what the
context leaves; tokens that end a reply are named in `matched_stop_token_id`
and are neither sent nor counted. `ignore_eos` and untokenized text are
refused, rather than read in some other way.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import math
import time
import zipfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import cast

import grpc

from forebay.kit.failure import BackendUnavailable, ContextExceeded
from forebay.kit.rpc import Context, Edge, caller, write
from forebay.kit.server import Register
from forebay.mlx_service.smg_api import SERVICE, Api, Message, refuse
from forebay.mlx_service.worker.engine import Engine, Over, Reading, Row, Ticket, Written
from forebay.mlx_service.worker.sampling import SamplingParams
from forebay.mlx_service.worker.service import Served
from forebay.mlx_service.worker.words import Words

CHUNK_BYTES = 64 << 10
"""Bytes of the tokenizer in one message."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
)
_TOKENIZER_PATTERNS = ("*.jinja", "*.model", "*.tiktoken")

_ABORTED = "aborted"


def register(found: Api, served: Served, engine: Engine, words: Words, folder: Path) -> Register:
    """Returns what adds the interface to a worker's server.

    Args:
        found: the interface.
        served: the model.
        engine: generates.
        words: knows the tokens that end a reply.
        folder: the model's folder.
    """

    def add(server: grpc.aio.Server, edge: Edge) -> Sequence[str]:
        servicer = SmgWorker(found, served, engine, words, folder, edge)
        found.services.add_MlxEngineServicer_to_server(servicer, server)
        return [SERVICE]

    return add


class SmgWorker:
    """The interface of one model in memory.

    Args:
        found: the interface.
        served: the model.
        engine: generates.
        words: knows the tokens that end a reply.
        folder: the model's folder.
        edge: what is around every call.
    """

    def __init__(
        self, found: Api, served: Served, engine: Engine, words: Words, folder: Path, edge: Edge
    ) -> None:
        self._api = found
        self._served = served
        self._engine = engine
        self._words = words
        self._folder = folder
        self._edge = edge
        self._began = time.monotonic()
        self._tickets: dict[str, list[Ticket]] = {}

    async def Generate(self, request: Message, context: Context) -> None:
        """Streams a reply, or sends it whole where `stream` is not set."""
        async with self._edge.serve(context, f"{SERVICE}/Generate"):
            ticket = self._engine.submit(self._row(request, context))
            named = self._tickets.setdefault(request.request_id, [])
            named.append(ticket)
            try:
                await self._reply(request, ticket, context)
            finally:
                ticket.cancel()
                named.remove(ticket)
                if not named:
                    self._tickets.pop(request.request_id, None)

    async def Abort(self, request: Message, context: Context) -> Message:
        """Ends replies by their identifiers; those that are not there are ignored."""
        async with self._edge.serve(context, f"{SERVICE}/Abort"):
            for id_ in request.request_ids:
                for ticket in self._tickets.get(id_, ()):
                    ticket.cancel()
                    ticket.tell(Over(_ABORTED))
            return self._api.messages.AbortResponse()

    async def HealthCheck(self, request: Message, context: Context) -> Message:
        """Says whether the model is in memory and its engine runs."""
        async with self._edge.serve(context, f"{SERVICE}/HealthCheck", is_routine=True):
            is_well = self._engine.vocabulary_size > 0 and not self._engine.has_ended
            return self._api.messages.HealthCheckResponse(
                healthy=is_well, message="active" if is_well else "loading"
            )

    async def GetModelInfo(self, request: Message, context: Context) -> Message:
        """Describes the model."""
        async with self._edge.serve(context, f"{SERVICE}/GetModelInfo", is_routine=True):
            self._check_loaded()
            served = self._served
            config = await asyncio.to_thread(_config, self._folder)
            context_count = served.context_token_count
            return self._api.messages.GetModelInfoResponse(
                model_path=served.model_id,
                served_model_name=served.model_id,
                is_generation=True,
                max_context_length=context_count,
                max_req_input_len=context_count - 1,
                vocab_size=self._engine.vocabulary_size,
                model_type=served.facts.family,
                architectures=[served.facts.architecture] if served.facts.architecture else [],
                eos_token_ids=sorted(self._words.language.end_tokens),
                pad_token_id=_token(config, "pad_token_id"),
                bos_token_id=_token(config, "bos_token_id"),
            )

    async def GetServerInfo(self, request: Message, context: Context) -> Message:
        """Says how busy the engine is, and since when it runs."""
        async with self._edge.serve(context, f"{SERVICE}/GetServerInfo", is_routine=True):
            stats = self._engine.stats()
            return self._api.messages.GetServerInfoResponse(
                server_type="mlx-grpc",
                active_requests=stats.live + stats.waiting,
                uptime_seconds=time.monotonic() - self._began,
            )

    async def GetTokenizer(self, request: Message, context: Context) -> None:
        """Streams the tokenizer's files as one zip archive; its digest comes with the last part."""
        async with self._edge.serve(context, f"{SERVICE}/GetTokenizer"):
            archive = await asyncio.to_thread(_archive, self._folder)
            digest = hashlib.sha256(archive).hexdigest()
            for start in range(0, len(archive), CHUNK_BYTES):
                part = archive[start : start + CHUNK_BYTES]
                is_last = start + CHUNK_BYTES >= len(archive)
                await write(
                    context, self._api.common.GetTokenizerChunk(data=part, sha256=digest if is_last else "")
                )

    def _check_loaded(self) -> None:
        if not self._engine.vocabulary_size:
            raise BackendUnavailable(f"model {self._served.model_id} is being loaded")

    def _row(self, request: Message, context: Context) -> Row:
        self._check_loaded()
        if request.WhichOneof("input") != "tokenized" or not request.tokenized.input_ids:
            raise refuse("tokenized.input_ids", "send the prompt's tokens")
        wanted = request.sampling_params
        vocabulary = self._engine.vocabulary_size
        tokens = tuple(int(token) for token in request.tokenized.input_ids)
        if max(tokens) >= vocabulary:
            raise refuse("tokenized.input_ids", f"the model's vocabulary has {vocabulary} tokens")
        if wanted.ignore_eos:
            raise refuse("sampling_params.ignore_eos", "a reply that meets an end token ends")
        room = self._served.context_token_count - len(tokens)
        most = wanted.max_tokens if wanted.HasField("max_tokens") else max(room, 1)
        if most < 1:
            raise refuse("sampling_params.max_tokens", "must be at least 1")
        if most > room:
            raise ContextExceeded(
                f"the prompt has {len(tokens)} tokens, the context {self._served.context_token_count}: there "
                f"is no room for a reply of up to {most}",
                metadata={
                    "prompt_token_count": str(len(tokens)),
                    "max_output_token_count": str(most),
                    "context_token_count": str(self._served.context_token_count),
                },
            )
        remaining = cast("float | None", context.time_remaining())  # None without a deadline
        who = caller(context) if self._served.isolates_callers else ""
        return Row(
            tokens=tokens,
            most=most,
            sampling=_sampling(wanted, vocabulary),
            top_logprobs=wanted.logprobs if wanted.logprobs > 0 else None,
            deadline=None if remaining is None else asyncio.get_running_loop().time() + remaining,
            cache_key="\0".join((self._served.facts.outline, "", who)),
        )

    async def _reply(self, request: Message, ticket: Ticket, context: Context) -> None:
        stops = frozenset(request.sampling_params.stop_token_ids)
        reply = _Reply(self._api, len(ticket.row.tokens), self._words.language.end_tokens)
        while True:
            new: list[Written] = []
            reason = ""
            for happening in await ticket.next():
                if isinstance(happening, Written):
                    if happening.token in stops:
                        reason, reply.matched = "stop", happening.token
                        break
                    new.append(happening)
                elif isinstance(happening, Reading):
                    reply.cached = happening.cached
                elif isinstance(happening, Over):
                    if happening.failure is not None:
                        raise happening.failure
                    reason = happening.reason
            reply.add(new)
            if new and request.stream:
                await write(context, reply.chunk(new))
            if reason == _ABORTED:
                return
            if reason:
                await write(context, reply.complete(reason, is_whole=not request.stream))
                return


class _Reply:
    """Turns what happens to a row into the interface's messages."""

    def __init__(self, found: Api, prompt_count: int, end_tokens: Collection[int]) -> None:
        self._messages = found.messages
        self._prompt_count = prompt_count
        self._end_tokens = end_tokens
        self._written: list[Written] = []
        self.cached = 0
        self.matched: int | None = None

    def add(self, new: Sequence[Written]) -> None:
        """Takes what was written."""
        self._written += new

    def chunk(self, new: Sequence[Written]) -> Message:
        """Returns the part of a stream that has these tokens."""
        chunk = self._messages.GenerateStreamChunk(
            token_ids=[each.token for each in new],
            prompt_tokens=self._prompt_count,
            completion_tokens=len(self._written),
            cached_tokens=self.cached,
            output_logprobs=self._logprobs(new),
        )
        return self._messages.GenerateResponse(chunk=chunk)

    def complete(self, reason: str, *, is_whole: bool) -> Message:
        """Returns the end of a reply, with all of it where nothing was sent before."""
        if reason == "stop" and self.matched is None and len(self._end_tokens) == 1:
            (self.matched,) = self._end_tokens
        sent = self._written if is_whole else ()
        complete = self._messages.GenerateComplete(
            output_ids=[each.token for each in sent],
            finish_reason=reason,
            prompt_tokens=self._prompt_count,
            completion_tokens=len(self._written),
            cached_tokens=self.cached,
            output_logprobs=self._logprobs(sent),
            matched_stop_token_id=self.matched,
        )
        return self._messages.GenerateResponse(complete=complete)

    def _logprobs(self, written: Sequence[Written]) -> Message | None:
        known = [each for each in written if each.logprob is not None]
        if not known:
            return None
        return self._messages.OutputLogProbs(
            token_ids=[each.token for each in known],
            token_logprobs=[each.logprob for each in known],
            top_logprobs=[
                self._messages.TopLogProbs(
                    token_ids=[token for token, _ in each.top], values=[value for _, value in each.top]
                )
                for each in known
            ],
        )


def _sampling(wanted: Message, vocabulary: int) -> SamplingParams:
    """Returns the sampling that is asked for. Zero is what the interface has for unset."""
    temperature = wanted.temperature if wanted.HasField("temperature") else 1.0
    penalty = wanted.repetition_penalty or 1.0
    for name, value, is_fine in (
        ("temperature", temperature, 0.0 <= temperature <= 2.0),
        ("top_p", wanted.top_p, 0.0 <= wanted.top_p <= 1.0),
        ("min_p", wanted.min_p, 0.0 <= wanted.min_p <= 1.0),
        ("repetition_penalty", penalty, 0.0 < penalty <= 10.0),
        ("presence_penalty", wanted.presence_penalty, -2.0 <= wanted.presence_penalty <= 2.0),
        ("frequency_penalty", wanted.frequency_penalty, -2.0 <= wanted.frequency_penalty <= 2.0),
    ):
        if not is_fine or math.isnan(value):
            raise refuse(f"sampling_params.{name}", f"{value:g} is out of range")
    for token in wanted.logit_bias:
        if not 0 <= token < vocabulary:
            raise refuse(
                f"sampling_params.logit_bias[{token}]", f"the model's vocabulary has {vocabulary} tokens"
            )
    return SamplingParams(
        temperature=temperature,
        top_p=wanted.top_p or 1.0,
        top_k=min(wanted.top_k, vocabulary),
        min_p=wanted.min_p,
        seed=wanted.seed if wanted.HasField("seed") else None,
        repetition_penalty=penalty,
        presence_penalty=wanted.presence_penalty,
        frequency_penalty=wanted.frequency_penalty,
        logit_bias=tuple(sorted(wanted.logit_bias.items())),
    )


def _config(folder: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((folder / "config.json").read_bytes())
    return config


def _token(config: dict[str, object], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else 0


def _archive(folder: Path) -> bytes:
    """Returns the tokenizer's files as a zip archive, the same bytes for the same files."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in _tokenizer_files(folder):
            archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return content.getvalue()


def _tokenizer_files(folder: Path) -> Iterator[Path]:
    found = {folder / name for name in _TOKENIZER_FILES}
    for pattern in _TOKENIZER_PATTERNS:
        found.update(folder.glob(pattern))
    return iter(sorted(path for path in found if path.is_file()))
