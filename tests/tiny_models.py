"""Tiny llama models, made in a moment, for tests that want a real engine and no download.

`build_random` has random weights: its text is noise, but the same noise for the
same seed, and it depends on the whole prompt. `build_scripted` says a given
list of pieces, one token each, whatever it is asked: its blocks add nothing
to the residual stream, so the next token depends on the last one alone.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

BOS = "<|im_start|>"
EOS = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = ("t h", "th e", "i n", "e r", "a n", "o n", "Ġ t", "Ġ a", "Ġt h", "Ġth e", "a t", "e s", "o r")
CONTEXT = 2048
LAYERS = 2
HEADS = 4


def byte_alphabet() -> dict[int, str]:
    """Returns the printable stand-in of every byte in byte-level vocabularies."""
    ranges = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [b for first, last in ranges for b in range(ord(first), ord(last) + 1)]
    alphabet = {b: chr(b) for b in printable}
    others = (b for b in range(256) if b not in alphabet)
    return alphabet | {b: chr(256 + i) for i, b in enumerate(others)}


def build_random(
    path: Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = LAYERS,
    context: int = CONTEXT,
    plain: bool = False,
    family: str = "llama",
) -> Path:
    """Writes a model with random weights into `path` and returns it.

    Args:
        family: `llama`, or `qwen2`, which is the same with biases before attention.
        plain: whether greedy replies are of capitals and digits alone, so that their text can be cut anywhere
            and gives the same tokens again. Such replies never end by themselves.
    """
    vocab = _vocab(())
    random = np.random.default_rng(seed)
    size = len(vocab) + 2
    tensors = _blocks(random, hidden, layers, scale=0.3)
    tensors["model.embed_tokens.weight"] = random.normal(0, 1.0, (size, hidden)).astype(np.float32)
    tensors["lm_head.weight"] = head = random.normal(0, 0.5, (size, hidden)).astype(np.float32)
    if plain:
        likely = [vocab[char] for char in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"]
        for token in set(range(size)) - set(likely):
            head[token] = (
                head[likely[token % len(likely)]] / 2
            )  # less than its model wherever that is likeliest
    if family == "qwen2":
        for name in [
            name for name in tensors if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        ]:
            bias = random.normal(0, 0.1, hidden).astype(np.float32)
            tensors[name.replace("weight", "bias")] = bias
    return _write(path, vocab, tensors, hidden, layers, context, (), CHAT_TEMPLATE, family)


def build_scripted(
    path: Path,
    pieces: Sequence[str | bytes],
    *,
    context: int = CONTEXT,
    chat_template: str = CHAT_TEMPLATE,
    markers: Sequence[str] = (),
    sharpness: float = 20.0,
) -> Path:
    """Writes a model that answers with `pieces`, each a token of its own, and ends.

    Args:
        pieces: texts, or bytes where a token is to hold part of a character. No piece twice.
        markers: added tokens, such as `<think>`, that may also be pieces.
        sharpness: how sure the model is; less makes sampling leave the script.
    """
    alphabet = byte_alphabet()
    spelled = [
        p if isinstance(p, str) and p in markers else "".join(alphabet[b] for b in _bytes(p)) for p in pieces
    ]
    if len(set(spelled)) != len(spelled):
        raise ValueError("a piece is there twice")
    vocab = _vocab([s for s in spelled if s not in markers])
    ids = dict(vocab)
    added = [BOS, EOS, *markers]
    ids.update({token: len(vocab) + i for i, token in enumerate(added)})
    hidden = 256  # random directions of 256 components are nearly orthogonal: the script is never left
    random = np.random.default_rng(7)
    size = len(ids)
    embed = random.normal(0, 1.0, (size, hidden)).astype(np.float32)
    embed /= np.linalg.norm(embed, axis=1, keepdims=True) / np.sqrt(hidden)
    head = np.zeros((size, hidden), np.float32)
    last = ids[alphabet[ord("\n")]]
    for token in [*(ids[s] for s in spelled), ids[EOS]]:
        head[token] += embed[last] * sharpness / hidden
        last = token
    tensors = _blocks(random, hidden, LAYERS, scale=0.0)
    tensors["model.embed_tokens.weight"] = embed
    tensors["lm_head.weight"] = head
    return _write(path, vocab, tensors, hidden, LAYERS, context, markers, chat_template)


def _bytes(piece: str | bytes) -> bytes:
    return piece if isinstance(piece, bytes) else piece.encode()


def _vocab(extra: Sequence[str]) -> dict[str, int]:
    tokens = [*byte_alphabet().values(), *(m.replace(" ", "") for m in MERGES)]
    tokens += [t for t in extra if t not in tokens]
    return {token: i for i, token in enumerate(tokens)}


def _blocks(random: np.random.Generator, hidden: int, layers: int, scale: float) -> dict[str, np.ndarray]:
    def weight(rows: int, columns: int, by: float) -> np.ndarray:
        return (random.normal(0, 1.0, (rows, columns)) * by / np.sqrt(columns)).astype(np.float32)

    tensors = {"model.norm.weight": np.ones(hidden, np.float32)}
    for i in range(layers):
        at = f"model.layers.{i}."
        tensors[at + "input_layernorm.weight"] = np.ones(hidden, np.float32)
        tensors[at + "post_attention_layernorm.weight"] = np.ones(hidden, np.float32)
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[at + f"self_attn.{name}.weight"] = weight(hidden, hidden, 1.5)
        tensors[at + "self_attn.o_proj.weight"] = weight(hidden, hidden, scale * 4)
        tensors[at + "mlp.gate_proj.weight"] = weight(2 * hidden, hidden, 1.5)
        tensors[at + "mlp.up_proj.weight"] = weight(2 * hidden, hidden, 1.5)
        tensors[at + "mlp.down_proj.weight"] = weight(hidden, 2 * hidden, scale * 4)
    return tensors


def _write(
    path: Path,
    vocab: dict[str, int],
    tensors: dict[str, np.ndarray],
    hidden: int,
    layers: int,
    context: int,
    markers: Sequence[str],
    chat_template: str,
    family: str = "llama",
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    added = [BOS, EOS, *markers]
    ids = {token: len(vocab) + i for i, token in enumerate(added)}
    config = {
        "model_type": family,
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(vocab) + len(added),
        "max_position_embeddings": context,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": ids[BOS],
        "eos_token_id": ids[EOS],
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": ids[t],
                "content": t,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": t in {BOS, EOS},
            }
            for t in added
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [m.split(" ") for m in MERGES]},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template,
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    _save(path / "model.safetensors", tensors)
    return path


def _save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for tensor in tensors.values():
            file.write(tensor.tobytes())
