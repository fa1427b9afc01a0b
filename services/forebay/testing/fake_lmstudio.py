"""A server that behaves like LM Studio's: its REST APIs, its habits and its faults.

It plays the OpenAI-compatible API, `/api/v0` and the native `/api/v1` of the
version it is told to be, on models that exist only as text. What it says
depends on the request and nothing else. A test can change its options while
it runs, hold it at named gates, and script any reply down to the bytes.

The SDK's WebSocket protocol, `/v1/responses` and `/v1/messages` are not
played: they are unknown paths here, which means a 200 with an error.

Runs as a process too: `python -m forebay.testing.fake_lmstudio --port 0 --models a,b`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import orjson
from aiohttp import web

from forebay.testing import fake_lmstudio_text as text
from forebay.testing.fake_lmstudio_plan import (
    Piece,
    Plan,
    Prompt,
    TooLongError,
    overflow_message,
    plan,
    read_messages,
    read_native_input,
)
from forebay.testing.fake_lmstudio_script import Gates, Reply, is_gone, play
from forebay.testing.fake_lmstudio_state import (
    CatalogueEntry,
    FakeModel,
    FakeOptions,
    Instance,
    Json,
    RefusedError,
    Studio,
    Version,
    bare,
    compatible,
    native,
)

__all__ = ["CatalogueEntry", "FakeLmStudio", "FakeModel", "FakeOptions", "Recorded", "Reply", "Version"]

_NO_CREDENTIAL = (
    "An LM Studio API token is required to make requests to this server, but none was provided using the "
    "Authorization header using the 'Bearer' scheme"
)
_TOKEN_FORM = re.compile(r"sk-lm-[A-Za-z0-9]{8}:[A-Za-z0-9]{20}")
_UNLOADED = "Model unloaded."
_BODY_BYTES = 256 * 1024 * 1024

Emit = Callable[[Piece, int], Awaitable[None]]
Handler = Callable[[web.Request, Json], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A request that came in."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Json


class _UnloadedError(Exception):
    """The instance was unloaded in the middle of a reply."""


class _LeftError(Exception):
    """The client hung up in the middle of a reply."""


class FakeLmStudio:
    """A fake LM Studio on a loopback port.

    Args:
        models: what is on disk.
        catalogue: what can be downloaded.
        options: how it behaves.
        host: address to listen on.
        port: port to listen on. 0 picks a free one.
        control: whether `/__fake__/` lets another process script it.
    """

    def __init__(
        self,
        models: Sequence[FakeModel] = (),
        *,
        catalogue: Mapping[str, CatalogueEntry] | None = None,
        options: FakeOptions | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        control: bool = False,
    ) -> None:
        self.options = options or FakeOptions()
        self.gates = Gates()
        self.studio = Studio(
            models,
            catalogue=catalogue or {},
            options=self.options,
            gates=self.gates,
            clock=time.monotonic,
        )
        self.requests: list[Recorded] = []
        self.disconnects = 0
        self._host = host
        self._port = port
        self._control = control
        self._scripts: dict[tuple[str, str], deque[Reply]] = {}
        self._runner: web.AppRunner | None = None
        self._ids = 0
        self._routes: dict[tuple[str, str], Handler] = {
            ("GET", "/lmstudio-greeting"): self._greeting,
            ("GET", "/api/v1/models"): self._models,
            ("POST", "/api/v1/models/load"): self._load,
            ("POST", "/api/v1/models/unload"): self._unload,
            ("POST", "/api/v1/models/download"): self._download,
            ("POST", "/api/v1/chat"): self._native_chat,
            ("GET", "/api/v0/models"): self._models_v0,
            ("POST", "/api/v0/chat/completions"): self._chat,
            ("POST", "/api/v0/completions"): self._completions,
            ("POST", "/api/v0/embeddings"): self._embeddings,
            ("GET", "/v1/models"): self._models_compatible,
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/completions"): self._completions,
            ("POST", "/v1/embeddings"): self._embeddings,
        }

    async def __aenter__(self) -> FakeLmStudio:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listens."""
        app = web.Application(client_max_size=_BODY_BYTES)
        app.router.add_route("*", "/{tail:.*}", self._dispatch)
        self._runner = web.AppRunner(
            app, keepalive_timeout=self.options.keep_alive, shutdown_timeout=0.2, access_log=None
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Lets everyone pass and closes every connection."""
        self.gates.release_all()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @property
    def url(self) -> str:
        """Base address, without a slash at its end."""
        return f"http://{self._host}:{self._port}"

    @property
    def port(self) -> int:
        """Port it listens on."""
        return self._port

    def script(self, method: str, path: str, *replies: Reply) -> None:
        """Makes the next requests to a path get these replies, in order."""
        self._scripts.setdefault((method, path), deque()).extend(replies)

    def unused(self) -> list[str]:
        """Returns which scripted replies nobody asked for."""
        return [f"{method} {path} x{len(left)}" for (method, path), left in self._scripts.items() if left]

    def calls(self, path: str, method: str = "POST") -> list[Json]:
        """Returns the bodies of the requests to a path, in order."""
        return [one.body for one in self.requests if one.path == path and one.method == method]

    def busy(self, name: str) -> int:
        """Returns how many slots of an instance are taken."""
        return self.studio.instances[name].busy

    async def load(self, key: str, *, context_length: int | None = None, **more: object) -> Instance:
        """Loads a model as a person does in the application.

        Args:
            key: the model.
            context_length: tokens it makes room for. None takes the option's.
            more: `identifier`, `parallel`, `jit` or `ttl` of the instance.
        """
        config: Json = {} if context_length is None else {"context_length": context_length}
        return await self.studio.load(key, config=config, **more)  # type: ignore[arg-type]  # tests name them

    async def _dispatch(self, request: web.Request) -> web.StreamResponse:
        path = request.rel_url.raw_path
        raw = await request.read()
        try:
            body = orjson.loads(raw) if raw else {}
        except orjson.JSONDecodeError:
            body = None
        fields = body if isinstance(body, dict) else {}
        if self._control and path.startswith("/__fake__/"):
            return self._controlled(request, path, fields)
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append(Recorded(method=request.method, path=path, headers=headers, body=fields))
        scripted = self._scripts.get((request.method, path))
        if scripted:
            return await play(scripted.popleft(), request, self.gates)
        try:
            handler = self._route(request, path)
            if body is None:
                raise bare("Unexpected token in JSON")
            return await handler(request, fields)
        except RefusedError as refused:
            return _json(refused.body, status=refused.status)
        except _LeftError:
            self.disconnects += 1
            return web.Response(status=500)  # to nobody

    def _route(self, request: web.Request, path: str) -> Handler:
        method = request.method
        if method == "OPTIONS" and self.options.cors:
            return self._preflight
        version = self.options.version
        known = not (path.startswith("/api/v1/") and not version.has_v1)
        known = known and not (path.startswith("/api/v0/") and not version.has_v0)
        if known and path != "/lmstudio-greeting":
            self._authorise(request)
        handler = self._routes.get((method, path)) if known else None
        if handler is None and known and method == "GET":
            if path.startswith("/api/v1/models/download/status/"):
                handler = self._download_status
            elif path.startswith("/api/v0/models/"):
                handler = self._model_v0
        return handler or self._unexpected

    def _authorise(self, request: web.Request) -> None:
        if not self.options.token or not self.options.version.has_auth:
            return
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or not token:
            raise native(_NO_CREDENTIAL, status=401, code="invalid_api_key")
        if _TOKEN_FORM.fullmatch(token) is None:
            shown = token[:10] + "*" * max(0, len(token) - 10)
            message = f"Malformed LM Studio API token provided: {shown}"
            raise native(message, status=401, code="invalid_api_key")
        if token != self.options.token:
            raise native("Invalid LM Studio API token provided", status=401, code="invalid_api_key")

    async def _unexpected(self, request: web.Request, body: Json) -> web.StreamResponse:
        del body
        path = request.rel_url.raw_path
        return _json({"error": f"Unexpected endpoint or method. ({request.method} {path})"})

    async def _preflight(self, request: web.Request, body: Json) -> web.StreamResponse:
        del request, body
        return web.Response(status=204, headers={"Access-Control-Allow-Origin": "*"})

    async def _greeting(self, request: web.Request, body: Json) -> web.StreamResponse:
        del request, body
        return _json({"lmstudio": True})

    async def _models(self, request: web.Request, body: Json) -> web.StreamResponse:
        del request, body
        return _json(self.studio.listing())

    async def _models_v0(self, request: web.Request, body: Json) -> web.StreamResponse:
        del request, body
        return _json({"object": "list", "data": self.studio.listing_v0()})

    async def _model_v0(self, request: web.Request, body: Json) -> web.StreamResponse:
        del body
        name = request.rel_url.path.removeprefix("/api/v0/models/")
        model = self.studio.models.get(name)
        if model is None:
            raise compatible(f'Model "{name}" not found', param="model", code="model_not_found")
        return _json(self.studio.entry_v0(model))

    async def _models_compatible(self, request: web.Request, body: Json) -> web.StreamResponse:
        del request, body
        return _json(self.studio.listing_compatible())

    async def _load(self, request: web.Request, body: Json) -> web.StreamResponse:
        del request  # a client that leaves does not end a load
        key, config, echo = self.studio.check_load(body)
        began = time.monotonic()
        instance = await self.studio.load(key, config=config)
        reply: Json = {
            "type": instance.model.type,
            "instance_id": instance.id,
            "load_time_seconds": round(time.monotonic() - began, 3),
            "status": "loaded",
        }
        if echo:
            reply["load_config"] = instance.config_json()
        return _json(reply)

    async def _unload(self, request: web.Request, body: Json) -> web.StreamResponse:
        del request
        identifier = body.get("instance_id")
        if not isinstance(identifier, str) or not identifier:
            raise native('"instance_id" is required', code="missing_required_parameter", param="instance_id")
        self.studio.unload(identifier)
        return _json({"instance_id": identifier})

    async def _download(self, request: web.Request, body: Json) -> web.StreamResponse:
        del request
        return _json(self.studio.start_download(body))

    async def _download_status(self, request: web.Request, body: Json) -> web.StreamResponse:
        del body
        return _json(self.studio.look_at_download(request.path.rpartition("/")[2]))

    async def _pause(self, gate: str, seconds: float) -> None:
        await self.gates.pass_(gate)
        if seconds:
            await asyncio.sleep(seconds)

    async def _predict(self, request: web.Request, instance: Instance, reply: Plan, emit: Emit) -> None:
        """Emits the pieces of a reply while it holds a slot.

        A client that leaves is noticed between tokens only: a prompt is read to its end.
        """
        async with instance.slot():
            if is_gone(request):
                raise _LeftError
            await self._pause("prefill", self.options.prefill_seconds)
            for position, piece in enumerate(reply.pieces):
                await self._pause("token", self.options.token_seconds)
                if instance.unloaded:
                    raise _UnloadedError
                if is_gone(request):
                    raise _LeftError
                await emit(piece, position)
        instance.last_used = time.monotonic()

    async def _chat(self, request: web.Request, body: Json) -> web.StreamResponse:
        instance = await self._instance(body)
        prompt = read_messages(body.get("messages"), instance.model)
        return await self._complete(request, body, instance, prompt, chat=True)

    async def _completions(self, request: web.Request, body: Json) -> web.StreamResponse:
        said = body.get("prompt")
        if not isinstance(said, str):
            raise bare("'prompt' field is required and must be a string")
        instance = await self._instance(body)
        plain = body | {"reasoning_effort": "none"}  # there is no chat template that would begin it
        return await self._complete(request, plain, instance, Prompt(text=said), chat=False)

    async def _instance(self, body: Json, kind: Literal["llm", "embedding"] = "llm") -> Instance:
        name = body.get("model")
        return await self.studio.resolve(
            name if isinstance(name, str) else "", kind=kind, ttl=body.get("ttl")
        )

    async def _complete(
        self, request: web.Request, body: Json, instance: Instance, prompt: Prompt, *, chat: bool
    ) -> web.StreamResponse:
        self._ids += 1
        shape = _Shape(
            id=f"{'chatcmpl' if chat else 'cmpl'}-{text.digits(prompt.text)}{self._ids:06d}",
            instance=instance,
            chat=chat,
            older=request.path.startswith("/api/v0/"),
            with_usage=self._wants_usage(body),
        )
        stream = body.get("stream") is True
        try:
            reply = plan(body, prompt, instance, logprobs=self.options.logprobs)
        except TooLongError:
            message = overflow_message(instance, prompt.tokens)
            if not stream:
                raise bare(message) from None
            if self.options.overflow == "silent":
                return await self._silent(request)
            return await self._failed_stream(request, message)
        if stream:
            return await self._stream(request, reply, shape)
        return await self._whole(request, reply, shape)

    def _wants_usage(self, body: Json) -> bool:
        match body.get("stream_options"):
            case {"include_usage": True}:
                return self.options.version.has_stream_usage
            case _:
                return False

    async def _whole(self, request: web.Request, reply: Plan, shape: _Shape) -> web.StreamResponse:
        async def emit(piece: Piece, position: int) -> None:
            del piece, position

        began = time.monotonic()
        try:
            await self._predict(request, shape.instance, reply, emit)
        except _UnloadedError:
            raise bare(_UNLOADED, status=500) from None
        return _json(shape.whole(reply, time.monotonic() - began))

    async def _stream(self, request: web.Request, reply: Plan, shape: _Shape) -> web.StreamResponse:
        response = _event_stream()
        began = time.monotonic()

        async def emit(piece: Piece, position: int) -> None:
            await self._open(response, request)
            await _data(response, shape.chunk(piece, reply, position))

        try:
            await self._predict(request, shape.instance, reply, emit)
            await self._open(response, request)
            await _data(response, shape.last_chunk(reply, time.monotonic() - began))
            if shape.with_usage:
                await _data(response, shape.usage_chunk(reply))
            await response.write(b"data: [DONE]\n\n")
        except _UnloadedError:
            await self._open(response, request)
            await self._error_event(response, _UNLOADED)
        except ConnectionError:
            raise _LeftError from None
        await response.write_eof()
        return response

    async def _open(self, response: web.StreamResponse, request: web.Request) -> None:
        if not response.prepared:
            await response.prepare(request)

    async def _failed_stream(self, request: web.Request, message: str) -> web.StreamResponse:
        response = _event_stream()
        await response.prepare(request)
        await self._error_event(response, message)
        await response.write_eof()
        return response

    async def _error_event(self, response: web.StreamResponse, message: str) -> None:
        payload = orjson.dumps({"error": {"message": message}, "message": message})
        await response.write(b"event: error\ndata: " + payload + b"\n\n")
        if self.options.done_after_error:
            await response.write(b"data: [DONE]\n\n")

    async def _silent(self, request: web.Request) -> web.StreamResponse:
        response = _event_stream()
        await response.prepare(request)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _embeddings(self, request: web.Request, body: Json) -> web.StreamResponse:
        inputs = body.get("input")
        texts = [inputs] if isinstance(inputs, str) else inputs
        if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
            raise bare("'input' field must be a string or an array of strings")
        instance = await self._instance(body, "embedding")
        if self.options.version.refuses_empty_text and "" in texts:
            raise bare("Failed to embed: input is empty", status=500)
        async with instance.slot():
            await self._pause("embed", self.options.prefill_seconds)
            if is_gone(request):
                raise _LeftError
            if len(texts) > self.options.embed_batch:
                raise bare("Failed to process embeddings. Error: llama_decode returned -1", status=500)
            for one in texts:
                if text.count(one) > instance.context_length:
                    message = f"input ({text.count(one)} tokens) is too large to process."
                    raise bare(f"{message} increase the physical batch size", status=500)
        model = instance.model
        data = [
            {
                "object": "embedding",
                "embedding": text.vector(one, model=model.key, size=model.dimensions),
                "index": index,
            }
            for index, one in enumerate(texts)
        ]
        suffix = f"@{model.quantization.lower()}" if model.quantization else ""
        return _json(
            {
                "object": "list",
                "data": data,
                "model": f"{model.key}{suffix}",
                "usage": {"prompt_tokens": 0, "total_tokens": 0},
            }
        )

    async def _native_chat(self, request: web.Request, body: Json) -> web.StreamResponse:
        name = body.get("model")
        if not isinstance(name, str) or not name:
            raise native('"model" is required', code="missing_required_parameter", param="model")
        refused = sorted(set(body) - _NATIVE_FIELDS)
        if refused:
            raise native(
                f"Unrecognized key(s) in object: '{refused[0]}'", code="unrecognized_keys", param=refused[0]
            )
        loads_before = len(self.studio.loads)
        instance = await self.studio.resolve(name, kind="llm")
        prompt = read_native_input(body.get("input"), item=self.options.input_item, model=instance.model)
        system = body.get("system_prompt")
        if isinstance(system, str) and system:
            prompt = replace(prompt, text=f"system: {system}\n{prompt.text}")
        effort = body.get("reasoning")
        if effort is not None and not instance.model.reasoning:
            raise native("This model does not support the 'reasoning' setting", param="reasoning")
        asked = {"temperature": body.get("temperature"), "max_tokens": body.get("max_output_tokens", -1)}
        if effort == "off":
            asked["reasoning_effort"] = "none"
        try:
            reply = plan(asked, prompt, instance, logprobs=False)
        except TooLongError:
            message = overflow_message(instance, prompt.tokens)
            raise native(message, kind="invalid_request") from None
        shape = _NativeShape(
            instance=instance,
            loaded_now=len(self.studio.loads) > loads_before,
            stored=body.get("store") is not False,
            number=len(self.requests),
        )
        if body.get("stream") is not True:
            return await self._native_whole(request, reply, shape)
        return await self._native_stream(request, reply, shape)

    async def _native_whole(
        self, request: web.Request, reply: Plan, shape: _NativeShape
    ) -> web.StreamResponse:
        async def emit(piece: Piece, position: int) -> None:
            del piece, position

        try:
            await self._predict(request, shape.instance, reply, emit)
        except _UnloadedError:
            raise native(_UNLOADED, status=500, kind="internal_error") from None
        return _json(shape.result(_native_pieces(reply)))

    async def _native_stream(
        self, request: web.Request, reply: Plan, shape: _NativeShape
    ) -> web.StreamResponse:
        response = _event_stream()
        await response.prepare(request)
        told: list[Piece] = []
        speaking = ""

        async def event(kind: str, **fields: object) -> None:
            payload = orjson.dumps({"type": kind, **fields})
            await response.write(f"event: {kind}\ndata: ".encode() + payload + b"\n\n")

        async def speak(kind: str) -> None:
            nonlocal speaking
            if speaking and speaking != kind:
                await event(f"{speaking}.end")
            if kind and speaking != kind:
                await event(f"{kind}.start")
            speaking = kind

        async def emit(piece: Piece, position: int) -> None:
            if position == 0:
                await event("prompt_processing.progress", progress=1.0)
                await event("prompt_processing.end")
            if not piece.text:
                return
            await speak("reasoning" if piece.kind == "reasoning" else "message")
            await event(f"{speaking}.delta", content=piece.text)
            told.append(piece)

        try:
            await event("chat.start", model_instance_id=shape.instance.id)
            if shape.loaded_now:
                await event("model_load.start", model_instance_id=shape.instance.id)
                for progress in (0.0, 0.5, 1.0):
                    await event("model_load.progress", model_instance_id=shape.instance.id, progress=progress)
                await event("model_load.end", model_instance_id=shape.instance.id, load_time_seconds=0.5)
            await event("prompt_processing.start")
            await event("prompt_processing.progress", progress=0.0)
            shown = replace(reply, pieces=_native_pieces(reply))
            try:
                await self._predict(request, shape.instance, shown, emit)
            except _UnloadedError:
                await event("error", error={"type": "internal_error", "message": _UNLOADED})
            await speak("")
            await event("chat.end", result=shape.result(told))
        except ConnectionError:
            raise _LeftError from None
        await response.write_eof()
        return response

    def _controlled(self, request: web.Request, path: str, body: Json) -> web.StreamResponse:
        """Answers another process that scripts this one."""
        match request.method, path:
            case "POST", "/__fake__/script":
                reply = body.get("reply")
                try:
                    scripted = Reply.from_json(reply if isinstance(reply, dict) else {})
                except ValueError as error:
                    return _json({"error": str(error)}, status=400)
                self.script(str(body.get("method", "POST")), str(body.get("path", "")), scripted)
            case "POST", "/__fake__/restart":
                self.studio.restart()
            case "POST", "/__fake__/hold":
                self.gates.hold(str(body.get("gate", "")))
            case "POST", "/__fake__/release":
                self.gates.release(str(body.get("gate", "")))
            case "GET", "/__fake__/state":
                return _json(
                    {
                        "instances": {one.id: one.busy for one in self.studio.loaded()},
                        "loads": self.studio.loads,
                        "requests": [f"{one.method} {one.path}" for one in self.requests],
                        "disconnects": self.disconnects,
                        "unused": self.unused(),
                    }
                )
            case _:
                return _json({"error": "no such control"}, status=404)
        return _json({"ok": True})


_NATIVE_FIELDS = frozenset(
    {
        "model",
        "input",
        "system_prompt",
        "integrations",
        "stream",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repeat_penalty",
        "max_output_tokens",
        "reasoning",
        "context_length",
        "store",
        "previous_response_id",
    }
)


def _native_pieces(reply: Plan) -> list[Piece]:
    """Returns a reply with inline reasoning told apart, as the native API does it."""
    said = reply.joined("content")
    if not said.startswith("<think>"):
        return list(reply.pieces)
    thought, _, answer = said.removeprefix("<think>").partition("</think>")
    return [
        *(Piece("reasoning", word) for word in text.tokens(thought.strip())),
        *(Piece("content", word) for word in text.tokens(answer.strip())),
    ]


@dataclass(frozen=True, kw_only=True)
class _NativeShape:
    """Builds the replies of the native chat."""

    instance: Instance
    loaded_now: bool
    stored: bool
    number: int

    def result(self, told: Sequence[Piece]) -> Json:
        """Returns the whole reply."""
        output: list[Json] = []
        for kind, name in (("reasoning", "reasoning"), ("content", "message")):
            said = "".join(piece.text for piece in told if piece.kind == kind)
            if said:
                output.append({"type": name, "content": said})
        stats: Json = {
            "input_tokens": 12,
            "total_output_tokens": len(told),
            "reasoning_output_tokens": sum(piece.kind == "reasoning" for piece in told),
            "tokens_per_second": 51.4,
            "time_to_first_token_seconds": 0.111,
        }
        if self.loaded_now:
            stats["model_load_time_seconds"] = 0.5
        reply: Json = {"model_instance_id": self.instance.id, "output": output, "stats": stats}
        if self.stored:
            reply["response_id"] = f"resp_{self.number:048x}"
        return reply


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """Builds the replies of the OpenAI-compatible API and of `/api/v0`."""

    id: str
    instance: Instance
    chat: bool
    older: bool
    with_usage: bool

    def _frame(self, choices: Sequence[Json], *, chunk: bool) -> Json:
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            "id": self.id,
            "object": f"{kind}.chunk" if chunk and self.chat else kind,
            "created": int(time.time()),
            "model": self.instance.id,
            "system_fingerprint": self.instance.id,
            "choices": list(choices),
        }

    def chunk(self, piece: Piece, reply: Plan, position: int) -> Json:
        """Returns the chunk of one token."""
        logprobs = _logprobs(piece, position, reply.logprobs)
        if not self.chat:
            return self._frame(
                [{"index": 0, "text": piece.text, "logprobs": logprobs, "finish_reason": None}], chunk=True
            )
        delta: Json = {"role": "assistant"}
        match piece.kind:
            case "content":
                delta["content"] = piece.text
            case "reasoning":
                delta[self.instance.model.reasoning] = piece.text
            case "tool_start":
                function = {"name": piece.text, "arguments": ""}
                call = {"index": piece.index, "id": piece.id, "type": "function", "function": function}
                delta["tool_calls"] = [call]
            case "tool_arguments":
                arguments = {"arguments": piece.text}
                delta["tool_calls"] = [{"index": piece.index, "type": "function", "function": arguments}]
        choice: Json = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return self._frame([choice], chunk=True)

    def last_chunk(self, reply: Plan, seconds: float) -> Json:
        """Returns the chunk that says why the reply ended."""
        choice: Json = {"index": 0, "logprobs": None, "finish_reason": reply.finish}
        if self.chat:
            choice["delta"] = {}
        else:
            choice["text"] = ""
        return self._frame([choice], chunk=True) | self._stats(reply, seconds)

    def usage_chunk(self, reply: Plan) -> Json:
        """Returns the chunk that holds the usage."""
        return self._frame([], chunk=True) | {"usage": reply.usage()}

    def whole(self, reply: Plan, seconds: float) -> Json:
        """Returns the reply as one document."""
        choice: Json = {"index": 0, "logprobs": None, "finish_reason": reply.finish}
        if reply.logprobs is not None:
            entries = [_logprob_entry(p, at, reply.logprobs) for at, p in enumerate(reply.pieces)]
            choice["logprobs"] = {"content": entries}
        if self.chat:
            choice["message"] = self._message(reply)
        else:
            choice["text"] = reply.joined("content")
        body = self._frame([choice], chunk=False) | {"usage": reply.usage()}
        return body | (self._stats(reply, seconds) if self.older else {"stats": {}})

    def _message(self, reply: Plan) -> Json:
        message: Json = {"role": "assistant", "content": reply.joined("content")}
        reasoning = reply.joined("reasoning")
        if reasoning:
            message[self.instance.model.reasoning] = reasoning
        message["tool_calls"] = [
            {
                "type": "function",
                "id": start.id,
                "function": {
                    "name": start.text,
                    "arguments": "".join(
                        one.text
                        for one in reply.pieces
                        if one.kind == "tool_arguments" and one.index == start.index
                    ),
                },
            }
            for start in reply.pieces
            if start.kind == "tool_start"
        ]
        return message

    def _stats(self, reply: Plan, seconds: float) -> Json:
        if not self.older:
            return {}
        model = self.instance.model
        return {
            "stats": {
                "tokens_per_second": round(reply.output_tokens / max(seconds, 0.001), 3),
                "time_to_first_token": 0.111,
                "generation_time": round(seconds, 3),
                "stop_reason": reply.stop_reason,
            },
            "model_info": {
                "arch": model.architecture,
                "quant": model.quantization,
                "format": model.format,
                "context_length": self.instance.context_length,
            },
            "runtime": {"name": "llama.cpp-fake", "version": "1.3.0", "supported_formats": [model.format]},
        }


def _logprob_entry(piece: Piece, position: int, top: int) -> Json:
    value = text.logprob(piece.text, position)
    entry: Json = {"token": piece.text, "logprob": value, "bytes": list(piece.text.encode())}
    others = [
        {"token": f"~{n}", "logprob": value - n, "bytes": list(f"~{n}".encode())} for n in range(1, top)
    ]
    entry["top_logprobs"] = [entry.copy(), *others] if top else []
    return entry


def _logprobs(piece: Piece, position: int, top: int | None) -> Json | None:
    if top is None or piece.kind != "content":
        return None
    return {"content": [_logprob_entry(piece, position, top)]}


def _headers() -> dict[str, str]:
    return {"X-Powered-By": "Express", "Keep-Alive": "timeout=5"}


def _json(body: object, *, status: int = 200) -> web.Response:
    return web.Response(
        body=orjson.dumps(body),
        status=status,
        headers={"Content-Type": "application/json; charset=utf-8", **_headers()},
    )


def _event_stream() -> web.StreamResponse:
    headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", **_headers()}
    response = web.StreamResponse(headers=headers)
    response.enable_chunked_encoding()
    return response


async def _data(response: web.StreamResponse, body: Json) -> None:
    await response.write(b"data: " + orjson.dumps(body) + b"\n\n")


def _parse_model(spec: str) -> FakeModel:
    """Returns the model that `key[:embed|:vision|:reasoning|:reasoning_content|:inline]...` names."""
    key, *traits = spec.split(":")
    model = FakeModel(key=key)
    for trait in traits:
        match trait:
            case "embed":
                model = replace(model, type="embedding")
            case "vision":
                model = replace(model, vision=True)
            case "reasoning" | "reasoning_content" | "inline":
                model = replace(model, reasoning=trait)
            case _:
                raise ValueError(f"unknown trait of a model: {trait}")
    return model


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fake_lmstudio", description="Plays an LM Studio server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument(
        "--models", default="qwen-fake,nomic-fake:embed", help="key[:trait...] separated by commas"
    )
    parser.add_argument("--loaded", default="", help="keys to load at the start, separated by commas")
    parser.add_argument("--version", default="0.4.4", help="version to play")
    parser.add_argument("--token", default="", help="API token to ask for")
    parser.add_argument("--context-length", type=int, default=4096)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--no-jit", action="store_true", help="do not load models on request")
    parser.add_argument("--load-seconds", type=float, default=0.0)
    parser.add_argument("--prefill-seconds", type=float, default=0.0)
    parser.add_argument("--token-seconds", type=float, default=0.0)
    parser.add_argument("--control", action="store_true", help="let other processes script it at /__fake__/")
    return parser.parse_args(argv)


async def _serve(arguments: argparse.Namespace) -> None:
    fake = FakeLmStudio(
        [_parse_model(spec) for spec in arguments.models.split(",") if spec],
        options=FakeOptions(
            version=Version.parse(arguments.version),
            token=arguments.token,
            jit=not arguments.no_jit,
            context_length=arguments.context_length,
            parallel=arguments.parallel,
            load_seconds=arguments.load_seconds,
            prefill_seconds=arguments.prefill_seconds,
            token_seconds=arguments.token_seconds,
        ),
        host=arguments.host,
        port=arguments.port,
        control=arguments.control,
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # not on every platform
            loop.add_signal_handler(number, stop.set)
    async with fake:
        for key in arguments.loaded.split(","):
            if key:
                await fake.load(key)
        sys.stdout.write(f"forebay fake-lmstudio listening on {fake.url}\n")
        sys.stdout.flush()
        await stop.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a fake until it is told to stop."""
    asyncio.run(_serve(_arguments(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
