"""The ledger: one ceiling, and what every worker may take of it.

Each worker has an account and a share. What it needs at the least is what it
cannot be asked to give back: its weights, its process, and what the requests
it has accepted can come to need. What is left of the ceiling is dealt out in
proportion to weights, since the state of a request grows with them. The shares
together never exceed the ceiling: one grows only by what others have confirmed
to have given up.

Nothing here waits or looks at anything: figures come in, figures go out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from forebay.mlx.v1 import worker_pb2 as worker

MIB = 1 << 20

WANTED = "wanted_bytes"
"""Where a worker's refusal of a request says with which limit it would have accepted it."""

WEIGHTS_MARGIN = 1.02
"""What weights take for each byte of their files: some tensors are stored narrower than they run."""

UNPACKED_ROOM = 0.6
"""Share of its limit that a worker on a CPU lets unpacked weights take. The rest is for what is read and
written."""

PROCESS_BYTES = 192 * MIB
"""What a worker takes beside MLX's memory, until it is measured: Python, libraries, a large vocabulary."""

ROOM_SHARE = 0.1
"""Share of its weights that a model needs for requests at the least, within the bounds below. With less it
would be in memory and good for little: 10 % of an 8B model at 4 bits is a conversation of 2,000 tokens."""

ROOM_LEAST = 64 * MIB
ROOM_MOST = 3 << 30


@dataclass(slots=True, kw_only=True, eq=False)
class Account:
    """What one worker takes, and may take."""

    model_id: str
    weights: int
    """Bytes of its weights: by their files, and as measured once it is loaded."""
    is_loaded: bool = False
    """Whether its figures are measured."""
    process: int = PROCESS_BYTES
    """Bytes it takes beside MLX's memory."""
    reserved: int = 0
    """Bytes that the requests it accepted can come to need."""
    wanted: int = 0
    """Limit that a request asked for and did not find."""
    share: int = 0
    """Bytes it may take, all in all. 0 until it was dealt any."""
    pid: int = 0
    """Its process; 0 has not been started."""
    report: worker.AdjustResponse | None = None
    """What it said of itself last."""

    @property
    def is_idle(self) -> bool:
        """Whether it said last that it has nothing to do."""
        return self.report is None or not self.report.live_count + self.report.waiting_count

    @property
    def limit(self) -> int:
        """Bytes that its weights and requests may take: what the worker is told."""
        return max(1, self.share - self.process)

    @property
    def firm(self) -> int:
        """Bytes that it cannot give back without breaking off what it has begun."""
        weights = self.weights if self.is_loaded else int(self.weights * WEIGHTS_MARGIN)
        return self.process + weights + self.reserved

    @property
    def least(self) -> int:
        """Bytes with which it is of use."""
        room = min(max(int(self.weights * ROOM_SHARE), ROOM_LEAST), ROOM_MOST)
        return max(self.firm - self.reserved + room, self.firm, self.process + self.wanted)

    def note(self, report: worker.AdjustResponse, footprint: int) -> None:
        """Takes in what the worker says of itself, and what its process holds."""
        self.report = report
        self.reserved = report.reserved_bytes
        if report.weights_bytes:
            self.is_loaded = True
            self.weights = report.weights_bytes
            beside = footprint - report.memory_bytes - report.freed_bytes
            if beside > 0:
                self.process = beside


class Ledger:
    """Deals one machine's memory out to workers.

    Args:
        ceiling: bytes that all of them may take together.
    """

    def __init__(self, ceiling: int) -> None:
        self.ceiling = ceiling
        self._accounts: dict[str, Account] = {}

    def __repr__(self) -> str:
        shares = " | ".join(f"{each.model_id} {mib(each.share)}" for each in self.accounts)
        return f"<Ledger {mib(self.ceiling)} [{shares}]>"

    @property
    def accounts(self) -> list[Account]:
        """All accounts. It may be asked on any thread."""
        return list(self._accounts.values())

    @property
    def dealt(self) -> int:
        """Bytes of all shares."""
        return sum(account.share for account in self.accounts)

    @property
    def free(self) -> int:
        """Bytes beyond what all need at the least. Negative is how much is lacking."""
        return self.ceiling - sum(account.least for account in self.accounts)

    def get(self, model_id: str) -> Account | None:
        """Returns a model's account, if it has one."""
        return self._accounts.get(model_id)

    def open(self, model_id: str, weights: int) -> Account:
        """Reserves what a model needs for being loaded. Whether that fits is for `free` to say."""
        account = self._accounts[model_id] = Account(model_id=model_id, weights=weights)
        return account

    def close(self, model_id: str) -> bool:
        """Gives back what a model has. Returns whether it had an account."""
        return self._accounts.pop(model_id, None) is not None

    def deal(self) -> dict[str, int]:
        """Returns the share that each should have. Together they exceed the ceiling only if firm needs do.

        Who is being loaded gets no more than it needs: it could not be told to give anything back.
        """
        accounts = self.accounts
        spare = self.free
        if spare >= 0:
            parts = {each.model_id: each.weights + 1 if each.is_loaded else 0 for each in accounts}
            whole = max(1, sum(parts.values()))
            return {each.model_id: each.least + spare * parts[each.model_id] // whole for each in accounts}
        spare = max(0, self.ceiling - sum(account.firm for account in accounts))
        wishes = sum(account.least - account.firm for account in accounts) or 1
        return {each.model_id: each.firm + spare * (each.least - each.firm) // wishes for each in accounts}

    def grow(self, targets: Mapping[str, int]) -> list[Account]:
        """Raises shares towards their targets by what is left of the ceiling, and returns those that grew."""
        growing = [each for each in self.accounts if targets.get(each.model_id, 0) > each.share]
        wishes = sum(targets[each.model_id] - each.share for each in growing)
        spare = min(max(0, self.ceiling - self.dealt), wishes)
        for each in growing:
            each.share += spare * (targets[each.model_id] - each.share) // max(1, wishes)
        return growing


@dataclass(frozen=True, slots=True)
class Candidate:
    """An idle model that could leave."""

    model_id: str
    frees: int
    """Bytes that come back."""
    idle_seconds: float
    """How long nobody has used it."""
    load_seconds: float
    """How long loading it again takes."""

    @property
    def rank(self) -> float:
        """How good it is to let it leave: how long it was idle, for each second of loading it again."""
        return self.idle_seconds / max(self.load_seconds, 0.1)


def choose(candidates: Iterable[Candidate], *, lacking: int, places: int) -> list[Candidate] | None:
    """Returns who is to leave so that so many bytes and places come free, or None if all together do not do.

    The longest unused leave first, those that load fast before those that load
    slowly. Whoever turns out not to be needed once a larger one leaves is spared.
    """
    chosen: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda each: -each.rank):
        if lacking <= 0 and places <= 0:
            break
        chosen.append(candidate)
        lacking -= candidate.frees
        places -= 1
    if lacking > 0 or places > 0:
        return None
    for candidate in reversed(chosen[:-1]):
        if lacking + candidate.frees <= 0 and places + 1 <= 0:
            chosen.remove(candidate)
            lacking += candidate.frees
            places += 1
    return chosen


def mib(size: int) -> str:
    """Returns a size for people."""
    return f"{size / MIB:.1f} MiB"


def holders(accounts: Sequence[Account], why: Mapping[str, str]) -> str:
    """Says who holds how much and why it stays, the largest first."""
    largest = sorted(accounts, key=lambda each: -each.least)
    return ", ".join(f"{each.model_id} {mib(each.least)} ({why[each.model_id]})" for each in largest)
