"""The conformance suite notices: an engine that breaks one promise fails the test of that promise."""

import asyncio
from collections.abc import Callable
from typing import cast

import grpc
import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.config import ServerSettings
from forebay.kit.failure import Internal
from forebay.kit.pipeline import Call, Event, Send
from forebay.kit.server import serving
from forebay.testing.client import CallError, client
from forebay.testing.contract import ContractSuite, Target
from forebay.testing.grammar import GrammarError
from forebay.testing.script import DEFAULT_CAPABILITIES, Fault, Script, ScriptedModel
from forebay.testing.scripted import ScriptedEngine


class Lying(ScriptedEngine):
    """An engine whose requests and events are changed on their way."""

    def __init__(
        self,
        *,
        ask: Callable[[pb.GenerateRequest], object] = lambda request: None,
        say: Callable[[pb.GenerateResponse], object] = lambda event: None,
        fault: str = "",
        deaf: bool = False,
        capabilities: frozenset[pb.Capability.ValueType] = DEFAULT_CAPABILITIES,
    ) -> None:
        script = Script(token_count=20, fault=Fault.parse(fault) if fault else None)
        super().__init__(
            models=[ScriptedModel(name="m", script=script, capabilities=capabilities), "embedder"]
        )
        self._ask = ask
        self._say = say
        self._deaf = deaf
        self._deaf_calls: set[asyncio.Task[None]] = set()

    async def generate(self, call: Call[pb.GenerateRequest], send: Send) -> None:
        self._ask(call.request)

        async def lie(event: Event) -> None:
            self._say(cast("pb.GenerateResponse", event))
            await send(event)

        if not self._deaf:
            await super().generate(call, lie)
            return

        async def ignore(event: Event) -> None:
            await asyncio.sleep(0)

        orphan = asyncio.create_task(super().generate(call, ignore))
        self._deaf_calls.add(orphan)
        await super().generate(call, lie)

    async def embed(self, call: Call[pb.EmbedRequest]) -> pb.EmbedResponse:
        response = await super().embed(call)
        embeddings = list(response.embeddings)[::-1]
        embeddings[0].values[0] += 1.0
        del response.embeddings[:]
        response.embeddings.extend(embeddings)
        return response

    async def count_tokens(self, call: Call[pb.CountTokensRequest]) -> pb.CountTokensResponse:
        return pb.CountTokensResponse(token_count=4, backend=self.name, model="m")

    async def list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        return pb.ListModelsResponse()

    async def end(self) -> None:
        for orphan in self._deaf_calls:
            orphan.cancel()
        await asyncio.gather(*self._deaf_calls, return_exceptions=True)


def clear(name: str) -> Callable[[pb.GenerateRequest], object]:
    return lambda request: request.ClearField(name)  # type: ignore[arg-type]  # names of fields


def refuse(request: pb.GenerateRequest) -> None:
    raise Internal("a fault that nobody asked for")


def other_model(event: pb.GenerateResponse) -> None:
    if event.HasField("started"):
        event.started.model = "another"


def no_usage(event: pb.GenerateResponse) -> None:
    if event.HasField("finished"):
        event.finished.ClearField("usage")


def other_identifier(event: pb.GenerateResponse) -> None:
    if event.HasField("started"):
        event.started.request_id = "mine"


def shuffle(event: pb.GenerateResponse) -> None:
    if event.HasField("delta"):
        shuffle.count = getattr(shuffle, "count", 0) + 1  # type: ignore[attr-defined]  # a counter
        event.delta.text += str(shuffle.count)  # type: ignore[attr-defined]  # a counter


NOTICED = (AssertionError, CallError, GrammarError, grpc.RpcError, ValueError, pytest.fail.Exception)
"""How a test fails, an unreadable JSON and an error that did not come included."""

BROKEN: list[tuple[str, Callable[[], Lying]]] = [
    ("a_reply_follows_the_grammar_and_says_who_serves_it", lambda: Lying(fault="TRUNCATE@end")),
    ("a_reply_follows_the_grammar_and_says_who_serves_it", lambda: Lying(fault="REPEAT@0")),
    ("a_reply_follows_the_grammar_and_says_who_serves_it", lambda: Lying(say=other_model)),
    ("finished_has_a_reason_usage_and_timings", lambda: Lying(say=no_usage)),
    ("a_greedy_reply_is_the_same_again", lambda: Lying(say=shuffle)),
    ("a_seed_repeats_a_reply", lambda: Lying(say=shuffle)),
    ("max_output_token_count_ends_the_reply_with_length", lambda: Lying(ask=clear("limits"))),
    ("a_stop_sequence_cuts_the_reply_before_it", lambda: Lying(ask=clear("limits"))),
    ("the_request_id_is_echoed", lambda: Lying(say=other_identifier)),
    ("a_missing_request_id_is_made_up", lambda: Lying(say=other_identifier)),
    ("eight_replies_at_once_are_not_mixed", lambda: Lying(say=shuffle)),
    ("a_caller_who_leaves_stops_the_generation", lambda: Lying(deaf=True)),
    ("a_deadline_ends_the_call_and_the_generation", lambda: Lying(deaf=True)),
    ("a_schema_is_enforced_or_refused", lambda: Lying(ask=clear("output_format"))),
    ("a_regular_expression_is_enforced_or_refused", lambda: Lying(ask=clear("output_format"))),
    ("a_required_tool_is_called_or_refused", lambda: Lying(ask=clear("tools"))),
    ("a_required_tool_is_called_or_refused", lambda: Lying(ask=refuse)),
    ("log_probabilities_come_with_the_tokens_or_are_refused", lambda: Lying(ask=clear("logprobs"))),
    ("token_identifiers_come_with_the_tokens_or_are_refused", lambda: Lying(ask=clear("include_token_ids"))),
    ("a_stop_token_ends_the_reply_before_it_or_is_refused", lambda: Lying(ask=clear("limits"))),
    ("a_reply_is_taken_up_where_it_broke_off_or_refused", lambda: Lying(ask=clear("continue_from"))),
    ("texts_are_embedded_in_order", Lying),
    ("more_text_has_more_tokens", Lying),
    ("the_model_is_listed_with_its_backend", Lying),
]


@pytest.mark.parametrize(("promise", "engine"), BROKEN)
async def test_a_broken_promise_is_noticed(promise: str, engine: Callable[[], Lying]) -> None:
    lying = engine()

    async def active() -> int:
        return len(lying.active)

    def slowly(request: pb.GenerateRequest) -> pb.GenerateRequest:
        request.backend_options["scripted"].update({"token_count": 2000, "token_delay": 0.02})
        return request

    async with serving(ServerSettings(), inference=lying, models=lying) as up:
        await up.set_ready(True)
        target = Target(
            address=up.address,
            model="m",
            embedding_model="embedder",
            capabilities=DEFAULT_CAPABILITIES,
            backend="scripted",
            prepare=slowly,
            active=active,
            stop_seconds=0.3,
        )
        async with client(up.address, timeout=10) as peer:
            with pytest.raises(NOTICED):
                await getattr(ContractSuite(), f"test_{promise}")(target, peer)
        await lying.end()


def test_every_broken_promise_is_one_of_the_suite() -> None:
    promises = {name.removeprefix("test_") for name in dir(ContractSuite)}
    assert {promise for promise, _ in BROKEN} <= promises
