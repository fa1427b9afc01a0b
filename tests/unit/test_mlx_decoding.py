"""What a step on a CPU leaves out changes no bit of what it gives."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.models.cache import BatchRotatingKVCache

import tiny_models
from forebay.mlx_service.worker import decoding, turns
from forebay.mlx_service.worker.batch import Batch, Generated
from forebay.mlx_service.worker.load import load_weights
from forebay.mlx_service.worker.runtime import BatchKVCache, Llama3RoPE, load_model, mx, nn
from forebay.mlx_service.worker.sampling import SamplingParams, pick, sampler

pytestmark = pytest.mark.mlx

GREEDY = sampler(SamplingParams(temperature=0), position=0)
KINDS: dict[str, Callable[[bool], Any]] = {
    "plain": lambda paired: nn.RoPE(32, traditional=paired),
    "stretched": lambda paired: nn.RoPE(32, traditional=paired, scale=0.25, base=500),
    "llama3": lambda paired: Llama3RoPE(32, traditional=paired, scaling_config={"factor": 8}),
}


class Layers(nn.Module):  # type: ignore[misc]  # mlx has no types
    def __init__(self, *ropes: object) -> None:
        super().__init__()
        self.layers = [nn.Sequential(rope) for rope in ropes]
        self.own = [Held(rope) for rope in ropes]


class Held(nn.Module):  # type: ignore[misc]  # mlx has no types
    def __init__(self, rope: object) -> None:
        super().__init__()
        self.rope = rope


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_random(tmp_path_factory.mktemp("decoding") / "m", hidden=128, layers=3)


@pytest.mark.parametrize("is_paired", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [32, 48])
def test_shared_angles_turn_to_the_same_bits(kind: str, is_paired: bool, width: int) -> None:
    own = KINDS[kind](is_paired)
    model = Layers(own, KINDS[kind](is_paired))
    turns.share_turns(model)
    first, second = (held.rope for held in model.own)
    assert type(first) is not type(own)
    offsets = [0, 5, 100_000, mx.array([3]), mx.array([3, 700]), mx.array([-2, 70_000])]
    for offset, count in itertools.product(offsets, (1, 7)):
        rows = 1 if isinstance(offset, int) else offset.size
        x = mx.random.normal((rows, count, 4, width)).transpose(0, 2, 1, 3)
        wanted = own(x, offset=offset)
        for rope in (first, second, first):
            assert mx.array_equal(rope(x, offset=offset), wanted)


def test_layers_that_turn_alike_share_angles_and_others_do_not() -> None:
    model = Layers(nn.RoPE(32), nn.RoPE(32), nn.RoPE(32, base=7), nn.RoPE(32, traditional=True))
    turns.share_turns(model)
    shared = [held.rope._turns for held in model.own]
    assert shared[0] is shared[1]
    assert len({id(one) for one in shared}) == 3
    assert copy.deepcopy(model).own[0].rope._turns is shared[0]


def test_numbers_that_are_not_float32_turn_as_before() -> None:
    model = Layers(nn.RoPE(32))
    own = nn.RoPE(32)
    turns.share_turns(model)
    x = mx.random.normal((1, 4, 3, 32)).astype(mx.float16)
    assert mx.array_equal(model.own[0].rope(x, offset=9), own(x, offset=9))
    y = mx.random.normal((4, 3, 32))
    assert mx.array_equal(model.own[0].rope(y, offset=9), own(y, offset=9))


def run(batch: Batch) -> list[Generated]:
    return batch.step()[1]


def test_rows_that_come_and_go_are_written_as_mlx_lm_writes_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With mlx-lm's own step, masks and rotation, and with ours: the same tokens with the same chances."""
    told: dict[str, dict[int, list[tuple[int, list[float]]]]] = {}
    for side in ("theirs", "ours"):
        model = load_model(folder)[0] if side == "theirs" else load_weights(folder)
        with monkeypatch.context() as patch:
            if side == "theirs":
                patch.setattr(decoding.generate, "GenerationBatch", decoding._Writing.__base__)
                patch.setattr(BatchKVCache, "make_mask", decoding._made_mask)
            batch = Batch(model, rows=4, prefill_step=16, end_tokens=[])
        rows: dict[int, list[tuple[int, list[float]]]] = {}
        told[side] = rows

        def take(count: int, batch: Batch = batch, rows: Any = rows) -> None:
            for token in itertools.chain.from_iterable(run(batch) for _ in range(count)):
                chances = token.chances
                found = chances.logprobs() if isinstance(chances, decoding.Chances) else chances
                rows.setdefault(token.uid, []).append((token.token, found.tolist()))

        with monkeypatch.context() as patch:
            if side == "theirs":
                patch.setattr(decoding.generate, "GenerationBatch", decoding._Writing.__base__)
                patch.setattr(BatchKVCache, "make_mask", decoding._made_mask)
            for prompt in ([5] * 9, [7] * 9, list(range(30))):  # two without padding, then one that pads them
                batch.insert(prompt, most=60, sampler=GREEDY, processors=())
                take(12)
            batch.remove(0)
            take(9)
            batch.remove(2)  # no padding is left
            take(30)
        batch.close()
    assert {uid: [token for token, _ in row] for uid, row in told["ours"].items()} == {
        uid: [token for token, _ in row] for uid, row in told["theirs"].items()
    }
    for uid, row in told["ours"].items():
        for (_, ours), (_, theirs) in zip(row, told["theirs"][uid], strict=True):
            assert ours == pytest.approx(theirs, abs=2e-5)


def test_rows_without_padding_have_no_mask_and_padded_ones_do(folder: Path) -> None:
    batch = Batch(load_weights(folder), rows=4, prefill_step=16, end_tokens=[])
    for prompt in ([5] * 9, [7] * 9):
        batch.insert(prompt, most=60, sampler=GREEDY, processors=())
    while len(run(batch)) < 2:
        pass
    # The second row came when the first had written: it is the padded one.
    writing = batch._generator._generation_batch
    cache = writing.prompt_cache[0]
    assert cache.make_mask(1) is not None
    batch.remove(1)
    run(batch)
    assert cache.make_mask(1) is None
    assert cache.make_mask(2) is not None
    assert cache.make_mask(1, window_size=4) is not None
    assert cache.make_mask(1, return_array=True) is not None
    batch.close()


@pytest.mark.parametrize("make", [BatchKVCache, lambda padding: BatchRotatingKVCache(8, padding)])
@pytest.mark.parametrize("count", [1, 3])
def test_a_cache_never_changes_positions_in_place(make: Callable[[list[int]], Any], count: int) -> None:
    """Angles are found again by the array they were made for, and layers share it."""
    cache = make([0, 2])
    for _ in range(12):
        before, was = cache.offset, cache.offset.tolist()
        new = mx.zeros((2, 1, count, 4))
        cache.update_and_fetch(new, new)
        assert cache.offset is not before
        assert before.tolist() == was
        assert cache.offset.tolist() == [each + count for each in was]


def test_the_likeliest_token_is_picked_beside_rows_that_draw() -> None:
    logits = mx.random.normal((3, 50))
    drawn = sampler(SamplingParams(temperature=1.0, seed=3), position=0)
    again = sampler(SamplingParams(temperature=1.0, seed=3), position=0)
    mixed = pick([GREEDY, drawn, GREEDY], logits).tolist()
    alone = pick([GREEDY] * 3, logits).tolist()
    assert [mixed[0], mixed[2]] == [alone[0], alone[2]]
    assert mixed[1:2] == pick([again], logits[1:2]).tolist()
