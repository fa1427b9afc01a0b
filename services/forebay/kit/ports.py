"""Who holds a port, so that an error can name them."""

from __future__ import annotations

import psutil


def holder(address: str) -> str:
    """Returns who listens on a TCP address, such as `python3 (pid 4711)`; empty if nobody or unknown.

    Other users' processes cannot be seen without privileges.

    Args:
        address: `host:port`; a unix address has no holder that can be asked for.
    """
    port = address.rpartition(":")[2]
    if address.startswith("unix:") or not port.isdigit():
        return ""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:  # macOS, without privileges
        return _own_holder(int(port))
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and getattr(connection.laddr, "port", None) == int(port):
            return _describe(connection.pid) if connection.pid else "another user's process"
    return ""


def _own_holder(port: int) -> str:
    for process in psutil.process_iter():
        try:
            connections = process.net_connections(kind="tcp")
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
        if any(
            c.status == psutil.CONN_LISTEN and getattr(c.laddr, "port", None) == port for c in connections
        ):
            return _describe(process.pid)
    return ""


def _describe(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        words = process.cmdline()
        name = process.name()
    except psutil.Error:
        return f"pid {pid}"
    modules = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-m"]
    return f"{modules[0] if modules else name} (pid {pid})"
