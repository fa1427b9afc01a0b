"""What a reply of LM Studio's compatible chat means beyond the OpenAI dialect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import BrokenStream, ContextExceeded, Failure, StreamInterrupted
from forebay.upstream.framing import SseEvent
from forebay.upstream.openai_chat import ReplyReader
from forebay.upstream.values import number, text

_STOP_REASONS: Final = {
    "eosFound": pb.FINISH_REASON_STOP,
    "stopStringFound": pb.FINISH_REASON_STOP,
    "toolCalls": pb.FINISH_REASON_TOOL_CALLS,
    "maxPredictedTokensReached": pb.FINISH_REASON_LENGTH,
    "contextLengthReached": pb.FINISH_REASON_LENGTH,
}
_BROKEN: Final = {
    "userStopped": "somebody stopped it in LM Studio",
    "modelUnloaded": "its model was unloaded",
    "failed": "its engine failed",
}

_BYTES_PER_TOKEN: Final = 6
"""Bytes of prompt that a token takes at the most, over a whole prompt: English text has about 4, code and
other languages fewer. A prompt that is too long even so surely does not fit."""


class ChatReply:
    """Reads one reply.

    Args:
        request: what was asked.
        backend: the backend's name, for messages.
        context_length: tokens the model has room for. 0 is unknown.
    """

    def __init__(self, request: pb.GenerateRequest, *, backend: str, context_length: int) -> None:
        self._request = request
        self._backend = backend
        self._context_length = context_length
        self._any = False
        self._reader = ReplyReader(
            backend=backend,
            want_logprobs=request.HasField("logprobs"),
            top_logprobs=request.logprobs.top_logprob_count,
        )

    @property
    def model(self) -> str:
        """The model that LM Studio says it is. Empty until it says so."""
        return self._reader.model

    @property
    def done(self) -> bool:
        """Whether the reply is whole."""
        return self._reader.done

    def feed(self, event: SseEvent) -> list[pb.Delta | pb.Progress]:
        """Returns what an event adds to the reply.

        Raises:
            UpstreamError: the event is an error.
            BrokenStream: the event is none of a chat completion.
        """
        parts = self._reader.feed(event)
        self._any = self._any or any(isinstance(part, pb.Delta) for part in parts)
        return parts

    def finish(self) -> tuple[Sequence[pb.Delta], pb.Finished]:
        """Ends the reply; returns what was held back, and how it ended.

        Raises:
            ContextExceeded: the prompt did not fit, of which LM Studio says nothing.
            StreamInterrupted: LM Studio broke the reply off after it had begun.
            BrokenStream: the reply is not whole.
        """
        stop_reason = text(self._reader.stats, "stop_reason") or self._reader.finish_reason
        if stop_reason in _BROKEN:
            raise self._broken(f"{self._backend} broke the reply off: {_BROKEN[stop_reason]}")
        if not self._any and self._is_silent():
            self._check_context()
        deltas, finished = self._reader.finish()
        if stop_reason in _STOP_REASONS and finished.reason != pb.FINISH_REASON_TOOL_CALLS:
            finished.reason = _STOP_REASONS[stop_reason]
        stops = self._request.limits.stop_sequences
        if stop_reason == "stopStringFound" and len(stops) == 1:
            finished.stop_sequence = stops[0]
        first = number(self._reader.stats, "time_to_first_token")
        if first > 0:
            finished.timings.prefill_duration.FromMicroseconds(int(first * 1e6))
        return deltas, finished

    def _is_silent(self) -> bool:
        return not self._reader.used().output_token_count

    def _check_context(self) -> None:
        """Tells a prompt that was too long from an answer that is empty."""
        room = self._context_length
        used = self._reader.used().prompt_token_count
        tokens = used or prompt_bytes(self._request) // _BYTES_PER_TOKEN
        if room and tokens >= room:
            raise ContextExceeded(
                f"{self._backend} answered nothing, as it does when a prompt does not fit: it has room "
                f"for {room} tokens; shorten the prompt or load the model with more context",
                metadata={
                    "backend": self._backend,
                    "context_token_count": str(room),
                    "prompt_token_count": str(tokens),
                },
            )

    def _broken(self, message: str) -> Failure:
        kind = StreamInterrupted if self._any else BrokenStream
        return kind(message, metadata={"backend": self._backend})


def prompt_bytes(request: pb.GenerateRequest) -> int:
    """Returns the bytes of text in a conversation."""
    return sum(
        len(part.text.encode()) + len(part.tool_result.text.encode()) + len(part.tool_call.arguments_json)
        for message in request.messages
        for part in message.parts
    )
