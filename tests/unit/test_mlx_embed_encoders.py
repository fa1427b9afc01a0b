"""Encoders of other builds than BERT's: each against a forward pass in numpy, one text at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from forebay.kit.failure import ModelLoadFailed
from forebay.mlx_service import requirements
from forebay.mlx_service.models.describe import describe
from tiny_encoders import HEADS, HIDDEN, Reference, build, cosine, tensors, write

if requirements.missing():
    pytest.skip(requirements.missing(), allow_module_level=True)

from forebay.mlx_service.worker.embedding import activations
from forebay.mlx_service.worker.embedding.load import load_embedder
from forebay.mlx_service.worker.runtime import mx
from forebay.mlx_service.worker.weights import Plan

pytestmark = pytest.mark.mlx

IDS = [[2, 5, 6, 7, 8, 14, 9, 10, 11, 12, 5, 3], [2, 3], [2, 9, 10, 17, 3]]
SIZE = HIDDEN // HEADS
LAYERS = 3
INNER = 48
VOCABULARY = 44

random = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return (random.normal(0, 1, shape) * 0.3).astype(np.float32)


def embedded(path: Path, how: Plan | None = None, ids: Sequence[Sequence[int]] = IDS) -> np.ndarray:
    """Embeds all in one batch, padded with a token that is none."""
    facts = describe(path)
    model = load_embedder(path, facts.recipe, *([how] if how else []))
    width = max(map(len, ids))
    padded = [[*row, *[4] * (width - len(row))] for row in ids]
    mask = mx.array([[i < len(row) for i in range(width)] for row in ids])
    return np.array(model(mx.array(padded), mask))


def save(path: Path, config: dict[str, object], weights: dict[str, np.ndarray], prefix: str = "") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    write(path / "config.json", config)
    tiny_models._save(path / "model.safetensors", {prefix + name: t for name, t in weights.items()})
    return path


# The numpy side


def norm(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0, epsilon: float = 1e-5
) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * weight + bias


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rotated(x: np.ndarray, base: float) -> np.ndarray:
    """Turns each pair of components (i, i + half) of [tokens, heads, size] by its token's place."""
    half = SIZE // 2
    angles = np.arange(len(x))[:, None] / base ** (np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attended(qkv: np.ndarray, base: float, reach: int | None = None) -> np.ndarray:
    tokens = len(qkv)
    q, k, v = qkv.reshape(tokens, 3, HEADS, SIZE).swapaxes(0, 1)
    q, k = rotated(q, base), rotated(k, base)
    mixed = np.zeros((tokens, HEADS, SIZE))
    for head in range(HEADS):
        for i in range(tokens):
            seen = [j for j in range(tokens) if reach is None or abs(i - j) <= reach]
            scores = np.array([q[i, head] @ k[j, head] for j in seen]) / math.sqrt(SIZE)
            shares = np.exp(scores - scores.max())
            mixed[i, head] = (shares / shares.sum()) @ v[seen, head]
    return mixed.reshape(tokens, HIDDEN)


# ModernBERT


def modernbert() -> tuple[dict[str, object], dict[str, np.ndarray]]:
    weights = {"embeddings.tok_embeddings.weight": normal(VOCABULARY, HIDDEN)}
    for name in ("embeddings.norm", "final_norm"):
        weights[f"{name}.weight"] = 1 + normal(HIDDEN)
    for layer in range(LAYERS):
        at = f"layers.{layer}"
        if layer:
            weights[f"{at}.attn_norm.weight"] = 1 + normal(HIDDEN)
        weights[f"{at}.attn.Wqkv.weight"] = normal(3 * HIDDEN, HIDDEN)
        weights[f"{at}.attn.Wo.weight"] = normal(HIDDEN, HIDDEN)
        weights[f"{at}.mlp_norm.weight"] = 1 + normal(HIDDEN)
        weights[f"{at}.mlp.Wi.weight"] = normal(2 * INNER, HIDDEN)
        weights[f"{at}.mlp.Wo.weight"] = normal(HIDDEN, INNER)
    config = {
        "model_type": "modernbert",
        "architectures": ["ModernBertForMaskedLM"],
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 64,
        "local_attention": 4,
        "global_attn_every_n_layers": 2,
        "global_rope_theta": 160000.0,
        "local_rope_theta": 1000.0,
    }
    return config, weights


def modernbert_outputs(w: dict[str, np.ndarray], ids: Sequence[int]) -> np.ndarray:
    x = norm(w["embeddings.tok_embeddings.weight"][list(ids)].astype(np.float64), w["embeddings.norm.weight"])
    for layer in range(LAYERS):
        at = f"layers.{layer}"
        y = norm(x, w[f"{at}.attn_norm.weight"]) if layer else x
        is_local = layer % 2 == 1
        y = attended(y @ w[f"{at}.attn.Wqkv.weight"].T, *((1000.0, 2) if is_local else (160000.0, None)))
        x = x + y @ w[f"{at}.attn.Wo.weight"].T
        y = norm(x, w[f"{at}.mlp_norm.weight"]) @ w[f"{at}.mlp.Wi.weight"].T
        x = x + (gelu(y[:, :INNER]) * y[:, INNER:]) @ w[f"{at}.mlp.Wo.weight"].T
    return norm(x, w["final_norm.weight"])


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("is_new", [False, True])
def test_modernbert_equals_a_forward_pass_in_numpy(tmp_path, prefix, is_new):
    config, weights = modernbert()
    extra = {"head.dense.weight": normal(4, 4), "decoder.bias": normal(4)} if prefix else {}
    if is_new:
        for key in ("global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"):
            del config[key]
        config["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
        config["rope_parameters"] = {
            "full_attention": {"rope_type": "default", "rope_theta": 160000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        }
    path = save(tmp_path, config, weights, prefix)
    tiny_models._save(path / "model-head.safetensors", extra)
    for ids, vector in zip(IDS, embedded(path), strict=True):
        wanted = modernbert_outputs(weights, ids).mean(axis=0)
        assert cosine(vector, wanted) >= 0.9999
        assert vector == pytest.approx(wanted, abs=1e-4)
    assert describe(path).recipe.token_count == 64


def test_rotations_that_are_stretched_are_refused(tmp_path):
    config, weights = modernbert()
    config["rope_parameters"] = {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4}}
    path = save(tmp_path, config, weights)
    with pytest.raises(ModelLoadFailed, match="rotations of kind 'yarn' are not supported"):
        embedded(path)


# Nomic's BERT


def nomic() -> tuple[dict[str, object], dict[str, np.ndarray]]:
    weights = {
        "embeddings.word_embeddings.weight": normal(VOCABULARY, HIDDEN),
        "embeddings.token_type_embeddings.weight": normal(2, HIDDEN),
    }
    norms = ["emb_ln"]
    for layer in range(LAYERS):
        at = f"encoder.layers.{layer}"
        weights[f"{at}.attn.Wqkv.weight"] = normal(3 * HIDDEN, HIDDEN)
        weights[f"{at}.attn.out_proj.weight"] = normal(HIDDEN, HIDDEN)
        weights[f"{at}.mlp.fc11.weight"] = normal(INNER, HIDDEN)
        weights[f"{at}.mlp.fc12.weight"] = normal(INNER, HIDDEN)
        weights[f"{at}.mlp.fc2.weight"] = normal(HIDDEN, INNER)
        norms += [f"{at}.norm1", f"{at}.norm2"]
    for name in norms:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + normal(HIDDEN), normal(HIDDEN)
    config = {
        "model_type": "nomic_bert",
        "architectures": ["NomicBertModel"],
        "n_embd": HIDDEN,
        "n_head": HEADS,
        "n_layer": LAYERS,
        "n_positions": 8192,
        "max_trained_positions": 2048,
        "rotary_scaling_factor": 2,
        "rotary_emb_base": 1000,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "activation_function": "swiglu",
        "layer_norm_epsilon": 1e-12,
        "prenorm": False,
    }
    return config, weights


def nomic_outputs(w: dict[str, np.ndarray], ids: Sequence[int]) -> np.ndarray:
    def normed(name: str, x: np.ndarray) -> np.ndarray:
        return norm(x, w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    x = w["embeddings.word_embeddings.weight"][list(ids)].astype(np.float64)
    x = normed("emb_ln", x + w["embeddings.token_type_embeddings.weight"][0])
    for layer in range(LAYERS):
        at = f"encoder.layers.{layer}"
        y = attended(x @ w[f"{at}.attn.Wqkv.weight"].T, 1000.0)
        x = normed(f"{at}.norm1", x + y @ w[f"{at}.attn.out_proj.weight"].T)
        y = (x @ w[f"{at}.mlp.fc11.weight"].T) * silu(x @ w[f"{at}.mlp.fc12.weight"].T)
        x = normed(f"{at}.norm2", x + y @ w[f"{at}.mlp.fc2.weight"].T)
    return x


def test_nomics_bert_equals_a_forward_pass_in_numpy(tmp_path):
    config, weights = nomic()
    path = save(tmp_path, config, weights)
    for ids, vector in zip(IDS, embedded(path), strict=True):
        wanted = nomic_outputs(weights, ids).mean(axis=0)
        assert cosine(vector, wanted) >= 0.9999
        assert vector == pytest.approx(wanted, abs=1e-4)


def test_texts_are_no_longer_than_rotations_were_trained_for(tmp_path):
    config, weights = nomic()
    path = save(tmp_path, config, weights)
    assert describe(path).recipe.token_count == 2048
    del config["rotary_scaling_factor"]
    assert describe(save(tmp_path / "b", config, weights)).recipe.token_count == 8192


@pytest.mark.parametrize(
    ("key", "value"), [("num_experts", 8), ("prenorm", True), ("activation_function", "gelu")]
)
def test_settings_of_nomics_bert_that_are_not_supported_are_said(tmp_path, key, value):
    config, weights = nomic()
    path = save(tmp_path, config | {key: value}, weights)
    with pytest.raises(ModelLoadFailed, match=f"its {key} .* is not supported"):
        embedded(path)


# DistilBERT


def distilled(tmp_path: Path) -> tuple[Path, Path]:
    """A BERT without token types, and the same under DistilBERT's names."""
    bert = build(tmp_path / "bert")
    found = {name: np.array(t) for name, t in tensors(bert / "model.safetensors").items()}
    found["embeddings.token_type_embeddings.weight"][:] = 0
    tiny_models._save(bert / "model.safetensors", found)
    names = {
        "encoder.layer.": "transformer.layer.",
        "attention.self.query": "attention.q_lin",
        "attention.self.key": "attention.k_lin",
        "attention.self.value": "attention.v_lin",
        "attention.output.dense": "attention.out_lin",
        "attention.output.LayerNorm": "sa_layer_norm",
        "intermediate.dense": "ffn.lin1",
        "output.dense": "ffn.lin2",
        "output.LayerNorm": "output_layer_norm",
    }
    renamed: dict[str, np.ndarray] = {}
    for name, tensor in found.items():
        if "token_type" in name or "pooler" in name:
            continue
        for old, new in names.items():
            name = name.replace(old, new)  # noqa: PLW2901
        renamed[f"distilbert.{name}"] = tensor
    renamed["vocab_transform.weight"] = normal(4, 4)
    config = {
        "model_type": "distilbert",
        "architectures": ["DistilBertForMaskedLM"],
        "dim": HIDDEN,
        "n_layers": 2,
        "n_heads": HEADS,
        "activation": "gelu",
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return bert, save(tmp_path / "distilbert", config, renamed)


def test_distilbert_is_a_bert_without_segments(tmp_path):
    bert, path = distilled(tmp_path)
    reference = Reference(bert)
    for ids, vector in zip(IDS, embedded(path), strict=True):
        assert vector == pytest.approx(reference.outputs(ids).mean(axis=0), abs=1e-4)
    assert describe(path).recipe.token_count == 64


# All of them


@pytest.mark.parametrize("make", [modernbert, nomic])
def test_a_missing_tensor_is_named(tmp_path, make):
    config, weights = make()
    name = sorted(weights)[-1]
    del weights[name]
    with pytest.raises(ModelLoadFailed, match=f"1 tensors are missing, such as {name}"):
        embedded(save(tmp_path, config, weights))


def test_what_config_json_leaves_out_is_said(tmp_path):
    config, weights = nomic()
    del config["n_head"]
    with pytest.raises(ModelLoadFailed, match=r"its config\.json has no n_head"):
        embedded(save(tmp_path, config, weights))


def test_a_model_type_that_is_not_supported_is_refused_with_those_that_are(tmp_path):
    path = build(tmp_path, kind="deberta-v2")
    with pytest.raises(ModelLoadFailed, match=r"'deberta-v2' are not supp.*distilbert.*modernbert.*nomic"):
        embedded(path)


@pytest.mark.parametrize("is_float32", [False, True])
def test_half_precision_and_packed_weights_are_unpacked_where_that_is_asked(tmp_path, is_float32):
    """A packed encoder gives what its unpacked numbers give."""
    path = build(tmp_path / "packed", config={"quantization": {"group_size": 32, "bits": 8}})
    packed: dict[str, mx.array] = {}
    plain: dict[str, mx.array] = {}
    for name, tensor in mx.load(str(path / "model.safetensors")).items():
        half = tensor.astype(mx.float16)
        if name.endswith("dense.weight") and "pooler" not in name:
            parts = mx.quantize(half, group_size=32, bits=8)
            for leaf, part in zip(("weight", "scales", "biases"), parts, strict=True):
                packed[f"{name.removesuffix('weight')}{leaf}"] = part
            wide = [part.astype(mx.float32) for part in parts[1:]]
            plain[name] = mx.dequantize(parts[0], *wide, group_size=32, bits=8)
        else:
            packed[name] = half
            plain[name] = half.astype(mx.float32)
    mx.save_safetensors(str(path / "model.safetensors"), packed)
    other = build(tmp_path / "other")
    mx.save_safetensors(str(other / "model.safetensors"), plain)
    wanted = embedded(other)
    got = embedded(path, Plan(is_float32=is_float32))
    assert got == pytest.approx(wanted, abs=1e-6 if is_float32 else 1e-2)


def test_gelu_on_a_cpu_is_near_the_exact_one(monkeypatch):
    x = np.linspace(-12, 12, 5001).astype(np.float32)
    wanted = gelu(x.astype(np.float64))
    assert np.abs(np.array(activations.gelu(mx.array(x))) - wanted).max() < 1e-5
    monkeypatch.setattr(activations.mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    assert np.abs(np.array(activations.gelu(mx.array(x))) - wanted).max() < 2e-6


def test_an_activation_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"'mish' is not supported; gelu, .*silu are"):
        activations.activation("mish")
