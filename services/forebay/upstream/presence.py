"""Notices when a server comes and goes, so that its bridge says so and neither starts nor stops with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from forebay.kit.failure import Failure, printable

_log = logging.getLogger(__name__)

Probe: TypeAlias = Callable[[], Awaitable[None]]
"""Asks the server whether it can serve; raises a `Failure` that says why not. Must never load a model."""

Change: TypeAlias = Callable[[bool, str], Awaitable[None]]
"""Is told whether the server can serve, and if not, why, in one sentence."""


async def watch_presence(
    probe: Probe,
    change: Change,
    *,
    name: str,
    interval: float = 2.0,
    patience: int = 2,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Probes a server forever and tells of every change.

    The first answer counts at once. A server that served is given up only
    after `patience` failures in a row: one lost probe of a busy machine would
    otherwise turn calls away.

    Args:
        probe: asks the server.
        change: is told of the first answer, and then of each change of it or of its reason.
        name: the backend's name, for the log.
        interval: seconds between probes. A server that comes back is found this soon.
        patience: failures in a row that make a serving server absent.
        sleep: waits.
    """
    told: tuple[bool, str] | None = None
    failures = 0
    while True:
        try:
            await probe()
        except Failure as failure:
            failures += 1
            state = (False, failure.message)
            settled = told is None or not told[0] or failures >= patience
        else:
            failures = 0
            state, settled = (True, ""), True
        if settled and state != told:
            if told is None or state[0] != told[0]:
                _log.info("%s %s", name, "serves" if state[0] else f"does not serve: {printable(state[1])}")
            told = state
            await change(*state)
        await sleep(interval)
