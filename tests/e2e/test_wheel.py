"""The wheel holds everything, and adds one name to site-packages."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_adds_only_forebay_to_site_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"forebay"}
    assert "forebay/__init__.py" not in names  # a namespace that other distributions may share


def test_the_wheel_carries_protos_types_and_the_dashboard(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for interface in ("inference", "models", "fleet"):
        assert f"forebay/{interface}/v1/{interface}.proto" in names
        assert f"forebay/{interface}/v1/{interface}_pb2.pyi" in names
    for file in ("index.html", "app.js", "charts.js", "style.css", "icon.svg"):
        assert f"forebay/orchestrator/web/page/{file}" in names
    packages = {name.split("/")[1] for name in names if name.startswith("forebay/")}
    assert {f"forebay/{package}/py.typed" for package in packages} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def _environment() -> dict[str, str]:
    # The coverage of an installed copy is not that of this tree.
    return {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "orchestrator",
        "mlx_service",
        "ollama_bridge",
        "lmstudio_bridge",
        "openai_bridge",
        "testing.scripted",
    ],
)
def test_every_process_starts_from_the_wheel_outside_the_checkout(
    wheel: Path, module: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "installed"
    if not folder.exists():
        zipfile.ZipFile(wheel).extractall(folder)
    run = subprocess.run(
        [sys.executable, "-m", f"forebay.{module}", "--help"],
        cwd=folder.parent,
        env={**_environment(), "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    assert "usage" in run.stdout.lower()
