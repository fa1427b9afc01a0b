"""Weights have one digest only if they are the same to the last byte, and it is read once."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest

import tiny_models
from forebay.mlx_service.models import identity
from forebay.mlx_service.models.identity import Identity, known_digest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.build_random(tmp_path / "m")


def digest(folder: Path, store: Path | None = None) -> str:
    found = Identity(folder, store)
    found.learn()
    return found.digest


def age(folder: Path) -> None:
    """Makes the files look as if nobody had touched them lately, as far as a program can."""
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time at which a file's inode changed cannot be set, so no change counts as recent."""
    monkeypatch.setattr(identity, "SETTLED_SECONDS", -60.0)


def test_a_single_byte_of_a_single_tensor_makes_other_weights(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    assert digest(model) == digest(other)
    assert digest(model).startswith("sha256:")
    for offset in (-1, -50_000):
        with (other / "model.safetensors").open("r+b") as file:
            file.seek(offset, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(offset, os.SEEK_END)
            file.write(bytes([byte ^ 1]))
        assert digest(model) != digest(other)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_another_tokenizer_template_or_configuration_is_another_model(
    model: Path, tmp_path: Path, name: str
) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    with (other / name).open("a") as file:
        file.write(" ")
    assert digest(model) != digest(other)


def test_a_readme_is_no_part_of_the_model_and_a_stage_of_it_is(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    (other / "README.md").write_text("read me")
    assert digest(model) == digest(other)
    (other / "2_Dense").mkdir()
    (other / "2_Dense" / "model.safetensors").write_bytes(b"x")
    assert digest(model) != digest(other)


@pytest.mark.usefixtures("settled")
def test_what_was_read_once_is_remembered_until_a_file_changes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "cache" / "digests"
    first = digest(model, store)
    assert known_digest(model, store) == first
    with monkeypatch.context() as patch:
        patch.setattr(Identity, "_read", lambda _: pytest.fail("it was read again"))
        assert digest(model, store) == first
    weights = model / "model.safetensors"
    stat = weights.stat()
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert known_digest(model, store) == "", "size and time are as before, and the inode's change tells"
    assert digest(model, store) != first


def test_a_file_that_changed_a_moment_ago_is_not_remembered(model: Path, tmp_path: Path) -> None:
    age(model)
    assert digest(model, tmp_path / "store")
    assert known_digest(model, tmp_path / "store") == ""


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"digest": 3, "stamps": null}', "\x00"])
def test_a_broken_memory_is_none(model: Path, tmp_path: Path, content: str) -> None:
    store = tmp_path / "store"
    first = digest(model, store)
    (entry,) = store.iterdir()
    assert json.loads(entry.read_text())["digest"] == first
    entry.write_text(content)
    assert known_digest(model, store) == ""
    assert digest(model, store) == first
    assert known_digest(model, store) == first


@pytest.mark.usefixtures("settled")
def test_a_memory_that_cannot_be_written_costs_only_time(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert digest(model, tmp_path / "file" / "store").startswith("sha256:")


def test_weights_that_are_written_meanwhile_or_cannot_be_read_stay_unknown(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamps = identity._stamps
    calls = iter([{}, {"config.json": (1,)}])
    monkeypatch.setattr(identity, "_stamps", lambda folder: stamps(folder) | next(calls))
    assert digest(model) == ""
    monkeypatch.undo()
    gone = Identity(model)
    monkeypatch.setattr(identity, "_stamps", lambda _: (_ for _ in ()).throw(OSError("gone")))
    gone.learn()
    assert gone.digest == ""
    assert repr(gone) == "<Identity unknown>"


def test_a_worker_that_ends_waits_for_no_more_than_a_block(model: Path) -> None:
    reading = threading.Event()
    found = Identity(model)

    class Stopping(threading.Event):
        def is_set(self) -> bool:
            reading.set()
            self.wait(10)
            return super().is_set()

    found._stopped = Stopping()
    found.start()
    assert reading.wait(10)
    found.wait(0)
    found.close()
    assert found.digest == ""
    Identity(model).close()
