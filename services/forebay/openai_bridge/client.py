"""What the bridge asks of a server, and what its answers mean. No request of the mesh is seen here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Final

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BackendError, BackendUnavailable, CapabilityUnsupported, Failure
from forebay.openai_bridge.flavors import FLAVORS, GENERIC, LLAMA_SERVER, MLX_LM, VLLM, Flavor
from forebay.upstream.embeds import Batch
from forebay.upstream.errors import UpstreamError, translated
from forebay.upstream.http import Body, Upstream
from forebay.upstream.values import JsonObject, array, integer, obj, text

PATHS: Final = (
    "GET /health",
    "GET /props",
    "GET /version",
    "GET /models",
    "GET /v1/models",
    "POST /v1/chat/completions",
    "POST /v1/chat/completions/input_tokens",
    "POST /v1/embeddings",
    "POST /apply-template",
    "POST /tokenize",
    "POST /models/load",
    "POST /models/unload",
)
"""All that the bridge ever calls."""

PROBE_TIMEOUT: Final = 10.0
"""Seconds a server may take to say that it is there. A busy llama-server answers late, not never."""

_STATES: Final = {
    "unloaded": pb.Model.STATE_AVAILABLE,
    "loading": pb.Model.STATE_LOADING,
    "loaded": pb.Model.STATE_ACTIVE,
    "sleeping": pb.Model.STATE_ACTIVE,  # it wakes up by itself
    "downloading": pb.Model.STATE_LOADING,
    "downloaded": pb.Model.STATE_AVAILABLE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What answers at the base URL."""

    flavor: Flavor
    """What kind of server it is."""
    router: bool = False
    """Whether it is a llama-server that loads models when it is asked to."""
    slots: int = 0
    """Requests it serves at once. 0 is not known."""
    vision: bool = True
    """Whether it may take images."""
    embeds: bool | None = None
    """Whether it has embeddings, tried on the running server. None is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A model that the server lists."""

    id: str
    """The server's own name of it."""
    aliases: tuple[str, ...] = ()
    """Other names of it."""
    state: pb.Model.State.ValueType = pb.Model.STATE_ACTIVE
    """Where it is in its life."""
    detail: str = ""
    """Why it is in this state."""
    context: int = 0
    """Tokens it was made for. 0 is not known."""
    loaded_context: int = 0
    """Tokens of one slot as it is loaded. 0 is not known."""
    vision: bool | None = None
    """Whether it takes images. None is not known."""
    fields: Mapping[str, object] = field(default_factory=dict, repr=False)
    """What the server says of its weights."""

    @property
    def weights(self) -> pb.WeightIdentity:
        """Which weights it has, as far as the server says."""
        meta = self.fields
        size, ftype = meta.get("n_params"), meta.get("ftype")
        return pb.WeightIdentity(
            quantization=str(ftype).removeprefix("all ") if isinstance(ftype, str) else "",
            parameter_count=size if isinstance(size, int) else 0,
            format="gguf" if isinstance(size, int) else "",
        )

    @property
    def size(self) -> int:
        """Bytes of its weights. 0 is not known."""
        size = self.fields.get("size")
        return size if isinstance(size, int) else 0

    @property
    def fingerprint(self) -> str:
        """Tells two models of one name apart, as far as the server's words do."""
        meta = self.fields
        said = [self.id, *(str(meta.get(k, "")) for k in ("n_params", "n_embd", "n_vocab", "size", "ftype"))]
        return hashlib.sha256("\0".join(said).encode()).hexdigest()

    def answers_to(self, name: str) -> bool:
        """Returns whether it can be asked for by `name`."""
        return name == self.id or name in self.aliases


