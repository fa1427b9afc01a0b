"""Names of models: one model has many spellings, and answers come in another than questions.

`/api/tags` and `/api/ps` always print the tag and leave defaults out; a chat
echoes what was asked, letter by letter. Names are compared only in canonical
form.
"""

from __future__ import annotations

import re
from typing import Final

DEFAULT_HOST: Final = "registry.ollama.ai"

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,79}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]{0,79}")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:\-]{0,349}")


def canonical(name: str) -> str:
    """Returns the spelling under which all spellings of a model's name are equal."""
    bare = name.strip().partition("://")[2] or name.strip()
    bare = bare.lower().removesuffix(":local").removeprefix(f"{DEFAULT_HOST}/").removeprefix("library/")
    return bare if ":" in bare.rpartition("/")[2] else f"{bare}:latest"


def aliases(listed: str) -> list[str]:
    """Returns the other names of a model that the server lists under `listed`."""
    return [listed.removesuffix(":latest")] if listed.endswith(":latest") else []


def registry_of(name: str) -> str | None:
    """Returns the host that a name would be fetched from; None if it is no valid name."""
    head, _, last = name.rpartition("/")
    model, colon, tag = last.partition(":")
    if not _PART.fullmatch(model) or (colon and not _PART.fullmatch(tag)):
        return None
    host, slash, namespace = head.rpartition("/")
    if head and not _NAMESPACE.fullmatch(namespace):
        return None
    if not slash:
        return DEFAULT_HOST
    return host.lower() if _HOST.fullmatch(host) else None


def is_cloud(name: str) -> bool:
    """Whether a name asks for a model on other people's machines."""
    return name.endswith((":cloud", "-cloud"))
