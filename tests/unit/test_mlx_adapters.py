"""Promises of adapters: each answers as it does alone, the base is unchanged, weights are there once."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    CapabilityUnsupported,
    Draining,
    Failure,
    MemoryExhausted,
    ModelLoadFailed,
    ModelNotFound,
)
from forebay.kit.pipeline import Call
from forebay.mlx_service.models.adapter import describe_adapter
from forebay.mlx_service.models.describe import NotAModelError, describe
from forebay.mlx_service.models.identity import Identity
from forebay.mlx_service.worker.adapters import AdapterModels, Adapters, needs_plain_layers
from forebay.mlx_service.worker.engine import Engine
from forebay.mlx_service.worker.grammar import Grammars
from forebay.mlx_service.worker.load import load_weights
from forebay.mlx_service.worker.prefix_cache import PrefixCache
from forebay.mlx_service.worker.runtime import load_adapters, make_prompt_cache, mx
from forebay.mlx_service.worker.service import Served, WorkerService
from forebay.mlx_service.worker.speculation import Speculation
from forebay.mlx_service.worker.weights import STORED, Plan
from forebay.mlx_service.worker.words import Words
from forebay.models.v1 import models_pb2 as models_pb
from mlx_worker_rig import MODEL, Rig, ask, until
from tiny_adapters import RANK, make_adapter

pytestmark = pytest.mark.mlx


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_random(tmp_path_factory.mktemp("adapters") / "base")


@pytest.fixture(scope="module")
def folders(base: Path) -> dict[str, Path]:
    return {f"a{i}": make_adapter(base.parent / f"a{i}", base, seed=i) for i in range(3)}


@asynccontextmanager
async def serving(
    base: Path, folders: Mapping[str, Path], *, ceiling: int | None = None, how: Plan = STORED
) -> AsyncIterator[tuple[Rig, AdapterModels]]:
    words = Words(base)
    await words.load()
    engine = Engine(
        lambda: (load_weights(base, how), words.language.end_tokens),
        rows=6,
        prefill_step=32,
        prefixes=PrefixCache(max_bytes=64 << 20, min_tokens=4),
        ceiling=ceiling,
        speculation=Speculation(),
    )
    identity = Identity(base)
    identity.learn()
    served = Served(
        model_id=MODEL,
        backend="mlx",
        facts=describe(base),
        identity=identity,
        context_token_count=512,
        default_max_tokens=64,
        rows=6,
    )
    adapters = Adapters(engine, MODEL, folders)
    await engine.start()
    try:
        service = WorkerService(served, engine, words, Grammars(words), adapters)
        yield Rig(service, engine, words), AdapterModels(adapters, "mlx")
    finally:
        await engine.stop(timeout=20)
        words.close()


def request(model: str, text: str = "the man in the tent", most: int = 24) -> pb.GenerateRequest:
    made = ask(text, most=most, include_token_ids=True)
    made.model = model
    return made


async def tokens(rig: Rig, model: str, text: str = "the man in the tent") -> list[int]:
    return (await rig.generate(request(model, text))).token_ids


def by_mlx_lm(base: Path, folder: Path | None, prompt: tuple[int, ...], count: int) -> list[int]:
    """What mlx-lm makes of a prompt with the adapter loaded the usual way, into a model of its own."""
    model = load_weights(base)
    if folder is not None:
        load_adapters(model, str(folder))
    assert callable(model)
    caches = make_prompt_cache(model)
    inputs = mx.array([prompt])
    found: list[int] = []
    for _ in range(count):
        inputs = mx.argmax(model(inputs, cache=caches)[:, -1:], axis=-1)
        found.append(int(inputs.item()))
    return found


async def test_each_adapter_answers_as_it_does_alone_while_all_run_at_once(
    base: Path, folders: dict[str, Path]
) -> None:
    async with serving(base, folders) as (rig, _):
        prompts = ["the man in the tent", "hi", "on and on and on in the rain"]
        read = {text: (await rig.words.prompt(ask(text).messages)).tokens for text in prompts}
        async with asyncio.TaskGroup() as tasks:
            running = {
                (name, text): tasks.create_task(tokens(rig, name, text))
                for text in prompts
                for name in (MODEL, *folders)
            }
        assert rig.engine.stats().faults == 0
        again = await tokens(rig, "a1", prompts[0])  # alone, and with its prompt read already
    found = {case: task.result() for case, task in running.items()}
    for (name, text), told in found.items():
        expected = by_mlx_lm(base, folders.get(name), read[text], 24)
        assert told == expected[: len(told)]
        assert len(told) == 24 or expected[len(told)] in rig.words.language.end_tokens
    assert again == found["a1", prompts[0]]
    assert len({tuple(found[name, prompts[0]]) for name in (MODEL, *folders)}) == 4


async def test_adapters_take_their_own_memory_and_none_of_the_base(
    base: Path, folders: dict[str, Path]
) -> None:
    async with serving(base, folders) as (rig, models):
        before = await rig.engine.run(mx.get_active_memory)
        sizes = [describe_adapter(folder).disk_bytes for folder in folders.values()]
        for name in folders:
            await load(models, name)
        took = await rig.engine.run(mx.get_active_memory) - before
        assert took <= sum(sizes) * 1.05 + 16384
        assert took < rig.engine.stats().weights_bytes / 2
        for name in folders:
            await models.unload_model(models_pb.UnloadModelRequest(model=name))
        await rig.engine.run(mx.clear_cache)
        assert await rig.engine.run(mx.get_active_memory) - before <= 16384


async def load(models: AdapterModels, name: str) -> pb.Model:
    events: list[models_pb.LoadModelResponse] = []

    async def send(event: models_pb.LoadModelResponse) -> None:
        events.append(event)

    await models.load_model(models_pb.LoadModelRequest(model=name), send)
    assert events[-1].WhichOneof("event") == "loaded"
    return events[-1].loaded.model


async def test_adapters_are_models_of_their_own(base: Path, folders: dict[str, Path]) -> None:
    async with serving(base, folders) as (rig, models):
        plain = await rig.generate(request(MODEL))
        adapted = await rig.generate(request("a0"))
        assert adapted.started.model == "a0"
        assert adapted.started.weights.digest != plain.started.weights.digest
        listed = {m.id: m for m in (await rig.service.list_models(pb.ListModelsRequest())).models}
        assert set(listed) == {MODEL, *folders}
        assert listed["a0"].state == pb.Model.STATE_ACTIVE
        assert listed["a0"].weights.digest == adapted.started.weights.digest
        assert listed["a0"].capabilities == listed[MODEL].capabilities
        assert listed["a1"].state == pb.Model.STATE_AVAILABLE
        counted = pb.CountTokensRequest(model="a1", messages=ask("hi").messages)
        assert (await rig.service.count_tokens(Call(request=counted))).model == "a1"
        assert (await models.get_model(models_pb.GetModelRequest(model="a0"))).model.state == (
            pb.Model.STATE_ACTIVE
        )
        assert (await load(models, "a1")).state == pb.Model.STATE_ACTIVE


async def test_nothing_that_one_adapter_read_serves_another(base: Path, folders: dict[str, Path]) -> None:
    async with serving(base, folders) as (rig, _):
        text = "the rain in the mountains " * 3
        first = {name: await rig.generate(request(name, text)) for name in (MODEL, "a0", "a1")}
        again = {name: await rig.generate(request(name, text)) for name in (MODEL, "a0", "a1")}
        for name, reply in first.items():
            assert reply.finished.usage.cached_token_count == 0
            assert again[name].finished.usage.cached_token_count > 0
            assert again[name].token_ids == reply.token_ids


async def test_an_adapter_that_is_unloaded_waits_for_its_calls_and_comes_back(
    base: Path, folders: dict[str, Path]
) -> None:
    async with serving(base, folders) as (rig, models):
        expected = await tokens(rig, "a0")
        running = asyncio.create_task(rig.generate(request("a0", "hi", 300)))
        await until(lambda: rig.engine.stats().live)
        leaving = asyncio.create_task(models.unload_model(models_pb.UnloadModelRequest(model="a0")))
        await running
        answer = await leaving
        assert answer.model.state == pb.Model.STATE_AVAILABLE
        await models.unload_model(models_pb.UnloadModelRequest(model="a0"))  # again is no error
        assert await tokens(rig, "a0") == expected


async def test_a_forced_unload_ends_its_calls_and_nobody_elses(base: Path, folders: dict[str, Path]) -> None:
    async with serving(base, folders) as (rig, models):
        running = asyncio.create_task(rig.generate(request("a0", "hi", 400)))
        other = asyncio.create_task(rig.generate(request("a1", "hi", 60)))
        await until(lambda: rig.engine.stats().live == 2)
        await models.unload_model(models_pb.UnloadModelRequest(model="a0", force=True))
        with pytest.raises(Draining, match="a0"):
            await running
        assert (await other).finished.usage.output_token_count > 0


async def failing(rig: Rig, name: str) -> Failure:
    with pytest.raises(Failure) as found:
        await rig.generate(request(name))
    return found.value


@pytest.mark.parametrize("what", ["rank", "base", "lacking", "missing", "peft", "full", "broken"])
async def test_an_adapter_that_does_not_fit_names_its_file_and_the_remedy(
    base: Path, tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "bad"
    other = tiny_models.build_random(tmp_path / "other", hidden=32)
    make_adapter(folder, other if what == "base" else base, seed=1)
    config = json.loads((folder / "adapter_config.json").read_text())
    remedy = "base"
    if what == "rank":
        config["lora_parameters"]["rank"] = RANK + 1
    elif what == "lacking":
        weights = mx.load(str(folder / "adapters.safetensors"))
        assert isinstance(weights, dict)
        weights.pop(sorted(weights)[0])
        mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    elif what == "missing":
        (folder / "adapters.safetensors").unlink()
        remedy = "an adapter is a folder with"
    elif what == "peft":
        (folder / "adapters.safetensors").rename(folder / "adapter_model.safetensors")
        remedy = "convert"
    elif what == "full":
        config["fine_tune_type"] = "full"
        remedy = "model_folders"
    elif what == "broken":
        (folder / "adapters.safetensors").write_bytes(b"no")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    async with serving(base, {"bad": folder}) as (rig, _):
        failure = await failing(rig, "bad")
        assert isinstance(failure, ModelLoadFailed)
        assert str(folder) in failure.message
        assert remedy in failure.message
        assert await tokens(rig, MODEL)  # the base goes on
        weights_bytes = rig.engine.stats().weights_bytes
        await failing(rig, "bad")
        assert rig.engine.stats().weights_bytes == weights_bytes


async def test_an_adapter_without_room_is_refused(base: Path, folders: dict[str, Path]) -> None:
    ceiling = describe(base).weight_bytes + 20_000
    async with serving(base, folders, ceiling=ceiling) as (rig, models):
        with pytest.raises(MemoryExhausted, match="Unload another"):
            await load(models, "a0")
        assert rig.engine.stats().weights_bytes <= ceiling


async def test_a_worker_manages_its_adapters_and_nothing_else(base: Path, folders: dict[str, Path]) -> None:
    async with serving(base, folders) as (_, models):
        with pytest.raises(ModelNotFound):
            await models.get_model(models_pb.GetModelRequest(model=MODEL))
        with pytest.raises(CapabilityUnsupported):
            await models.pull_model(models_pb.PullModelRequest(model="a0"), _ignore)
        with pytest.raises(CapabilityUnsupported):
            await models.delete_model(models_pb.DeleteModelRequest(model="a0"))


async def _ignore(event: models_pb.PullModelResponse) -> None:
    raise AssertionError(event)


async def test_a_caller_that_leaves_while_an_adapter_opens_leaves_nothing_behind(
    base: Path, folders: dict[str, Path]
) -> None:
    async with serving(base, folders) as (rig, models):
        weights = rig.engine.stats().weights_bytes
        opening = asyncio.create_task(load(models, "a0"))
        while not rig.engine.stats().weights_bytes > weights:
            await asyncio.sleep(0)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        assert rig.engine.stats().weights_bytes == weights
        assert await tokens(rig, "a0")


def test_a_folder_is_described_anew_when_it_changes(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", base, seed=1)
    first = describe_adapter(folder)
    assert (first.rank, first.kind) == (RANK, "lora")
    assert describe_adapter(folder) is first
    make_adapter(tmp_path / "b", base, seed=2)
    (tmp_path / "b" / "adapters.safetensors").rename(folder / "adapters.safetensors")
    assert describe_adapter(folder).digest != first.digest
    (folder / "adapter_config.json").write_text("[")
    with pytest.raises(NotAModelError, match="cannot be read"):
        describe_adapter(folder)


@pytest.fixture(scope="module")
def quantised(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model in four bits, as mlx-lm writes it."""
    path = tmp_path_factory.mktemp("adapters") / "quantised"
    shutil.copytree(base, path)
    config = json.loads((path / "config.json").read_text())
    model, config = quantize_model(load_weights(base), config, group_size=32, bits=4)
    (path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return path


async def test_quantised_weights_are_shared_like_others(quantised: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "q", quantised, seed=7)
    async with serving(quantised, {"q": folder}) as (rig, models):
        before = await rig.engine.run(mx.get_active_memory)
        await load(models, "q")
        took = await rig.engine.run(mx.get_active_memory) - before
        assert took <= describe_adapter(folder).disk_bytes * 1.05 + 16384
        prompt = (await rig.words.prompt(ask("hi").messages)).tokens
        told = await tokens(rig, "q", "hi")
    expected = by_mlx_lm(quantised, folder, prompt, 24)
    assert told == expected[: len(told)]


@pytest.mark.parametrize("kind", ["lora", "dora"])
async def test_an_adapter_answers_the_same_over_unpacked_weights(
    base: Path, tmp_path: Path, kind: str
) -> None:
    folder = make_adapter(tmp_path / "u", base, seed=3, dora=kind == "dora")
    assert needs_plain_layers([tmp_path / "none", folder]) is (kind == "dora")
    how = Plan(is_float32=True, is_blocked=kind == "lora")
    async with serving(base, {"u": folder}, how=how) as (rig, _):
        prompt = (await rig.words.prompt(ask("hi").messages)).tokens
        told = await tokens(rig, "u", "hi")
    expected = by_mlx_lm(base, folder, prompt, 24)
    assert told == expected[: len(told)]
    assert len(told) == 24 or expected[len(told)] in rig.words.language.end_tokens
