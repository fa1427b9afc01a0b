"""A rank of a shared model that is not the first: `python -m forebay.mlx_service.worker.follower`.

Standard input has first what to load and then what to do, a JSON object a
line. Its end ends the process: rank 0 is gone.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

from forebay.kit.failure import ModelLoadFailed
from forebay.mlx_service.worker.runtime import leave_thread, mx
from forebay.mlx_service.worker.sharding import Follower, join, load_part

EX_LOAD = 3
"""Exit code of a rank that could not load its part."""

EX_LOST = 70

STUCK_SECONDS = 3.0
"""How long a rank may take to end after rank 0 did. Longer is a wait for it inside mlx."""

Orders = queue.SimpleQueue[dict[str, Any] | None]


def main(source: TextIO | None = None) -> int:
    """Runs a rank and returns its exit code."""
    orders: Orders = queue.SimpleQueue()
    lines = source or sys.stdin
    reader = threading.Thread(target=_read, args=(lines, orders), name="mlx-orders", daemon=True)
    reader.start()
    job = orders.get()
    if job is None:
        return 0
    try:
        _follow(job, orders)
    except ModelLoadFailed as error:
        print(f"forebay mlx-worker: {error.message}", file=sys.stderr, flush=True)  # noqa: T201 - the front reads it
        return EX_LOAD
    finally:
        leave_thread()
    return 0


def _follow(job: dict[str, Any], orders: Orders) -> None:
    mx.set_cache_limit(job["cache_limit"])
    group = join(job["rank"], job["addresses"])
    follower = Follower(load_part(Path(job["model"]), group, job["kind"]), group)
    try:
        while (order := orders.get()) is not None:
            follower.obey(order)
    finally:
        follower.close()


def _read(lines: TextIO, orders: Orders) -> None:
    for line in lines:
        orders.put(json.loads(line))
    orders.put(None)
    stuck = threading.Timer(STUCK_SECONDS, os._exit, (EX_LOST,))
    stuck.daemon = True
    stuck.start()


if __name__ == "__main__":
    sys.exit(main())
