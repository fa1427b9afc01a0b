"""Reads a streamed chat completion. Pure: server-sent events in, parts of a reply out.

No two servers stream alike: roles come once or always, contents come as null,
choices are missing, usage comes in one of three places, errors in one of four.
What all of them do at the end of a reply that is whole is to send `[DONE]`;
without it the reply was cut, whatever the connection looked like.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BrokenStream
from forebay.upstream.errors import UpstreamError, error_in, from_value
from forebay.upstream.framing import SseEvent
from forebay.upstream.reasoning import Piece, ThinkSplitter
from forebay.upstream.tools import ToolCalls
from forebay.upstream.values import JsonObject, JsonValue, array, dump, integer, number, obj, parse, text

DONE: Final = "[DONE]"
"""The data that ends a whole reply."""

_REASONS: Final = {
    "stop": pb.FINISH_REASON_STOP,
    "eos": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "max_tokens": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
    "function_call": pb.FINISH_REASON_TOOL_CALLS,
    "content_filter": pb.FINISH_REASON_CONTENT_FILTER,
}
_BROKEN_OFF: Final = frozenset({"abort", "error", "cancelled"})
_KEEPALIVE: Final = re.compile(r"keepalive (\d{1,9})/(\d{1,9})")
_REASONING_KEYS: Final = ("reasoning_content", "reasoning")


@dataclass(slots=True)
class _Held:
    """What belongs to tokens whose text is not there yet."""

    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def move_to(self, delta: pb.Delta) -> None:
        delta.logprobs.extend(self.logprobs)
        delta.token_ids.extend(self.token_ids)
        delta.token_count = max(len(self.logprobs), len(self.token_ids))
        self.logprobs.clear()
        self.token_ids.clear()


class ReplyReader:
    """Reads one reply.

    Args:
        backend: the backend's name, for messages.
        want_logprobs: whether the caller asked for log probabilities.
        top_logprobs: how many of the most likely tokens the caller asked for.
        want_token_ids: whether the caller asked for token identifiers.
    """

    def __init__(
        self,
        *,
        backend: str,
        want_logprobs: bool = False,
        top_logprobs: int = 0,
        want_token_ids: bool = False,
    ) -> None:
        self._backend = backend
        self._want_logprobs = want_logprobs
        self._top_logprobs = top_logprobs
        self._want_token_ids = want_token_ids
        self._think = ThinkSplitter()
        self._tools = ToolCalls(backend=backend)
        self._held = _Held()
        self._stop_sequence = ""
        self._usage: JsonObject = {}
        self._timings: JsonObject = {}
        self._prompt_tokens = 0
        self.choices = 0
        """Parts of the reply that came, also empty ones."""
        self.finish_reason = ""
        """Why the reply ended, in the server's word. Empty until it says so."""
        self.stats: JsonObject = {}
        """What LM Studio says of how the reply went. Empty where it does not."""
        self.done = False
        """Whether `[DONE]` came: the reply is whole, and what follows is ignored."""
        self.model = ""
        """The model that the server says it is. Empty until it says so."""

    def feed(self, event: SseEvent) -> list[pb.Delta | pb.Progress]:
        """Returns what an event adds to the reply.

        Raises:
            UpstreamError: the event is an error.
            BrokenStream: the event is none of a chat completion.
        """
        if self.done:
            return []
        if event.comment:
            return self._comment(event.comment)
        if event.error:
            raise _as_error(event.error)
        data = event.data.strip()
        if data == DONE:
            self.done = True
            return []
        if not data:
            return []
        try:
            value = parse(data)
        except ValueError as error:
            if event.event == "error":
                raise _as_error(data) from error
            raise BrokenStream(
                f"{self._backend} sent an event that is not JSON", metadata={"backend": self._backend}
            ) from error
        if found := error_in(value):
            raise found
        if event.event == "error":
            raise from_value(value)
        return self._chunk(obj(value))

    def finish(self) -> tuple[list[pb.Delta], pb.Finished]:
        """Ends the reply; returns what was held back, and how it ended.

        Raises:
            BrokenStream: the reply is not whole, or its tool calls are not.
        """
        if not self.done:
            raise BrokenStream(
                f"{self._backend} ended its reply without {DONE}: it is cut off",
                metadata={"backend": self._backend},
            )
        if not self.choices:
            raise BrokenStream(
                f"{self._backend} ended its reply without having begun it",
                metadata={"backend": self._backend},
            )
        if self.finish_reason in _BROKEN_OFF:
            raise BrokenStream(
                f"{self._backend} broke its reply off ({self.finish_reason})",
                metadata={"backend": self._backend},
            )
        reason = _REASONS.get(self.finish_reason, pb.FINISH_REASON_UNSPECIFIED)
        deltas = self._deltas(self._think.finish())
        deltas += [
            pb.Delta(tool_call=part) for part in self._tools.finish(cut=reason == pb.FINISH_REASON_LENGTH)
        ]
        if self._held.logprobs or self._held.token_ids:
            rest = pb.Delta(text="")
            self._held.move_to(rest)
            deltas.append(rest)
        if len(self._tools) and reason in {pb.FINISH_REASON_STOP, pb.FINISH_REASON_UNSPECIFIED}:
            reason = pb.FINISH_REASON_TOOL_CALLS
        finished = pb.Finished(reason=reason, usage=self.used(), stop_sequence=self._stop_sequence)
        prefill = number(self._timings, "prompt_ms")
        if prefill > 0:
            finished.timings.prefill_duration.FromMicroseconds(int(prefill * 1000))
        return deltas, finished

    def _comment(self, comment: str) -> list[pb.Delta | pb.Progress]:
        found = _KEEPALIVE.fullmatch(comment)
        if not found:
            return []
        self._prompt_tokens = int(found[2])
        return [_prefill(int(found[1]), self._prompt_tokens)]

    def _chunk(self, chunk: JsonObject) -> list[pb.Delta | pb.Progress]:
        self.model = self.model or text(chunk, "model")
        self._usage = obj(chunk.get("usage")) or self._usage
        self._timings = obj(chunk.get("timings")) or self._timings
        self.stats = obj(chunk.get("stats")) or self.stats
        parts: list[pb.Delta | pb.Progress] = []
        if progress := obj(chunk.get("prompt_progress")):
            parts.append(_prefill(integer(progress, "processed"), integer(progress, "total")))
        for item in array(chunk.get("choices")):
            choice = obj(item)
            if integer(choice, "index") != 0:
                continue  # one reply was asked for; others are not for us
            self.choices += 1
            self.finish_reason = text(choice, "finish_reason") or self.finish_reason
            self._stop_sequence = text(choice, "stop_reason") or self._stop_sequence
            self._take_logprobs(choice)
            # A server that does not stream after all sends the message whole.
            parts += self._delta(obj(choice.get("delta")) or obj(choice.get("message")))
        return parts

    def _delta(self, delta: JsonObject) -> list[pb.Delta]:
        pieces: list[Piece] = []
        for key in _REASONING_KEYS:
            if reasoning := text(delta, key):
                pieces.append(("reasoning", reasoning))
                break
        if content := _content(delta.get("content")):
            pieces += self._think.feed(content)
        deltas = self._deltas(pieces)
        calls = [obj(call) for call in array(delta.get("tool_calls"))]
        if old := obj(delta.get("function_call")):
            calls.append({"index": 0, "function": old})
        for call in calls:
            deltas += [pb.Delta(tool_call=part) for part in self._call(call)]
        if deltas:
            self._held.move_to(deltas[0])
        return deltas

    def _call(self, call: JsonObject) -> Sequence[pb.ToolCallDelta]:
        function = obj(call.get("function"))
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            arguments = "" if arguments is None else dump(arguments).decode()
        index = integer(call, "index", -1)
        return self._tools.feed(
            None if index < 0 else index,
            call_id=text(call, "id"),
            name=text(function, "name"),
            arguments=arguments,
        )

    def _deltas(self, pieces: Sequence[Piece]) -> list[pb.Delta]:
        return [
            pb.Delta(text=piece) if kind == "text" else pb.Delta(reasoning=piece) for kind, piece in pieces
        ]

    def _take_logprobs(self, choice: JsonObject) -> None:
        for item in array(obj(choice.get("logprobs")).get("content")):
            entry = obj(item)
            if self._want_token_ids and "id" in entry:
                self._held.token_ids.append(integer(entry, "id"))
            if self._want_logprobs:
                listed = pb.TokenLogprob(
                    token=text(entry, "token"), raw_bytes=_bytes(entry), logprob=_logprob(entry)
                )
                if "id" in entry:
                    listed.token_id = integer(entry, "id")
                for top in array(entry.get("top_logprobs"))[: self._top_logprobs]:
                    one = obj(top)
                    added = listed.top_logprobs.add(
                        token=text(one, "token"), raw_bytes=_bytes(one), logprob=_logprob(one)
                    )
                    if "id" in one:
                        added.token_id = integer(one, "id")
                self._held.logprobs.append(listed)

    def used(self) -> pb.Usage:
        """Returns the tokens used, as far as the server has said."""
        usage, timings = self._usage, self._timings
        cached = integer(
            obj(usage.get("prompt_tokens_details")), "cached_tokens", integer(timings, "cache_n")
        )
        timed = integer(timings, "cache_n") + integer(timings, "prompt_n")
        return pb.Usage(
            prompt_token_count=_count(integer(usage, "prompt_tokens", timed or self._prompt_tokens)),
            cached_token_count=_count(cached),
            output_token_count=_count(integer(usage, "completion_tokens", integer(timings, "predicted_n"))),
            reasoning_token_count=_count(
                integer(obj(usage.get("completion_tokens_details")), "reasoning_tokens")
            ),
        )


def _content(value: JsonValue) -> str:
    """Returns the text of a content: a string, or a list of parts."""
    if isinstance(value, str):
        return value
    return "".join(text(obj(part), "text") for part in array(value))


def _as_error(said: str) -> UpstreamError:
    try:
        return from_value(parse(said))
    except ValueError:
        return from_value(said)


def _bytes(entry: JsonObject) -> bytes:
    values = array(entry.get("bytes"))
    return bytes(v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 256)


def _logprob(entry: JsonObject) -> float:
    value = entry.get("logprob")
    if isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value):
        # Zero probability comes as -infinity or as -9999; a float32 that is a little above 0 as rounding.
        return min(0.0, max(float(value), -1e30))
    return 0.0


def _count(value: int) -> int:
    return min(max(value, 0), 2**31 - 1)


def _prefill(processed: int, total: int) -> pb.Progress:
    progress = pb.Progress(stage=pb.Progress.STAGE_PREFILLING)
    if total > 0:
        progress.fraction = min(1.0, max(0.0, processed / total))
    return progress
