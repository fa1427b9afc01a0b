"""Promises of `forebay.mlx_service.quick_import`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forebay.mlx_service.quick_import import FILE, _Memory, remembering

FOUND = {
    frozenset(): {"llama.configuration_llama": {"LlamaConfig"}, "auto.tokenization_auto": {"A", "B"}},
    frozenset({"torch", "vision"}): {"llava.modeling_llava": {"Llava"}},
}


class Package:
    """What looks like the folder of transformers' models, and counts how often it is searched."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "transformers" / "models"
        self.file = folder / "cache" / FILE
        (self.root / "llama").mkdir(parents=True)
        (self.root / "llama" / "configuration_llama.py").write_text("1")
        self.searched: list[tuple[object, str | None]] = []

    def define(self, path: object, prefix: str | None = None) -> dict:
        self.searched.append((path, prefix))
        return FOUND

    def memory(self) -> _Memory:
        return _Memory(self.define, self.file)


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return Package(tmp_path)


def test_what_was_found_is_remembered_within_a_process_and_by_the_next(package: Package) -> None:
    memory = package.memory()
    for _ in range(2):
        assert memory.define(package.root, None) == FOUND
        assert memory.define(str(package.root / "__init__.py")) == FOUND
    assert memory.define(package.root, "models") == {
        needs: {f"models.{module}": names for module, names in found.items()}
        for needs, found in FOUND.items()
    }
    assert package.searched == [(str(package.root), None)]
    assert package.memory().define(package.root) == FOUND
    assert len(package.searched) == 1


def test_whoever_changes_what_it_got_changes_nobody_elses(package: Package) -> None:
    memory = package.memory()
    got = memory.define(package.root)
    got[frozenset()]["auto.tokenization_auto"].clear()
    got[frozenset()].clear()
    assert memory.define(package.root) == FOUND


@pytest.mark.parametrize("change", ["edit", "add", "touch"])
def test_a_change_in_any_file_has_it_search_again(package: Package, change: str) -> None:
    package.memory().define(package.root)
    path = package.root / "llama" / "configuration_llama.py"
    if change == "edit":
        path.write_text("12")
    elif change == "add":
        (package.root / "llama" / "tokenization_llama.py").write_text("")
    else:
        os.utime(path, ns=(1, 1))
    package.memory().define(package.root)
    assert len(package.searched) == 2


def test_compiled_files_are_no_change(package: Package) -> None:
    package.memory().define(package.root)
    (package.root / "__pycache__").mkdir()
    (package.root / "__pycache__" / "x.pyc").write_text("")
    package.memory().define(package.root)
    assert len(package.searched) == 1


@pytest.mark.parametrize("content", ["", "[]", "{", '{"stamp": ""}', "stamped"])
def test_a_file_that_cannot_be_read_is_written_anew(package: Package, content: str) -> None:
    package.memory().define(package.root)
    if content == "stamped":
        content = json.dumps({**json.loads(package.file.read_text()), "names": [[1, 2, 3]]})
    package.file.write_text(content)
    assert package.memory().define(package.root) == FOUND
    assert package.memory().define(package.root) == FOUND
    assert len(package.searched) == 2


def test_where_nothing_can_be_written_it_is_searched_each_time(package: Package) -> None:
    package.file.parent.write_text("a file where the folder should be")
    for count in (1, 2):
        assert package.memory().define(package.root) == FOUND
        assert len(package.searched) == count


def test_without_a_folder_it_is_remembered_within_the_process(package: Package) -> None:
    memory = _Memory(package.define, None)
    assert memory.define(package.root) == memory.define(str(package.root)) == FOUND
    assert len(package.searched) == 1


def test_other_folders_are_searched_as_before(package: Package) -> None:
    one = package.root / "llama" / "__init__.py"
    package.memory().define(str(one), "models.llama")
    package.memory().define(str(one))
    assert package.searched == [(str(one), "models.llama"), (str(one), None)]


def test_a_version_without_that_function_is_left_alone_and_no_trace_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "transformers" / "utils"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("from .utils import import_utils")
    (folder / "__init__.py").write_text("")
    (folder / "import_utils.py").write_text("here = 1")
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    with remembering(str(tmp_path)):
        import transformers
    assert sys.meta_path == finders
    made = transformers.utils.import_utils
    assert made.here == 1
    assert type(made.__loader__).__name__ == type(made.__spec__.loader).__name__ == "SourceFileLoader"
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)


COMPARE = """
import sys
from forebay.mlx_service.quick_import import remembering
with remembering(sys.argv[1]):
    import transformers
from transformers.utils import import_utils
root = transformers.__path__[0] + "/models"
mine = import_utils.define_import_structure
plain = mine.__self__._define
assert transformers.AutoTokenizer and transformers.PreTrainedTokenizerFast and transformers.LlamaConfig
assert mine(root) == plain(root), "all"
assert mine(root + "/__init__.py", "models") == plain(root, "models"), "with a prefix"
"""


@pytest.mark.mlx
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not here")
def test_the_real_transformers_gets_what_it_would_have_found(tmp_path: Path) -> None:
    files = set()
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", COMPARE, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        files.add((tmp_path / FILE).stat().st_ino)
    assert len(files) == 1  # the second one wrote none: it read the first one's
