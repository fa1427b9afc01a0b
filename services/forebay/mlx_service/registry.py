"""Which models are on this machine: in configured folders, Forebay's own cache and the Hugging Face cache.

Nothing here imports mlx or reads a weight, so that listing a thousand models
costs a few milliseconds and no memory. A folder that cannot be read is a model
with a reason: it is listed as failed rather than left out, since a model that
is silently missing is the harder riddle.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import cast

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import ModelLoadFailed, ModelNotFound
from forebay.mlx_service.fetch import Report, file_digest, import_gguf, is_complete
from forebay.mlx_service.models.describe import ModelFacts, NotAModelError, describe
from forebay.mlx_service.models.embedding import capabilities
from forebay.mlx_service.models.gguf_file import Head
from forebay.mlx_service.ollama_store import OllamaStore, Problem

logger = logging.getLogger(__name__)

DEPTH = 3
"""Levels of folders searched below a configured one: enough for `owner/repository/file.gguf`."""

_SHARD = re.compile(r"-(\d{5})-of-\d{5}$")
_QUANTIZATION = re.compile(
    r"(?<![A-Za-z0-9])(I?Q\d(?:_[A-Z0-9]+)*|BF16|F16|F32)(?![A-Za-z0-9])", re.IGNORECASE
)


class Kind(Enum):
    """What a model's files are."""

    FOLDER = "safetensors"
    GGUF = "gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A model on disk."""

    id: str
    """Identifier under which it is served."""
    kind: Kind
    path: Path
    """Folder with `config.json` and safetensors, or a GGUF file."""
    aliases: tuple[str, ...] = ()
    """Other names under which it can be asked for."""
    facts: ModelFacts | None = None
    """What the folder says of itself. None for a broken one, and for a GGUF file that was never loaded."""
    disk_bytes: int = 0
    fault: str = ""
    """Why it cannot be loaded, in one sentence. Empty if nothing is known against it."""
    problem: str = ""
    """What kind of reason that is, where it has a name."""
    digest: str = ""
    """SHA-256 that a GGUF file must have, in hexadecimal, where somebody vouches for it."""
    gguf: Head | None = None
    """Head of a GGUF file, where it was read."""
    note: str = ""
    """What else is to be said of it."""
    removable: Path | None = None
    """What `DeleteModel` removes: a folder of Forebay's cache or of the hub's. None is not ours to remove."""

    def to_model(self, backend: str, digest: str = "") -> pb.Model:
        """Returns the model as the service describes it while it is not loaded.

        Args:
            backend: the service's name.
            digest: that of its weights, as far as known.
        """
        model = pb.Model(
            id=self.id,
            backend=backend,
            state=pb.Model.STATE_FAILED if self.fault else pb.Model.STATE_AVAILABLE,
            aliases=self.aliases,
            disk_bytes=self.disk_bytes,
            detail=self.fault or self.note,
        )
        weights = model.weights
        weights.format = self.kind.value
        weights.digest = digest
        facts = self.facts
        if facts is not None:
            model.context_token_count = facts.context_token_count
            model.memory_bytes = facts.weight_bytes
            weights.family = facts.family
            weights.size_label = facts.size_label
            weights.quantization = facts.quantization
            weights.parameter_count = facts.parameter_count
            if facts.recipe is not None:
                model.capabilities.extend(capabilities(probed=False))
            else:  # more is known when its template and tokenizer were read
                model.capabilities.add(capability=pb.CAPABILITY_EMBED, support=pb.CapabilityReport.SUPPORT_NO)
            return model
        if self.gguf is not None:
            weights.family = self.gguf.text("general.architecture")
            weights.size_label = self.gguf.text("general.size_label")
            weights.quantization = self.gguf.most_common_type
            model.context_token_count = max(0, self.gguf.context_token_count)
            model.memory_bytes = self.disk_bytes
            if self.fault:  # it never will, whoever asks; others who have it may
                no = pb.CapabilityReport.SUPPORT_NO
                model.capabilities.add(capability=pb.CAPABILITY_GENERATE, support=no)
        elif found := _QUANTIZATION.search(self.id):
            weights.quantization = found[1].upper()
        return model


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """A folder that is searched for models."""

    path: Path
    hub: bool = False
    """Whether it is laid out as the Hugging Face cache."""
    ollama: bool = False
    """Whether it is laid out as Ollama's models folder."""
    removable: bool = False
    """Whether models may be deleted from it."""
    required: bool = False
    """Whether somebody named it, so that its absence is worth a warning."""


