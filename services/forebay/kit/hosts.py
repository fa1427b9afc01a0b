"""Which `Host` an HTTP page of ours answers to.

A web page can make a browser ask this machine under a name that the page's
owner chose, and then read the answer. The name is in the `Host` header, so
whoever asks for a name that is not ours gets nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

OURS = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of this machine for itself."""


def is_ours(header: str, names: Collection[str] = ()) -> bool:
    """Returns whether a `Host` header names this machine, or is one of the names.

    Args:
        header: the header, with or without a port.
        names: further names that are allowed.
    """
    try:
        host = urlsplit(f"//{header}").hostname
    except ValueError:
        return False
    return host is not None and (host in OURS or host in names)
