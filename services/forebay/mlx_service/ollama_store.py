"""Finds GGUF models in Ollama's models folder, so that one download serves both. It only ever reads.

The folder has manifests, one for each name, and blobs, named by their SHA-256:

    manifests/registry.ollama.ai/library/llama3.2/1b      JSON, up to Ollama 0.39
    manifests-v2/ollama.com/library/llama3.2/1b           from 0.40: a link to a blob, the same or a list
    blobs/sha256-74701a8c35f6c8d9a4b91f3f3497643001d63e0c7a84e085bc452548fa88d45f

What a manifest says is not trusted. A digest that is none never becomes a
path, a link that leads out of the folder is not followed, and sizes are
compared here; whether a blob is what its name says is found out when it is
converted, for that reads it anyway. What cannot be served is a model with a
reason, not a missing one.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from pathlib import Path

from forebay.mlx_service.models.gguf_check import check
from forebay.mlx_service.models.gguf_file import GgufError, Head, read_head

MANIFEST_BYTES = 4 << 20
"""Most bytes of a manifest. Real ones have a few hundred, lists of tensors some hundred thousand."""

_LAYOUTS = ("manifests-v2", "manifests")
"""Folders of manifests. The newer goes first: the older is kept for those who go back to an old Ollama."""

_PUBLIC = frozenset({"registry.ollama.ai", "ollama.com"})
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,349}(:\d{1,5})?")
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")

_MODEL = "application/vnd.ollama.image.model"
_ADAPTER = "application/vnd.ollama.image.adapter"
_PROJECTOR = "application/vnd.ollama.image.projector"
_TENSOR = "application/vnd.ollama.image.tensor"
_LIST = "application/vnd.ollama.manifest.list.v2+json"

_RUNNERS = ("ggml", "llamacpp", "")
"""Builds of a model that are GGUF files, best first."""


class Problem(Enum):
    """Why a model of Ollama's cannot be served."""

    BAD_MANIFEST = "its manifest cannot be read"
    BAD_DIGEST = "its manifest names a file by something that is no digest"
    OUTSIDE = "it leads out of Ollama's folder"
    MISSING = "a file is not there"
    SIZE_MISMATCH = "a file has another size than its manifest says"
    DIGEST_MISMATCH = "a file is not what its name says"
    UNSUPPORTED = "MLX cannot be given a model of this kind"


class StoreError(ValueError):
    """A model of Ollama's cannot be served.

    Args:
        problem: what kind of reason.
        text: the reason, in one line for people.
    """

    def __init__(self, problem: Problem, text: str) -> None:
        super().__init__(text)
        self.problem = problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A model in Ollama's folder."""

    name: str
    """As Ollama shows it, such as `llama3.2:1b`."""
    path: Path
    """Its GGUF file; its manifest where there is none."""
    digest: str = ""
    """SHA-256 that the file must have, in hexadecimal."""
    disk_bytes: int = 0
    head: Head | None = None
    """The file's head."""
    note: str = ""
    """What of it is left out."""
    problem: Problem | None = None
    fault: str = ""
    """Why it cannot be served. Empty if nothing is known against it."""


def ollama_folder(env: Mapping[str, str] = os.environ) -> Path:
    """Returns where Ollama keeps its models, by its own rule."""
    if found := env.get("OLLAMA_MODELS"):
        return Path(found).expanduser()
    return Path("~/.ollama/models").expanduser()


