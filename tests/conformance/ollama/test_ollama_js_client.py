"""The official JavaScript client against the emulator. It insists on `done` where Python's does not."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from pathlib import Path

import platformdirs
import pytest

from forebay.testing.fake_ollama import MODELS, FakeOllama, Layer
from forebay.testing.fake_ollama_runners import FakeModel
from forebay.testing.fake_ollama_script import Line

VERSION = "0.6.4"


def client_root() -> Path:
    """Returns a folder in which node finds the client, filled once."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    root = platformdirs.user_cache_path("forebay") / "conformance" / f"ollama-js-{VERSION}"
    if not (root / "node_modules" / "ollama").is_dir():
        root.mkdir(parents=True, exist_ok=True)
        install = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(root), f"ollama@{VERSION}"]
        if subprocess.run(install, capture_output=True, timeout=100, check=False).returncode:
            pytest.skip("the JavaScript client cannot be fetched from the npm registry")
    return root


async def test_the_javascript_client_is_content() -> None:
    root = client_root()
    slow = FakeModel(name="slow:latest", answer_tokens=10_000)
    registry = {"tiny:latest": [Layer(digest="sha256:" + "c" * 64, size=2 << 20)]}
    async with FakeOllama([*MODELS, slow], registry=registry, token_seconds=0.001) as fake:
        fake.script("/api/generate", [Line({"model": "llama3.2", "response": "a", "done": False})])
        process = await asyncio.create_subprocess_exec(
            "node",
            str(Path(__file__).with_name("scenario.mjs")),
            fake.url,
            str(root),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(60):
            out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        seen = json.loads(out)
        async with asyncio.timeout(2):
            while fake.running:
                await asyncio.sleep(0.01)
        stopped = [generation for generation in fake.generations if generation.state == "stopped"]
    assert seen["streamEqualsWhole"]
    assert seen["abort"] == "AbortError"
    assert [generation.model for generation in stopped] == ["slow:latest"]
    assert seen["pull"][0] == "pulling manifest"
    assert seen["pull"][-1] == seen["create"] == "success"
    assert seen["embed"] == [32, 32]
    assert seen["list"] == len(MODELS) + 3
    assert seen["errors"] == [
        [404, "model 'nope' not found"],
        [404, "model 'nope:latest' not found"],
        [404, "model 'nope' not found"],
        [0, "pull model manifest: file does not exist"],
        [0, "Did not receive done or success response in stream."],
    ]
