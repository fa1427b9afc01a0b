"""Makes importing transformers quick: what it finds out about itself each time is remembered.

Each time it is imported, transformers reads the text of all its models' modules, twice, to learn which names
they have: thousands of files, and a third of a worker's start. Here what it found is written down, with
the sizes and times of all those files, and read the next time if not one of them has changed. What
transformers gets is the same. A version that goes about it in another way is left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

FOLDER_VARIABLE = "FOREBAY_MLX__CACHE_DIR"
"""Environment variable of the setting `cache_dir`: workers are told by it, since they need it so early."""

FILE = "transformers.json"
"""Name of the file in that folder."""

MODULE = "transformers.utils.import_utils"
_FUNCTION = "define_import_structure"
_ROOT = ("transformers", "models")

Names: TypeAlias = dict[frozenset[str], dict[str, set[str]]]
"""Names by module, and those by what has to be installed for them."""

_Define: TypeAlias = Callable[[object, "str | None"], Names]


@contextlib.contextmanager
def remembering(folder: str | None) -> Iterator[None]:
    """Has transformers remember, if it is imported in the block.

    Args:
        folder: where to write it down. None remembers within this process, which halves the work.
    """
    finder = _Finder(Path(folder, FILE) if folder else None)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    """Finds the one module that looks for names, and leaves all others to the next finder."""

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == MODULE else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._file)
        return spec


class _Loader(Loader):
    """Loads that module as it is, and then puts a function that remembers in the place of one."""

    def __init__(self, loader: Loader, file: Path | None) -> None:
        self._loader, self._file = loader, file

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        define = getattr(module, _FUNCTION, None)
        if define is not None:
            setattr(module, _FUNCTION, _Memory(define, self._file).define)


class _Memory:
    """What transformers found in the folder of all its models.

    Args:
        define: what finds it.
        file: where it is written down.
    """

    def __init__(self, define: _Define, file: Path | None) -> None:
        self._define = define
        self._file = file
        self._found: Names = {}

    def define(self, module_path: object, prefix: str | None = None) -> Names:
        """Returns what `define_import_structure` does. Each caller may change what it gets."""
        root = Path(str(module_path))
        root = root.parent if root.suffix else root
        if root.parts[-2:] != _ROOT:  # it is some model's own folder, which is small
            return self._define(module_path, prefix)
        self._found = self._found or self._find(str(root))
        start = "" if prefix is None else f"{prefix}."
        return {
            needs: {start + module: set(names) for module, names in found.items()}
            for needs, found in self._found.items()
        }

    def _find(self, root: str) -> Names:
        if self._file is None:
            return self._define(root, None)
        stamp = _stamp(root)
        # Whatever is wrong with the file, a new one mends it.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            known = json.loads(self._file.read_bytes())
            if known["stamp"] == stamp:
                return _decode(known["names"])
        found = self._define(root, None)
        with contextlib.suppress(OSError):  # it is looked for again next time
            _write(self._file, json.dumps({"stamp": stamp, "names": _encode(found)}))
        return found


def _stamp(root: str) -> str:
    """Returns what is another one as soon as any file below a folder is."""
    digest = hashlib.sha256(f"1 {root}".encode())
    folders = [root]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir():
                    if entry.name != "__pycache__":
                        folders.append(entry.path)
                else:
                    stat = entry.stat()
                    digest.update(f"\0{entry.path} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _encode(names: Names) -> list[list[object]]:
    return [
        [sorted(needs), {module: sorted(names) for module, names in found.items()}]
        for needs, found in names.items()
    ]


def _decode(encoded: list[tuple[list[str], dict[str, list[str]]]]) -> Names:
    return {
        frozenset(needs): {module: set(names) for module, names in found.items()} for needs, found in encoded
    }


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    Path(name).replace(path)
