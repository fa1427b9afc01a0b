"""Remembers which backend has read which conversation, so that the next turn can go back to it.

A backend that lists what it holds knows best. Most frameworks keep what they
read and tell nobody; for those, where a conversation went last is a good
guess. A wrong guess costs nothing: the prompt is read as if it were new.

What is remembered are hashes, kept apart for each caller: nobody's calls are
steered, and so nobody learns anything, by what others asked. They are of this
process alone, and a fifth of the work of the digests that processes exchange.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.prefixes import beginnings, digests, longest
from forebay.orchestrator.clock import Clock
from forebay.orchestrator.config import AffinitySettings

MOST_MESSAGES = 512
"""Messages beyond which a conversation is not looked up. It keeps the cost of a decision within bounds."""


class Affinity:
    """Beginnings of conversations, and the backends that read them.

    Args:
        settings: how many, and for how long.
        clock: gives the time in seconds.
    """

    def __init__(self, settings: AffinitySettings, *, clock: Clock) -> None:
        self._entries = settings.entries
        self._ttl = settings.ttl.total_seconds()
        self._clock = clock
        self._places: OrderedDict[tuple[str, int], dict[str, tuple[float, int]]] = OrderedDict()
        self._lives: Counter[str] = Counter()  # how often each backend was forgotten

    def __len__(self) -> int:
        return len(self._places)

    def chain(self, request: pb.GenerateRequest) -> list[int]:
        """Returns what stands for the request's beginnings here, one for each message, shortest first.

        Empty if the request is too long to look up.
        """
        if not self._entries or len(request.messages) > MOST_MESSAGES:
            return []
        tools = b"".join(tool.SerializeToString(deterministic=True) for tool in request.tools)
        link = hash((request.model, request.reasoning_effort, tools))
        links = []
        for message in request.messages:
            link = hash((link, message.SerializeToString(deterministic=True)))
            links.append(link)
        return links

    def note(self, caller: str, backend: str, chain: Sequence[int]) -> None:
        """Remembers that a backend has read a conversation.

        Args:
            caller: whose conversation it is.
            backend: the backend's name.
            chain: the conversation, from `chain`.
        """
        until = self._clock() + self._ttl
        for link in chain:
            key = (caller, link)
            place = self._places.setdefault(key, {})
            place[backend] = (until, self._lives[backend])
            self._places.move_to_end(key)
        while len(self._places) > self._entries:
            self._places.popitem(last=False)

    def forget(self, backend: str) -> None:
        """Forgets what a backend has read, since it may have lost it."""
        self._lives[backend] += (
            1  # what was noted in another life counts no more, and goes when its turn comes
        )

    def matches(self, caller: str, chain: Sequence[int], backends: Collection[str]) -> dict[str, int]:
        """Returns how many messages each backend has read, of those that have read any."""
        found: dict[str, int] = {}
        now = self._clock()
        for count in range(len(chain), 0, -1):
            for backend, (until, life) in self._places.get((caller, chain[count - 1]), {}).items():
                if backend in backends and until > now and life == self._lives[backend]:
                    found.setdefault(backend, count)
            if len(found) == len(backends):
                break
        return found


def listed(request: pb.GenerateRequest, held: Mapping[str, pb.Model]) -> dict[str, int]:
    """Returns how many messages each backend says that it holds, of those that say so of any beginning.

    Args:
        request: the request.
        held: the model that each backend would serve.
    """
    chains: dict[str, list[int]] = {}
    found: dict[str, int] = {}
    for backend, model in held.items():
        if not model.prefix_digests or len(request.messages) > MOST_MESSAGES:
            continue
        chain = chains.get(model.id)
        if chain is None:
            chain = chains[model.id] = digests(request, model=model.id)
        count = longest(chain, model.prefix_digests)
        if count:
            found[backend] = beginnings(request)[count - 1]
    return found


def shares(request: pb.GenerateRequest, counts: Mapping[str, int]) -> dict[str, float]:
    """Returns the part of the prompt, in (0.0, 1.0], that its first messages are.

    Args:
        request: the request.
        counts: how many of them, by backend. None is what comes before them, such as tools.
    """
    # One more for each message, so that a longer match always counts for more.
    sizes = [1 + sum(len(part.text) for part in message.parts) for message in request.messages]
    upto = [0, *accumulate(sizes)]
    # What is before the messages counts as one, for a match that holds nothing else.
    return {backend: (1 + upto[count]) / (1 + upto[-1]) for backend, count in counts.items()}