class Client:
    """Speaks with one server. Everything it raises is a `Failure`, but where it says otherwise.

    Args:
        upstream: carries the calls.
        flavor: what the server is; None asks it.
    """

    def __init__(self, upstream: Upstream, *, flavor: str = "auto") -> None:
        self._http = upstream
        self._flavor = FLAVORS.get(flavor)

    @property
    def name(self) -> str:
        """The backend's name."""
        return self._http.name

    async def identify(self) -> Identity:
        """Finds out what the server is. Loads nothing."""
        with translated(backend=self.name):
            flavor = self._flavor or await self._guess()
            if flavor is not LLAMA_SERVER:
                await self.probe(flavor)
                return Identity(flavor=flavor)
            await self.probe(flavor)
            try:
                props = obj(await self._http.get_json("/props"))
            except UpstreamError:
                props = {}  # it can be switched off
            modalities = obj(props.get("modalities"))
            router = text(props, "role") == "router"
            return Identity(
                flavor=flavor,
                router=router,
                slots=0 if router else max(0, integer(props, "total_slots")),
                vision=bool(modalities.get("vision", True)),
                embeds=None if router else await self._tries_to_embed(),
            )

    async def probe(self, flavor: Flavor) -> None:
        """Returns if the server can serve. Loads nothing."""
        with translated(backend=self.name):
            try:
                await self._http.request("GET", flavor.health, timeout=PROBE_TIMEOUT)
            except UpstreamError as error:
                if error.no_such_endpoint or 200 <= error.status < 500:
                    raise
                if error.says("loading model"):
                    raise
                raise BackendUnavailable(
                    f"{self.name} says that it cannot serve ({error})", metadata={"backend": self.name}
                ) from error

    async def offers(self, identity: Identity) -> list[Offer]:
        """Returns the models that the server lists."""
        with translated(backend=self.name):
            try:
                answer = await self._http.get_json("/v1/models")
            except UpstreamError as error:
                if identity.flavor is MLX_LM and error.type == "unreadable_body":
                    # It has no folder to list, and serves the model it was started with under this name.
                    return [Offer(id="default_model")]
                raise
        listed = obj(answer)
        if not isinstance(answer, dict) or "data" not in listed:
            raise BackendError(
                f"{self.name} does not list models as OpenAI's dialect has it: check the base URL",
                metadata={"backend": self.name},
            )
        return [_offer(obj(item), identity) for item in array(listed["data"]) if text(obj(item), "id")]

    def chat(
        self, body: JsonObject, *, first_byte: float | None, between_bytes: float | None
    ) -> AbstractAsyncContextManager[Body]:
        """Opens a streamed chat completion. Raises `UpstreamError` where the server refuses."""
        return self._http.stream(
            "POST",
            "/v1/chat/completions",
            json=body,
            first_byte=first_byte,
            between_bytes=between_bytes,
        )

    async def count(self, body: JsonObject, *, flavor: Flavor) -> int:
        """Returns the tokens of a conversation.

        Raises:
            UpstreamError: the server refuses the conversation.
            CapabilityUnsupported: the server cannot count.
        """
        if flavor is VLLM:
            return integer(obj(await self._http.post_json("/tokenize", json=body)), "count")
        if flavor is not LLAMA_SERVER:
            raise CapabilityUnsupported(f"{self.name} cannot count tokens", metadata={"backend": self.name})
        try:
            path = "/v1/chat/completions/input_tokens"
            return integer(obj(await self._http.post_json(path, json=body)), "input_tokens")
        except UpstreamError as error:
            if not error.no_such_endpoint:
                raise
        # A build from before it could count: render and tokenise by ourselves.
        prompt = text(obj(await self._http.post_json("/apply-template", json=body)), "prompt")
        model = body.get("model")
        asked = {"model": model, "content": prompt, "add_special": True, "parse_special": True}
        return len(array(obj(await self._http.post_json("/tokenize", json=asked)).get("tokens")))

    async def embed(self, body: JsonObject, count: int, *, timeout: float | None) -> Batch:
        """Returns the vectors of `count` texts, in order, whatever order they came in.

        Raises:
            UpstreamError: the server refuses the texts.
        """
        answer = await self._http.post_json("/v1/embeddings", json=body, timeout=timeout)
        # The native shape is a bare list with a list of vectors for each text.
        items = [obj(item) for item in array(answer if isinstance(answer, list) else obj(answer).get("data"))]
        vectors: list[list[float]] = [[] for _ in range(count)]
        for position, item in enumerate(items):
            place = integer(item, "index", position)
            if not 0 <= place < count or vectors[place]:
                raise self._odd_vectors()
            vectors[place] = self._vector(item)
        if len(items) != count:
            raise self._odd_vectors()
        usage = obj(obj(answer).get("usage"))
        return Batch(vectors=vectors, prompt_tokens=max(0, integer(usage, "prompt_tokens")))

    async def load(self, model: str) -> None:
        """Asks a router to load a model; it returns before the model is there. A loaded one is no error."""
        try:
            await self._http.post_json("/models/load", json={"model": model})
        except UpstreamError as error:
            if not error.says("already running", "already loaded", "already loading"):
                raise

    async def unload(self, model: str) -> None:
        """Asks a router to unload a model. One that is not loaded is no error."""
        try:
            await self._http.post_json("/models/unload", json={"model": model})
        except UpstreamError as error:
            if not error.says("not running", "not loaded"):
                raise

    async def _tries_to_embed(self) -> bool | None:
        """Embeds one letter: a server with one model, which is loaded, says at once that it cannot."""
        try:
            await self._http.post_json("/v1/embeddings", json={"input": "a"}, timeout=PROBE_TIMEOUT)
        except UpstreamError as error:
            return False if error.status == 501 else None
        except Failure:
            return None  # too busy to say
        return True

    async def _guess(self) -> Flavor:
        reply = await self._http.request("GET", "/v1/models", timeout=PROBE_TIMEOUT)
        if reply.server.startswith("BaseHTTP/"):
            return MLX_LM  # Python's plain http.server; nobody else is as frugal
        if b'"llamacpp"' in reply.body:
            return LLAMA_SERVER
        if b'"vllm"' in reply.body:
            return VLLM
        return GENERIC

    def _vector(self, item: JsonObject) -> list[float]:
        value = item.get("embedding")
        if isinstance(value, str):
            raise BackendError(
                f"{self.name} answers base64 where numbers were asked for", metadata={"backend": self.name}
            )
        values = array(value)
        if len(values) == 1 and isinstance(values[0], list):
            values = values[0]
        vector = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(vector) != len(values) or not vector:
            raise self._odd_vectors()
        return vector

    def _odd_vectors(self) -> BackendError:
        return BackendError(
            f"{self.name} answers embeddings that do not fit the texts", metadata={"backend": self.name}
        )


