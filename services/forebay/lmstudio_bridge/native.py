"""LM Studio's own chat, for the questions that it can take.

It is the only stream of LM Studio that tells how far it is with the prompt. It
takes one question with a system prompt and images, and no seed, stop sequence,
tool, schema or earlier answer; for all else the compatible chat serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BrokenStream
from forebay.lmstudio_bridge.listing import Entry
from forebay.lmstudio_bridge.translate import Options, data_uri, plain
from forebay.upstream.errors import UpstreamError, from_value
from forebay.upstream.framing import SseEvent
from forebay.upstream.values import JsonObject, JsonValue, integer, number, obj, parse, text

_SAMPLING: Final = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
OTHER_ITEM: Final = {"text": "message", "message": "text"}
"""The type of text items that the other versions know."""

_STAGES: Final = {
    "model_load": pb.Progress.STAGE_LOADING,
    "prompt_processing": pb.Progress.STAGE_PREFILLING,
}


def chat_body(
    request: pb.GenerateRequest, *, entry: Entry, model: str, options: Options, item: str
) -> dict[str, object] | None:
    """Returns the body for the native chat, or None if the request needs more than that has.

    Args:
        request: what is asked for.
        entry: the model that is to answer.
        model: what reaches it.
        options: our own options of the request.
        item: type of text items, which differs by version.
    """
    if options.draft_model or not _is_plain(request, entry):
        return None
    question = request.messages[-1]
    has_images = any(part.WhichOneof("kind") == "image" for part in question.parts)
    said = "".join(part.text for part in question.parts)
    body: dict[str, object] = {
        "model": model,
        "input": _items(question.parts, item) if has_images else said,
        "stream": True,
        "store": False,
    }
    if len(request.messages) == 2:
        body["system_prompt"] = "".join(part.text for part in request.messages[0].parts)
    for descriptor, value in request.sampling.ListFields():
        body[_SAMPLING[descriptor.name]] = plain(value)
    if request.limits.HasField("max_output_token_count"):
        body["max_output_tokens"] = request.limits.max_output_token_count
    return body


def with_items(body: dict[str, object], item: str) -> dict[str, object]:
    """Returns a body whose text items have another type."""
    items = body["input"]
    assert isinstance(items, list)
    return {**body, "input": [one if one["type"] == "image" else {**one, "type": item} for one in items]}


def refuses_items(error: UpstreamError) -> bool:
    """Whether a server refused the type of text items, as one of another version does."""
    return error.status == 400 and error.says("invalid discriminator value")


def _is_plain(request: pb.GenerateRequest, entry: Entry) -> bool:
    beyond = (
        request.tools
        or request.limits.stop_sequences
        or request.limits.stop_token_ids
        or request.include_token_ids
        or request.reasoning_effort
        or request.HasField("logprobs")
        or request.HasField("continue_from")
        or request.output_format.WhichOneof("constraint")
        or any(descriptor.name not in _SAMPLING for descriptor, _ in request.sampling.ListFields())
        or request.sampling.temperature > 1
    )
    roles = [message.role for message in request.messages]
    kinds = {part.WhichOneof("kind") for part in request.messages[-1].parts}
    return (
        not beyond
        and roles in ([pb.ROLE_USER], [pb.ROLE_SYSTEM, pb.ROLE_USER])
        and (kinds == {"text"} or entry.vision is not False)
    )


def _items(parts: Sequence[pb.Part], item: str) -> list[dict[str, str]]:
    return [
        {"type": item, "content": part.text}
        if part.WhichOneof("kind") == "text"
        else {"type": "image", "data_url": data_uri(part.image)}
        for part in parts
    ]


class NativeReply:
    """Reads one reply of the native chat.

    Args:
        backend: the backend's name, for messages.
        limit: tokens the reply may have. 0 is no limit.
    """

    def __init__(self, *, backend: str, limit: int) -> None:
        self._backend = backend
        self._limit = limit
        self._result: JsonObject = {}
        self._error: UpstreamError | None = None
        self.done = False
        """Whether the reply is over."""
        self.model = ""
        """The instance that LM Studio says it is. Empty until it says so."""

    def feed(self, event: SseEvent) -> list[pb.Delta | pb.Progress]:
        """Returns what an event adds to the reply. Events of unknown types add nothing.

        An error is no end: what was generated until then still follows, and then the end.

        Raises:
            UpstreamError: the reply ended after an error.
            BrokenStream: an event is not JSON.
        """
        if self.done or not event.data.strip():
            return []
        try:
            value: JsonValue = parse(event.data)
        except ValueError as error:
            raise BrokenStream(
                f"{self._backend} sent an event that is not JSON", metadata={"backend": self._backend}
            ) from error
        body = obj(value)
        kind = text(body, "type") or event.event
        topic, _, what = kind.partition(".")
        if kind == "error":
            self._error = from_value(body)
        elif kind == "chat.start":
            self.model = text(body, "model_instance_id")
        elif kind == "chat.end":
            self.done = True
            if self._error is not None:
                raise self._error
            self._result = obj(body.get("result"))
            self.model = self.model or text(self._result, "model_instance_id")
        elif topic in _STAGES and what in {"start", "progress"}:
            return [_progress(topic, body)]
        elif what == "delta" and (content := text(body, "content")):
            if topic == "message":
                return [pb.Delta(text=content)]
            if topic == "reasoning":
                return [pb.Delta(reasoning=content)]
        return []

    def finish(self) -> tuple[Sequence[pb.Delta], pb.Finished]:
        """Ends the reply; returns how it ended.

        Raises:
            UpstreamError: there was an error, and then nothing.
            BrokenStream: the reply is not whole.
        """
        if not self.done:
            if self._error is not None:
                raise self._error
            raise BrokenStream(
                f"{self._backend} ended its reply without chat.end: it is cut off",
                metadata={"backend": self._backend},
            )
        stats = obj(self._result.get("stats"))
        # The native chat does not say why a reply ended, but a reply of just the limit met it.
        cut = 0 < self._limit <= integer(stats, "total_output_tokens")
        finished = pb.Finished(
            reason=pb.FINISH_REASON_LENGTH if cut else pb.FINISH_REASON_STOP,
            usage=pb.Usage(
                prompt_token_count=max(0, integer(stats, "input_tokens")),
                output_token_count=max(0, integer(stats, "total_output_tokens")),
                reasoning_token_count=max(0, integer(stats, "reasoning_output_tokens")),
            ),
        )
        first = number(stats, "time_to_first_token_seconds")
        if first > 0:
            finished.timings.prefill_duration.FromMicroseconds(int(first * 1e6))
        return [], finished


def _progress(topic: str, body: JsonObject) -> pb.Progress:
    progress = pb.Progress(stage=_STAGES[topic])
    if "progress" in body:
        progress.fraction = min(1.0, max(0.0, number(body, "progress")))
    return progress
