"""ollama-python's own tests, replayed through the emulator's parser and framing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import platformdirs
import pytest

VERSION = "0.6.3"
NETWORK_TESTS = 53


def suite() -> Path:
    """Returns the tests of the official client's source distribution, fetched once."""
    cache = platformdirs.user_cache_path("forebay") / "conformance"
    root = cache / f"ollama-{VERSION}"
    if not (root / "tests").is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "ollama"]
        fetched = subprocess.run(
            [*download, "-d", str(cache), f"ollama=={VERSION}"], capture_output=True, timeout=90, check=False
        )
        archive = cache / f"ollama-{VERSION}.tar.gz"
        if fetched.returncode or not archive.exists():
            pytest.skip("the source distribution of the official client cannot be fetched")
        with tarfile.open(archive) as tar:
            tar.extractall(cache, filter="data")
    return root / "tests"


@pytest.mark.timeout(240)
def test_the_official_suite_passes_through_the_emulator() -> None:
    tests = suite()
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), *sys.path])
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("COV_", "COVERAGE_"))
    }
    plugins = ["-p", "ollama_replay_plugin", "-p", "no:cacheprovider", "-p", "no:asyncio"]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            *plugins,
            "-o",
            "addopts=",
            f"--rootdir={tests.parent}",
            str(tests),
        ],
        env={**environment, "PYTHONPATH": path},
        cwd=tests.parent,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    counts = re.search(r"network tests passed: (\d+) of (\d+)", run.stdout)
    assert counts is not None, run.stdout[-4000:] + run.stderr[-2000:]
    assert counts.groups() == (str(NETWORK_TESTS), str(NETWORK_TESTS)), run.stdout[-6000:]
    assert run.returncode == 0, run.stdout[-4000:]
