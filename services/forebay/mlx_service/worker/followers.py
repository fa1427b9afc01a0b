"""The other ranks of a model that several processes share, as rank 0 sees them.

Each is a process that gets what to do, a JSON object a line, on its standard
input: through ssh as well as here, without a port of its own, and with the end
of the pipe as the sign that rank 0 is gone. All ranks share every step, so one
that is lost takes the whole group along: rank 0 ends, its supervisor starts it
again, and it starts the others.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from forebay.mlx_service.shards import ShardSettings, is_here

log = logging.getLogger(__name__)

OnEnd = Callable[[int, int], None]
"""Is told, on a thread of its own, which rank ended and with which exit code."""

MODULE = "forebay.mlx_service.worker.follower"


class GroupLostError(BaseException):
    """The ranks are no longer in step. No `Exception`: nothing in this process can put that right."""


class Followers:
    """Starts the other ranks and tells them what to do.

    Args:
        shards: where they run.
        folder: the model.
        cache_limit: bytes of freed memory that each may keep.
        on_end: is told of a rank that ended.
    """

    def __init__(self, shards: ShardSettings, folder: Path, *, cache_limit: int, on_end: OnEnd) -> None:
        self.addresses = shards.addresses()
        """Where each rank listens."""
        self._shards = shards
        self._folder = folder
        self._cache_limit = cache_limit
        self._on_end = on_end
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def pids(self) -> list[int]:
        """Processes that were started for the other ranks."""
        return [process.pid for process in self._processes]

    def start(self) -> None:
        """Starts a process for each rank but the first."""
        for rank in range(1, len(self._shards.hosts)):
            process = subprocess.Popen(
                self._command(self._shards.hosts[rank]),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is rank 0's to handle
            )
            self._processes.append(process)
            watch = threading.Thread(
                target=self._watch, args=(rank, process), name=f"mlx-rank-{rank}", daemon=True
            )
            watch.start()
        for rank, process in enumerate(self._processes, start=1):
            job = {
                "rank": rank,
                "addresses": self.addresses,
                "kind": self._shards.kind,
                "model": str(self._folder),
                "cache_limit": self._cache_limit,
            }
            self._write(process, job)

    def tell(self, order: dict[str, object]) -> None:
        """Tells every other rank what rank 0 is about to do.

        Raises:
            GroupLostError: one is gone.
        """
        for process in self._processes:
            self._write(process, order)

    def _command(self, host: str) -> Sequence[str]:
        if is_here(host):
            return (sys.executable, "-m", MODULE)
        command = [part.replace("{host}", host) for part in self._shards.remote_command]
        return (*command, "-m", MODULE)

    @staticmethod
    def _write(process: subprocess.Popen[bytes], order: dict[str, object]) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        except OSError as error:
            raise GroupLostError("a rank of the model is gone") from error

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        self._on_end(rank, process.wait())


def end_with(load_failed: int, lost: int) -> OnEnd:
    """Returns what ends this process when a rank ended, in words that its supervisor reads.

    Args:
        load_failed: exit code of a rank, and then of this process, that could not load its part.
        lost: exit code of this process after any other end.
    """

    def end(rank: int, code: int) -> None:
        # Rank 0 may be waiting for that rank inside mlx, where no Python can reach it.
        how = "could not load its part" if code == load_failed else f"ended with {code}"
        print(f"forebay mlx-worker: rank {rank} of the model {how}", file=sys.stderr, flush=True)  # noqa: T201 - the front reads it
        logging.shutdown()
        os._exit(load_failed if code == load_failed else lost)

    return end