def _offer(item: JsonObject, identity: Identity) -> Offer:
    name = text(item, "id")
    meta = obj(item.get("meta"))
    status = obj(item.get("status"))
    state, detail = pb.Model.STATE_ACTIVE, ""
    if identity.router:
        state = _STATES.get(text(status, "value"), pb.Model.STATE_UNSPECIFIED)
        if status.get("failed"):
            state = pb.Model.STATE_FAILED
            detail = f"Its process ended with exit code {integer(status, 'exit_code')}."
    elif identity.flavor is MLX_LM:
        state = pb.Model.STATE_UNSPECIFIED  # it has one in memory and does not say which
    aliases = [text({"a": alias}, "a") for alias in array(item.get("aliases"))]
    if name.endswith(".gguf"):  # llama-server names its model by its path; people do by the file
        path = PurePath(name)
        aliases += [path.name, path.stem]
    inputs = array(obj(item.get("architecture")).get("input_modalities"))
    return Offer(
        id=name,
        aliases=tuple(dict.fromkeys(a for a in aliases if a and a != name)),
        state=state,
        detail=detail,
        context=max(0, integer(meta, "n_ctx_train")),
        loaded_context=max(0, integer(meta, "n_ctx", integer(item, "max_model_len"))),
        vision="image" in inputs if inputs else None,
        fields={k: v for k, v in meta.items() if isinstance(v, str | int) and not isinstance(v, bool)},
    )
