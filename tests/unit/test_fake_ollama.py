"""The emulator of Ollama: codes, texts and framing as the real server has them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import aiohttp
import pytest

from forebay.testing import fake_ollama_brain as brain
from forebay.testing.fake_ollama import FakeOllama, Layer
from forebay.testing.fake_ollama_runners import BUSY, FakeModel, Scheduler
from forebay.testing.fake_ollama_script import Body, Cut, Flush, Head, Line, Normal, Raw, Until, lines
from forebay.testing.fake_ollama_wire import (
    FOREVER,
    WireError,
    WireMessage,
    check_body,
    check_digest,
    go_json,
    parse_duration,
    parse_keep_alive,
    parse_name,
    strip_source,
)

USER = [{"role": "user", "content": "hi there"}]
GO_MAP = "map[string]interface {}"


@dataclass
class Answer:
    status: int
    kind: str
    body: bytes

    @property
    def json(self) -> dict[str, object]:
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value

    @property
    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.body.splitlines()]

    @property
    def error(self) -> str:
        return str(self.json["error"])


class Http:
    def __init__(self, fake: FakeOllama, session: aiohttp.ClientSession) -> None:
        self.fake = fake
        self.session = session

    async def __call__(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        async with self.session.request(method, self.fake.url + path, data=data, headers=headers) as response:
            return Answer(response.status, response.headers.get("Content-Type", ""), await response.read())

    async def post(self, path: str, body: object) -> Answer:
        return await self("POST", path, body)


@pytest.fixture
async def fake() -> AsyncIterator[FakeOllama]:
    async with FakeOllama() as server:
        yield server


@pytest.fixture
async def http(fake: FakeOllama) -> AsyncIterator[Http]:
    async with aiohttp.ClientSession() as session:
        yield Http(fake, session)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(3):
        while not holds():
            await asyncio.sleep(0.002)


# Routing


async def test_plain_routes_answer_as_the_server_does(http: Http) -> None:
    root = await http("GET", "/")
    assert (root.body, root.kind) == (b"Ollama is running", "text/plain; charset=utf-8")
    assert (await http("HEAD", "/")).status == 200
    assert (await http("GET", "/api/version")).json == {"version": "0.33.0"}
    assert (await http("GET", "/api/status")).json["cloud"] == {"disabled": True, "source": "env"}
    missing = await http("GET", "/nothing")
    assert (missing.status, missing.body, missing.kind[:10]) == (404, b"404 page not found", "text/plain")
    wrong = await http("GET", "/api/chat")
    assert (wrong.status, wrong.body) == (405, b"405 method not allowed")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example.org", 403),
        ("localhost:1", 200),
        ("10.0.0.7:11434", 200),
        ("8.8.8.8", 403),
        ("[::1]:9", 200),
        ("box.local", 200),
    ],
)
async def test_a_public_name_is_refused_with_nothing_said(http: Http, host: str, status: int) -> None:
    answer = await http("GET", "/api/tags", Host=host)
    assert answer.status == status
    assert status == 200 or answer.body == b""


# Bodies


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/api/chat", b"", 400, "missing request body"),
        ("/api/chat", b"{", 400, "unexpected EOF"),
        ("/api/chat", b'{"a":nope}', 400, "invalid character in value"),
        ("/api/chat", b"nope", 400, "invalid character 'n' looking for beginning of value"),
        ("/api/chat", [], 400, "json: cannot unmarshal array into Go value of type api.ChatRequest"),
        ("/api/chat", {}, 400, "model is required"),
        (
            "/api/chat",
            {"model": 3},
            400,
            "json: cannot unmarshal number into Go struct field ChatRequest.model of type string",
        ),
        (
            "/api/chat",
            {"model": "x", "stream": "yes"},
            400,
            "json: cannot unmarshal string into Go struct field ChatRequest.stream of type bool",
        ),
        (
            "/api/chat",
            {"model": "x", "messages": {}},
            400,
            "json: cannot unmarshal object into Go struct field ChatRequest.messages of type []interface {}",
        ),
        (
            "/api/chat",
            {"model": "x", "messages": [1]},
            400,
            "json: cannot unmarshal number into Go struct field ChatRequest.messages of type api.Message",
        ),
        (
            "/api/chat",
            {"model": "x", "options": 1},
            400,
            f"json: cannot unmarshal number into Go struct field ChatRequest.options of type {GO_MAP}",
        ),
        (
            "/api/chat",
            {"model": "x", "top_logprobs": True},
            400,
            "json: cannot unmarshal bool into Go struct field ChatRequest.top_logprobs of type int",
        ),
        (
            "/api/chat",
            {"model": "x", "messages": [{"role": "user", "images": ["ab?d"]}]},
            400,
            "illegal base64 data at input byte 2",
        ),
        (
            "/api/chat",
            {"model": "x", "messages": [{"role": "user", "images": ["abc"]}]},
            400,
            "illegal base64 data at input byte 3",
        ),
        (
            "/api/chat",
            {"model": "x", "messages": [{"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
            400,
            f"json: cannot unmarshal string into Go struct field ToolCallFunction.arguments of type {GO_MAP}",
        ),
        ("/api/chat", {"model": "x", "keep_alive": True}, 400, "Unsupported type: 'bool'"),
        ("/api/chat", {"model": "x", "keep_alive": "10"}, 400, 'time: missing unit in duration "10"'),
        ("/api/chat", {"model": "x", "keep_alive": "1y"}, 400, 'time: unknown unit "y" in duration "1y"'),
        ("/api/chat", {"model": "x", "keep_alive": "soon"}, 400, 'time: invalid duration "soon"'),
        (
            "/api/chat",
            {"model": "x", "think": "hard"},
            400,
            'invalid think value: "hard" (must be "high", "medium", "low", "max", "xhigh", true, or false)',
        ),
        ("/api/chat", {"model": "nope", "messages": USER}, 404, "model 'nope' not found"),
        ("/api/generate", {}, 404, "model '' not found"),
        (
            "/api/generate",
            {"model": "llama3.2", "raw": True, "system": "x", "prompt": "y"},
            400,
            "raw mode does not support template, system, or context",
        ),
        (
            "/api/generate",
            {"model": "llama3.2", "prompt": "a", "suffix": "b"},
            400,
            "registry.ollama.ai/library/llama3.2:latest does not support insert",
        ),
        ("/api/generate", {"model": "all-minilm"}, 400, '"all-minilm" does not support generate'),
        (
            "/api/generate",
            {"model": "llama3.2", "prompt": "x", "options": {"stop": "x"}},
            500,
            'option "stop" must be of type array',
        ),
        (
            "/api/generate",
            {"model": "llama3.2", "prompt": "x", "options": {"use_mmap": 1}},
            500,
            'option "use_mmap" must be of type boolean',
        ),
        (
            "/api/generate",
            {"model": "llama3.2", "prompt": "x", "format": "xml"},
            500,
            'invalid format: "xml"; expected "json" or a valid JSON Schema object',
        ),
        (
            "/api/generate",
            {"model": "llama3.2", "prompt": "x", "images": [base64.b64encode(b"x").decode()]},
            500,
            "this model is missing data required for image input",
        ),
        (
            "/api/generate",
            {"model": "llama3.2:local:cloud"},
            400,
            'use either :local or :cloud, not both: "llama3.2:local:cloud"',
        ),
        ("/api/embed", {"model": "all-minilm", "input": 3}, 400, "invalid input type"),
        ("/api/embed", {"model": ""}, 404, "model '' not found"),
        ("/api/embed", {"model": "x"}, 404, 'model "x" not found, try pulling it first'),
        ("/api/embeddings", {}, 400, "model is required"),
        (
            "/api/embeddings",
            {"model": "llama3.2", "prompt": "x"},
            500,
            "This server does not support embeddings. Start it with `--embeddings`",
        ),
        ("/api/show", {}, 400, "model is required"),
        ("/api/show", {"model": "x"}, 404, "model 'x:latest' not found"),
        ("/api/show", {"model": "a b"}, 404, "model 'a b' not found"),
        ("/api/pull", {"model": "a b"}, 400, "invalid model name"),
        ("/api/create", {"model": "a b"}, 400, "invalid model name"),
        ("/api/create", {"model": "m"}, 400, "neither 'from' or 'files' was specified"),
        ("/api/create", {"model": "m", "from": "nope"}, 500, "pull model manifest: file does not exist"),
        ("/api/create", {"model": "m", "files": {"../x": "y"}}, 400, "file path must be relative"),
        ("/api/create", {"model": "m", "files": {"x": "y"}}, 400, "invalid digest format"),
        ("/api/create", {"model": "m", "files": {"x": "sha256:" + "0" * 64}}, 400, "unknown type"),
        ("/api/copy", {"source": "llama3.2", "destination": "a b"}, 400, 'destination "a b" is invalid'),
        ("/api/copy", {"source": "nope", "destination": "b"}, 404, 'model "nope" not found'),
    ],
)
async def test_errors_have_the_server_s_code_and_text(
    http: Http, path: str, body: object, status: int, text: str
) -> None:
    answer = await http.post(path, body)
    assert (answer.status, answer.error) == (status, text)
    assert answer.kind.startswith("application/json")


async def test_deleting_an_invalid_name_is_refused(http: Http) -> None:
    answer = await http("DELETE", "/api/delete", {"model": "a b"})
    assert (answer.status, answer.error) == (400, 'name "a b" is invalid')


def test_keep_alive_has_all_its_forms() -> None:
    assert parse_keep_alive(None) is None
    assert [parse_keep_alive(v) for v in (300, 1.5, "5m", "1h30m", "10ms", 0, "0", "0s")] == [
        300, 1.5, 300, 5400, 0.01, 0, 0, 0,
    ]  # fmt: skip
    assert [parse_keep_alive(v) for v in (-1, "-1m")] == [FOREVER, FOREVER]
    assert parse_duration("-1m") == -60
    for bad in ("", "m", [1], {}):
        with pytest.raises(WireError):
            parse_keep_alive(bad)


def test_names_come_in_parts() -> None:
    name = parse_name("https://hf.co/User/Model:Q4_K_M")
    assert name is not None
    assert (name.host, name.namespace, name.model, name.tag) == ("hf.co", "User", "Model", "Q4_K_M")
    assert name.short() == "hf.co/User/Model:Q4_K_M"
    mine = parse_name("me/mine")
    assert mine is not None
    assert (mine.short(), mine.key()) == ("me/mine:latest", "registry.ollama.ai/me/mine:latest")
    for bad in ("", "x:", "-x", "a.b/c", "h st/n/m", "m:" + "t" * 81):
        assert parse_name(bad) is None
    assert strip_source("m:local") == "m"
    assert strip_source("m:cloud") == "m:cloud"
    assert check_digest("sha256-" + "A" * 64) == "sha256:" + "a" * 64


def test_markup_is_escaped_as_go_does() -> None:
    assert go_json({"a": "<b>&\u2028é"}) == b'{"a":"\\u003cb\\u003e\\u0026\\u2028\xc3\xa9"}'


def test_a_body_can_be_judged_without_a_server() -> None:
    check_body("POST", "/api/chat", b'{"model":"m","options":{"seed":1},"format":"json"}')
    check_body("POST", "/api/create", b'{"model":"m","stream":false}')
    check_body("DELETE", "/api/delete", b'{"model":"m"}')
    check_body("HEAD", "/api/blobs/sha256:" + "a" * 64, b"")
    check_body("POST", "/api/embed", b'{"model":"m","input":["a"]}')
    check_body("GET", "/api/tags", b"")
    for method, path in (("GET", "/api/chat"), ("POST", "/api/nothing"), ("POST", "/api/blobs/x")):
        with pytest.raises(WireError):
            check_body(method, path, b"{}")


# Answers


async def test_a_stream_is_ndjson_with_metrics_at_its_end(http: Http) -> None:
    answer = await http.post("/api/generate", {"model": "llama3.2", "prompt": "x"})
    assert answer.kind == "application/x-ndjson"
    assert answer.body.endswith(b"\n")
    *parts, last = answer.lines
    assert not any("done_reason" in part for part in parts)
    assert last["done_reason"] == "stop"
    assert "load_duration" not in last, "a zero is an absent key"
    assert last["eval_count"] == len(parts) == 12
    assert last["context"]
    raw = await http.post("/api/generate", {"model": "llama3.2", "prompt": "x", "raw": True, "stream": False})
    assert "context" not in raw.json
    assert raw.json["response"]


async def test_a_load_is_json_and_an_unload_too(http: Http) -> None:
    loaded = await http.post("/api/generate", {"model": "llama3.2", "system": ""})
    assert (loaded.json["done_reason"], loaded.json["done"]) == ("load", True)
    assert loaded.kind.startswith("application/json")
    assert not loaded.body.endswith(b"\n")
    chat = await http.post("/api/chat", {"model": "llama3.2", "messages": []})
    assert chat.json["done_reason"] == "load"
    assert (await http("GET", "/api/ps")).json["models"]
    for model in ("llama3.2", "all-minilm"):
        unloaded = await http.post("/api/generate", {"model": model, "keep_alive": "0"})
        assert unloaded.json["done_reason"] == "unload"
    assert not (await http("GET", "/api/ps")).json["models"]


async def test_the_rendered_prompt_can_be_asked_for(http: Http) -> None:
    body = {
        "model": "llama3.2",
        "messages": [{"role": "system", "content": "s"}, *USER],
        "_debug_render_only": True,
    }
    answer = await http.post("/api/chat", body)
    assert answer.json["_debug_info"] == {
        "rendered_template": "<|system|> s\n<|user|> hi there\n<|assistant|>"
    }


async def test_a_prompt_that_is_too_long_loses_its_oldest_messages(http: Http) -> None:
    long = [{"role": "system", "content": "s"}, {"role": "user", "content": "w " * 30}, *USER]
    body = {"model": "llama3.2", "messages": long, "options": {"num_ctx": 16}, "stream": False}
    assert (await http.post("/api/chat", body)).json["prompt_eval_count"] == 6
    refused = await http.post("/api/chat", {**body, "truncate": False})
    assert (refused.status, refused.error) == (400, "the input length exceeds the context length")
    alone = {**body, "messages": long[1:2]}
    assert (await http.post("/api/chat", alone)).json["prompt_eval_count"] == 16
    unshifted = {**body, "messages": [{"role": "user", "content": "w " * 8}], "shift": False}
    assert (await http.post("/api/chat", unshifted)).json["done_reason"] == "length"


async def test_generate_takes_a_system_prompt(http: Http) -> None:
    plain = await http.post("/api/generate", {"model": "llama3.2", "prompt": "x", "stream": False})
    system = await http.post(
        "/api/generate", {"model": "llama3.2", "prompt": "x", "system": "s t", "stream": False}
    )
    assert int(str(system.json["prompt_eval_count"])) > int(str(plain.json["prompt_eval_count"]))


async def test_a_whole_answer_holds_thinking_calls_and_probabilities(http: Http) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    nameless = {"type": "function"}
    body = {"model": "qwen3", "messages": [{"role": "user", "content": "f"}], "stream": False}
    answer = (await http.post("/api/chat", {**body, "tools": [nameless, tool], "logprobs": True})).json
    message = answer["message"]
    assert isinstance(message, dict)
    assert message["thinking"]
    assert message["tool_calls"][0]["function"]["name"] == "f"
    assert isinstance(answer["logprobs"], list)


async def test_embeddings_have_their_rules(http: Http) -> None:
    for empty in ("", [], None):
        answer = await http.post("/api/embed", {"model": "all-minilm", "input": empty})
        assert answer.json["embeddings"] == []
    one = await http.post("/api/embed", {"model": "all-minilm", "input": [""], "dimensions": 99})
    vectors = one.json["embeddings"]
    assert isinstance(vectors, list)
    assert len(vectors[0]) == 32
    long = {"model": "all-minilm", "input": "w " * 400}
    assert (await http.post("/api/embed", long)).json["prompt_eval_count"] == 256
    assert (await http.post("/api/embed", {**long, "truncate": False})).status == 400
    assert (await http.post("/api/embed", {"model": "llama3.2", "input": "x"})).status == 501
    assert (await http.post("/api/embeddings", {"model": "all-minilm"})).json == {"embedding": []}


async def test_blobs_are_kept_by_their_digest(http: Http) -> None:
    data = b"GGUF" + bytes(8)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert (await http("HEAD", f"/api/blobs/{digest}")).status == 404
    wrong = await http("POST", f"/api/blobs/sha256:{'0' * 64}", data)
    assert wrong.status == 400
    assert wrong.error.startswith("digest mismatch, expected")
    assert (await http("POST", f"/api/blobs/{digest}", data)).status == 201
    assert (await http("POST", f"/api/blobs/{digest}", data)).status == 200
    assert (await http("HEAD", f"/api/blobs/{digest}")).status == 200
    assert (await http("HEAD", "/api/blobs/x")).status == 400
    made = await http.post("/api/create", {"model": "m", "files": {"m.gguf": digest}})
    assert [line["status"] for line in made.lines] == [
        "parsing GGUF",
        f"using existing layer {digest}",
        "writing manifest",
        "success",
    ]


async def test_two_pulls_share_what_is_fetched() -> None:
    registry = {"tiny:latest": [Layer(digest="sha256:" + "a" * 64, size=3 << 20)]}
    async with FakeOllama(registry=registry, pull_seconds=0.002) as fake, aiohttp.ClientSession() as session:
        http = Http(fake, session)
        async with asyncio.TaskGroup() as group:
            pulls = [group.create_task(http.post("/api/pull", {"model": "tiny"})) for _ in range(2)]
        assert all(pull.result().lines[-1] == {"status": "success"} for pull in pulls)
        again = await http.post("/api/pull", {"name": "tiny"})
        cached = [line for line in again.lines if "digest" in line]
        assert [line["completed"] for line in cached] == [3 << 20]
        assert (await http.post("/api/pull", {"model": "tiny", "stream": False})).json == {
            "status": "success"
        }
        failed = await http.post("/api/pull", {"model": "none"})
        assert failed.status == 200
        assert failed.lines[-1] == {"error": "pull model manifest: file does not exist"}


async def test_an_old_server_knows_less() -> None:
    async with FakeOllama(version="0.5.1") as fake, aiohttp.ClientSession() as session:
        http = Http(fake, session)
        await http.post("/api/generate", {"model": "qwen3"})
        listed = (await http("GET", "/api/tags")).json["models"]
        running = (await http("GET", "/api/ps")).json["models"]
        assert isinstance(listed, list)
        assert isinstance(running, list)
        assert "capabilities" not in listed[0]
        assert "context_length" not in running[0]
        assert "capabilities" not in (await http.post("/api/show", {"name": "qwen3", "verbose": True})).json
        chat = await http.post(
            "/api/chat", {"model": "qwen3", "messages": USER, "think": True, "stream": False}
        )
        assert "thinking" not in json.dumps(chat.json)
        missing = await http.post("/api/chat", {"model": "x", "messages": USER})
        assert missing.error == 'model "x" not found, try pulling it first'


async def test_the_openai_dialect_is_spoken(http: Http) -> None:
    body = {"model": "llama3.2", "messages": USER}
    whole = (await http.post("/v1/chat/completions", body)).json
    streamed = await http.post(
        "/v1/chat/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    events = [line.removeprefix("data: ") for line in streamed.body.decode().split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"] == whole["usage"]
    assert (await http.post("/v1/chat/completions", {**body, "stream": True})).body.endswith(
        b"data: [DONE]\n\n"
    )
    assert isinstance((await http("GET", "/v1/models")).json["data"], list)
    vectors = (await http.post("/v1/embeddings", {"model": "all-minilm", "input": ["a", "b"]})).json["data"]
    assert isinstance(vectors, list)
    assert [entry["index"] for entry in vectors] == [0, 1]
    missing = await http.post("/v1/chat/completions", {**body, "model": "x"})
    error = missing.json["error"]
    assert isinstance(error, dict)
    assert (missing.status, error["type"]) == (404, "not_found_error")
    assert (await http.post("/v1/chat/completions", {"model": "llama3.2"})).status == 400


# The scheduler


async def test_a_model_leaves_when_its_time_is_over(http: Http) -> None:
    await http.post("/api/generate", {"model": "llama3.2", "keep_alive": 0.05})
    assert http.fake.scheduler.runners
    await until(lambda: not http.fake.scheduler.runners)
    await http.post("/api/generate", {"model": "llama3.2", "keep_alive": -1})
    (entry,) = (await http("GET", "/api/ps")).json["models"]  # type: ignore[misc]  # one, or the test fails
    assert entry["expires_at"].startswith("2318")


async def test_a_load_option_that_differs_loads_anew(http: Http) -> None:
    for options in (
        {},
        {"temperature": 1},
        {"num_ctx": 4096},
        {"num_ctx": 2048},
        {"num_ctx": 1 << 30},
        {"num_ctx": 1},
    ):
        await http.post("/api/generate", {"model": "llama3.2", "options": options})
    assert http.fake.scheduler.loads["llama3.2:latest"] == 4
    await http.post("/api/generate", {"model": "llama3.2", "options": {"num_ctx": 1}, "shift": False})
    assert http.fake.scheduler.loads["llama3.2:latest"] == 5
    await http.post("/api/generate", {"model": "llava", "options": {"num_ctx": 8}})
    contexts = {
        entry["name"]: entry["context_length"] for entry in (await http("GET", "/api/ps")).json["models"]
    }  # type: ignore[attr-defined]  # a list
    assert contexts == {"llama3.2:latest": 4, "llava:latest": 2048}


async def test_a_full_memory_evicts_the_idle_and_waits_for_the_busy() -> None:
    models = [FakeModel(name=f"{name}:latest", answer_tokens=20) for name in "abc"]
    scheduler = Scheduler(max_loaded=1, unload_seconds=0.01)
    async with (
        FakeOllama(models, scheduler=scheduler, token_seconds=0.002) as fake,
        aiohttp.ClientSession() as session,
    ):
        http = Http(fake, session)
        await http.post("/api/generate", {"model": "a"})
        await http.post("/api/generate", {"model": "b"})
        assert [runner.model.name for runner in scheduler.runners.values()] == ["b:latest"]
        async with asyncio.TaskGroup() as group:
            talking = group.create_task(http.post("/api/generate", {"model": "b", "prompt": "x"}))
            await until(lambda: fake.running == 1)
            loading = group.create_task(http.post("/api/generate", {"model": "c"}))
        assert talking.result().lines[-1]["done"]
        assert loading.result().json["done_reason"] == "load"


async def test_only_requests_that_wait_for_a_load_fill_the_queue() -> None:
    hold = asyncio.Event()
    scheduler = Scheduler(max_queue=1, hold_loads=hold)
    async with FakeOllama(scheduler=scheduler) as fake, aiohttp.ClientSession() as session:
        http = Http(fake, session)
        async with asyncio.TaskGroup() as group:
            first = group.create_task(http.post("/api/generate", {"model": "llama3.2"}))
            await until(lambda: scheduler.pending == 1)
            full = await http.post("/api/generate", {"model": "qwen3"})
            assert (full.status, full.error) == (503, BUSY)
            hold.set()
        assert first.result().status == 200
        async with asyncio.TaskGroup() as group:
            many = [
                group.create_task(http.post("/api/generate", {"model": "llama3.2", "prompt": "x"}))
                for _ in range(5)
            ]
        assert all(task.result().status == 200 for task in many)
        assert fake.running == 0


async def test_leaving_gives_a_load_up() -> None:
    scheduler = Scheduler(hold_loads=asyncio.Event())
    async with FakeOllama(scheduler=scheduler) as fake, aiohttp.ClientSession() as session:
        caller = asyncio.create_task(Http(fake, session).post("/api/generate", {"model": "llama3.2"}))
        await until(lambda: scheduler.loading == 1)
        caller.cancel()
        await until(lambda: scheduler.aborted_loads == 1)
        await asyncio.wait([caller])


async def test_a_load_that_fails_says_why() -> None:
    async with (
        FakeOllama([FakeModel(name="m:latest", load_error="boom")]) as fake,
        aiohttp.ClientSession() as session,
    ):
        answer = await Http(fake, session).post("/api/generate", {"model": "m"})
        assert (answer.status, answer.error) == (500, "boom")


# Scripts


async def test_scripts_are_played_in_order_and_then_the_server_is_itself(http: Http) -> None:
    gate = Until()
    http.fake.script("/api/tags", lines({"a": 1}), times=2)
    http.fake.script("/api/tags", [gate, Normal()])
    assert http.fake.unplayed == ["/api/tags"] * 2
    for _ in range(2):
        assert (await http("GET", "/api/tags")).json == {"a": 1}
    waiting = asyncio.create_task(http("GET", "/api/tags"))
    await until(lambda: len(http.fake.seen("/api/tags")) == 3)
    gate.event.set()
    assert "models" in (await waiting).json
    assert http.fake.unplayed == []


async def test_a_script_can_break_the_connection_anywhere(http: Http) -> None:
    http.fake.script("/api/show", [Cut()])
    with pytest.raises(aiohttp.ClientError):
        await http.post("/api/show", {})
    http.fake.script("/api/show", [Flush(), Body(b"abc", cuts=(1, 9)), Cut()])
    with pytest.raises(aiohttp.ClientError):
        await http.post("/api/show", {})
    http.fake.script("/api/show", [Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")])
    with pytest.raises(aiohttp.ClientPayloadError):
        await http.post("/api/show", {})
    http.fake.script("/api/show", [Head(418, {"X-A": "b"}), Line({"a": 1}, ending=b"")])
    answer = await http.post("/api/show", {})
    assert (answer.status, answer.body) == (418, b'{"a":1}')


# The brain


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"const": 3}, 3),
        ({"enum": ["x", "y"]}, "x"),
        ({"anyOf": [{"type": "integer"}]}, 1),
        ({"oneOf": ["odd"]}, "odd"),
        ({"type": ["boolean", "null"]}, True),
        ({"type": "null"}, None),
        ({"type": "number", "minimum": 5}, 5),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [True, True]),
        ({"type": "array"}, ["item"]),
        ({"properties": {"a": {"type": "integer"}, "b": True}}, {"a": 1}),
        ({"type": "object"}, {}),
    ],
)
def test_an_instance_matches_its_schema(schema: dict[str, object], value: object) -> None:
    assert brain.instance(schema) == value


def test_text_ends_before_its_first_stop_string() -> None:
    assert brain.cut_at_stop(["ab", "cd", "ef"], ["de", "zz", ""]) == ["ab", "c"]
    assert brain.cut_at_stop(["ab", "cd"], ["cd"]) == ["ab"]
    assert brain.cut_at_stop(["ab"], []) == ["ab"]


def test_a_rendered_prompt_holds_calls_and_tools() -> None:
    calls = ({"function": {"name": "f"}},)
    text = brain.render([WireMessage(role="assistant", content="", tool_calls=calls)], [{"type": "function"}])
    assert text.startswith("<|tools|>")
    assert '"name": "f"' in text
