"""From the chunks of a chat to the events of a reply."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Final

from google.protobuf import duration_pb2

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BrokenStream
from forebay.upstream.reasoning import TAGS, ThinkSplitter
from forebay.upstream.tools import ToolCalls
from forebay.upstream.values import JsonObject, JsonValue, array, dump, integer, number, obj, text

_REASONS: Final = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
_NANOSECONDS_IN_MICROSECOND: Final = 1000


class Reply:
    """Reads the chunks of one chat.

    Args:
        backend: the backend's name, for messages.
        wants_logprobs: whether log probabilities were asked for.
        splits_reasoning: whether reasoning comes inside the text, as old servers send it.
        least_prompt_tokens: what the prompt certainly has, where the server may leave those out of its count
            that it found in its cache, as old servers do. A smaller count is passed on as not known.
    """

    def __init__(
        self,
        *,
        backend: str,
        wants_logprobs: bool = False,
        splits_reasoning: bool = False,
        least_prompt_tokens: int = 0,
    ) -> None:
        self._backend = backend
        self._wants_logprobs = wants_logprobs
        self._least_prompt_tokens = least_prompt_tokens
        self._splitter = ThinkSplitter(tags=TAGS[:1]) if splits_reasoning else None
        self._tools = ToolCalls(backend=backend)
        self._held: list[pb.TokenLogprob] = []
        self._chances = 0
        self._last: JsonObject = {}
        self.done = False
        """Whether the last chunk came."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens in the prompt as the server counted them; 0 if it did not say."""
        return integer(self._last, "prompt_eval_count")

    def feed(self, chunk: JsonObject) -> list[pb.Delta]:
        """Takes a chunk and returns what of the reply it holds. The last chunk may hold some too.

        Raises:
            BrokenStream: a tool call cannot be read, or the server loaded a model and said nothing.
        """
        message = obj(chunk.get("message"))
        self._held += [_logprob(obj(entry)) for entry in array(chunk.get("logprobs"))]
        deltas = [self._with_logprobs(delta) for delta in self._texts(message)]
        deltas += [
            pb.Delta(tool_call=part) for call in array(message.get("tool_calls")) for part in self._call(call)
        ]
        if chunk.get("done") is True:
            self.done = True
            self._last = chunk
            deltas += self._rest()
        return deltas

    def finished(self, *, queued: float, loaded: float, first: float | None, spoke: float) -> pb.Finished:
        """Returns the last event.

        Args:
            queued: seconds the call waited for its slot.
            loaded: seconds it waited for the model.
            first: seconds from its arrival to its first delta; None if there was none.
            spoke: seconds from the first delta to the last.

        Raises:
            BrokenStream: the server did not generate, or left out the log probabilities without a word.
        """
        said = text(self._last, "done_reason")
        if said in {"load", "unload"}:
            raise BrokenStream(
                f"{self._backend} answered a conversation with {said!r} and no reply",
                metadata={"backend": self._backend},
            )
        produced = integer(self._last, "eval_count")
        if self._wants_logprobs and produced and not self._chances:
            raise BrokenStream(
                f"{self._backend} gave no log probabilities", metadata={"backend": self._backend}
            )
        reason = _REASONS.get(said, pb.FINISH_REASON_UNSPECIFIED)
        if len(self._tools) and reason != pb.FINISH_REASON_LENGTH:
            reason = pb.FINISH_REASON_TOOL_CALLS
        read = self.prompt_tokens
        if read < self._least_prompt_tokens:
            read = 0
        return pb.Finished(
            reason=reason,
            usage=pb.Usage(prompt_token_count=read, output_token_count=produced),
            timings=pb.Timings(
                queue_duration=_seconds(queued),
                load_duration=_seconds(loaded) if loaded else _nanoseconds(self._last, "load_duration"),
                first_delta_duration=_seconds(first or 0.0),
                generation_duration=_seconds(spoke),
                prefill_duration=_nanoseconds(self._last, "prompt_eval_duration"),
            ),
        )

    def _texts(self, message: JsonObject) -> Iterator[pb.Delta]:
        if reasoning := text(message, "thinking"):
            yield pb.Delta(reasoning=reasoning)
        content = text(message, "content")
        if self._splitter is None:
            if content:
                yield pb.Delta(text=content)
            return
        for kind, piece in self._splitter.feed(content):
            yield pb.Delta(text=piece) if kind == "text" else pb.Delta(reasoning=piece)

    def _with_logprobs(self, delta: pb.Delta) -> pb.Delta:
        # A chunk may hold probabilities and no text yet: they go with the text that they become.
        if self._held:
            delta.logprobs.extend(self._held)
            delta.token_count = len(self._held)
            self._chances += len(self._held)
            self._held = []
        return delta

    def _call(self, call: JsonValue) -> list[pb.ToolCallDelta]:
        fields = obj(call)
        function = obj(fields.get("function"))
        arguments = function.get("arguments")
        # Ollama sends an object; servers that imitate it send OpenAI's string.
        written = arguments if isinstance(arguments, str) else dump(arguments or {}).decode()
        return self._tools.whole(name=text(function, "name"), arguments=written, call_id=text(fields, "id"))

    def _rest(self) -> list[pb.Delta]:
        deltas = []
        if self._splitter is not None:
            for kind, piece in self._splitter.finish():
                deltas.append(pb.Delta(text=piece) if kind == "text" else pb.Delta(reasoning=piece))
        cut = text(self._last, "done_reason") == "length"
        deltas += [pb.Delta(tool_call=part) for part in self._tools.finish(cut=cut)]
        if self._held:
            deltas.append(self._with_logprobs(pb.Delta(text="")))
        return deltas


def _logprob(entry: JsonObject) -> pb.TokenLogprob:
    found = pb.TokenLogprob(
        token=text(entry, "token"), raw_bytes=_bytes(entry), logprob=min(0.0, number(entry, "logprob"))
    )
    for rival in array(entry.get("top_logprobs")):
        fields = obj(rival)
        found.top_logprobs.add(
            token=text(fields, "token"),
            raw_bytes=_bytes(fields),
            logprob=min(0.0, number(fields, "logprob")),
        )
    return found


def _bytes(entry: JsonObject) -> bytes:
    values = array(entry.get("bytes"))
    good = [value for value in values if isinstance(value, int) and 0 <= value < 256]
    return bytes(good) if len(good) == len(values) else b""


def _seconds(seconds: float) -> duration_pb2.Duration:
    found = duration_pb2.Duration()
    found.FromTimedelta(timedelta(seconds=max(0.0, seconds)))
    return found


def _nanoseconds(source: JsonObject, key: str) -> duration_pb2.Duration:
    found = duration_pb2.Duration()
    found.FromMicroseconds(max(0, integer(source, key)) // _NANOSECONDS_IN_MICROSECOND)
    return found
