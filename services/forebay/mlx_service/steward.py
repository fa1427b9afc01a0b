"""The steward: sees to it that all models together stay within one ceiling.

Before a model is loaded its estimate is reserved, others give back what they
do not need, and idle models leave if that does not do. Only then, and only
when the memory is really there, the worker is started; it is told its share,
and told again whenever that changes. A model that cannot fit is refused with
figures before anybody has left for it.

One at a time makes room. Two that did it together would count the same memory
twice, and each would wait for what the other has just been given: so this is
one of the few places with a lock over an await. Nobody who holds it waits for
more than the end of calls on a model that leaves anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit import metrics
from forebay.kit.failure import MemoryExhausted
from forebay.kit.metrics import Metrics
from forebay.mlx.v1 import worker_pb2 as worker_pb
from forebay.mlx_service import blas
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.host import METAL_SHARE, Host, default_ceiling, weights_in
from forebay.mlx_service.ledger import UNPACKED_ROOM, Account, Candidate, Ledger, choose, holders, mib

if TYPE_CHECKING:
    from forebay.mlx_service.process import Worker
    from forebay.mlx_service.supervisor import Residence

logger = logging.getLogger(__name__)

_POLL = 0.05
"""Seconds between two looks at whether memory has come back."""

_RETURN_TIMEOUT = 5.0
"""Seconds that memory may take to come back once its process is gone, or was told to make room. The system
takes a moment; if it takes longer, somebody else has it."""

_FIT_TIMEOUT = 15.0
"""Seconds after which a load is refused whose room exists in the ledger and is not given up by who has it."""

_WISH_SECONDS = 10.0
"""Seconds that a worker keeps what a request asked for and has not used. The request is on its way there."""

_ALMOST = 0.99
"""Most of a load that is told before its worker says that it is done."""

_DRIFT = 0.05
"""Change of a figure, as a share of it, that is worth dealing anew."""


class Steward:
    """Keeps the ledger of a service and makes room in it.

    Args:
        settings: the ceiling, and how many models there may be.
        host: the machine.
        residences: all models.
        measured: the metrics of this process.
        weigh: returns the bytes of the weights in a folder, as stored and as float32.
        beside: returns the folder of the model that a model's worker loads in addition, if any.
    """

    def __init__(
        self,
        settings: MlxSettings,
        *,
        host: Host,
        residences: Mapping[str, Residence],
        measured: Metrics,
        weigh: Callable[[Path], tuple[int, int]] = weights_in,
        beside: Callable[[str], Path | None] = lambda model_id: None,
    ) -> None:
        self._settings = settings
        self._host = host
        self._residences = residences
        self._metrics = measured
        self._weigh = weigh
        self._beside = beside
        self.ledger = Ledger(
            settings.memory_ceiling or default_ceiling(host.total, reserve=settings.memory_reserve)
        )
        self._most = self.ledger.ceiling
        self._told: dict[str, int] = {}
        self._wanting: dict[str, int] = {}
        self._wished_at: dict[str, float] = {}
        self._turn = asyncio.Lock()
        self._due = asyncio.Event()
        self._returns_until = 0.0
        measured.observe(metrics.HOST_MEMORY, self._host_samples)
        measured.observe(metrics.MODEL_MEMORY, self._model_samples)
        measured.observe(metrics.ROWS, self._row_samples)

    def __repr__(self) -> str:
        return f"<Steward {self.ledger!r}>"

    async def admit(self, residence: Residence, folder: Path) -> None:
        """Reserves what a model needs, and returns when the memory is there. `release` gives it back.

        Raises:
            MemoryExhausted: it does not fit, even if every idle model left.
        """
        *wishes, least = self._estimates(residence.id, folder)
        async with self._turn:
            account = self.ledger.open(residence.id, least)
            try:
                await self._ask()
                for wish in wishes:
                    account.weights = wish
                    self.ledger.ceiling = self._ceiling()
                    if self.ledger.free >= 0:
                        with contextlib.suppress(MemoryExhausted):
                            return await self._fit(residence, account)
                account.weights = least
                await self._fit(residence, account)
            except BaseException:
                self.ledger.close(residence.id)
                raise

    def _estimates(self, model_id: str, folder: Path) -> list[int]:
        """Returns what a model's weights may take, the best first. Nobody leaves for any but the last.

        A worker on a CPU unpacks weights if its limit leaves room for that, and says by what it then
        takes whether it did. Of a model that several machines share only the parts here count.
        """
        stored, unpacked = self._weigh(folder)
        if (draft := self._beside(model_id)) is not None:
            more, more_unpacked = self._weigh(draft)
            stored, unpacked = stored + more, unpacked and more_unpacked and unpacked + more_unpacked
        if model_id in self._settings.shards:
            return [self._part(model_id, stored)]
        how = self._settings.cpu_weights
        if how == "stored" or sys.platform != "linux" or not unpacked:
            return [stored]
        if how == "float32":
            return [unpacked]
        return [stored] if self._settings.cpu_blas == blas.OFF else [int(unpacked / UNPACKED_ROOM), stored]

    def _part(self, model_id: str, weights: int) -> int:
        """Returns what is on this machine of so many bytes of a model's weights."""
        shards = self._settings.shards.get(model_id)
        return weights if shards is None else weights * shards.here // len(shards.hosts)

    def limit(self, residence: Residence) -> int:
        """Returns what a model's worker is to be told when it is started."""
        account = self.ledger.get(residence.id)
        limit = 0 if account is None else account.limit
        self._told[residence.id] = limit
        return limit

    def started(self, residence: Residence, pid: int) -> None:
        """Notes the process of a model's worker."""
        account = self.ledger.get(residence.id)
        if account is not None:
            account.pid, account.report, account.reserved = pid, None, 0

    def arrived(self, model_id: str) -> float | None:
        """Returns how much of a model that is being loaded is in memory, below 1; None is unknown.

        It compares what the worker's process holds with what was estimated, so it may leap at the end.
        """
        account = self.ledger.get(model_id)
        if account is None or not account.pid or account.is_loaded:
            return None
        return min(_ALMOST, self._used(account) / account.firm)

    async def settle(self, residence: Residence, worker: Worker) -> None:
        """Puts what was measured in the place of estimates, and tells a worker that has loaded its share."""
        self.note(residence, await worker.adjust(None))
        account = self.ledger.get(residence.id)
        if account is None:
            return
        # Growing takes no turn: it only takes what nobody has.
        self.ledger.grow({residence.id: self.ledger.deal()[residence.id]})
        self.note(residence, await worker.adjust(self.limit(residence)))

    def note(self, residence: Residence, report: worker_pb.AdjustResponse | None) -> None:
        """Takes in what a worker says of itself."""
        account = self.ledger.get(residence.id)
        if account is None or report is None:
            return
        before = account.report
        least = account.least
        account.note(report, self._used(account))
        label = {"gen_ai.request.model": self._metrics.admit(residence.id)}
        preempted = report.preemption_count - (before.preemption_count if before is not None else 0)
        if preempted > 0:
            self._metrics.add(metrics.PREEMPTIONS, label, preempted)
        if report.device_bytes and self._settings.memory_ceiling is None:
            self._most = min(self._most, int(report.device_bytes * METAL_SHARE))
        if report.wanted_bytes > account.limit:
            self._wanting[residence.id] = report.wanted_bytes
            self._due.set()
        if before is None or abs(account.least - least) > _DRIFT * least:
            self._due.set()

    def release(self, residence: Residence) -> None:
        """Gives back what a model had. Its process is gone."""
        self._told.pop(residence.id, None)
        self._wanting.pop(residence.id, None)
        self._wished_at.pop(residence.id, None)
        if self.ledger.close(residence.id):
            self._returns_until = _now() + _RETURN_TIMEOUT
            self._due.set()

    def left(self, residence: Residence, reason: str) -> None:
        """Counts a model that left memory by itself."""
        label = {"gen_ai.request.model": self._metrics.admit(residence.id), "forebay.reason": reason}
        self._metrics.add(metrics.MODEL_EVICTIONS, label)

    async def widen(self, residence: Residence, wanted: int) -> bool:
        """Gives a worker a limit of so many bytes, if idle models and unused shares make that possible.

        Returns whether it has it now.
        """
        async with self._turn:
            account = self.ledger.get(residence.id)
            if account is None or residence.usable is None:
                return False
            if account.limit >= wanted:
                return await self._tell(account)
            account.wanted = wanted
            self._wished_at[residence.id] = _now()
            try:
                await self._fit(residence, account)
            except MemoryExhausted:
                account.wanted = 0
                return False
            return account.limit >= wanted

    async def watch(self) -> None:
        """Deals anew when something changed: a model came or left, a worker wants more, the host has less."""
        interval = self._settings.health_interval.total_seconds()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await self._due.wait()
            is_due = self._due.is_set()
            self._due.clear()
            try:
                await self._review(is_due)
            except Exception:  # the models are served all the same, and the next look may go well
                logger.exception("dealing out memory failed through a fault of ours")

    async def _review(self, is_due: bool) -> None:
        ceiling = self._ceiling()
        if is_due or abs(ceiling - self.ledger.ceiling) > _DRIFT * self.ledger.ceiling:
            async with self._turn:
                self.ledger.ceiling = ceiling
                self._forget_wishes()
                await self._deal()
        wanting, self._wanting = self._wanting, {}
        for model_id, wanted in wanting.items():
            await self.widen(self._residences[model_id], wanted)

    def takes(self, model_id: str, weights: int) -> int:
        """Returns the bytes that a model takes, or would take if it were loaded; 0 is unknown.

        Args:
            model_id: the model.
            weights: bytes of its weights by its files; 0 is unknown.
        """
        account = self.ledger.get(model_id)
        if account is not None and account.is_loaded:
            return max(account.firm, self._used(account))
        return Account(model_id=model_id, weights=self._part(model_id, weights)).least if weights else 0

    def memory(self) -> pb.Memory:
        """Describes the machine and what the service takes of it."""
        used = reserved = 0
        for account in self.ledger.accounts:
            held = self._used(account)
            used += held
            reserved += max(0, account.firm - held)
        return pb.Memory(
            host=self._host.identity,
            total_bytes=self._host.total,
            available_bytes=self._host.available(),
            limit_bytes=self.ledger.ceiling,
            used_bytes=used,
            reserved_bytes=reserved,
        )

    # From here on: making room. Whoever is here has the turn.

    async def _fit(self, residence: Residence, account: Account) -> None:
        """Makes what all need at the least fit below the ceiling, and deals it out.

        Raises:
            MemoryExhausted: that is impossible; nobody was asked to leave.
        """
        await self._ask()
        self._forget_wishes()
        deadline: float | None = None
        while not residence.stopping and self.ledger.get(residence.id) is account:
            self.ledger.ceiling = self._ceiling()
            others = [r for r in self._others(residence) if self.ledger.get(r.id) is not None]
            places = len(others) - (self._settings.max_loaded_models - 1)
            lacking = -self.ledger.free
            if lacking <= 0 and places <= 0:
                if await self._deal(account):
                    return
                deadline = deadline or _now() + _FIT_TIMEOUT
                if _now() >= deadline:
                    raise self._refusal(account, others, places=places)
                await asyncio.sleep(_POLL)
                continue
            leaving = [r for r in others if r.stopping]
            fits = places <= 0 and lacking <= self._most - self.ledger.ceiling
            if not leaving and fits and _now() < self._returns_until:
                # A process has just ended, and the system does not see yet that its memory is free.
                await asyncio.sleep(_POLL)
                continue
            if not leaving:
                leaving = self._evict(account, others, lacking=lacking, places=places)
            await leaving[0].change()

    def _evict(self, own: Account, others: list[Residence], *, lacking: int, places: int) -> list[Residence]:
        """Asks those to leave who are idle and make enough room."""
        now = _now()
        idle = {r.id: r for r in others if r.worker is not None and not r.calls and not r.options.pinned}
        candidates = [
            Candidate(
                model_id=r.id,
                frees=account.least,
                idle_seconds=now - r.last_used,
                load_seconds=r.load_seconds,
            )
            for r in idle.values()
            if (account := self.ledger.get(r.id)) is not None
        ]
        chosen = choose(candidates, lacking=lacking, places=places)
        if chosen is None:
            raise self._refusal(own, others, places=places if lacking <= 0 else 0)
        for candidate in chosen:
            account = self.ledger.get(candidate.model_id)
            freed = mib(account.least if account is not None else 0)
            logger.info("%s leaves memory, %s, to make room for %s", candidate.model_id, freed, own.model_id)
            self.left(idle[candidate.model_id], "room")
            idle[candidate.model_id].stop(force=False)
        return [idle[candidate.model_id] for candidate in chosen]

    def _refusal(self, own: Account, others: list[Residence], *, places: int) -> MemoryExhausted:
        needed, ceiling = own.least, self.ledger.ceiling
        free = max(0, ceiling - sum(each.least for each in self.ledger.accounts if each is not own))
        accounts = [each for r in others if (each := self.ledger.get(r.id)) is not None]
        held = holders(accounts, {r.id: _why(r) for r in others})
        if places <= 0:
            text = (
                f"{own.model_id} has no room: it needs {mib(needed)}, {mib(free)} of {mib(ceiling)} are free"
                + (f", and {held} stay" if held else "")
            )
        else:
            text = (
                f"{own.model_id} has no room: {len(others)} models are loaded and in use or pinned, "
                f"and max_loaded_models is {self._settings.max_loaded_models}"
            )
        ever = needed <= self._most
        return MemoryExhausted(
            text if ever else f"{text}: it never fits",
            metadata={
                "model": own.model_id,
                "needed_bytes": str(needed),
                "free_bytes": str(free),
                "ceiling_bytes": str(ceiling),
                "held_by": held,
            },
            retry_after=self._settings.restart_backoff_max if ever else None,
        )

    async def _deal(self, newcomer: Account | None = None) -> bool:
        """Deals the shares out and tells the workers: first those that get less, then the others.

        Returns whether the newcomer has what it needs, and others have made room for it.
        """
        targets = self.ledger.deal()
        less = [each for each in self.ledger.accounts if targets[each.model_id] < each.share]
        await asyncio.gather(*(self._shrink(each, targets[each.model_id]) for each in less))
        if newcomer is not None and less:
            await self._until_back(less)
        grown = self.ledger.grow(targets)
        news = [each for each in self.ledger.accounts if each in grown or self._is_out_of_date(each)]
        await asyncio.gather(*(self._tell(each) for each in news))
        return newcomer is None or newcomer.share >= newcomer.least

    def _is_out_of_date(self, account: Account) -> bool:
        told = self._told.get(account.model_id)
        return told is not None and abs(told - account.limit) > _DRIFT * account.limit

    async def _shrink(self, account: Account, target: int) -> None:
        """Takes a share back as far as the worker confirms."""
        worker = self._worker(account)
        if worker is None:
            return  # it is being loaded and was promised its share
        report = await worker.adjust(max(1, target - account.process))
        if report is not None:
            self.note(self._residences[account.model_id], report)
            self._told[account.model_id] = report.limit_bytes
            account.share = min(account.share, max(target, report.limit_bytes + account.process))

    async def _tell(self, account: Account) -> bool:
        """Tells a worker its share. Returns whether it has heard."""
        worker = self._worker(account)
        if worker is None:
            return False
        limit = self._told[account.model_id] = account.limit
        report = await worker.adjust(limit)
        self.note(self._residences[account.model_id], report)
        return report is not None and report.limit_bytes >= limit

    def _forget_wishes(self) -> None:
        """Takes back what requests were given that have ended."""
        for account in self.ledger.accounts:
            wished_at = self._wished_at.get(account.model_id, 0.0)
            if account.wanted and account.is_idle and _now() >= wished_at + _WISH_SECONDS:
                account.wanted = 0

    async def _ask(self) -> None:
        """Asks all workers what they take."""
        asked = [each for each in self.ledger.accounts if self._worker(each) is not None]
        workers = [self._worker(each) for each in asked]
        reports = await asyncio.gather(*(each.adjust(None) for each in workers if each is not None))
        for account, report in zip(asked, reports, strict=True):
            self.note(self._residences[account.model_id], report)

    async def _until_back(self, accounts: Iterable[Account]) -> None:
        """Waits until workers hold no more than their shares, but not for ever."""
        deadline = _now() + _RETURN_TIMEOUT
        for account in accounts:
            while _now() < deadline and (worker := self._worker(account)) is not None:
                report = await worker.adjust(None)
                if report is None or report.memory_bytes + report.freed_bytes <= report.limit_bytes:
                    break
                await asyncio.sleep(_POLL)

    def _worker(self, account: Account) -> Worker | None:
        residence = self._residences.get(account.model_id)
        return None if residence is None else residence.usable

    def _others(self, residence: Residence) -> list[Residence]:
        return [each for each in self._residences.values() if each is not residence]

    def _used(self, account: Account) -> int:
        if not account.pid:
            return 0
        held = self._host.footprint(account.pid)
        if account.model_id in self._settings.shards:  # ranks on this machine are its worker's children
            held += sum(self._host.footprint(pid) for pid in self._host.children(account.pid))
        return held

    def _ceiling(self) -> int:
        """Returns what models may take now: never more than the machine can give beside what others hold."""
        used = sum(self._used(account) for account in self.ledger.accounts)
        return max(1, min(self._most, used + self._host.available()))

    # Gauges. They are read on a thread of their own.

    def _host_samples(self) -> list[tuple[float, dict[str, str]]]:
        memory = self.memory()
        return [
            (memory.limit_bytes, {"forebay.memory": "ceiling"}),
            (memory.used_bytes, {"forebay.memory": "used"}),
            (memory.reserved_bytes, {"forebay.memory": "reserved"}),
            (memory.available_bytes, {"forebay.memory": "available"}),
        ]

    def _model_samples(self) -> list[tuple[float, dict[str, str]]]:
        samples: list[tuple[float, dict[str, str]]] = []
        for account in self.ledger.accounts:
            label = {"gen_ai.request.model": self._metrics.label(account.model_id)}
            parts = {"share": account.share, "weights": account.weights, "reserved": account.reserved}
            if account.report is not None:
                parts |= {
                    "cache": account.report.cache_bytes,
                    "prefix": account.report.prefix_bytes,
                    "peak": account.report.peak_bytes,
                }
            samples += [(size, label | {"forebay.memory": part}) for part, size in parts.items()]
        return samples

    def _row_samples(self) -> list[tuple[float, dict[str, str]]]:
        samples: list[tuple[float, dict[str, str]]] = []
        for account in self.ledger.accounts:
            if account.report is not None:
                label = {"gen_ai.request.model": self._metrics.label(account.model_id)}
                samples.append((account.report.live_count, label | {"forebay.state": "live"}))
                samples.append((account.report.waiting_count, label | {"forebay.state": "waiting"}))
        return samples


def _why(residence: Residence) -> str:
    if residence.options.pinned:
        return "pinned"
    if residence.calls:
        return "in use"
    return "idle" if residence.worker is not None else "being loaded"


def _now() -> float:
    return asyncio.get_running_loop().time()
