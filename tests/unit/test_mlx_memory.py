"""Promises about memory: what rows cost is measured, and what could exceed the ceiling is refused."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from pathlib import Path

import pytest

import tiny_models
from forebay.kit.failure import MemoryExhausted
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.host import default_ceiling
from forebay.mlx_service.service import worker_arguments
from forebay.mlx_service.worker.balance import PADDED
from forebay.mlx_service.worker.engine import Engine, Over, Row, Written
from forebay.mlx_service.worker.load import load_weights
from forebay.mlx_service.worker.memory import KvCost, Ledger, metal_memory, probe
from forebay.mlx_service.worker.prefix_cache import PrefixCache
from forebay.mlx_service.worker.sampling import SamplingParams
from mlx_worker_rig import ask, rig, until

pytestmark = pytest.mark.mlx

TOKEN_BYTES = tiny_models.LAYERS * 2 * 64 * 4
GIB = 1 << 30
SOON = timedelta(seconds=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_random(tmp_path_factory.mktemp("memory") / "m")


def row(count: int, most: int) -> Row:
    return Row(tokens=tuple(range(count)), most=most, sampling=SamplingParams(temperature=0))


async def finish(engine: Engine, wanted: Row) -> int:
    ticket = engine.submit(wanted)
    written = 0
    while True:
        for happening in await ticket.next():
            written += isinstance(happening, Written)
            if isinstance(happening, Over):
                assert happening.failure is None
                return written


async def weights_of(model: Path) -> int:
    async with rig(model) as made:
        await until(lambda: made.engine.stats().weights_bytes)
        return made.engine.stats().weights_bytes


def test_what_a_token_costs_is_measured(model: Path) -> None:
    cost = probe(load_weights(model))
    assert cost.per_token == TOKEN_BYTES
    assert cost.of(60) == cost.of(64) == int(64 * TOKEN_BYTES * PADDED)


def test_a_window_stops_growing(tmp_path: Path) -> None:
    tiny_models.build_random(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    cost = probe(load_weights(tmp_path / "m"))
    assert cost.of(640) == int((16 + 640) * TOKEN_BYTES / 2 * PADDED)


def test_states_that_do_not_grow_are_counted_once() -> None:
    class State:
        nbytes = 100

    class Both:
        caches = (State(), State())

    class Model:
        layers = ()

        def make_cache(self) -> list[object]:
            return [State(), Both()]

        def __call__(self, tokens: object, cache: object) -> object:
            return tokens

    assert probe(Model()) == KvCost((), 300)


async def test_a_row_that_never_fits_is_refused_with_figures_and_others_are_served(model: Path) -> None:
    ceiling = await weights_of(model) + 400 * TOKEN_BYTES
    async with rig(model, ceiling=ceiling, context=2048) as made:
        await until(lambda: made.engine.stats().weights_bytes)
        with pytest.raises(MemoryExhausted, match="never fits") as caught:
            await made.generate(ask("x" * 300, most=200))
        assert caught.value.retry_after is None
        figures = {name: int(value) for name, value in caught.value.metadata.items()}
        assert figures["ceiling_bytes"] == ceiling
        assert figures["weights_bytes"] + figures["need_bytes"] > ceiling
        assert (await made.generate(ask("x", most=3))).finished.usage.output_token_count == 3


async def test_memory_that_others_reserved_is_refused_until_they_leave(model: Path) -> None:
    ceiling = await weights_of(model) + 4000 * TOKEN_BYTES
    async with rig(model, ceiling=ceiling, context=2048) as made:
        await until(lambda: made.engine.stats().weights_bytes)
        first = made.engine.submit(row(20, 1900))
        with pytest.raises(MemoryExhausted, match="other requests") as caught:
            made.engine.submit(row(20, 1900))
        assert caught.value.retry_after is not None
        assert made.engine.stats().reserved_bytes > 0
        first.cancel()
        assert made.engine.stats().reserved_bytes == 0
        assert await finish(made.engine, row(20, 5)) == 5
        assert made.engine.stats().reserved_bytes == 0


async def test_prefixes_make_room_for_rows(model: Path) -> None:
    ceiling = await weights_of(model) + 3700 * TOKEN_BYTES
    cache = PrefixCache(max_bytes=GIB, min_tokens=4)
    async with rig(model, ceiling=ceiling, context=2048, prefixes=cache) as made:
        await until(lambda: made.engine.stats().weights_bytes)
        await finish(made.engine, row(250, 30))
        await until(lambda: made.engine.stats().prefix.bytes)
        big = made.engine.submit(row(20, 2000))
        async with asyncio.timeout(10):
            while not any(isinstance(h, Written) for h in await big.next()):
                pass
        assert made.engine.stats().prefix.bytes == 0
        big.cancel()


def test_only_rows_that_can_run_at_once_are_counted() -> None:
    ledger = Ledger(10_000, rows=2)
    ledger.weights, ledger.cost = 1000, KvCost(((10, None),))
    sizes = [(64, 960), (128, 1920), (192, 2880), (64, 960)]
    for i, (tokens, _) in enumerate(sizes):
        ledger.reserve(i, tokens, in_use=0, retry_after=SOON)
    assert ledger.reserved == 4800
    assert ledger.room_for_prefixes == int(9000 * 0.85) - 4800
    ledger.release(2)
    assert ledger.reserved == 1920 + 960


def test_what_is_in_use_counts_even_if_nobody_reserved_it() -> None:
    ledger = Ledger(10_000, rows=2)
    ledger.cost = KvCost(((10, None),))
    with pytest.raises(MemoryExhausted):
        ledger.reserve("a", 64, in_use=9_500, retry_after=SOON)
    assert ledger.reserved == 0


def test_without_a_ceiling_nothing_is_refused() -> None:
    ledger = Ledger(None, rows=1)
    ledger.cost = KvCost(((GIB, None),))
    ledger.reserve("a", 1 << 20, in_use=1 << 60, retry_after=SOON)
    assert ledger.room_for_prefixes is None


@pytest.mark.parametrize(
    ("total", "metal", "ceiling"),
    [
        (4, None, 2),
        (8, None, 5.2),
        (16, None, 10.4),
        (64, None, 52),
        (512, None, 500),
        (16, 10, 9.5),
        (1, None, 0.25),
    ],
)
def test_the_ceiling_leaves_the_machine_its_share(total: int, metal: int | None, ceiling: float) -> None:
    assert default_ceiling(total * GIB, metal and metal * GIB) == pytest.approx(ceiling * GIB, rel=1e-6)


def test_metal_is_asked_only_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from forebay.mlx_service.worker import memory

    monkeypatch.setattr(memory.mx.metal, "is_available", lambda: False)
    assert metal_memory() is None
    monkeypatch.setattr(memory.mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(
        memory.mx, "device_info", lambda: {"max_recommended_working_set_size": 11_453_251_584}
    )
    assert metal_memory() == 11_453_251_584


def test_settings_reach_the_worker() -> None:
    settings = MlxSettings(memory_ceiling="1GiB", prefix_cache_bytes="1MiB", auth_token_digests=("0" * 64,))
    arguments = " ".join(worker_arguments(settings))
    assert "--memory-ceiling" not in arguments  # each is told its share when it is started
    assert "--prefix-cache 1048576" in arguments
    assert "--isolate-callers" in arguments
    assert "--isolate" not in " ".join(worker_arguments(MlxSettings()))
