"""Goes on with a reply whose backend was lost, if the caller allowed that.

A reply is followed as it passes. When it breaks off, what was sent is the
beginning of a new call, and what that one brings is joined to it: no text is
sent twice, none is left out, and one `continued` event marks the place.

A splice falls on a *mark*: a delta after which it is certain how many tokens
were generated. If something was sent after the last usable mark, the backend
that goes on has to say it again, letter by letter; that is compared and not
sent on. A reply that cannot be joined exactly stays broken.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from opentelemetry import trace

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import Failure, StreamInterrupted, StreamStalled
from forebay.kit.pipeline import Call, Event, Request, Resumption, Send, Service, Serving
from forebay.orchestrator.backoff import Backoff
from forebay.orchestrator.budget import RetryBudget
from forebay.orchestrator.config import RetrySettings
from forebay.orchestrator.layers.route import CONTINUING

_PASSING = frozenset({"tried", "reachable", "serving", "drained", "breaker", "room"})
"""Filters whose refusal may be over in a moment, so that waiting for a backend makes sense."""


class Continue:
    """Lets another backend go on with a reply that broke off after its first delta.

    Args:
        inner: serves a call from wherever its `continue_from` says.
        settings: how often to try, and how long to wait for a backend.
        budget: shared by all calls; each splice takes a retry from it.
        source: where jitter comes from.
        on_splice: told of the failure behind each splice, for metrics.
    """

    def __init__(
        self,
        inner: Service,
        *,
        settings: RetrySettings,
        budget: RetryBudget,
        source: random.Random,
        on_splice: Callable[[Failure], None] | None = None,
    ) -> None:
        self._inner = inner
        self._settings = settings
        self._budget = budget
        self._source = source
        self._on_splice = on_splice

    def __call__(self, call: Call[Request], send: Send) -> Serving:
        """Serves a call.

        Raises:
            StreamInterrupted: the reply broke off and nobody could go on with it.
            Failure: as the layers below say.
        """
        request = call.request
        if isinstance(request, pb.GenerateRequest) and request.routing.continuation in CONTINUING:
            return self._serve(call, request, send)
        return self._inner(call, send)

    async def _serve(self, call: Call[Request], request: pb.GenerateRequest, send: Send) -> None:
        reply = _Reply(request, send)
        lost = await self._begin(call, reply)
        left = self._most_attempts(request) - 1
        while lost is not None:
            mark = reply.splice()
            if mark is None:
                raise _unspliced(lost, "it cannot be joined exactly")
            if left <= 0 or not await self._take_retry(call):
                raise _unspliced(lost, "no retry is left")
            left -= 1
            if self._on_splice is not None:
                self._on_splice(lost)
            lost = await self._go_on(call, reply, mark, lost)

    async def _take_retry(self, call: Call[Request]) -> bool:
        """Takes a retry from the budget, and waits for one as it does for a backend.

        A backend that is lost takes all its replies with it, and more of them than there are retries at once.
        """
        now = asyncio.get_running_loop().time
        remaining = call.remaining()
        until = now() + min(
            self._settings.continue_wait.total_seconds(), math.inf if remaining is None else remaining
        )
        backoff = Backoff(self._settings.backoff_min, self._settings.backoff_min, source=self._source)
        while not self._budget.withdraw():
            wait = backoff.next()
            if now() + wait >= until:
                return False
            await asyncio.sleep(wait)
        return True

    async def _begin(self, call: Call[Request], reply: _Reply) -> Failure | None:
        """Serves the first part. Returns how its backend was lost, or None if it is all there is."""
        try:
            await self._inner(call, reply.take)
        except (StreamInterrupted, StreamStalled) as failure:
            if not reply.has_begun:
                raise
            return failure
        return None

    async def _go_on(self, call: Call[Request], reply: _Reply, mark: _Mark, lost: Failure) -> Failure | None:
        """Serves the next part. Returns how its backend was lost, or None if it was the last."""
        request = reply.rest(mark)
        resumption = reply.resumption
        backend = lost.metadata.get("backend", "")
        backoff = Backoff(self._settings.backoff_min, self._settings.backoff_max, source=self._source)
        waited = 0.0
        # Whoever was just lost comes last: its process may be gone while its connection seems up.
        tried = frozenset({backend})
        while True:
            part = _Part(reply, mark, lost)
            try:
                async with asyncio.timeout(None) as leash:
                    part.leash = leash
                    again = call.with_(request=request, tried=tried, resumption=resumption)
                    await self._inner(again, part)
                return None
            except TimeoutError:
                if not part.is_over:
                    raise
                if part.mismatch:
                    raise _unspliced(lost, part.mismatch) from None
                await part.end()
                return None
            except (StreamInterrupted, StreamStalled) as failure:
                return failure
            except Failure as failure:
                # The attempts below have ended, and none got as far as a delta.
                if tried and _may_pass(failure):
                    tried = frozenset()
                    continue
                wait = backoff.next()
                waited += wait
                remaining = call.remaining()
                if (
                    not _may_pass(failure)
                    or waited > self._settings.continue_wait.total_seconds()
                    or (remaining is not None and wait >= remaining)
                ):
                    raise _unspliced(lost, failure.reason) from failure
                await asyncio.sleep(wait)

    def _most_attempts(self, request: pb.GenerateRequest) -> int:
        if request.routing.HasField("max_attempt_count"):
            return max(1, request.routing.max_attempt_count)
        return self._settings.max_attempts


@dataclass(frozen=True, slots=True)
class _Mark:
    """A place in a reply after which it can go on."""

    text: int = 0
    """Characters of the answer before it."""
    reasoning: int = 0
    """Characters of the reasoning before it."""
    ids: int = 0
    """Token identifiers before it: those of all tokens, or 0."""
    count: int = 0
    """Tokens before it."""
    thought: int = 0
    """Those among them that are reasoning."""


class _Reply:
    """What the caller has of a reply, and from where it can go on."""

    def __init__(self, request: pb.GenerateRequest, send: Send) -> None:
        self.request = request
        self.send = send
        self.span = trace.get_current_span()
        """The request's: what comes later comes inside the span of an attempt."""
        self.has_begun = False
        self.has_tool_call = False
        self.weights = ""
        self._clock = asyncio.get_running_loop().time
        self._since = self._clock()
        self._first_delta = 0.0
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._ids: list[int] = []
        self._at = _Mark()  # where the part that is being read has come to
        self._marks = [self._at]  # the beginning, and the last two

    @property
    def resumption(self) -> Resumption:
        """What a call that goes on with it has to say."""
        policy = self.request.routing.continuation
        return Resumption(
            weights=self.weights, needs_same_weights=policy == pb.CONTINUATION_POLICY_SAME_WEIGHTS
        )

    @property
    def token_count(self) -> int:
        """Tokens generated up to here."""
        return self._at.count

    @property
    def text(self) -> str:
        """The answer, as far as it was sent."""
        self._text = ["".join(self._text)]
        return self._text[0]

    @property
    def reasoning(self) -> str:
        """The reasoning, as far as it was sent."""
        self._reasoning = ["".join(self._reasoning)]
        return self._reasoning[0]

    async def take(self, event: Event) -> None:
        """Takes an event of the first part."""
        event = cast("pb.GenerateResponse", event)
        if event.HasField("started"):
            self.weights = event.started.weights.digest
        elif event.HasField("delta"):
            self.note(event.delta)
            self._keep(event.delta)
        await self.send(event)

    async def pass_on(self, event: pb.GenerateResponse) -> None:
        """Takes a delta of a later part, which was noted before."""
        self._keep(event.delta)
        await self.send(event)

    def note(self, delta: pb.Delta) -> None:
        """Follows the part that is being read, whether what it says is sent on or not."""
        self._ids.extend(delta.token_ids)
        old = self._at
        count = old.count + delta.token_count
        are_ids_whole = len(self._ids) == count
        self._at = _Mark(
            text=old.text + len(delta.text),
            reasoning=old.reasoning + len(delta.reasoning),
            ids=count if are_ids_whole else 0,
            count=count,
            thought=old.thought + (delta.token_count if delta.reasoning else 0),
        )
        # A backend may count the tokens of several deltas in the last of them, so one without a count is no
        # mark. Where nothing is ever counted each delta is as good as the other.
        if delta.token_count or not count:
            self._marks = [self._marks[0], *self._marks[1:][-1:], self._at]

    def splice(self) -> _Mark | None:
        """Returns where to go on, and follows the next part from there. None if there is no such place."""
        request = self.request
        needs_same = self.resumption.needs_same_weights
        if self.has_tool_call or (needs_same and not self.weights):
            return None
        has_limit = request.limits.HasField("max_output_token_count")
        # At the limit there is nothing left to ask for but how it ended, so a step back is taken.
        usable = [
            mark
            for mark in self._marks
            if not has_limit or mark.count < request.limits.max_output_token_count
        ]
        if has_limit and not self._at.count:
            usable = self._marks[:1]  # how much is left is not known, so all of it is said again
        mark = usable[-1]
        if request.output_format.WhichOneof("constraint") and not (needs_same and mark.ids):
            return None  # only by its tokens is it certain where in the grammar the reply is
        del self._ids[mark.ids :]
        self._at = mark
        self._marks = [self._marks[0], mark]
        return mark

    def rest(self, mark: _Mark) -> pb.GenerateRequest:
        """Returns the request for what comes after a mark."""
        request = pb.GenerateRequest()
        request.CopyFrom(self.request)
        before = self.request.continue_from
        prefix = pb.ReplyPrefix(
            text=before.text + self.text[: mark.text],
            reasoning=before.reasoning + self.reasoning[: mark.reasoning],
        )
        if mark.ids and (before.token_ids or not (before.text or before.reasoning)):
            prefix.token_ids.extend((*before.token_ids, *self._ids[: mark.ids]))
        if prefix.text or prefix.reasoning:
            request.continue_from.CopyFrom(prefix)
        if request.limits.HasField("max_output_token_count"):
            request.limits.max_output_token_count -= mark.count
        return request

    def hand_over(self, weights: str) -> None:
        """Notes which weights write from here on. Tokens of others mean nothing to them."""
        if not weights or weights != self.weights:
            self._ids.clear()
        self.weights = weights

    def total(self, finished: pb.Finished, mark: _Mark) -> None:
        """Makes the end of a later part the end of the whole."""
        usage = finished.usage
        usage.prompt_token_count = max(0, usage.prompt_token_count - mark.count)
        usage.cached_token_count = min(usage.cached_token_count, usage.prompt_token_count)
        usage.output_token_count += mark.count
        usage.reasoning_token_count += mark.thought
        timings = finished.timings
        timings.first_delta_duration.FromNanoseconds(round((self._first_delta - self._since) * 1e9))
        timings.generation_duration.FromNanoseconds(round((self._clock() - self._first_delta) * 1e9))

    def _keep(self, delta: pb.Delta) -> None:
        if not self.has_begun:
            self.has_begun = True
            self._first_delta = self._clock()
        if delta.text:
            self._text.append(delta.text)
        elif delta.reasoning:
            self._reasoning.append(delta.reasoning)
        self.has_tool_call = self.has_tool_call or delta.HasField("tool_call")
        if not self.request.include_token_ids:
            delta.ClearField("token_ids")


