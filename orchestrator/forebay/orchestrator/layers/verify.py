"""Holds a finished reply against what was asked, before the caller is told that it is complete.

A framework that is asked for JSON may ignore that, and one whose context is too
small may leave out half of the prompt; both say that all went well. Capabilities
tell what a backend claims, and this what it did. What a reply shows of them is
told to a judge, so that claims become proofs, or doubts.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from jsonschema import exceptions, validators
from referencing import Registry
from referencing.exceptions import Unresolvable

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import FormatViolated, InvalidRequest, PromptTruncated
from forebay.kit.pipeline import Call, Event, Request, Send, Service, Serving
from forebay.orchestrator.routing.classify import MOST_WORDS_PER_TOKEN, least_tokens

_FIELD = "output_format.json_schema"

_LEAST_BYTES_PER_TOKEN = 2 * MOST_WORDS_PER_TOKEN
"""Bytes of text behind each token that it must at least have: no text has more of those tokens."""

Fault = Callable[[object], str]
"""Returns the keyword of a schema that a value violates, or an empty string."""

Judge = Callable[[str, str, pb.Capability.ValueType, bool], None]
"""Told of a backend, its model, a capability, and whether the reply was what that capability promises."""


class Verify:
    """Refuses to call a reply complete that is not what was asked for.

    Args:
        inner: serves the call.
        judge: told how each reply kept what its backend had promised.
    """

    def __init__(self, inner: Service, *, judge: Judge | None = None) -> None:
        self._inner = inner
        self._judge = judge

    def __call__(self, call: Call[Request], send: Send) -> Serving:
        """Serves a call.

        Raises:
            InvalidRequest: the JSON Schema is none.
            FormatViolated: the reply is not the JSON that was asked for.
            PromptTruncated: fewer prompt tokens were read than the prompt has at the very least.
        """
        request = call.request
        if isinstance(request, pb.GenerateRequest):
            return self._serve(call, request, send)
        return self._inner(call, send)

    async def _serve(self, call: Call[Request], request: pb.GenerateRequest, send: Send) -> None:
        check = _Check(request, send, self._judge)
        await self._inner(call, check)
        await check.end()


class _Check:
    """A `Send` that follows a reply, and keeps its end back until it was looked at.

    It is looked at when the layers below are done: raised in the middle of them, a failure of ours would pass
    for a broken stream, and be tried again.
    """

    def __init__(self, request: pb.GenerateRequest, send: Send, judge: Judge | None) -> None:
        accepted = request.accepted_degradations
        self._send = send
        self._judge = judge
        self._request = request
        self._fault: Fault | None = None
        if pb.DEGRADATION_KIND_FORMAT_NOT_ENFORCED not in accepted:
            self._fault = _fault_of(request.output_format)
        self._wanted = _wanted(request) if judge is not None else frozenset()
        self._shown: set[pb.Capability.ValueType] = set()
        self._follows = bool(self._fault or self._wanted)
        self._text = [request.continue_from.text]
        self._backend = ""
        self._model = ""  # empty where several models wrote the reply: nobody knows whose fault it is
        self._finished: pb.GenerateResponse | None = None

    def __call__(self, event: Event) -> Awaitable[None]:
        if isinstance(event, pb.GenerateResponse):
            match event.WhichOneof("event"):
                case "started":
                    self._backend, self._model = event.started.backend, event.started.model
                case "continued":
                    self._backend, self._model = event.continued.backend, ""
                case "delta":
                    if self._follows:
                        self._follow(event.delta)
                case "finished":
                    self._finished = event
                    return _nothing()
        return self._send(event)

    def _follow(self, delta: pb.Delta) -> None:
        if delta.text:
            self._text.append(delta.text)
        if delta.logprobs:
            self._shown.add(pb.CAPABILITY_LOGPROBS)
        if delta.token_ids:
            self._shown.add(pb.CAPABILITY_TOKEN_IDS)
        if delta.HasField("tool_call"):
            self._shown.add(pb.CAPABILITY_TOOLS)

    async def end(self) -> None:
        """Sends the end of the reply, if it deserves that."""
        if self._finished is not None:
            self._check(self._finished.finished)
            await self._send(self._finished)

    def _check(self, finished: pb.Finished) -> None:
        read = finished.usage.prompt_token_count
        least = self._least_tokens(read)
        if 0 < read < least:
            raise PromptTruncated(
                f"backend {self._backend} read {read} tokens of a prompt that has at least "
                f"{least}; load the model with a larger context",
                metadata={
                    "backend": self._backend,
                    "prompt_token_count": str(read),
                    "least_token_count": str(least),
                },
            )
        self._judge_shown(finished)
        # A reply that was cut by a limit or turned into tool calls says so itself.
        if self._fault is None or finished.reason != pb.FINISH_REASON_STOP:
            return
        try:
            keyword = self._fault(json.loads("".join(self._text)))
        except ValueError:
            keyword = "json"
        except RecursionError:
            keyword = "depth"
        if self._judge is not None and self._model:
            self._judge(self._backend, self._model, pb.CAPABILITY_JSON_SCHEMA, not keyword)
        if keyword:
            # Neither the value nor its path is named: both are text of the answer.
            raise FormatViolated(
                f"the reply of backend {self._backend} violates {keyword!r} of the format that was asked for",
                metadata={"backend": self._backend, "keyword": keyword},
            )

    def _judge_shown(self, finished: pb.Finished) -> None:
        """Tells what the reply shows of the capabilities it relied on."""
        if self._judge is None or not self._model:
            return
        has_text = any(self._text[1:])
        has_to_call = self._request.tool_choice.mode == pb.ToolChoice.MODE_REQUIRED
        for capability in self._wanted:
            is_shown = capability in self._shown
            # Who is offered tools may do without, and a reply that was cut may not get there.
            is_due = (
                has_to_call and finished.reason == pb.FINISH_REASON_STOP
                if capability == pb.CAPABILITY_TOOLS
                else has_text
            )
            if is_shown or is_due:
                self._judge(self._backend, self._model, capability, is_shown)

    def _least_tokens(self, read: int) -> int:
        """Returns how many tokens must have been read; 0 where they certainly were, or need not be."""
        request = self._request
        # A word and the space after it are two bytes at least, so most replies need no count of the words.
        if read * _LEAST_BYTES_PER_TOKEN >= request.ByteSize():
            return 0
        if pb.DEGRADATION_KIND_PROMPT_TRUNCATED in request.accepted_degradations:
            return 0
        return least_tokens(request)


def _wanted(request: pb.GenerateRequest) -> frozenset[pb.Capability.ValueType]:
    """Returns what the request asks for that a reply shows, unless its caller does without."""
    accepted = request.accepted_degradations
    wanted = set()
    if pb.DEGRADATION_KIND_OPTION_IGNORED not in accepted:
        if request.HasField("logprobs"):
            wanted.add(pb.CAPABILITY_LOGPROBS)
        if request.include_token_ids:
            wanted.add(pb.CAPABILITY_TOKEN_IDS)
    if request.tools and pb.DEGRADATION_KIND_TOOLS_DROPPED not in accepted:
        wanted.add(pb.CAPABILITY_TOOLS)
    return frozenset(wanted)


async def _nothing() -> None:
    """Is awaited in place of a send."""


def _fault_of(output_format: pb.OutputFormat) -> Fault | None:
    """Returns what finds the fault of a JSON value, or None if no JSON is asked for.

    Raises:
        InvalidRequest: the schema is none.
    """
    kind = output_format.WhichOneof("constraint")
    if kind == "any_json" and output_format.any_json:
        return lambda value: ""
    if kind != "json_schema":
        return None
    try:
        schema = json.loads(output_format.json_schema)
    except ValueError as error:
        raise _invalid("must be JSON") from error
    kind_of_schema = validators.validator_for(schema, default=validators.validator_for({}))
    try:
        kind_of_schema.check_schema(schema)
    except exceptions.SchemaError as error:
        raise _invalid(f"is no JSON Schema: see its {error.validator!r}") from error
    if "patternProperties" in output_format.json_schema:
        return lambda value: ""  # which properties are allowed depends on regular expressions
    # An empty registry, for by default a reference to a URL would be fetched from the network.
    lenient = validators.extend(  # type: ignore[no-untyped-call]  # the stubs leave it out
        kind_of_schema, {"pattern": _let_pass}
    )
    validator = lenient(schema, registry=Registry())

    def fault(value: object) -> str:
        try:
            error = next(validator.iter_errors(value), None)
        except Unresolvable:
            return "$ref"
        return "" if error is None else str(error.validator)

    return fault


def _let_pass(validator: Any, pattern: Any, instance: Any, schema: Any) -> Iterator[Any]:  # jsonschema's
    """Leaves regular expressions to the backend: dialects differ, and a bad one can take for ever."""
    return iter(())


def _invalid(text: str) -> InvalidRequest:
    return InvalidRequest(f"{_FIELD}: {text}", violations=[(_FIELD, text)])
