"""Tiny encoders with random weights, laid out as sentence-transformers does, and what they should give.

`reference` is a second forward pass, written for clearness in numpy and one
text at a time: no batch, no mask, no padding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import tiny_models

WORDS = ("the", "river", "is", "deep", "water", "mill", "old", "stone", "a", "and", "##s", "##er", ".")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
HIDDEN = 32
HEADS = 4
LAYERS = 2


def build(
    path: Path,
    *,
    kind: str = "bert",
    seed: int = 0,
    positions: int = 64,
    max_tokens: int | None = 48,
    pooling: Sequence[str] | None = ("mean_tokens",),
    normalize: bool = True,
    dense: str | None = None,
    prefix: str = "",
    config: Mapping[str, object] | None = None,
    own: Mapping[str, object] | None = None,
) -> Path:
    """Writes an encoder into `path` and returns it.

    Args:
        kind: its `model_type`.
        positions: most tokens of a text, by its table of positions.
        max_tokens: most tokens of a text, by its settings.
        pooling: modes that are on. None leaves out everything but the transformer.
        dense: activation of a linear stage after the pooling.
        prefix: what stands before every tensor's name.
        config: what else `config.json` holds.
        own: what `config_sentence_transformers.json` holds.
    """
    path.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    offset = 0 if kind == "bert" else 2
    vocab = {token: i for i, token in enumerate((*SPECIAL, *WORDS, *"abcdefghijklmnopqrstuvwxyz"))}

    def normal(*shape: int, scale: float = 0.3) -> np.ndarray:
        return (random.normal(0, 1, shape) * scale).astype(np.float32)

    tensors = {
        "embeddings.word_embeddings.weight": normal(len(vocab), HIDDEN),
        "embeddings.position_embeddings.weight": normal(positions + offset, HIDDEN),
        "embeddings.token_type_embeddings.weight": normal(2, HIDDEN),
        "pooler.dense.weight": normal(HIDDEN, HIDDEN),
    }
    sizes = {"attention.output.dense": (HIDDEN, HIDDEN), "intermediate.dense": (2 * HIDDEN, HIDDEN)}
    sizes |= {f"attention.self.{name}": (HIDDEN, HIDDEN) for name in ("query", "key", "value")}
    sizes |= {"output.dense": (HIDDEN, 2 * HIDDEN)}
    norms = ["embeddings.LayerNorm"]
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}."
        for name, shape in sizes.items():
            tensors[f"{at}{name}.weight"], tensors[f"{at}{name}.bias"] = normal(*shape), normal(shape[0])
        norms += [f"{at}attention.output.LayerNorm", f"{at}output.LayerNorm"]
    for name in norms:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + normal(HIDDEN), normal(HIDDEN)
    tiny_models._save(path / "model.safetensors", {prefix + name: t for name, t in tensors.items()})
    write(
        path / "config.json",
        {
            "model_type": kind,
            "architectures": ["BertModel"],
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": 2 * HIDDEN,
            "max_position_embeddings": positions + offset,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "pad_token_id": offset - 1 if offset else 0,
            "vocab_size": len(vocab),
            **(config or {}),
        },
    )
    write(path / "tokenizer.json", tokenizer(vocab))
    if pooling is not None:
        stages = [
            "Transformer",
            "Pooling",
            *(["Dense"] if dense else []),
            *(["Normalize"] if normalize else []),
        ]
        write_stages(path, stages, pooling)
        if max_tokens is not None:
            write(path / "sentence_bert_config.json", {"max_seq_length": max_tokens})
        if dense:
            write(path / "2_Dense" / "config.json", {"activation_function": f"torch.nn.modules.{dense}"})
            tiny_models._save(
                path / "2_Dense" / "model.safetensors",
                {"linear.weight": normal(8, HIDDEN), "linear.bias": normal(8)},
            )
    if own is not None:
        write(path / "config_sentence_transformers.json", own)
    return path


def write_stages(path: Path, stages: Sequence[str], pooling: Sequence[str]) -> None:
    """Writes which stages a model has, and how it pools."""
    write(
        path / "modules.json",
        [
            {"path": f"{i}_{stage}" if i else "", "type": f"sentence_transformers.models.{stage}"}
            for i, stage in enumerate(stages)
        ],
    )
    write(path / "1_Pooling" / "config.json", {f"pooling_mode_{mode}": True for mode in pooling})


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def tokenizer(vocab: Mapping[str, int]) -> dict[str, object]:
    """A WordPiece tokenizer, with the settings for cutting and padding that a training run leaves behind."""
    ends = ("[CLS]", "[SEP]")
    return {
        "version": "1.0",
        "truncation": {"max_length": 6, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {
            "strategy": {"Fixed": 16},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": [
            {
                "id": vocab[t],
                "content": t,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for t in SPECIAL
        ],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {t: {"id": t, "ids": [vocab[t]], "tokens": [t]} for t in ends},
        },
        "decoder": None,
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": dict(vocab),
        },
    }


def tensors(file: Path) -> dict[str, np.ndarray]:
    """Reads a safetensors file of float32 and int64."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    kinds = {"F32": np.float32, "I64": np.int64}
    body = memoryview(data)[8 + length :]
    return {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], kinds[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


class Reference:
    """A model's outputs for one text, in numpy.

    Args:
        path: its folder.
        prefix: what stands before every tensor's name.
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.config = json.loads((path / "config.json").read_text())
        found = tensors(path / "model.safetensors")
        self.weights = {name.removeprefix(prefix): t.astype(np.float64) for name, t in found.items()}

    def outputs(self, ids: Sequence[int]) -> np.ndarray:
        """Returns the output for each token."""
        w, config = self.weights, self.config
        first = 0 if config["model_type"] == "bert" else config["pad_token_id"] + 1
        x = w["embeddings.word_embeddings.weight"][list(ids)]
        x = x + w["embeddings.position_embeddings.weight"][first : first + len(ids)]
        x = x + w["embeddings.token_type_embeddings.weight"][0]
        x = self.norm("embeddings.LayerNorm", x)
        size = config["hidden_size"] // config["num_attention_heads"]
        for layer in range(config["num_hidden_layers"]):
            at = f"encoder.layer.{layer}."
            q, k, v = (
                self.linear(f"{at}attention.self.{name}", x).reshape(len(ids), -1, size).swapaxes(0, 1)
                for name in ("query", "key", "value")
            )
            scores = q @ k.swapaxes(1, 2) / math.sqrt(size)
            shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
            mixed = (shares / shares.sum(axis=-1, keepdims=True)) @ v
            mixed = mixed.swapaxes(0, 1).reshape(len(ids), -1)
            x = self.norm(
                f"{at}attention.output.LayerNorm", x + self.linear(f"{at}attention.output.dense", mixed)
            )
            y = self.linear(f"{at}intermediate.dense", x)
            y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
            x = self.norm(f"{at}output.LayerNorm", x + self.linear(f"{at}output.dense", y))
        return x

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        spread = np.sqrt(x.var(axis=-1, keepdims=True) + self.config["layer_norm_eps"])
        return (x - x.mean(axis=-1, keepdims=True)) / spread * self.weights[f"{name}.weight"] + self.weights[
            f"{name}.bias"
        ]


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def cosine(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    return float(unit(np.asarray(a, np.float64)) @ unit(np.asarray(b, np.float64)))