class _Part:
    """A `Send` that joins a later part to what the caller has.

    Args:
        reply: what the caller has.
        mark: where this part begins.
        lost: why there is another part.
    """

    def __init__(self, reply: _Reply, mark: _Mark, lost: Failure) -> None:
        self._reply = reply
        self._mark = mark
        self._lost = lost
        self._started = pb.Started()
        self._is_announced = False
        # What was sent after the mark, which this part has to repeat.
        self._text = reply.text[mark.text :]
        self._reasoning = reply.reasoning[mark.reasoning :]
        self._endings = _Endings(reply.text, reply.request.limits.stop_sequences)
        self._held: list[pb.GenerateResponse] = []
        self.leash = asyncio.timeout(None)
        self.is_over = False
        self.mismatch = ""

    async def __call__(self, event: Event) -> None:
        """Takes the next event of this part."""
        event = cast("pb.GenerateResponse", event)
        match event.WhichOneof("event"):
            case "started":
                self._started = event.started
                self._reply.hand_over(event.started.weights.digest)
            case "delta":
                await self._delta(event)
            case "finished":
                if self._text or self._reasoning:
                    await self._stop("it ended before what was sent already")
                await self._release()
                await self._announce()
                self._reply.total(event.finished, self._mark)
                await self._reply.send(event)
            case _:
                await self._reply.send(event)

    async def end(self) -> None:
        """Sends the end of a reply whose stop sequence began in one part and ended in the next."""
        await self._announce()
        finished = pb.Finished(reason=pb.FINISH_REASON_STOP, stop_sequence=self._endings.met)
        finished.usage.output_token_count = self._reply.token_count - self._mark.count
        self._reply.total(finished, self._mark)
        await self._reply.send(pb.GenerateResponse(finished=finished))

    async def _delta(self, event: pb.GenerateResponse) -> None:
        delta = event.delta
        self._reply.note(delta)
        if self._is_out_of_turn(delta):
            await self._stop("it went on to something else")
        is_text = bool(delta.text)
        due, said = (self._text, delta.text) if is_text else (self._reasoning, delta.reasoning)
        if due and said:
            length = min(len(due), len(said))
            if due[:length] != said[:length]:
                await self._stop("it said something else than was sent already")
            if is_text:
                self._text, delta.text = due[length:], said[length:]
            else:
                self._reasoning, delta.reasoning = due[length:], said[length:]
            if not said[length:]:
                return
            delta.ClearField("logprobs")  # some of them were sent already, and which is not known
        self._held.append(event)
        if self._endings.may_follow(delta.text):
            if self._endings.met:
                self._held.clear()
                await self._stop("")
            return
        await self._release()

    def _is_out_of_turn(self, delta: pb.Delta) -> bool:
        if delta.text:
            return bool(self._reasoning)
        if delta.reasoning:
            return bool(self._text) and not self._reasoning
        return delta.HasField("tool_call") and bool(self._text or self._reasoning)

    async def _release(self) -> None:
        held, self._held = self._held, []
        if held:
            await self._announce()
        for event in held:
            await self._reply.pass_on(event)

    async def _announce(self) -> None:
        if self._is_announced:
            return
        self._is_announced = True
        started = self._started
        continued = pb.Continued(
            backend=started.backend,
            model=started.model,
            reason=self._lost.reason,
            text_length=len(self._reply.text),
            degradations=started.degradations,
            lost_backend=self._lost.metadata.get("backend", ""),
        )
        if started.HasField("weights"):
            continued.weights.CopyFrom(started.weights)
        self._reply.span.add_event(
            "forebay.continued",
            {
                "forebay.backend": continued.backend,
                "forebay.lost_backend": continued.lost_backend,
                "error.type": continued.reason,
                "forebay.text_length": continued.text_length,
            },
        )
        await self._reply.send(pb.GenerateResponse(continued=continued))

    async def _stop(self, mismatch: str) -> None:
        """Ends this part from within, as a caller would who leaves: its backend has done nothing wrong."""
        self.is_over, self.mismatch = True, mismatch
        self.leash.reschedule(asyncio.get_running_loop().time())
        await asyncio.Event().wait()


