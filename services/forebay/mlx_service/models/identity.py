"""Which weights a folder holds: the digest of everything in them.

Two backends go on with one another's replies if their weights have one
digest, so models that differ in a single byte must not share it: it covers
every byte of the weights, and of all that turns text into tokens and back,
for on the same weights another template writes another reply. Until it is
known it is empty, and an empty digest equals none.

Reading a large model takes a while, so it is done once, beside the model's
load, and remembered under the files' identity: device, inode, size, and the
times at which content and inode changed, the last of which no program can
set. A file that changed in the last moments is read again next time: its
clock may be too coarse to show the next change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
import time
from pathlib import Path

BLOCK_BYTES = 4 << 20
"""Bytes read at once: a few milliseconds' work, after each of which it can be broken off."""

SETTLED_SECONDS = 3.0
"""Age of a change from which it is remembered. Some file systems' clocks tick every two seconds."""

_PATTERNS = (
    "config.json",
    "model*.safetensors",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "modules.json",
    "*sentence*.json",
    "*/config.json",  # of the parts of a model for embeddings, with their weights
    "*/model*.safetensors",
)
"""Files that decide what a model answers. Others, such as a README, do not."""

_VERSION = "forebay weights 1"


class Identity:
    """The identity of one folder's weights.

    Args:
        folder: the model's folder.
        store: folder in which digests are remembered; None remembers none.
    """

    def __init__(self, folder: Path, store: Path | None = None) -> None:
        self._folder = folder
        self._store = store
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self.digest = known_digest(folder, store)
        """`sha256:` and the digest; empty as long as it is not known."""

    def __repr__(self) -> str:
        return f"<Identity {self.digest or 'unknown'}>"

    def learn(self) -> None:
        """Reads the weights, unless their digest is remembered. What cannot be read stays unknown."""
        if not self.digest:
            with contextlib.suppress(OSError):
                self.digest = self._read()

    def start(self) -> None:
        """Has a thread learn the digest."""
        self._thread = threading.Thread(target=self.learn, name="weights-digest", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None) -> None:
        """Waits until the thread is done, at most so many seconds; None waits for as long as it takes."""
        if self._thread is not None:
            self._thread.join(timeout)

    def close(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self.wait(2.0)  # for the block at hand; of a disk that is slower nobody waits

    def _read(self) -> str:
        began = time.time()
        stamps = _stamps(self._folder)
        whole = hashlib.sha256(_VERSION.encode())
        for name in stamps:
            one = hashlib.sha256()
            with (self._folder / name).open("rb", buffering=0) as file:
                while block := file.read(BLOCK_BYTES):
                    if self._stopped.is_set():
                        return ""
                    one.update(block)
            whole.update(f"\0{name}\0".encode() + one.digest())
        if _stamps(self._folder) != stamps:
            return ""  # somebody writes them: what was read is of no one moment
        digest = f"sha256:{whole.hexdigest()}"
        settled = all(max(stamp[-2:]) / 1e9 < began - SETTLED_SECONDS for stamp in stamps.values())
        if settled and self._store is not None:
            _remember(_entry(self._folder, self._store), {"stamps": stamps, "digest": digest})
        return digest


def known_digest(folder: Path, store: Path | None) -> str:
    """Returns the digest of a folder's weights if it is remembered, else an empty string."""
    if store is None:
        return ""
    try:
        found = json.loads(_entry(folder, store).read_bytes())
        stamps = {name: list(stamp) for name, stamp in _stamps(folder).items()}
        return str(found["digest"]) if found["stamps"] == stamps else ""
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def _stamps(folder: Path) -> dict[str, tuple[int, ...]]:
    """Returns what tells the files apart that make the model what it is, in the order of their names."""
    paths = {path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}
    found: dict[str, tuple[int, ...]] = {}
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in paths):
        stat = path.stat()
        found[name] = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return found


def _entry(folder: Path, store: Path) -> Path:
    return store / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.json"


def _remember(path: Path, entry: object) -> None:
    with contextlib.suppress(OSError):  # it is read again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump(entry, file)
        Path(name).replace(path)