class Imports:
    """GGUF files that were converted, by digest: a file that is moved or copied is not converted again.

    Args:
        folder: where conversions are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = folder / "index.json"

    def folder_of(self, source: Path) -> Path | None:
        """Returns the folder into which a file was converted, or None if it was not."""
        digest = self._digests().get(_stamp(source))
        if digest is None:
            return None
        folder = self._folder / digest
        return folder if is_complete(folder) else None

    async def convert(self, source: Path, progress: Report, *, expected: str = "") -> Path:
        """Returns the folder of a GGUF file, converting it if it was not yet.

        Args:
            source: the file.
            progress: is told how far it is.
            expected: SHA-256 that it must have, in hexadecimal. Empty takes any.

        Raises:
            ModelLoadFailed: it cannot be converted, or is another file than expected.
        """
        key = await asyncio.to_thread(_stamp, source)
        digests = await asyncio.to_thread(self._digests)
        digest = digests.get(key)
        if digest is None:
            digest = await asyncio.to_thread(file_digest, source)
            await asyncio.to_thread(self._remember, key, digest)
        if expected and digest != expected:
            raise ModelLoadFailed(
                f"{source.name} is damaged: its digest is {digest}. Fetch it again",
                metadata={"file": source.name, "problem": Problem.DIGEST_MISMATCH.name, "digest": digest},
            )
        return await import_gguf(source, self._folder / digest, progress)

    def _digests(self) -> dict[str, str]:
        try:
            index = json.loads(self._index.read_bytes())
        except (OSError, ValueError):  # it is only a shortcut: without it a file is read once more
            return {}
        return cast("dict[str, str]", index) if isinstance(index, dict) else {}

    def _remember(self, key: str, digest: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._index.with_name(f".{self._index.name}.{os.getpid()}")
        partial.write_text(json.dumps({**self._digests(), key: digest}, indent=1))
        partial.replace(self._index)


class Registry:
    """The models on this machine, read again when a folder changed.

    Args:
        roots: where to look; of two models with one identifier the earlier root's is served.
        aliases: other names, and the identifiers they stand for.
        imports: where conversions of GGUF files are kept.
    """

    def __init__(self, roots: Sequence[Root], *, aliases: Mapping[str, str], imports: Imports) -> None:
        self._roots = tuple(roots)
        self._aliases = dict(aliases)
        self._imports = imports
        self._entries: dict[str, Entry] = {}
        self._marks: dict[Path, int | None] = {}
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        broken = sum(1 for entry in self._entries.values() if entry.fault)
        return f"<Registry {len(self._entries)} models{f', {broken} broken' if broken else ''}>"

    async def entries(self) -> list[Entry]:
        """Returns every model, sorted by identifier."""
        await asyncio.to_thread(self._refresh)
        return [self._entries[id_] for id_ in sorted(self._entries)]

    async def find(self, name: str) -> Entry:
        """Returns the model of that identifier or alias.

        Raises:
            ModelNotFound: there is none; the message names some that are here.
        """
        await asyncio.to_thread(self._refresh)
        entry = (
            self._entries.get(self._aliases.get(name, name))
            or self._entries.get(name)
            or self._entries.get(f"{name}:latest")  # as Ollama completes names
        )
        if entry is None:
            known = sorted(self._entries)
            near = difflib.get_close_matches(name, known, n=3) or known[:3]
            raise ModelNotFound(
                f"there is no model {name!r} here; "
                + (f"there are {', '.join(near)}" if near else "there are none: PullModel fetches one"),
                metadata={"model": name},
            )
        return entry

    async def folder(self, entry: Entry, progress: Report) -> Path:
        """Returns the folder to load, converting a GGUF file if that was not done yet.

        Raises:
            forebay.kit.failure.ModelLoadFailed: it cannot be converted.
        """
        if entry.kind is Kind.FOLDER:
            return entry.path
        folder = await self._imports.convert(entry.path, progress, expected=entry.digest)
        self._marks = {}
        return folder

    def forget(self) -> None:
        """Makes the next look read every folder again."""
        self._marks = {}

    # Everything below runs in a thread, on nothing but local state until the last assignment.

    def _refresh(self) -> None:
        marks = self._marks
        if marks and all(_mark(path) == mark for path, mark in marks.items()):
            return
        scan = _Scan(self._roots, self._imports)
        found: dict[str, Entry] = {}
        for entry in scan.entries():
            kept = found.get(entry.id)
            if kept is None:
                found[entry.id] = entry
            elif kept.path != entry.path:
                note = f"another model of this name, at {entry.path}, is hidden by this one"
                found[entry.id] = replace(kept, note=note)
                self._warn(f"two models are named {entry.id}: {kept.path} is served, {entry.path} is not")
        for alias, id_ in self._aliases.items():
            if alias in found:
                self._warn(f"alias {alias!r} is also the name of a model; the alias wins")
            if id_ in found:
                found[id_] = replace(found[id_], aliases=(*found[id_].aliases, alias))
        for complaint in scan.complaints:
            self._warn(complaint)
        self._entries, self._marks = found, scan.marks

    def _warn(self, text: str) -> None:
        """Logs a finding once, however often the folders are read."""
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)


class _Scan:
    """One look at all folders.

    Args:
        roots: where to look.
        imports: where conversions are kept.
    """

    def __init__(self, roots: Iterable[Root], imports: Imports) -> None:
        self._roots = roots
        self._imports = imports
        self.marks: dict[Path, int | None] = {}
        """What was looked at, and when it had changed last. None is not there."""
        self.complaints: list[str] = []

    def entries(self) -> Iterator[Entry]:
        """Finds the models, root by root."""
        for root in self._roots:
            if root.required and not root.path.is_dir():
                self.complaints.append(f"model folder {root.path} is not there")
            if root.hub:
                yield from self._hub(root)
            elif root.ollama:
                yield from self._ollama(root)
            else:
                yield from self._folder(root.path, root, ())

    def _folder(self, path: Path, root: Root, above: tuple[str, ...]) -> Iterator[Entry]:
        files, folders = self._list(path)
        if "config.json" in files or any(name.endswith(".safetensors") for name in files):
            yield self._model("/".join(above[-2:]) or path.name, path, path if root.removable else None)
            return
        for name in files:
            if name.endswith(".gguf") and not name.startswith("mmproj"):
                yield from self._gguf(path / name, root)
        if len(above) < DEPTH:
            for name in folders:
                yield from self._folder(path / name, root, (*above, name))

    def _hub(self, root: Root) -> Iterator[Entry]:
        for name in self._list(root.path)[1]:
            if not name.startswith("models--"):
                continue
            repository = root.path / name
            snapshot = self._snapshot(repository)
            if snapshot is None:
                continue
            files, _ = self._list(snapshot)
            # Other programs keep other models here: what is not meant for MLX is none of our business.
            if "config.json" in files and any(".safetensors" in file for file in files):
                id_ = name.removeprefix("models--").replace("--", "/")
                yield self._model(id_, snapshot, repository)

    def _ollama(self, root: Root) -> Iterator[Entry]:
        def looked(path: Path) -> None:
            self.marks[path] = _mark(path)

        for found in OllamaStore(root.path, looked).models():
            facts: ModelFacts | None = None
            with contextlib.suppress(OSError, NotAModelError):
                folder = self._imports.folder_of(found.path) if found.digest else None
                facts = describe(folder) if folder is not None else None
            bare = found.name.removesuffix(":latest")
            yield Entry(
                id=found.name,
                kind=Kind.GGUF,
                path=found.path,
                aliases=(bare,) if bare != found.name else (),
                facts=facts,
                disk_bytes=found.disk_bytes,
                fault=found.fault,
                problem=found.problem.name if found.problem is not None else "",
                digest=found.digest,
                gguf=found.head,
                note=found.note,
            )

    def _snapshot(self, repository: Path) -> Path | None:
        """Returns the folder of the main revision, else of the newest."""
        snapshots = repository / "snapshots"
        with contextlib.suppress(OSError):
            main = snapshots / (repository / "refs" / "main").read_text().strip()
            self.marks[repository / "refs" / "main"] = _mark(repository / "refs" / "main")
            if main.is_dir():
                return main
        _, names = self._list(snapshots)
        return max((snapshots / name for name in names), key=lambda path: _mark(path) or 0, default=None)

    def _model(self, id_: str, path: Path, removable: Path | None) -> Entry:
        try:
            self._check_shards(path)
            facts = describe(path)
        except NotAModelError as error:
            return Entry(id=id_, kind=Kind.FOLDER, path=path, fault=str(error), removable=removable)
        return Entry(
            id=id_,
            kind=Kind.FOLDER,
            path=path,
            facts=facts,
            disk_bytes=facts.disk_bytes,
            removable=removable,
        )

    @staticmethod
    def _check_shards(path: Path) -> None:
        """Raises where the index names files that are not there: a download that was broken off."""
        try:
            index = json.loads((path / "model.safetensors.index.json").read_bytes())
            wanted = set(index["weight_map"].values())
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise NotAModelError(f"{path}/model.safetensors.index.json cannot be read") from error
        missing = sorted(name for name in wanted if not (path / str(name)).is_file())
        if missing:
            raise NotAModelError(
                f"{path} lacks {len(missing)} of {len(wanted)} weight files, such as {missing[0]}; "
                "fetch it again"
            )

    def _gguf(self, path: Path, root: Root) -> Iterator[Entry]:
        self.marks[path] = _mark(path)
        stem = path.name.removesuffix(".gguf")
        shard = _SHARD.search(stem)
        if shard and shard[1] != "00001":
            return
        removable = path if root.removable else None
        try:
            size = path.stat().st_size
            folder = self._imports.folder_of(path)
        except OSError as error:
            fault = f"{path} cannot be read: {error.strerror}"
            yield Entry(id=stem, kind=Kind.GGUF, path=path, fault=fault, removable=removable)
            return
        facts: ModelFacts | None = None
        if folder is not None:
            with contextlib.suppress(NotAModelError):
                facts = describe(folder)
        fault = "a GGUF model in several files cannot be converted: merge them first" if shard else ""
        yield Entry(
            id=stem, kind=Kind.GGUF, path=path, facts=facts, disk_bytes=size, fault=fault, removable=removable
        )

    def _list(self, path: Path) -> tuple[list[str], list[str]]:
        """Returns names of files and of folders, sorted, without hidden ones."""
        self.marks[path] = _mark(path)
        files: list[str] = []
        folders: list[str] = []
        try:
            with os.scandir(path) as found:
                for item in found:
                    if not item.name.startswith("."):
                        (folders if item.is_dir() else files).append(item.name)
        except FileNotFoundError:
            pass
        except OSError as error:
            self.complaints.append(f"{path} cannot be read: {error.strerror}")
        return sorted(files), sorted(folders)


def _mark(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _stamp(path: Path) -> str:
    """Names a file's content as well as can be had without reading it."""
    status = path.stat()
    return f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"


def hub_cache_dir(env: Mapping[str, str] = os.environ) -> Path:
    """Returns where the Hugging Face libraries keep models, by their own rules."""
    if found := env.get("HF_HUB_CACHE"):
        return Path(found).expanduser()
    if found := env.get("HF_HOME"):
        return Path(found).expanduser() / "hub"
    base = env.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"