class OllamaStore:
    """Ollama's models folder.

    Args:
        folder: the folder, with `manifests` and `blobs` in it.
        looked: is told each folder and file whose change makes another look worthwhile.
    """

    def __init__(self, folder: Path, looked: Callable[[Path], None] = lambda path: None) -> None:
        self._folder = folder
        self._blobs = folder / "blobs"
        self._looked = looked

    def __repr__(self) -> str:
        return f"<OllamaStore {self._folder}>"

    def models(self) -> Iterator[Found]:
        """Finds the models, each name once."""
        seen = set()
        for name, manifest in self._manifests():
            if name.lower() not in seen:
                seen.add(name.lower())
                yield self._model(name, manifest)

    def _manifests(self) -> Iterator[tuple[str, Path]]:
        for layout in _LAYOUTS:
            root = self._folder / layout
            for host in self._names(root):
                for owner in self._names(root / host):
                    for model in self._names(root / host / owner):
                        for tag in self._names(root / host / owner / model):
                            name = _name(host, owner, model, tag)
                            path = root / host / owner / model / tag
                            # A link whose blob an old Ollama removed is no model: the older manifest may be.
                            if name and path.is_file() and not _is_shadow(layout, owner, model):
                                yield name, path

    def _names(self, path: Path) -> list[str]:
        self._looked(path)
        try:
            # Hidden files are manifests that are being written.
            return sorted(item.name for item in os.scandir(path) if not item.name.startswith("."))
        except OSError:
            return []

    def _model(self, name: str, manifest: Path) -> Found:
        self._looked(manifest)
        found = Found(name=name, path=manifest)
        try:
            return self._read(found, manifest)
        except StoreError as error:
            return replace(found, problem=error.problem, fault=str(error))
        except OSError as error:  # it was there a moment ago
            return replace(found, problem=Problem.MISSING, fault=f"it cannot be read: {error.strerror}")

    def _read(self, found: Found, manifest: Path) -> Found:
        layers = _layers(self._chosen(_json(self._inside(manifest))))
        kinds = Counter(str(layer.get("mediaType")) for layer in layers)
        models = [layer for layer in layers if layer.get("mediaType") == _MODEL]
        if kinds[_TENSOR]:
            raise StoreError(Problem.UNSUPPORTED, "it is kept tensor by tensor, for Ollama's own engine")
        if not models:
            raise StoreError(Problem.UNSUPPORTED, "there are no weights here: it runs on another machine")
        if len(models) > 1:
            raise StoreError(Problem.UNSUPPORTED, "a GGUF model in several files cannot be converted")
        if kinds[_ADAPTER]:
            raise StoreError(Problem.UNSUPPORTED, "its adapter cannot be applied to a GGUF model")
        digest, path = self._blob(models[0])
        note = "images are not read: only the text model is served" if kinds[_PROJECTOR] else ""
        found = replace(found, path=path, digest=digest, disk_bytes=path.stat().st_size, note=note)
        try:
            head = _head(path, found.disk_bytes, path.stat().st_mtime_ns)
        except GgufError as error:
            raise StoreError(Problem.UNSUPPORTED, str(error)) from error
        found = replace(found, head=head)
        try:
            check(head)
        except GgufError as error:
            return replace(found, problem=Problem.UNSUPPORTED, fault=str(error))
        return found

    def _chosen(self, manifest: Mapping[str, object]) -> Mapping[str, object]:
        """Returns a manifest of layers; of a list of builds the one that is a GGUF file."""
        if manifest.get("mediaType") != _LIST:
            return manifest
        builds = [
            build for build in _mappings(manifest.get("manifests")) if isinstance(build.get("digest"), str)
        ]
        for runner in _RUNNERS:
            for build in builds:
                if str(build.get("runner", "")).lower() == runner:
                    return _json(self._blob(build)[1])
        raise StoreError(Problem.UNSUPPORTED, "there is no GGUF build of it here")

    def _blob(self, layer: Mapping[str, object]) -> tuple[str, Path]:
        """Returns the digest and the path of a layer's file."""
        digest = _DIGEST.fullmatch(str(layer.get("digest", "")))
        if digest is None:
            raise StoreError(Problem.BAD_DIGEST, "its manifest names a file by something that is no digest")
        path = self._inside(self._blobs / f"sha256-{digest[1]}")
        self._looked(path)
        size = layer.get("size")
        found = path.stat().st_size
        if isinstance(size, int) and not isinstance(size, bool) and size != found:
            raise StoreError(
                Problem.SIZE_MISMATCH,
                f"its file has {found} bytes and its manifest says {size}: fetch it again",
            )
        return digest[1], path

    def _inside(self, path: Path) -> Path:
        """Returns a file's own path. Folders may be links to another disk, files only to files in them."""
        own = path.resolve()
        if not any(own.is_relative_to(folder.resolve()) for folder in (self._folder, self._blobs)):
            raise StoreError(Problem.OUTSIDE, f"{path.name} is a link that leads out of Ollama's folder")
        if not own.is_file():
            raise StoreError(Problem.MISSING, f"{path.name} is not there: fetch it again")
        return own


def _name(host: str, owner: str, model: str, tag: str) -> str:
    """Returns a name as Ollama shows it, or nothing if it is none of Ollama's."""
    host = re.sub("%3a", ":", host, flags=re.IGNORECASE)
    if _HOST.fullmatch(host) is None or not all(_PART.fullmatch(part) for part in (owner, model, tag)):
        return ""
    if host.lower() not in _PUBLIC:
        return f"{host}/{owner}/{model}:{tag}"
    return f"{model}:{tag}" if owner.lower() == "library" else f"{owner}/{model}:{tag}"


def _is_shadow(layout: str, owner: str, model: str) -> bool:
    """Whether a name is a build that Ollama 0.40 made of another model, kept for those who go back."""
    return layout == _LAYOUTS[1] and owner == "library" and model == "llamacpp"


def _json(path: Path) -> Mapping[str, object]:
    try:
        if path.stat().st_size > MANIFEST_BYTES:
            raise StoreError(Problem.BAD_MANIFEST, "its manifest is too long")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise StoreError(Problem.BAD_MANIFEST, f"its manifest cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(Problem.BAD_MANIFEST, "its manifest is broken: fetch it again") from error
    if not isinstance(content, dict):
        raise StoreError(Problem.BAD_MANIFEST, "its manifest is broken: fetch it again")
    return content


def _layers(manifest: Mapping[str, object]) -> list[Mapping[str, object]]:
    if not isinstance(manifest.get("layers"), list):
        raise StoreError(Problem.BAD_MANIFEST, "its manifest has no layers")
    return _mappings(manifest["layers"])


def _mappings(value: object) -> list[Mapping[str, object]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


@lru_cache(maxsize=64)
def _head(path: Path, size: int, changed: int) -> Head:
    """Reads a file's head, once as long as it does not change: a vocabulary takes a tenth of a second."""
    return read_head(path)
