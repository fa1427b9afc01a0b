"""Promises of `forebay.mlx_service.registry`."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import ModelNotFound
from forebay.mlx_service import registry as registry_module
from forebay.mlx_service.registry import Imports, Kind, Registry, Root, hub_cache_dir


def model(folder: Path) -> Path:
    return tiny_models.build_random(folder, hidden=16, layers=1)


def hub_model(hub: Path, name: str, *, revision: str = "abc", main: str | None = "abc") -> Path:
    repository = hub / f"models--{name.replace('/', '--')}"
    model(repository / "snapshots" / revision)
    if main is not None:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(main)
    return repository


def registry(*roots: Root, tmp_path: Path, aliases=None) -> Registry:
    return Registry(roots, aliases=aliases or {}, imports=Imports(tmp_path / "imports"))


def silent(step) -> None:
    pass


async def test_models_are_found_by_folder_name_and_by_owner_and_name(tmp_path):
    model(tmp_path / "m" / "solo")
    model(tmp_path / "m" / "owner" / "name")
    model(tmp_path / "m" / ".hidden")
    (tmp_path / "m" / "empty").mkdir()
    found = await registry(Root(path=tmp_path / "m"), tmp_path=tmp_path).entries()
    assert [e.id for e in found] == ["owner/name", "solo"]
    assert all(e.removable is None for e in found)
    described = found[1].to_model("mlx")
    assert described.state == pb.Model.STATE_AVAILABLE
    assert described.context_token_count == tiny_models.CONTEXT
    assert described.weights.format == "safetensors"
    assert described.disk_bytes > 0
    assert described.memory_bytes > 0


async def test_a_root_can_be_a_model_itself(tmp_path):
    model(tmp_path / "solo")
    found = await registry(Root(path=tmp_path / "solo"), tmp_path=tmp_path).entries()
    assert [e.id for e in found] == ["solo"]


async def test_a_change_on_disk_is_seen_and_nothing_is_read_while_there_is_none(tmp_path, monkeypatch):
    model(tmp_path / "m" / "a")
    r = registry(Root(path=tmp_path / "m"), tmp_path=tmp_path)
    assert len(await r.entries()) == 1
    with monkeypatch.context() as patch:
        patch.setattr(registry_module, "_Scan", None)  # a second look at the folders would fail
        assert len(await r.entries()) == 1
    model(tmp_path / "m" / "b")
    assert [e.id for e in await r.entries()] == ["a", "b"]
    assert repr(r) == "<Registry 2 models>"


async def test_of_two_models_with_one_name_the_first_root_s_is_served_and_it_says_so_once(tmp_path, caplog):
    first = model(tmp_path / "one" / "m")
    model(tmp_path / "two" / "m")
    r = registry(Root(path=tmp_path / "one"), Root(path=tmp_path / "two"), tmp_path=tmp_path)
    with caplog.at_level(logging.WARNING):
        (entry,) = await r.entries()
        r.forget()
        await r.entries()
    assert entry.path == first
    assert "hidden" in entry.to_model("mlx").detail
    assert len([m for m in caplog.messages if "two models are named m" in m]) == 1


async def test_one_folder_below_two_roots_is_one_model(tmp_path):
    model(tmp_path / "m" / "a")
    r = registry(Root(path=tmp_path / "m"), Root(path=tmp_path / "m"), tmp_path=tmp_path)
    (entry,) = await r.entries()
    assert not entry.note


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"short"),
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
        ),
    ],
    ids=["config", "no config", "weights", "index", "shard"],
)
async def test_a_broken_folder_is_a_failed_model_with_a_reason(tmp_path, spoil):
    spoil(model(tmp_path / "m" / "bad"))
    r = registry(Root(path=tmp_path / "m"), tmp_path=tmp_path)
    (entry,) = await r.entries()
    described = entry.to_model("mlx")
    assert described.state == pb.Model.STATE_FAILED
    assert described.detail
    assert repr(r) == "<Registry 1 models, 1 broken>"


async def test_a_folder_with_all_shards_of_its_index_is_whole(tmp_path):
    folder = model(tmp_path / "m" / "a")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "model.safetensors"}})
    )
    (entry,) = await registry(Root(path=tmp_path / "m"), tmp_path=tmp_path).entries()
    assert not entry.fault


async def test_a_missing_or_unreadable_folder_is_a_warning_and_no_crash(tmp_path, caplog, monkeypatch):
    locked = tmp_path / "locked"
    locked.mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    r = registry(Root(path=tmp_path / "nowhere", required=True), Root(path=locked), tmp_path=tmp_path)
    assert await r.entries() == []
    assert any("nowhere is not there" in m for m in caplog.messages)
    assert any("Permission denied" in m for m in caplog.messages)


async def test_the_hub_cache_is_read_by_its_main_revision_else_by_its_newest(tmp_path):
    hub = tmp_path / "hub"
    repository = hub_model(hub, "org/a", revision="old", main="new")
    model(repository / "snapshots" / "new")
    hub_model(hub, "org/b", revision="only", main=None)
    hub_model(hub, "org/c", revision="only", main="gone")
    (hub / "models--org--empty").mkdir()
    (hub / "datasets--org--d").mkdir()
    other = hub / "models--org--torch" / "snapshots" / "x"
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}")
    found = {e.id: e for e in await registry(Root(path=hub, hub=True), tmp_path=tmp_path).entries()}
    assert sorted(found) == ["org/a", "org/b", "org/c"]
    assert found["org/a"].path.name == "new"
    assert found["org/a"].removable == repository


async def test_aliases_name_models_and_an_unknown_name_is_told_what_there_is(tmp_path, caplog):
    for name in ("llama", "qwen"):
        model(tmp_path / "m" / name)
    r = registry(
        Root(path=tmp_path / "m"), tmp_path=tmp_path, aliases={"small": "llama", "qwen": "llama", "x": "y"}
    )
    assert (await r.find("small")).id == "llama"
    assert (await r.find("qwen")).id == "llama"
    assert set((await r.find("llama")).to_model("mlx").aliases) == {"small", "qwen"}
    assert any("alias 'qwen' is also the name of a model" in m for m in caplog.messages)
    with pytest.raises(ModelNotFound, match="there are llama"):
        await r.find("lama")
    with pytest.raises(ModelNotFound):
        await r.find("x")
    empty = registry(tmp_path=tmp_path)
    with pytest.raises(ModelNotFound, match="PullModel"):
        await empty.find("m")


async def test_gguf_files_are_models_named_by_their_stem(tmp_path):
    folder = tmp_path / "m" / "owner" / "repository"
    folder.mkdir(parents=True)
    for name in (
        "Tiny.Q4_0.gguf",
        "mmproj-Tiny.gguf",
        "Big-00001-of-00002.gguf",
        "Big-00002-of-00002.gguf",
    ):
        (folder / name).write_bytes(b"GGUF")
    found = {e.id: e for e in await registry(Root(path=tmp_path / "m"), tmp_path=tmp_path).entries()}
    assert sorted(found) == ["Big-00001-of-00002", "Tiny.Q4_0"]
    tiny = found["Tiny.Q4_0"].to_model("mlx")
    assert (tiny.weights.format, tiny.weights.quantization) == ("gguf", "Q4_0")
    assert tiny.disk_bytes == 4
    assert "several files" in found["Big-00001-of-00002"].fault


async def test_a_gguf_file_that_vanishes_meanwhile_is_a_failed_model(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.gguf").symlink_to(tmp_path / "nowhere.gguf")
    (entry,) = await registry(Root(path=tmp_path / "m"), tmp_path=tmp_path).entries()
    assert "cannot be read" in entry.fault


async def test_a_gguf_file_is_converted_once_whatever_it_is_called_and_wherever_it_is(tmp_path, monkeypatch):
    converted = []

    async def convert(source, folder, progress):
        converted.append(source)
        return model(folder)

    monkeypatch.setattr(registry_module, "import_gguf", convert)
    digests = []
    digest = registry_module.file_digest
    monkeypatch.setattr(registry_module, "file_digest", lambda p: digests.append(p) or digest(p))
    (tmp_path / "m").mkdir()
    first = tmp_path / "m" / "a.gguf"
    first.write_bytes(b"GGUF weights")
    r = registry(Root(path=tmp_path / "m"), tmp_path=tmp_path)
    (entry,) = await r.entries()
    assert entry.kind is Kind.GGUF
    assert entry.facts is None
    folder = await r.folder(entry, silent)
    assert folder.parent == tmp_path / "imports"
    (entry,) = await r.entries()
    assert entry.facts is not None
    assert entry.to_model("mlx").context_token_count == tiny_models.CONTEXT
    assert await r.folder(entry, silent) == folder
    assert len(digests) == 1  # the file was read once
    copy = tmp_path / "m" / "b.gguf"
    copy.write_bytes(b"GGUF weights")
    assert await r.folder(await r.find("b"), silent) == folder
    first.write_bytes(b"GGUF other weights")
    r.forget()
    assert await r.folder(await r.find("a"), silent) != folder


async def test_a_broken_index_of_conversions_costs_no_more_than_time(tmp_path, monkeypatch):
    async def convert(source, folder, progress):
        return folder

    monkeypatch.setattr(registry_module, "import_gguf", convert)
    source = tmp_path / "a.gguf"
    source.write_bytes(b"GGUF")
    (tmp_path / "imports").mkdir()
    (tmp_path / "imports" / "index.json").write_text("{")
    imports = Imports(tmp_path / "imports")
    assert imports.folder_of(source) is None
    folder = await imports.convert(source, silent)
    assert imports.folder_of(source) is None  # known, and not there
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert imports.folder_of(source) == folder


async def test_a_conversion_that_cannot_be_described_leaves_the_file_a_model(tmp_path, monkeypatch):
    async def convert(source, folder, progress):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{")
        return folder

    monkeypatch.setattr(registry_module, "import_gguf", convert)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.gguf").write_bytes(b"GGUF")
    r = registry(Root(path=tmp_path / "m"), tmp_path=tmp_path)
    await r.folder(await r.find("a"), silent)
    assert (await r.find("a")).facts is None


async def test_a_folder_needs_no_conversion(tmp_path):
    folder = model(tmp_path / "m" / "a")
    r = registry(Root(path=tmp_path / "m"), tmp_path=tmp_path)
    assert await r.folder(await r.find("a"), silent) == folder


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({}, str(Path("~/.cache/huggingface/hub").expanduser())),
    ],
)
def test_the_hub_cache_is_where_the_hub_s_libraries_keep_it(env, wanted):
    assert str(hub_cache_dir(env)) == wanted
