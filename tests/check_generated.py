"""Fails if the committed stubs are not what the protos generate."""

from __future__ import annotations

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROTOS = ROOT / "protos"
BIN = Path(sys.executable).parent


def main() -> int:
    """Generates the stubs into a folder of its own and compares them with the committed ones."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}",
                f"--plugin=protoc-gen-mypy={BIN / 'protoc-gen-mypy'}",
                f"--plugin=protoc-gen-mypy_grpc={BIN / 'protoc-gen-mypy_grpc'}",
                *(f"--{kind}_out={folder}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
                *sources,
            ],
            check=True, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        made = {path.relative_to(folder) for path in Path(folder).rglob("*_pb2*")}
        kept = {
            path.relative_to(PROTOS) for path in PROTOS.rglob("*_pb2*.py*") if "__pycache__" not in path.parts
        }
        wrong = sorted(
            str(name)
            for name in made | kept
            if name not in made
            or name not in kept
            or not filecmp.cmp(Path(folder) / name, PROTOS / name, shallow=False)
        )
    for name in wrong:
        print(f"protos/{name} is not what the protos generate: run `make protos` and commit")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
