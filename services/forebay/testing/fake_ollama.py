"""An emulator of Ollama's HTTP server, for tests and demonstrations.

It answers every route a client of inference uses with the status codes, texts
and framing of the real server, keeps a scheduler with the real one's rules,
and can play any misbehaviour from a script. Its models are a hash function:
equal prompts and seeds give equal answers.

Run by itself with `python -m forebay.testing.fake_ollama`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import ipaddress
import json
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from aiohttp import web

from forebay.kit import process
from forebay.testing import fake_ollama_brain as brain
from forebay.testing.fake_ollama_runners import FakeModel, Runner, Scheduler
from forebay.testing.fake_ollama_script import Step, play
from forebay.testing.fake_ollama_wire import (
    ChatBody,
    EmbedBody,
    Fields,
    GenerateBody,
    Lines,
    Prompted,
    WireError,
    WireMessage,
    check_digest,
    check_format,
    check_options,
    json_reply,
    parse_chat,
    parse_embed,
    parse_generate,
    parse_name,
    strip_source,
    timestamp,
    without_zeros,
)

MODELS = (
    FakeModel(name="llama3.2:latest"),
    FakeModel(
        name="qwen3:latest",
        capabilities=("completion", "tools", "thinking"),
        family="qwen3",
        tools_early=True,
    ),
    FakeModel(name="llava:latest", capabilities=("completion", "vision"), family="llava", size=4_733_363_377),
    FakeModel(
        name="all-minilm:latest",
        capabilities=("embedding",),
        family="bert",
        context_length=256,
        embedding_length=32,
        parameter_size="23M",
        quantization="F16",
        size=45_960_996,
    ),
)
"""What is on the fake's disk unless it is told otherwise."""

