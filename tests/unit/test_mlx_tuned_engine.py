"""The engine keeps to what was chosen for the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny_models
from forebay.mlx_service.worker import engine as engines
from forebay.mlx_service.worker.batch import Batch
from forebay.mlx_service.worker.engine import Engine
from forebay.mlx_service.worker.load import load_weights

pytestmark = pytest.mark.mlx


def test_a_prompt_is_read_in_steps_as_long_as_the_time_and_the_machine_allow() -> None:
    assert engines._step_within(0.5, 1e-6, 512) == 512
    assert engines._step_within(0.5, 1e-6, 4096) == 4096
    assert engines._step_within(0.5, 1e-6, 100) == 64
    assert engines._step_within(0.5, 0.1, 4096) == 64
    assert engines._step_within(0.5, 9.0, 4096) == 16


@pytest.mark.parametrize(("has_metal", "wired"), [(False, []), (True, [4096])])
async def test_memory_is_wired_only_where_there_is_metal_and_freed_memory_is_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_metal: bool, wired: list[int]
) -> None:
    told: list[int] = []
    kept: list[int] = []
    monkeypatch.setattr(engines.mx.metal, "is_available", lambda: has_metal)
    monkeypatch.setattr(engines.mx, "set_wired_limit", told.append)
    monkeypatch.setattr(engines.mx, "set_cache_limit", kept.append)
    monkeypatch.setattr(engines.mx, "device_info", lambda: {"max_recommended_working_set_size": 99})
    folder = tiny_models.build_random(tmp_path / "m", hidden=16, layers=1)
    engine = Engine(
        lambda: (load_weights(folder), ()), rows=1, prefill_most=16, freed_bytes=12345, wired_bytes=4096
    )
    await engine.start()
    try:
        assert told == wired
        assert kept == [12345]
        assert engine._prefill_step == 16
    finally:
        await engine.stop(timeout=20)


def test_a_batch_wires_no_memory_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[int] = []
    mx = engines.mx
    monkeypatch.setattr(mx, "device_info", lambda *_: {"max_recommended_working_set_size": 1 << 33})
    monkeypatch.setattr(mx, "set_wired_limit", told.append)
    model = load_weights(tiny_models.build_random(tmp_path / "m", hidden=16, layers=1))
    Batch(model, rows=1, prefill_step=16, end_tokens=()).close()
    assert not told
