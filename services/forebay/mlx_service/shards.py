"""How a model that is larger than one machine is shared by several. Nothing here imports mlx."""

from __future__ import annotations

import socket
from typing import Literal

from pydantic import Field, model_validator

from forebay.kit.config import Settings

_HERE = frozenset({"127.0.0.1", "::1", "localhost"})


class ShardSettings(Settings):
    """How one model is shared by several machines. Experimental."""

    hosts: tuple[str, ...] = Field(
        min_length=2,
        max_length=64,
        description="Addresses of the machines that share the model, a rank each, this one first. 127.0.0.1 "
        "more than once makes several ranks here, to try it out.",
    )
    kind: Literal["tensor", "pipeline"] = Field(
        "tensor",
        description="What each has: `tensor` a part of every layer, `pipeline` some of the layers.",
    )
    port: int = Field(
        0,
        ge=0,
        le=65471,
        description="Port on which rank 0 listens for the others; each rank has the next one. 0 picks free "
        "ones, where all ranks are here.",
    )
    remote_command: tuple[str, ...] = Field(
        ("ssh", "-o", "BatchMode=yes", "{host}", "python3"),
        min_length=1,
        description="Runs a Python with Forebay on another machine, where the model has the same path.",
    )

    @model_validator(mode="after")
    def _check_port(self) -> ShardSettings:
        if not self.port and any(not is_here(host) for host in self.hosts):
            raise ValueError("port must be set where a rank is on another machine")
        return self

    @property
    def here(self) -> int:
        """Ranks on this machine. The first always is."""
        return 1 + sum(is_here(host) for host in self.hosts[1:])

    def addresses(self) -> list[str]:
        """Returns where each rank listens. Free ports are picked anew each time."""
        ports = [self.port + rank for rank in range(len(self.hosts))] if self.port else _free(len(self.hosts))
        return [f"{host}:{port}" for host, port in zip(self.hosts, ports, strict=True)]


def is_here(host: str) -> bool:
    """Whether an address is this machine's by its looks."""
    return host in _HERE


def _free(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()