_OPENAI_KINDS = {404: "not_found_error", 400: "invalid_request_error"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A part of a model in the registry."""

    digest: str
    size: int


@dataclass(slots=True, kw_only=True)
class Seen:
    """A request that arrived."""

    method: str
    path: str
    body: bytes
    headers: Mapping[str, str]

    @property
    def json(self) -> dict[str, object]:
        """The body as an object."""
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value


@dataclass(slots=True, kw_only=True)
class Generation:
    """An answer that was begun."""

    model: str
    sent: int = 0
    """Tokens generated so far."""
    state: str = "waiting"
    """`waiting` for a slot, `running`, `done`, or `stopped` because the client left."""
    ended_at: float = 0.0
    """When it was done or stopped, on the loop's clock."""


@dataclass(slots=True)
class _Script:
    path: str
    steps: Sequence[Step]
    times: int = 1


@dataclass(slots=True, kw_only=True)
class _Talk:
    """How one route wraps what the model says."""

    model: str
    chat: bool

    def part(self, *, text: str = "", thinking: str = "", calls: Sequence[object] = ()) -> dict[str, object]:
        """Returns a chunk, or the frame of the last one."""
        extra = without_zeros({"thinking": thinking, "tool_calls": list(calls)})
        head: dict[str, object] = {"model": self.model, "created_at": timestamp()}
        if self.chat:
            head["message"] = {"role": "assistant", "content": text, **extra}
        else:
            head.update({"response": text, **extra})
        head["done"] = False
        return head


class FakeOllama:
    """A server with models, a scheduler and scripts.

    Args:
        models: what is on disk.
        version: what `/api/version` says. Below 0.6 the server also behaves as old ones did.
        scheduler: settings and state of what is in memory.
        token_seconds: time between two tokens.
        registry: what can be pulled, as layers by name.
        pull_seconds: time between two ticks of a pull.
        pull_bytes: bytes fetched in a tick.
    """

    def __init__(
        self,
        models: Iterable[FakeModel] = MODELS,
        *,
        version: str = "0.33.0",
        scheduler: Scheduler | None = None,
        token_seconds: float = 0.0,
        registry: Mapping[str, Sequence[Layer]] | None = None,
        pull_seconds: float = 0.0,
        pull_bytes: int = 1 << 20,
    ) -> None:
        self.models = {model.parsed.key(): model for model in models}
        self.version = version
        self.scheduler = scheduler or Scheduler()
        self.token_seconds = token_seconds
        self.registry = dict(registry or {})
        self.pull_seconds = pull_seconds
        self.pull_bytes = pull_bytes
        self.blobs: dict[str, bytes] = {}
        """Blobs on disk by digest."""
        self.parts: dict[str, int] = {}
        """Bytes on disk of every layer that was pulled, whole or in part."""
        self.requests: list[Seen] = []
        """Every request that arrived, oldest first."""
        self.generations: list[Generation] = []
        """Every answer that was begun, oldest first."""
        self.url = ""
        """Where the server listens, once it does."""
        self._scripts: deque[_Script] = deque()
        self._runner: web.AppRunner | None = None

    # Life

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listens and returns the base URL."""
        runner = web.AppRunner(
            self._app(),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=0.1,
            keepalive_timeout=30,
        )
        await runner.setup()
        await web.TCPSite(runner, host, port).start()
        self._runner = runner
        self.url = f"http://{host}:{runner.addresses[0][1]}"
        return self.url

    async def stop(self) -> None:
        """Stops listening and breaks off what is under way."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self.scheduler.close()

    async def __aenter__(self) -> FakeOllama:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def script(self, path: str, steps: Sequence[Step], *, times: int = 1) -> None:
        """Plays these steps for the next requests to a path, in the order of the calls."""
        self._scripts.append(_Script(path, steps, times))

    @property
    def unplayed(self) -> list[str]:
        """Paths whose scripts were not all played."""
        return [script.path for script in self._scripts]

    def seen(self, path: str) -> list[Seen]:
        """Returns the requests to a path, oldest first."""
        return [request for request in self.requests if request.path == path]

    @property
    def running(self) -> int:
        """Answers being generated now."""
        return sum(generation.state == "running" for generation in self.generations)

    @property
    def is_old(self) -> bool:
        """Whether it behaves as servers before capabilities and thinking did."""
        numbers = self.version.split(".")
        return numbers[0] == "0" and numbers[1].isdigit() and 0 < int(numbers[1]) < 6

    # Routing

    def _app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=1 << 30)
        routes: list[tuple[str, str, Handler]] = [
            ("GET", "/", self._root),
            ("GET", "/api/version", self._version),
            ("GET", "/api/status", self._status),
            ("GET", "/api/tags", self._tags),
            ("GET", "/api/ps", self._ps),
            ("POST", "/api/show", self._show),
            ("POST", "/api/generate", self._generate),
            ("POST", "/api/chat", self._chat),
            ("POST", "/api/embed", self._embed),
            ("POST", "/api/embeddings", self._embeddings),
            ("POST", "/api/pull", self._pull),
            ("DELETE", "/api/delete", self._delete),
            ("POST", "/api/copy", self._copy),
            ("POST", "/api/create", self._create),
            ("HEAD", "/api/blobs/{digest}", self._head_blob),
            ("POST", "/api/blobs/{digest}", self._post_blob),
            ("GET", "/v1/models", self._v1_models),
            ("POST", "/v1/chat/completions", self._v1_chat),
            ("POST", "/v1/embeddings", self._v1_embeddings),
        ]
        for method, path, handler in routes:
            if method == "GET" and path in ("/", "/api/version", "/api/tags"):
                app.router.add_get(path, handler)
            else:
                app.router.add_route(method, path, handler)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        body = await request.read()
        self.requests.append(
            Seen(method=request.method, path=request.path, body=body, headers=dict(request.headers))
        )
        if not _host_allowed(request):
            return web.Response(status=403)
        try:
            script = self._next_script(request.path)
            answer = await play(script, request) if script is not None else None
            return answer or await handler(request)
        except WireError as error:
            return self._refusal(request, error)
        except web.HTTPNotFound:
            return web.Response(status=404, text="404 page not found")
        except web.HTTPMethodNotAllowed:
            return web.Response(status=405, text="405 method not allowed")

    def _refusal(self, request: web.Request, error: WireError) -> web.Response:
        if request.path.startswith("/v1/"):
            kind = _OPENAI_KINDS.get(error.status, "api_error")
            detail = {"message": error.text, "type": kind, "param": None, "code": None}
            return json_reply({"error": detail}, error.status)
        return json_reply({"error": error.text}, error.status)

    def _next_script(self, path: str) -> Sequence[Step] | None:
        for script in self._scripts:
            if script.path == path:
                script.times -= 1
                if script.times == 0:
                    self._scripts.remove(script)
                return script.steps
        return None

    def _find(self, name: str) -> FakeModel | None:
        parsed = parse_name(strip_source(name))
        return self.models.get(parsed.key()) if parsed else None

    def _must_find(self, name: str, text: str = "model '{}' not found") -> FakeModel:
        model = self._find(name)
        if model is None:
            if self.is_old:
                text = 'model "{}" not found, try pulling it first'
            raise WireError(404, text.format(name))
        return model

    # Lists

    async def _root(self, _: web.Request) -> web.Response:
        return web.Response(text="Ollama is running")

    async def _version(self, _: web.Request) -> web.Response:
        return json_reply({"version": self.version})

    async def _status(self, _: web.Request) -> web.Response:
        return json_reply({"cloud": {"disabled": True, "source": "env"}})

    def _details(self, model: FakeModel) -> dict[str, object]:
        details: dict[str, object] = {
            "parent_model": "",
            "format": "gguf",
            "family": model.family,
            "families": [model.family],
            "parameter_size": model.parameter_size,
            "quantization_level": model.quantization,
        }
        if not self.is_old:
            details |= {"context_length": model.context_length, "embedding_length": model.embedding_length}
        return details

    async def _tags(self, _: web.Request) -> web.Response:
        return json_reply({"models": [self._tag(model) for model in self.models.values()]})

    def _tag(self, model: FakeModel) -> dict[str, object]:
        name = model.parsed.short()
        entry: dict[str, object] = {
            "name": name,
            "model": name,
            "modified_at": "2025-05-10T08:06:48.639712648-07:00",
            "size": model.size,
            "digest": model.digest,
            "details": self._details(model),
        }
        if not self.is_old:
            entry["capabilities"] = list(model.capabilities)
        return entry

    async def _ps(self, _: web.Request) -> web.Response:
        now = asyncio.get_running_loop().time()
        entries = []
        for runner in self.scheduler.runners.values():
            left = runner.keep_alive if runner.expires_at is None else runner.expires_at - now
            entries.append((left, self._process(runner, left)))
        entries.sort(key=lambda pair: -pair[0])
        return json_reply({"models": [entry for _, entry in entries]})

    def _process(self, runner: Runner, left: float) -> dict[str, object]:
        model = runner.model
        name = model.parsed.short()
        if left == float("inf"):
            expires = "2318-11-23T11:40:11.123456789Z"
        else:
            expires = timestamp(datetime.now(UTC) + timedelta(seconds=left))
        entry: dict[str, object] = {
            "name": name,
            "model": name,
            "size": model.size + 4096 * runner.context,
            "digest": model.digest,
            "details": self._details(model),
            "expires_at": expires,
            "size_vram": model.size,
        }
        return entry if self.is_old else {**entry, "context_length": runner.context}

    async def _show(self, request: web.Request) -> web.Response:
        fields = Fields.of("ShowRequest", await request.read())
        name = fields.text("model") or fields.text("name")
        if not name:
            raise WireError(400, "model is required")
        parsed = parse_name(strip_source(name))
        model = self._must_find(name, f"model '{parsed.short() if parsed else name}' not found")
        info: dict[str, object] = {
            "general.architecture": model.family,
            "general.parameter_count": 3_212_749_888,
            f"{model.family}.context_length": model.context_length,
            f"{model.family}.embedding_length": model.embedding_length,
            "tokenizer.ggml.tokens": ["x"] * 4096 if fields.flag("verbose") else [],
        }
        answer: dict[str, object] = {
            "license": "A licence.",
            "modelfile": f"# Replace FROM to build another\nFROM /models/blobs/sha256-{model.weights}\n",
            "parameters": 'stop                           "<|eot_id|>"',
            "template": "{{ .Prompt }}",
            "details": self._details(model),
            "model_info": info,
            "modified_at": "2025-05-10T08:06:48.639712648-07:00",
        }
        if not self.is_old:
            answer["capabilities"] = list(model.capabilities)
        return json_reply(answer)

    # Text

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = parse_chat(await request.read())
        model = self._must_find(body.model)
        talk = _Talk(model=body.model, chat=True)
        if not body.messages:
            return await self._bare(body, model, talk)
        self._check(body, model, "chat", tools=bool(body.tools))
        text = body.messages[-1].content if body.messages[-1].role == "user" else ""
        calls = brain.call_tools(body.tools, text)
        images = any(message.images for message in body.messages)
        return await self._answer(
            request, body, model, talk, messages=body.messages, calls=calls, images=images
        )

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = parse_generate(await request.read())
        model = self._must_find(body.model)
        talk = _Talk(model=body.model, chat=False)
        if not body.prompt:
            if body.keep_alive != 0:
                self._check(body, model, "generate")
            return await self._bare(body, model, talk)
        self._check(body, model, "generate", insert=bool(body.suffix))
        messages = [WireMessage(role="user", content=body.prompt, images=body.images)]
        if body.system:
            messages.insert(0, WireMessage(role="system", content=body.system))
        return await self._answer(
            request, body, model, talk, messages=messages, calls=[], images=bool(body.images)
        )

    def _check(
        self, body: Prompted, model: FakeModel, verb: str, *, tools: bool = False, insert: bool = False
    ) -> None:
        can = model.capabilities
        if "completion" not in can:
            raise WireError(400, f'"{body.model}" does not support {verb}')
        for wanted, name in ((tools, "tools"), (insert, "insert")):
            if wanted and name not in can:
                raise WireError(400, f"{model.parsed.full()} does not support {name}")
        if body.think and "thinking" not in can and not self.is_old:
            raise WireError(400, f'"{body.model}" does not support thinking')

    async def _bare(self, body: Prompted, model: FakeModel, talk: _Talk) -> web.Response:
        if body.keep_alive == 0:
            self.scheduler.unload(model)
            return json_reply({**talk.part(), "done": True, "done_reason": "unload"})
        options = check_options(body.options)
        async with self.scheduler.lease(model, options, shift=body.shift, keep_alive=body.keep_alive):
            return json_reply({**talk.part(), "done": True, "done_reason": "load"})

    async def _answer(
        self,
        request: web.Request,
        body: ChatBody | GenerateBody,
        model: FakeModel,
        talk: _Talk,
        *,
        messages: Sequence[WireMessage],
        calls: list[dict[str, object]],
        images: bool,
    ) -> web.StreamResponse:
        options = check_options(body.options)
        tools = body.tools if isinstance(body, ChatBody) else ()
        if images and "vision" not in model.capabilities:
            raise WireError(500, "this model is missing data required for image input")
        record = Generation(model=model.name)
        self.generations.append(record)
        try:
            async with self.scheduler.lease(model, options, shift=body.shift, keep_alive=body.keep_alive) as (
                runner,
                took,
            ):
                shape = check_format(body.format)
                prompt, count = self._prompt(messages, tools, runner, truncate=body.truncate or self.is_old)
                if body.render_only:
                    debug = {"_debug_info": {"rendered_template": prompt}}
                    return json_reply({"model": body.model, "created_at": timestamp(), **debug})
                async with runner.slots:
                    record.state = "running"
                    answer = self._think_up(body, model, options, prompt, shape=shape, calls=calls)
                    if not body.shift:
                        answer = _shorten(answer, runner.context - count)
                    return await self._say(
                        request,
                        body,
                        model,
                        talk,
                        answer=answer,
                        record=record,
                        prompt_tokens=count,
                        load_seconds=took,
                    )
        except (asyncio.CancelledError, ConnectionError):
            record.state = "stopped"
            raise
        finally:
            record.ended_at = asyncio.get_running_loop().time()

    def _prompt(
        self,
        messages: Sequence[WireMessage],
        tools: Sequence[Mapping[str, object]],
        runner: Runner,
        *,
        truncate: bool,
    ) -> tuple[str, int]:
        kept, fits = list(messages), True
        if truncate:
            kept, fits = brain.fit(messages, tools, runner.context)
        prompt = brain.render(kept, tools)
        count = len(brain.tokens_of(prompt))
        if count > runner.context and fits:
            raise WireError(400, "the input length exceeds the context length")
        return prompt, min(count, runner.context)

    def _think_up(
        self,
        body: Prompted,
        model: FakeModel,
        options: Mapping[str, object],
        prompt: str,
        *,
        shape: str | dict[str, object] | None,
        calls: list[dict[str, object]],
    ) -> brain.Answer:
        seed = options.get("seed", -1)
        assert isinstance(seed, int)
        thinking: list[str] = []
        if "thinking" in model.capabilities and body.think is not False and not self.is_old:
            thinking = brain.speak(f"think {prompt}", seed, model.thinking_tokens)
        if shape is not None:
            value = brain.instance(shape, prompt) if isinstance(shape, dict) else {"answer": "yes"}
            pieces = _pieces(json.dumps(value, separators=(",", ":")), 5)
        elif calls:
            pieces = []
        else:
            pieces = (
                list(model.reply)
                if model.reply is not None
                else brain.speak(prompt, seed, model.answer_tokens)
            )
        stops = options.get("stop")
        pieces = brain.cut_at_stop(pieces, stops if isinstance(stops, list) else [])
        answer = brain.Answer(thinking=thinking, pieces=pieces, tool_calls=calls)
        most = options.get("num_predict", -1)
        return _shorten(answer, most) if isinstance(most, int) and most >= 0 else answer

    async def _say(
        self,
        request: web.Request,
        body: Prompted,
        model: FakeModel,
        talk: _Talk,
        *,
        answer: brain.Answer,
        record: Generation,
        prompt_tokens: int,
        load_seconds: float,
    ) -> web.StreamResponse:
        began = time.monotonic_ns()
        out = Lines(request)
        early = answer.tool_calls if model.tools_early else []
        chances: list[object] = []
        spoken = [(piece, True) for piece in answer.thinking] + [(piece, False) for piece in answer.pieces]
        for piece, is_thought in spoken:
            await asyncio.sleep(self.token_seconds)
            chunk = talk.part(thinking=piece) if is_thought else talk.part(text=piece)
            if body.logprobs:
                chunk["logprobs"] = [brain.logprobs_of(piece, body.top_logprobs)]
                chances.append(chunk["logprobs"])
            record.sent += 1
            if body.stream:
                await out.send(chunk)
        if early and body.stream:
            await out.send(talk.part(calls=early))
        took = time.monotonic_ns() - began
        late = [] if early and body.stream else answer.tool_calls
        whole = not body.stream
        last = talk.part(
            text="".join(answer.pieces) if whole else "",
            thinking="".join(answer.thinking) if whole else "",
            calls=late,
        )
        metrics = {
            "total_duration": took + int(load_seconds * 1e9) + 1000,
            "load_duration": int(load_seconds * 1e9),
            "prompt_eval_count": prompt_tokens,
            "prompt_eval_duration": 1000 * prompt_tokens,
            "eval_count": answer.token_count,
            "eval_duration": took,
        }
        last |= {"done": True, "done_reason": answer.reason, **without_zeros(metrics)}
        if whole and body.logprobs:
            last["logprobs"] = [
                entry for entries in chances for entry in (entries if isinstance(entries, list) else [])
            ]
        if isinstance(body, GenerateBody) and not body.raw:
            last["context"] = list(range(1, prompt_tokens + answer.token_count + 1))
        record.state = "done"
        if whole:
            return json_reply(last)
        await out.send(last)
        return await out.end()

    # Vectors

    async def _embed(self, request: web.Request) -> web.Response:
        body = parse_embed(await request.read())
        model = self._must_find(body.model, _embed_missing(body.model))
        options = check_options(body.options)
        async with self.scheduler.lease(model, options, shift=True, keep_alive=body.keep_alive) as (
            runner,
            took,
        ):
            vectors, count = await self._vectors(body, model, runner)
        metrics = without_zeros(
            {"total_duration": 14143917, "load_duration": int(took * 1e9), "prompt_eval_count": count}
        )
        return json_reply({"model": body.model, "embeddings": vectors, **metrics})

    async def _vectors(
        self, body: EmbedBody, model: FakeModel, runner: Runner
    ) -> tuple[list[list[float]], int]:
        vectors, count = [], 0
        if body.texts and "embedding" not in model.capabilities:
            raise WireError(501, "This server does not support embeddings. Start it with `--embeddings`")
        async with runner.slots:
            for text in body.texts:
                tokens = brain.tokens_of(text)
                if len(tokens) > runner.context:
                    if not body.truncate:
                        raise WireError(400, "the input length exceeds the context length")
                    tokens = tokens[: runner.context]
                await asyncio.sleep(self.token_seconds)
                vector = brain.embed(model.name, "".join(tokens), model.embedding_length)
                if 0 < body.dimensions < len(vector):
                    vector = brain.normalized(vector[: body.dimensions])
                vectors.append(vector)
                count += len(tokens)
        return vectors, count

    async def _embeddings(self, request: web.Request) -> web.Response:
        fields = Fields.of("EmbeddingRequest", await request.read())
        name, prompt = fields.text("model"), fields.text("prompt")
        if not name:
            raise WireError(400, "model is required")
        model = self._must_find(name)
        async with self.scheduler.lease(model, {}, shift=True, keep_alive=None):
            if not prompt:
                return json_reply({"embedding": []})
            if "embedding" not in model.capabilities:
                raise WireError(500, "This server does not support embeddings. Start it with `--embeddings`")
            vector = brain.embed(model.name, prompt, model.embedding_length)
            return json_reply({"embedding": [3.0 * value for value in vector]})

    # Disk

    async def _pull(self, request: web.Request) -> web.StreamResponse:
        fields = Fields.of("PullRequest", await request.read())
        name = fields.text("model") or fields.text("name")
        parsed = parse_name(name)
        if parsed is None:
            raise WireError(400, "invalid model name")
        if fields.flag("stream", True) is False:
            async for line in self._pulling(parsed.short()):
                if "error" in line:
                    raise WireError(500, str(line["error"]))
            return json_reply({"status": "success"})
        out = Lines(request)
        async for line in self._pulling(parsed.short()):
            await out.send(line)
        return await out.end()

    async def _pulling(self, name: str) -> AsyncIterator[dict[str, object]]:
        yield {"status": "pulling manifest"}
        layers = self.registry.get(name)
        if layers is None:
            yield {"error": "pull model manifest: file does not exist"}
            return
        for layer in layers:
            have = self.parts.setdefault(layer.digest, 0)
            head = {"status": f"pulling {layer.digest[7:19]}", "digest": layer.digest, "total": layer.size}
            yield {**head, **without_zeros({"completed": have})}
            while have < layer.size:
                await asyncio.sleep(self.pull_seconds)
                have = self.parts[layer.digest] = min(layer.size, self.parts[layer.digest] + self.pull_bytes)
                yield {**head, "completed": have}
        for status in ("verifying sha256 digest", "writing manifest"):
            yield {"status": status}
        model = FakeModel(name=name, size=sum(layer.size for layer in layers))
        self.models[model.parsed.key()] = model
        yield {"status": "success"}

    async def _delete(self, request: web.Request) -> web.Response:
        fields = Fields.of("DeleteRequest", await request.read())
        name = fields.text("model") or fields.text("name")
        if parse_name(name) is None:
            raise WireError(400, f'name "{name}" is invalid')
        model = self._must_find(name)
        del self.models[model.parsed.key()]
        return web.Response()

    async def _copy(self, request: web.Request) -> web.Response:
        fields = Fields.of("CopyRequest", await request.read())
        source, target = fields.text("source"), parse_name(fields.text("destination"))
        if target is None:
            raise WireError(400, f'destination "{fields.text("destination")}" is invalid')
        model = self._find(source)
        if model is None:
            raise WireError(404, f'model "{source}" not found')
        self.models[target.key()] = replace(model, name=target.short())
        return web.Response()

    async def _create(self, request: web.Request) -> web.StreamResponse:
        fields = Fields.of("CreateRequest", await request.read())
        name = parse_name(fields.text("model") or fields.text("name"))
        if name is None:
            raise WireError(400, "invalid model name")
        files, source = fields.mapping("files"), fields.text("from")
        statuses = []
        if files:
            size = self._check_files(files)
            statuses = ["parsing GGUF", *(f"using existing layer {digest}" for digest in files.values())]
            model = FakeModel(name=name.short(), size=size)
        elif source:
            found = self._find(source)
            if found is None:
                raise WireError(500, "pull model manifest: file does not exist")
            statuses = [f"using existing layer sha256:{found.digest}"]
            model = replace(found, name=name.short())
        else:
            raise WireError(400, "neither 'from' or 'files' was specified")
        self.models[name.key()] = model
        statuses += ["writing manifest", "success"]
        if fields.flag("stream", True) is False:
            return json_reply({"status": "success"})
        out = Lines(request)
        for status in statuses:
            await out.send({"status": status})
        return await out.end()

    def _check_files(self, files: Mapping[str, object]) -> int:
        size = 0
        for path, digest in files.items():
            if path.startswith("/") or ".." in path.split("/"):
                raise WireError(400, "file path must be relative")
            blob = self.blobs.get(check_digest(str(digest)))
            if blob is None or not blob.startswith(b"GGUF"):
                raise WireError(400, "unknown type")
            size += len(blob)
        return size

    async def _head_blob(self, request: web.Request) -> web.Response:
        digest = check_digest(request.match_info["digest"])
        return web.Response(status=200 if digest in self.blobs else 404)

    async def _post_blob(self, request: web.Request) -> web.Response:
        digest = check_digest(request.match_info["digest"])
        if digest in self.blobs:
            return web.Response(status=200)
        data = await request.read()
        got = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if got != digest:
            raise WireError(400, f'digest mismatch, expected "{digest}", got "{got}"')
        self.blobs[digest] = data
        return web.Response(status=201)

    # The OpenAI dialect

    async def _v1_models(self, _: web.Request) -> web.Response:
        entries = [
            {"id": model.parsed.short(), "object": "model", "created": 1746889608, "owned_by": "library"}
            for model in self.models.values()
        ]
        return json_reply({"object": "list", "data": entries})

    async def _v1_chat(self, request: web.Request) -> web.StreamResponse:
        fields = Fields.of("ChatCompletionRequest", await request.read())
        messages = [
            WireMessage(role=item.text("role"), content=str(item.values.get("content") or ""))
            for item in fields.each("messages", "Message")
        ]
        if not messages:
            raise WireError(400, "[] is too short - 'messages'")
        name = fields.text("model")
        model = self._must_find(name, 'model "{}" not found, try pulling it first')
        async with self.scheduler.lease(model, {}, shift=True, keep_alive=None) as (runner, _):
            prompt, count = self._prompt(messages, (), runner, truncate=True)
            async with runner.slots:
                pieces = brain.speak(prompt, fields.integer("seed") or -1, model.answer_tokens)
                usage = {
                    "prompt_tokens": count,
                    "completion_tokens": len(pieces),
                    "total_tokens": count + len(pieces),
                }
                frame = {"id": f"chatcmpl-{count % 999}", "created": int(time.time()), "model": name}
                if not fields.flag("stream", False):
                    message = {"role": "assistant", "content": "".join(pieces)}
                    choice = {"index": 0, "message": message, "finish_reason": "stop"}
                    return json_reply(
                        {**frame, "object": "chat.completion", "choices": [choice], "usage": usage}
                    )
                with_usage = bool(
                    Fields("StreamOptions", fields.mapping("stream_options")).flag("include_usage")
                )
                return await self._v1_stream(request, frame, pieces, usage if with_usage else None)

    async def _v1_stream(
        self,
        request: web.Request,
        frame: Mapping[str, object],
        pieces: Sequence[str],
        usage: Mapping[str, int] | None,
    ) -> web.StreamResponse:
        out = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await out.prepare(request)

        async def send(choices: list[object], **more: object) -> None:
            chunk = {**frame, "object": "chat.completion.chunk", "choices": choices, **more}
            await out.write(f"data: {json.dumps(chunk)}\n\n".encode())

        for at, piece in enumerate(pieces):
            await asyncio.sleep(self.token_seconds)
            delta = {"role": "assistant", "content": piece} if at == 0 else {"content": piece}
            await send([{"index": 0, "delta": delta, "finish_reason": None}])
        await send([{"index": 0, "delta": {}, "finish_reason": "stop"}])
        if usage is not None:
            await send([], usage=usage)
        await out.write(b"data: [DONE]\n\n")
        await out.write_eof()
        return out

    async def _v1_embeddings(self, request: web.Request) -> web.Response:
        raw = await request.read()
        fields = Fields.of("EmbedRequest", raw)
        body = parse_embed(raw)
        model = self._must_find(body.model, 'model "{}" not found, try pulling it first')
        async with self.scheduler.lease(model, {}, shift=True, keep_alive=None) as (runner, _):
            vectors, count = await self._vectors(body, model, runner)
        data = [{"object": "embedding", "index": at, "embedding": v} for at, v in enumerate(vectors)]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return json_reply({"object": "list", "data": data, "model": fields.text("model"), "usage": usage})