class _Endings:
    """Looks for stop sequences that began before a splice: whoever goes on may not look back that far.

    Args:
        before: the answer before the splice.
        sequences: the stop sequences.
    """

    def __init__(self, before: str, sequences: Sequence[str]) -> None:
        self._open = [
            (sequence, sequence[length:])
            for sequence in sequences
            for length in range(1, len(sequence))
            if before.endswith(sequence[:length])
        ]
        self._said = ""
        self.met = ""
        """The sequence that was met."""

    def may_follow(self, text: str) -> bool:
        """Whether the text after the splice, of which this is the next piece, may be the rest of one."""
        if not self._open:
            return False
        self._said += text
        for sequence, rest in self._open:
            if self._said.startswith(rest):
                self.met = sequence
                return True
        self._open = [(sequence, rest) for sequence, rest in self._open if rest.startswith(self._said)]
        return bool(self._open)


def _unspliced(lost: Failure, why: str) -> Failure:
    """Returns the failure of a reply that nobody goes on with, which says why."""
    lost.metadata["continuation"] = why
    return lost


def _may_pass(failure: Failure) -> bool:
    """Whether a backend may be there a moment later."""
    if "backend" in failure.metadata:
        return failure.elsewhere
    return any(value in _PASSING for key, value in failure.metadata.items() if key.startswith("refused."))
