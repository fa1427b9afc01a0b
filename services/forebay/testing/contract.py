"""The conformance suite: what every implementation of the interface promises, over a real connection.

A test module subclasses `ContractSuite`, gives it a fixture named `target`, and
pytest runs every promise against it. A promise that needs a capability is
tested the other way round where the target says that it lacks it: the call
must be refused by name, and served with a `Degradation` where the caller
accepts one. A test is skipped only where the target says why there is nothing
to test.

    class TestMyEngine(ContractSuite):
        @pytest.fixture
        async def target(self) -> AsyncIterator[Target]:
            async with ... as up:
                yield Target(address=up.address, model="m")
"""

# ruff: noqa: D102 - the name of a test is its promise; a docstring would say it again

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.rpc import INFERENCE_SERVICE, MODEL_SERVICE
from forebay.models.v1 import models_pb2 as models_pb
from forebay.testing import grammar
from forebay.testing.calls import message
from forebay.testing.client import CallError, Client, client

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"place": {"type": "string"}, "depth": {"type": "integer"}},
        "required": ["place", "depth"],
        "additionalProperties": False,
    }
)

TOOL = pb.Tool(
    name="look_up_depth",
    description="Returns the depth of a river at a place, in metres.",
    parameters_json_schema=json.dumps(
        {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
    ),
)

# A PNG of one pixel.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c636060f80f00"
    "0104010098e4b6d20000000049454e44ae426082"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the suite is run against, and what it says about itself."""

    address: str
    """Where it listens."""
    model: str
    """A model that generates."""
    embedding_model: str | None = None
    """A model that embeds, if there is one."""
    unknown_model: str = "no-such-model"
    """A name that no model has."""
    capabilities: frozenset[pb.Capability.ValueType] = frozenset()
    """What the model can do, beyond generating. What is not here must be refused."""
    deterministic: bool = True
    """Whether a reply at temperature 0 with a seed is always the same."""
    backend: str = ""
    """Name it gives itself in answers. Empty is any."""
    context_token_count: int | None = None
    """Tokens after which a prompt does not fit; None if that is unknown or too many to try."""
    long_token_count: int = 2000
    """Tokens to ask for where a reply must still be running when the test has seen its begin."""
    prepare: Callable[[pb.GenerateRequest], pb.GenerateRequest] = field(default=lambda request: request)
    """Changes a request so that its reply takes some seconds, where asking for many tokens is not enough."""
    active: Callable[[], Awaitable[int]] | None = None
    """Returns how many generations run behind it, where that can be seen."""
    stop_seconds: float = 5.0
    """Longest time until a cancelled generation has stopped. Ours take milliseconds; a framework may finish a
    token of a slow model first."""
    manages_models: bool = True
    """Whether it serves `ModelService`, with loading and unloading."""
    reflects: bool = True
    """Whether it serves reflection."""
    timeout: float = 30.0
    """Longest time that a call may take, in seconds."""

    def can(self, capability: pb.Capability.ValueType) -> bool:
        """Returns whether the model has a capability."""
        return capability in self.capabilities


class ContractSuite:
    """The promises. Subclasses give the fixture `target`."""

    @pytest.fixture
    async def peer(self, target: Target) -> AsyncIterator[Client]:
        """A client of the target."""
        async with client(target.address, timeout=target.timeout) as connected:
            yield connected

    @staticmethod
    def ask(
        target: Target, text: str = "Tell me about the river.", *, tokens: int = 12
    ) -> pb.GenerateRequest:
        """Returns a greedy request for a short reply."""
        return pb.GenerateRequest(
            model=target.model,
            messages=[message(text)],
            sampling=pb.Sampling(temperature=0.0, seed=7 if target.can(pb.CAPABILITY_SEED) else None),
            limits=pb.GenerationLimits(max_output_token_count=tokens),
        )

    @classmethod
    def ask_long(cls, target: Target) -> pb.GenerateRequest:
        """Returns a request whose reply takes some seconds."""
        return target.prepare(cls.ask(target, "Count as far as you can.", tokens=target.long_token_count))

    # The stream.

    async def test_a_reply_follows_the_grammar_and_says_who_serves_it(
        self, target: Target, peer: Client
    ) -> None:
        events = await peer.generate(self.ask(target))
        started = next(event.started for event in events if event.WhichOneof("event") == "started")
        assert started.model == target.model
        assert started.backend
        assert target.backend in ("", started.backend)
        assert not started.degradations
        assert not started.replayed
        assert grammar.text(events) or grammar.reasoning(events)

    async def test_finished_has_a_reason_usage_and_timings(self, target: Target, peer: Client) -> None:
        events = await peer.generate(self.ask(target))
        finished = events[-1].finished
        assert finished.reason in (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)
        assert finished.usage.prompt_token_count > 0
        assert finished.usage.output_token_count > 0
        assert finished.usage.cached_token_count <= finished.usage.prompt_token_count
        assert finished.timings.HasField("first_delta_duration")
        for name in ("first_delta_duration", "generation_duration"):
            assert getattr(finished.timings, name).ToNanoseconds() >= 0

    async def test_a_greedy_reply_is_the_same_again(self, target: Target, peer: Client) -> None:
        if not target.deterministic:
            pytest.skip("the target does not promise equal replies")
        first = await peer.text(self.ask(target))
        assert await peer.text(self.ask(target)) == first

    async def test_a_seed_repeats_a_reply(self, target: Target, peer: Client) -> None:
        request = self.ask(target)
        request.sampling.temperature = 1.0
        request.sampling.seed = 41
        if target.can(pb.CAPABILITY_SEED):
            if not target.deterministic:
                pytest.skip("the target does not promise equal replies")
            assert await peer.text(request) == await peer.text(request)
        else:
            await self.assert_refused(peer, request, "sampling.seed", pb.DEGRADATION_KIND_OPTION_IGNORED)

    async def test_max_output_token_count_ends_the_reply_with_length(
        self, target: Target, peer: Client
    ) -> None:
        events = await peer.generate(self.ask(target, tokens=3))
        assert events[-1].finished.reason == pb.FINISH_REASON_LENGTH
        assert 1 <= events[-1].finished.usage.output_token_count <= 3
        assert sum(delta.token_count for delta in grammar.deltas(events)) <= 3

    async def test_a_stop_sequence_cuts_the_reply_before_it(self, target: Target, peer: Client) -> None:
        if not target.deterministic:
            pytest.skip("which text comes cannot be foretold")
        whole = await peer.text(self.ask(target))
        stop = whole[len(whole) // 2 : len(whole) // 2 + 4]
        if not stop.strip():
            pytest.skip("the reply is too short to be cut")
        request = self.ask(target)
        request.limits.stop_sequences.append(stop)
        events = await peer.generate(request)
        assert grammar.text(events) == whole[: whole.index(stop)]
        assert events[-1].finished.reason == pb.FINISH_REASON_STOP
        assert events[-1].finished.stop_sequence in ("", stop)

    async def test_the_request_id_is_echoed(self, target: Target, peer: Client) -> None:
        request = self.ask(target, tokens=2)
        request.request_id = "0b6d4f5e-5f5e-4f0b-9a57-7f1f0c6f7c11"
        assert await self.started(peer, request) == request.request_id

    async def test_a_missing_request_id_is_made_up(self, target: Target, peer: Client) -> None:
        request = self.ask(target, tokens=2)
        first, second = await self.started(peer, request), await self.started(peer, request)
        assert first
        assert first != second

    async def test_a_system_message_and_a_conversation_are_read(self, target: Target, peer: Client) -> None:
        request = self.ask(target)
        del request.messages[:]
        request.messages.extend(
            [
                message("You answer in one word.", pb.ROLE_SYSTEM),
                message("Is water wet?"),
                message("Yes.", pb.ROLE_ASSISTANT),
                message("Is fire?"),
            ]
        )
        short = (await peer.generate(self.ask(target, "Is fire?")))[-1].finished.usage.prompt_token_count
        events = await peer.generate(request)
        usage = events[-1].finished.usage
        assert usage.prompt_token_count > short

    async def test_unknown_fields_are_ignored(self, target: Target, peer: Client) -> None:
        call: grpc.aio.UnaryStreamMultiCallable[bytes, pb.GenerateResponse] = peer.channel.unary_stream(
            f"/{INFERENCE_SERVICE}/Generate", response_deserializer=pb.GenerateResponse.FromString
        )
        field_1000 = b"\xc0\x3e\x01"
        stream = call(self.ask(target, tokens=2).SerializeToString() + field_1000, timeout=target.timeout)
        try:
            events = [event async for event in stream]
        finally:
            stream.cancel()
        grammar.check(events)

    async def test_eight_replies_at_once_are_not_mixed(self, target: Target, peer: Client) -> None:
        requests = [self.ask(target, f"Say something about number {n}.") for n in range(8)]
        for number, request in enumerate(requests):
            request.request_id = f"reply-{number}"
        async with asyncio.TaskGroup() as tasks:
            replies = [tasks.create_task(peer.generate(request)) for request in requests]
        for request, reply in zip(requests, replies, strict=True):
            identifiers = [e.started.request_id for e in reply.result() if e.WhichOneof("event") == "started"]
            assert identifiers == [request.request_id]
            if target.deterministic:
                assert grammar.text(reply.result()) == await peer.text(request)

    # Leaving.

    async def test_a_caller_who_leaves_stops_the_generation(self, target: Target, peer: Client) -> None:
        async with peer.stream(self.ask_long(target)) as call:
            async for event in call:
                if event.WhichOneof("event") == "delta":
                    break
        await self.assert_idle(target, peer)

    async def test_a_caller_who_leaves_before_the_first_delta_stops_the_generation(
        self, target: Target, peer: Client
    ) -> None:
        async with peer.stream(self.ask_long(target)) as call:
            await call.wait_for_connection()
        await self.assert_idle(target, peer)

    async def test_a_deadline_ends_the_call_and_the_generation(self, target: Target, peer: Client) -> None:
        with pytest.raises(CallError) as raised:
            await peer.generate(self.ask_long(target), timeout=0.5)
        assert raised.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await self.assert_idle(target, peer)

    # Refusals.

    async def test_an_unknown_model_is_not_found(self, target: Target, peer: Client) -> None:
        request = self.ask(target)
        request.model = target.unknown_model
        with pytest.raises(CallError) as raised:
            await peer.generate(request)
        assert raised.value.code is grpc.StatusCode.NOT_FOUND
        assert raised.value.reason == "MODEL_NOT_FOUND"
        assert not raised.value.events

    async def test_a_request_without_messages_is_refused_by_field(self, target: Target, peer: Client) -> None:
        request = self.ask(target)
        del request.messages[:]
        await self.assert_invalid(peer, request, "messages")

    async def test_a_temperature_out_of_range_is_refused_by_field(self, target: Target, peer: Client) -> None:
        for value in (-0.1, 2.1, math.nan):
            request = self.ask(target)
            request.sampling.temperature = value
            await self.assert_invalid(peer, request, "sampling.temperature")

    async def test_a_limit_of_no_tokens_is_refused_by_field(self, target: Target, peer: Client) -> None:
        await self.assert_invalid(peer, self.ask(target, tokens=0), "limits.max_output_token_count")

    async def test_a_prompt_that_does_not_fit_is_refused_and_never_cut(
        self, target: Target, peer: Client
    ) -> None:
        if target.context_token_count is None:
            pytest.skip("the target's context is unknown, or too large to fill in a test")
        with pytest.raises(CallError) as raised:
            await peer.generate(self.ask(target, "river " * (2 * target.context_token_count)))
        assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert raised.value.reason == "CONTEXT_EXCEEDED"

    # Capabilities.

    async def test_a_schema_is_enforced_or_refused(self, target: Target, peer: Client) -> None:
        request = self.ask(target, "Name a place on the river and its depth, as JSON.", tokens=200)
        request.output_format.json_schema = SCHEMA
        if not target.can(pb.CAPABILITY_JSON_SCHEMA):
            await self.assert_refused(peer, request, "output_format", pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED)
            return
        events = await peer.generate(request)
        if events[-1].finished.reason == pb.FINISH_REASON_LENGTH:
            pytest.skip("the model did not come to an end")
        value = json.loads(grammar.text(events))
        assert isinstance(value["place"], str)
        assert isinstance(value["depth"], int)

    async def test_any_json_is_enforced_or_refused(self, target: Target, peer: Client) -> None:
        request = self.ask(target, "Describe the river, as a JSON object.", tokens=300)
        request.output_format.any_json = True
        if not target.can(pb.CAPABILITY_JSON_SCHEMA):
            await self.assert_refused(peer, request, "output_format", pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED)
            return
        events = await peer.generate(request)
        if events[-1].finished.reason == pb.FINISH_REASON_LENGTH:
            pytest.skip("the model did not come to an end")
        json.loads(grammar.text(events))

    async def test_a_regular_expression_is_enforced_or_refused(self, target: Target, peer: Client) -> None:
        request = self.ask(target, "Say a number of three digits.")
        request.output_format.regex = "[0-9]{3}"
        if not target.can(pb.CAPABILITY_GRAMMAR):
            await self.assert_refused(peer, request, "output_format", pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED)
            return
        text = await peer.text(request)
        assert len(text) == 3
        assert text.isdigit()

    async def test_a_required_tool_is_called_or_refused(self, target: Target, peer: Client) -> None:
        request = self.ask(target, "How deep is the river at the mill?", tokens=200)
        request.tools.append(TOOL)
        if not target.can(pb.CAPABILITY_TOOLS):
            await self.assert_refused(peer, request, "tools", pb.DEGRADATION_KIND_TOOLS_DROPPED)
            return
        request.tool_choice.mode = pb.ToolChoice.MODE_REQUIRED
        try:
            events = await peer.generate(request)
        except CallError as error:
            assert (error.code, error.reason) == (  # noqa: PT017 - being refused by name is one of two promises
                grpc.StatusCode.UNIMPLEMENTED,
                "CAPABILITY_UNSUPPORTED",
            )
            return
        calls = grammar.tool_calls(events)
        assert [call.name for call in calls] == [TOOL.name] * len(calls)
        assert calls
        assert isinstance(json.loads(calls[0].arguments_json), dict)
        assert events[-1].finished.reason == pb.FINISH_REASON_TOOL_CALLS

    async def test_a_tool_s_result_is_read(self, target: Target, peer: Client) -> None:
        if not target.can(pb.CAPABILITY_TOOLS):
            pytest.skip("the model calls no tools")
        request = self.ask(target, "How deep is the river at the mill?")
        request.tools.append(TOOL)
        arguments = json.dumps({"place": "the mill"})
        call = pb.ToolCall(id="call_1", name=TOOL.name, arguments_json=arguments)
        result = pb.ToolResult(id="call_1", text="3 metres", name=TOOL.name)
        request.messages.add(role=pb.ROLE_ASSISTANT, parts=[pb.Part(tool_call=call)])
        request.messages.add(role=pb.ROLE_TOOL, parts=[pb.Part(tool_result=result)])
        await peer.generate(request)

    async def test_an_image_is_refused_where_the_model_cannot_see(self, target: Target, peer: Client) -> None:
        request = self.ask(target)
        request.messages[0].parts.add(image=pb.Blob(media_type="image/png", data=PIXEL))
        if target.can(pb.CAPABILITY_VISION):
            await peer.generate(request)
            return
        await self.assert_refused(peer, request, "messages", pb.DEGRADATION_KIND_IMAGE_DROPPED)

    async def test_log_probabilities_come_with_the_tokens_or_are_refused(
        self, target: Target, peer: Client
    ) -> None:
        request = self.ask(target)
        request.logprobs.top_logprob_count = 2
        if not target.can(pb.CAPABILITY_LOGPROBS):
            await self.assert_refused(peer, request, "logprobs", pb.DEGRADATION_KIND_OPTION_IGNORED)
            return
        entries = [e for delta in grammar.deltas(await peer.generate(request)) for e in delta.logprobs]
        assert entries
        for entry in entries:
            assert entry.logprob <= 0
            assert len(entry.top_logprobs) <= 2
            values = [top.logprob for top in entry.top_logprobs]
            assert values == sorted(values, reverse=True)

    async def test_token_identifiers_come_with_the_tokens_or_are_refused(
        self, target: Target, peer: Client
    ) -> None:
        request = self.ask(target)
        request.include_token_ids = True
        if not target.can(pb.CAPABILITY_TOKEN_IDS):
            await self.assert_refused(peer, request, "include_token_ids", pb.DEGRADATION_KIND_OPTION_IGNORED)
            return
        events = await peer.generate(request)
        identifiers = [token for delta in grammar.deltas(events) for token in delta.token_ids]
        # The last token may be the one that ends the reply, which has no text and no delta.
        assert 0 <= events[-1].finished.usage.output_token_count - len(identifiers) <= 1

    async def test_a_stop_token_ends_the_reply_before_it_or_is_refused(
        self, target: Target, peer: Client
    ) -> None:
        request = self.ask(target)
        if not target.can(pb.CAPABILITY_STOP_TOKEN_IDS):
            request.limits.stop_token_ids.append(5)
            await self.assert_refused(
                peer, request, "limits.stop_token_ids", pb.DEGRADATION_KIND_OPTION_IGNORED
            )
            return
        if not target.deterministic or not target.can(pb.CAPABILITY_TOKEN_IDS):
            pytest.skip("which token comes cannot be foretold")
        request.include_token_ids = True
        whole = [token for d in grammar.deltas(await peer.generate(request)) for token in d.token_ids]
        first = [i for i, token in enumerate(whole) if i and token not in whole[:i]]
        if not first:
            pytest.skip("the reply is one token again and again")
        at = first[len(first) // 2]
        request.limits.stop_token_ids.append(whole[at])
        events = await peer.generate(request)
        finished = events[-1].finished
        assert [token for delta in grammar.deltas(events) for token in delta.token_ids] == whole[:at]
        assert (finished.reason, finished.stop_token_id) == (pb.FINISH_REASON_STOP, whole[at])
        assert finished.usage.output_token_count == at
        # A limit there cuts the same text, but for a character that the limit leaves open.
        assert grammar.text(events).rstrip("\ufffd") == await peer.text(self.ask(target, tokens=at))

    async def test_a_reply_is_taken_up_where_it_broke_off_or_refused(
        self, target: Target, peer: Client
    ) -> None:
        request = self.ask(target)
        request.continue_from.text = "The river"
        if not target.can(pb.CAPABILITY_CONTINUE):
            with pytest.raises(CallError) as raised:
                await peer.generate(request)
            assert raised.value.code is grpc.StatusCode.UNIMPLEMENTED
            assert raised.value.reason == "CAPABILITY_UNSUPPORTED"
            return
        if not target.deterministic:
            await peer.generate(request)
            return
        deltas = grammar.deltas(await peer.generate(self.ask(target)))
        whole = "".join(delta.text for delta in deltas)
        request.continue_from.text = "".join(delta.text for delta in deltas[: len(deltas) // 2])
        rest = await peer.text(request)
        begun = request.continue_from.text + rest
        assert begun.startswith(whole) or whole.startswith(begun)

    async def test_an_accepted_shortfall_that_is_none_changes_nothing(
        self, target: Target, peer: Client
    ) -> None:
        request = self.ask(target)
        request.accepted_degradations.extend(
            kind for kind in pb.DegradationKind.values() if kind != pb.DEGRADATION_KIND_UNSPECIFIED
        )
        events = await peer.generate(request)
        started = next(event.started for event in events if event.WhichOneof("event") == "started")
        assert not started.degradations

    # Unary calls.

    async def test_texts_are_embedded_in_order(self, target: Target, peer: Client) -> None:
        model = self.embedding_model(target)
        texts = ["the river is deep", "a list of tax forms", "the river is deep"]
        response = await peer.embed(pb.EmbedRequest(model=model, texts=texts))
        vectors = [list(embedding.values) for embedding in response.embeddings]
        assert len(vectors) == 3
        assert {len(vector) for vector in vectors} == {response.dimension_count}
        assert response.dimension_count > 0
        assert vectors[0] == pytest.approx(vectors[2], abs=1e-3)
        assert vectors[0] != pytest.approx(vectors[1], abs=1e-3)
        if response.normalized:
            for vector in vectors:
                assert math.sqrt(sum(x * x for x in vector)) == pytest.approx(1.0, abs=1e-3)
        alone = await peer.embed(pb.EmbedRequest(model=model, texts=texts[1:2]))
        assert list(alone.embeddings[0].values) == pytest.approx(vectors[1], abs=2e-2)
        assert response.model == model
        assert target.backend in ("", response.backend)

    async def test_nothing_to_embed_is_refused_by_field(self, target: Target, peer: Client) -> None:
        with pytest.raises(CallError) as raised:
            await peer.embed(pb.EmbedRequest(model=self.embedding_model(target)))
        assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert raised.value.fields == ["texts"]

    async def test_embedding_with_an_unknown_model_is_not_found(self, target: Target, peer: Client) -> None:
        self.embedding_model(target)
        with pytest.raises(CallError) as raised:
            await peer.embed(pb.EmbedRequest(model=target.unknown_model, texts=["a"]))
        assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")

    async def test_more_text_has_more_tokens(self, target: Target, peer: Client) -> None:
        request = pb.CountTokensRequest(model=target.model, messages=[message("water")])
        if not target.can(pb.CAPABILITY_COUNT_TOKENS):
            with pytest.raises(CallError) as raised:
                await peer.count_tokens(request)
            assert raised.value.code is grpc.StatusCode.UNIMPLEMENTED
            assert raised.value.reason == "CAPABILITY_UNSUPPORTED"
            return
        short = await peer.count_tokens(request)
        request.messages[0].parts[0].text = "water runs down to the sea " * 8
        long = await peer.count_tokens(request)
        assert 0 < short.token_count < long.token_count
        assert long.token_count >= 8
        assert long.model == target.model
        assert target.backend in ("", long.backend)

    async def test_the_model_is_listed_with_its_backend(self, target: Target, peer: Client) -> None:
        listed = {model.id: model for model in await peer.list_models()}
        assert target.model in listed
        model = listed[target.model]
        assert model.backend
        assert target.backend in ("", model.backend)
        reports = {report.capability: report.support for report in model.capabilities}
        assert reports.get(pb.CAPABILITY_GENERATE) != pb.CapabilityReport.SUPPORT_NO
        for capability in target.capabilities:
            assert reports.get(capability) != pb.CapabilityReport.SUPPORT_NO, pb.Capability.Name(capability)

    # The service.

    async def test_health_is_serving_for_the_server_and_the_service(
        self, target: Target, peer: Client
    ) -> None:
        stub = health_pb2_grpc.HealthStub(peer.channel)
        for service in ("", INFERENCE_SERVICE):
            request = health_pb2.HealthCheckRequest(service=service)
            response = await stub.Check(  # type: ignore[attr-defined]  # set at run time
                request, timeout=target.timeout
            )
            assert response.status == health_pb2.HealthCheckResponse.SERVING, service

    async def test_reflection_lists_the_services(self, target: Target, peer: Client) -> None:
        if not target.reflects:
            pytest.skip("the target serves no reflection")
        ask: grpc.aio.StreamStreamMultiCallable[
            reflection_pb2.ServerReflectionRequest, reflection_pb2.ServerReflectionResponse
        ] = peer.channel.stream_stream(
            f"/{reflection.SERVICE_NAME}/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        request = reflection_pb2.ServerReflectionRequest(list_services="*")
        call = ask(iter([request]), timeout=target.timeout)
        try:
            response = await call.read()
        finally:
            call.cancel()
        assert isinstance(response, reflection_pb2.ServerReflectionResponse), "the stream was empty"
        names = {service.name for service in response.list_services_response.service}
        wanted = {INFERENCE_SERVICE, MODEL_SERVICE} if target.manages_models else {INFERENCE_SERVICE}
        assert wanted <= names

    async def test_loading_a_loaded_model_succeeds(self, target: Target, peer: Client) -> None:
        self.needs_models(target)
        request = models_pb.LoadModelRequest(model=target.model)
        await peer.load(request)
        loaded = await peer.load(request)
        assert loaded.model.id == target.model
        assert loaded.model.state == pb.Model.STATE_ACTIVE

    async def test_unloading_frees_a_model_and_again_does_nothing(self, target: Target, peer: Client) -> None:
        self.needs_models(target)
        await peer.load(models_pb.LoadModelRequest(model=target.model))
        for _ in range(2):
            model = await peer.unload(target.model)
            assert model.id == target.model
            assert model.state in (pb.Model.STATE_AVAILABLE, pb.Model.STATE_UNLOADING)
        await peer.generate(self.ask(target))

    async def test_an_unknown_model_cannot_be_described_loaded_or_unloaded(
        self, target: Target, peer: Client
    ) -> None:
        self.needs_models(target)
        unknown = target.unknown_model
        for attempt in (
            peer.get_model(unknown),
            peer.load(models_pb.LoadModelRequest(model=unknown)),
            peer.unload(unknown),
        ):
            with pytest.raises(CallError) as raised:
                await attempt
            assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")

    async def test_a_model_is_described(self, target: Target, peer: Client) -> None:
        self.needs_models(target)
        assert (await peer.get_model(target.model)).id == target.model

    # How promises are checked.

    @staticmethod
    async def started(peer: Client, request: pb.GenerateRequest) -> str:
        """Returns the identifier under which a reply was started."""
        events = await peer.generate(request)
        return next(event.started.request_id for event in events if event.WhichOneof("event") == "started")

    @staticmethod
    def embedding_model(target: Target) -> str:
        """Returns the target's embedding model, or skips the test."""
        if target.embedding_model is None:
            pytest.skip("the target has no model that embeds")
        return target.embedding_model

    @staticmethod
    def needs_models(target: Target) -> None:
        """Skips the test if the target does not manage models."""
        if not target.manages_models:
            pytest.skip("the target does not load and unload models")

    @staticmethod
    async def assert_invalid(peer: Client, request: pb.GenerateRequest, path: str) -> None:
        """Asserts that a request is refused because of one field."""
        with pytest.raises(CallError) as raised:
            await peer.generate(request)
        assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert raised.value.failure.reason == "INVALID_REQUEST"
        assert raised.value.fields == [path]

    @staticmethod
    async def assert_refused(
        peer: Client, request: pb.GenerateRequest, path: str, kind: pb.DegradationKind.ValueType
    ) -> None:
        """Asserts that a shortfall is refused by name, and told where the caller accepts it."""
        with pytest.raises(CallError) as raised:
            await peer.generate(request)
        assert raised.value.code is grpc.StatusCode.UNIMPLEMENTED
        assert raised.value.reason == "CAPABILITY_UNSUPPORTED"
        accepting = pb.GenerateRequest()
        accepting.CopyFrom(request)
        accepting.accepted_degradations.append(kind)
        events = await peer.generate(accepting)
        started = next(event.started for event in events if event.WhichOneof("event") == "started")
        told = [d for d in started.degradations if d.kind == kind and d.field.startswith(path)]
        assert told, f"no degradation of {path} among {list(started.degradations)}"
        assert told[0].detail

    async def assert_idle(self, target: Target, peer: Client) -> None:
        """Asserts that nothing is generated soon; where that cannot be seen, that a new call is served."""
        if target.active is None:
            await peer.generate(self.ask(target, tokens=2))
            return
        loop = asyncio.get_running_loop()
        until = loop.time() + target.stop_seconds
        while (count := await target.active()) and loop.time() < until:  # noqa: ASYNC110 - the target has no event for us
            await asyncio.sleep(0.01)
        assert count == 0, f"{count} generations still run"