def _embed_missing(name: str) -> str:
    return 'model "{}" not found, try pulling it first' if name else "model '{}' not found"


def _pieces(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def _shorten(answer: brain.Answer, most: int) -> brain.Answer:
    """Ends an answer at a number of tokens."""
    if answer.token_count <= most:
        return answer
    thinking = answer.thinking[: max(0, most)]
    pieces = answer.pieces[: max(0, most - len(thinking))]
    return brain.Answer(thinking=thinking, pieces=pieces, reason="length")


def _host_allowed(request: web.Request) -> bool:
    """The real server's guard against rebinding: a public name in `Host` is refused."""
    host = request.headers.get("Host", "").rsplit(":", 1)[0].strip("[]").lower()
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_private or address.is_unspecified
    return not host or host == "localhost" or host.endswith((".localhost", ".local", ".internal"))


async def _serve(arguments: argparse.Namespace) -> None:
    models = [*MODELS, *(FakeModel(name=_tagged(name)) for name in arguments.models.split(",") if name)]
    fake = FakeOllama(
        models,
        version=arguments.version,
        scheduler=Scheduler(
            parallel=arguments.parallel, max_queue=arguments.max_queue, load_seconds=arguments.load_seconds
        ),
        token_seconds=arguments.token_seconds,
        registry={"tiny:latest": [Layer(digest=f"sha256:{digit * 64}", size=4 << 20) for digit in "ab"]},
        pull_seconds=arguments.token_seconds,
    )
    async with process.stop_requests() as stopped:
        await fake.start(arguments.host, arguments.port)
        try:
            process.announce("fake-ollama", fake.url)
            await stopped.wait()
        finally:
            await fake.stop()


def _tagged(name: str) -> str:
    parsed = parse_name(name)
    if parsed is None:
        raise SystemExit(f"not a model name: {name}")
    return parsed.short()


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description="An emulator of Ollama's HTTP server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--models", default="", help="names of further models, with commas between them")
    parser.add_argument("--version", default="0.33.0")
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--max-queue", type=int, default=512)
    parser.add_argument("--token-seconds", type=float, default=0.02)
    parser.add_argument("--load-seconds", type=float, default=0.0)
    arguments = parser.parse_args(argv)
    asyncio.run(_serve(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
