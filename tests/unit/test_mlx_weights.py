"""How weights are held on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mlx_worker_rig
import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import ModelLoadFailed
from forebay.mlx_service.blas import Blas
from forebay.mlx_service.models.describe import ModelFacts, describe
from forebay.mlx_service.worker import weights
from forebay.mlx_service.worker.load import load_weights
from forebay.mlx_service.worker.runtime import BLAS, mx, nn, tree_flatten
from forebay.mlx_service.worker.weights import (
    BlockedEmbedding,
    BlockedLinear,
    CpuWeights,
    Plan,
    TransposedLinear,
    plan,
    unpack,
)
from mlx_worker_rig import ask, rig

pytestmark = pytest.mark.mlx

FAST = Blas(path="lib", version="OpenBLAS 0.3", kernels="Haswell", threads=1)
GIB = 1 << 30


@pytest.fixture(autouse=True)
def on_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture
def facts(tmp_path: Path) -> ModelFacts:
    return describe(tiny_models.build_random(tmp_path / "m"))


def matrix(rows: int, columns: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32))


@pytest.mark.parametrize("layout", ["plain", "transposed", "blocked"])
@pytest.mark.parametrize(("bits", "dtype"), [(4, mx.float16), (8, mx.bfloat16), (4, mx.float32)])
def test_unpacked_weights_are_exactly_what_the_packed_ones_stand_for(monkeypatch, layout, bits, dtype):
    monkeypatch.setattr(weights, "SMALL", 0 if layout == "blocked" else weights.SMALL)
    weight = matrix(128, 64).astype(dtype)
    linear = nn.Linear(64, 128, bias=True)
    linear.weight, linear.bias = weight, mx.ones((128,), dtype)
    table = nn.Embedding(128, 64)
    table.weight = weight
    model = nn.Sequential(linear, table)
    nn.quantize(model, group_size=32, bits=bits)
    packed, scales, biases = model.layers[0].weight, model.layers[0].scales, model.layers[0].biases
    numbers = np.array(packed).view(np.uint8)
    if bits == 4:
        numbers = np.stack([numbers & 15, numbers >> 4], axis=-1)
    numbers = numbers.reshape(128, 2, 32).astype(np.float32)
    wide = [np.array(x.astype(mx.float32))[..., None] for x in (scales, biases)]
    wanted = (numbers * wide[0] + wide[1]).reshape(128, 64)
    unpack(model, is_blocked=layout != "plain", is_transposed=layout != "plain")
    kinds = {
        "plain": (nn.Linear, nn.Embedding),
        "transposed": (TransposedLinear, nn.Embedding),
        "blocked": (BlockedLinear, BlockedEmbedding),
    }
    for layer, kind in zip(model.layers, kinds[layout], strict=True):
        assert type(layer) is kind
        assert np.allclose(np.array(layer.weight), wanted, rtol=1e-7, atol=1e-7)
    assert model.layers[0].bias.dtype == mx.float32
    assert all(array.dtype == mx.float32 for _, array in tree_flatten(model.parameters()))


@pytest.mark.parametrize("outputs", [64, 70, 128, 200])
def test_blocks_give_what_the_matrix_gives(outputs):
    weight = matrix(outputs, 96)
    bias = matrix(1, outputs, 1)[0]
    layer, table = BlockedLinear(weight, bias), BlockedEmbedding(weight)
    assert mx.array_equal(layer.weight, weight)
    for shape in ((96,), (1, 96), (5, 96), (2, 3, 96), (1, 200, 96)):
        x = mx.random.normal(shape)
        got = layer(x)
        assert got.shape == (*shape[:-1], outputs)
        assert mx.allclose(got, x @ weight.T + bias, rtol=1e-5, atol=1e-5)
        assert mx.allclose(table.as_linear(x), x @ weight.T, rtol=1e-5, atol=1e-5)
    ids = mx.array([[0, outputs - 1, 7], [63, 3, 3]])
    assert mx.array_equal(table(ids), weight[ids])


def test_a_layer_by_columns_gives_what_the_matrix_gives():
    weight, bias = matrix(70, 96), matrix(1, 70, 1)[0]
    layer, plain = TransposedLinear(weight, bias), TransposedLinear(weight)
    assert mx.array_equal(layer.weight, weight)
    for shape in ((96,), (5, 96), (2, 3, 96)):
        x = mx.random.normal(shape)
        assert mx.allclose(layer(x), x @ weight.T + bias, rtol=1e-5, atol=1e-5)
        assert mx.allclose(plain(x), x @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(BLAS is None or not BLAS.has_small_kernels, reason="needs kernels for AVX-512")
@pytest.mark.parametrize(
    ("kind", "outputs", "inputs"), [(BlockedLinear, 300, 576), (TransposedLinear, 271, 128)]
)
def test_a_rows_result_does_not_depend_on_the_rows_beside_it(kind, outputs, inputs):
    layer = kind(matrix(outputs, inputs))
    x = matrix(16, inputs, 2)
    together = layer(x)
    for rows in (1, 2, 5, 16):
        assert mx.array_equal(layer(x[:rows]), together[:rows])


def test_layers_that_models_derive_and_small_ones_stay_what_they_are():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(64, 64), nn.Linear(64, 8), nn.LayerNorm(8))
    model.set_dtype(mx.float16)
    unpack(model, is_blocked=True)
    assert [type(layer) for layer in model.layers] == [Own, nn.Linear, nn.LayerNorm]
    assert model(mx.ones((1, 64))).dtype == mx.float32


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (nn.Linear, Plan(is_float32=True)),
        (TransposedLinear, Plan(is_float32=True, is_blocked=True, is_transposed=True)),
        (BlockedLinear, Plan(is_float32=True, is_blocked=True, is_transposed=True)),
    ],
)
def test_a_model_says_the_same_however_its_weights_are_held(tmp_path: Path, monkeypatch, kind, how):
    monkeypatch.setattr(weights, "SMALL", 0 if kind is BlockedLinear else weights.SMALL)
    folder = tiny_models.build_random(tmp_path / "m", hidden=128)
    stored = load_weights(folder)
    unpacked = load_weights(folder, how)
    ids = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    assert mx.allclose(stored(ids), unpacked(ids), rtol=1e-3, atol=1e-3)
    assert {type(m) for m in unpacked.modules()} & {nn.Linear, TransposedLinear, BlockedLinear} == {kind}


@pytest.mark.parametrize(
    ("choice", "blas", "ceiling", "count", "is_float32", "reason"),
    [
        ("auto", FAST, GIB, 1000, True, "weights held as float32"),
        ("auto", None, GIB, 1000, False, "weights held as stored: there is no fast BLAS"),
        ("auto", FAST, GIB, 0, False, "weights held as stored: their number is not known"),
        (
            "auto",
            FAST,
            6000,
            1000,
            False,
            "weights held as stored: as float32 they would take 4000 of 6000 bytes",
        ),
        ("stored", FAST, GIB, 1000, False, "weights held as stored"),
        ("float32", None, 6000, 1000, True, "weights held as float32"),
    ],
)
def test_weights_are_unpacked_where_that_is_faster_and_there_is_room(
    facts, choice, blas, ceiling, count, is_float32, reason
):
    facts = replace(facts, parameter_count=count)
    chosen = plan(CpuWeights(choice), facts, ceiling=ceiling, blas=blas)
    assert (chosen.is_float32, chosen.reason) == (is_float32, reason)
    assert chosen.byte_count == (4 * count if is_float32 else facts.weight_bytes)


def test_float32_without_room_is_refused_with_figures(facts):
    with pytest.raises(ModelLoadFailed, match="as float32 and memory_ceiling is 100"):
        plan(CpuWeights.FLOAT32, facts, ceiling=100, blas=FAST)


def test_blocks_are_for_kernels_that_need_no_packing(facts):
    wide = replace(FAST, kernels="SkylakeX")
    assert plan(CpuWeights.AUTO, facts, ceiling=GIB, blas=wide).is_blocked
    assert not plan(CpuWeights.AUTO, facts, ceiling=GIB, blas=FAST).is_blocked


def test_a_gpu_computes_with_weights_as_they_are(facts, monkeypatch):
    monkeypatch.setattr(weights.mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    chosen = plan(CpuWeights.FLOAT32, facts, ceiling=GIB, blas=FAST)
    assert (chosen.is_float32, chosen.reason) == (False, "")


async def test_what_unpacked_weights_take_is_what_was_planned_and_how_they_are_held_is_told(
    tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(mlx_worker_rig, "BLAS", FAST)
    folder = tiny_models.build_random(tmp_path / "m", hidden=128)
    async with rig(folder) as worker:
        await worker.generate(ask(most=3))
        (model,) = (await worker.service.list_models(pb.ListModelsRequest())).models
        weights_bytes = worker.engine.stats().weights_bytes
    assert model.detail == "weights held as float32"
    planned = 4 * describe(folder).parameter_count
    assert planned <= weights_bytes < 1.05 * planned
