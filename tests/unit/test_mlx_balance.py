"""Promises of moving rows between lanes: no token changes, memory stays bounded, one row a step."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

import tiny_models
from forebay.mlx_service.worker import balance
from forebay.mlx_service.worker.balance import Move, Shape
from forebay.mlx_service.worker.batch import Batch, Generated
from forebay.mlx_service.worker.lanes import Lanes
from forebay.mlx_service.worker.load import load_weights
from forebay.mlx_service.worker.sampling import SamplingParams, processors, sampler

pytestmark = pytest.mark.mlx

TOKEN_BYTES = tiny_models.LAYERS * 2 * 64 * 4
BUFFER_TOKENS = 64
"""Caches grow by so many tokens."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> object:
    return load_weights(tiny_models.build_random(tmp_path_factory.mktemp("balance") / "m"))


def lanes(model: object, *, balances: bool = True) -> Lanes:
    seconds = itertools.count()  # every step takes one, so that a seed is a schedule
    return Lanes(
        lambda _: Batch(model, rows=8, prefill_step=256, end_tokens=[]),
        clock=lambda: float(next(seconds)),
        balances=balances,
    )


@dataclass(eq=False)
class Ask:
    tokens: tuple[int, ...]
    most: int
    params: SamplingParams
    leaves_after: int | None = None
    told: list[Generated] = field(default_factory=list)

    def insert(self, into: Lanes) -> int:
        return into.insert(
            self.tokens,
            most=self.most,
            sampler=sampler(self.params, position=0),
            processors=processors(self.params, prompt_count=len(self.tokens)),
        )

    @property
    def is_over(self) -> bool:
        return bool(self.told) and (self.told[-1].ended is not None or len(self.told) == self.leaves_after)

    @property
    def useful(self) -> int:
        return len(self.tokens) + len(self.told)


def alone(model: object, ask: Ask) -> list[int]:
    on = lanes(model, balances=False)
    ask.insert(on)
    tokens: list[int] = []
    while len(tokens) < ask.most:
        tokens += [token.token for token in on.step()[1]]
    on.close()
    return tokens


def some_params(draw: random.Random) -> SamplingParams:
    return draw.choice(
        [
            SamplingParams(temperature=0),
            SamplingParams(temperature=0, repetition_penalty=1.3, presence_penalty=0.5),
            SamplingParams(temperature=1.5, top_p=0.9, seed=draw.randrange(99)),
            SamplingParams(temperature=0.8, seed=draw.randrange(99), frequency_penalty=0.4),
        ]
    )


@pytest.mark.parametrize(
    "seed", [None, 1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 30))]
)
def test_rows_that_change_lanes_write_the_very_tokens_they_write_alone(
    model: object, seed: int | None
) -> None:
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    print(f"seed {seed}")
    draw = random.Random(seed)
    on = lanes(model)
    # A long row that stays, short ones that stay, and long ones that leave: lanes get worse by themselves.
    waiting = [
        Ask(
            tuple(draw.randrange(250) for _ in range(draw.choice((3, 20, 150, 700, 750)))),
            draw.choice((3, 10, 30)),
            some_params(draw),
            draw.choice((None, None, 2)),
        )
        for _ in range(14)
    ]
    live: dict[int, Ask] = {}
    done: list[Ask] = []
    too_much = 0
    while waiting or live:
        if waiting and len(live) < 8 and draw.random() < 0.4:
            ask = waiting.pop()
            live[ask.insert(on)] = ask
        if not live:
            continue
        moves = on.moves
        for token in on.step()[1]:
            live[token.uid].told.append(token)
        assert on.moves - moves <= 1
        for uid, ask in list(live.items()):
            if ask.is_over:
                if ask.told[-1].ended is None:
                    on.remove(uid)
                done.append(live.pop(uid))
        useful = sum(ask.useful for ask in live.values())
        if all(ask.told for ask in live.values()) and useful >= balance.FREE_TOKENS:
            spare = BUFFER_TOKENS * len(live)
            too_much = too_much + 1 if on.cache_bytes > (2 * useful + spare) * TOKEN_BYTES else 0
            assert too_much <= 8  # no more steps than there are rows to move
    assert on.moves > 0 or seed != 1
    on.close()
    for ask in done:
        told = [token.token for token in ask.told][: ask.leaves_after]
        assert told == alone(model, ask)[: len(told)]
        assert len(told) in {ask.most, ask.leaves_after}


def test_short_rows_leave_a_lane_that_a_long_row_made_wide(model: object) -> None:
    on = lanes(model)
    asks = [Ask((5,) * n, 200, SamplingParams(temperature=0)) for n in (*[520] * 6, 8, 8)]
    live = {ask.insert(on): ask for ask in asks}
    while not all(ask.told for ask in asks):
        for token in on.step()[1]:
            live[token.uid].told.append(token)
    assert on.widths == [8]  # beside six long rows two short ones cost little
    for uid in list(live)[:5]:
        on.remove(uid)
        del live[uid]
    for _ in range(4):
        on.step()
    assert sorted(on.widths) == [1, 2]
    assert on.moves <= 2
    useful = sum(ask.useful for ask in live.values())
    assert on.cache_bytes <= (2 * useful + BUFFER_TOKENS * 3) * TOKEN_BYTES
    on.close()


def test_half_empty_lanes_become_one(model: object) -> None:
    on = lanes(model)
    live = {}
    for length in (300, 310, 5, 6):
        ask = Ask((7,) * length, 900, SamplingParams(temperature=0))
        live[ask.insert(on)] = ask
    assert sorted(on.widths) == [2, 2]
    while not all(ask.told for ask in live.values()):
        for token in on.step()[1]:
            live[token.uid].told.append(token)
    on.remove(1)
    on.remove(3)
    steps = 0
    while len(on.widths) > 1 and steps < 3000:
        on.step()
        steps += 1
    assert on.widths == [2]  # the short row has grown: beside the long one it pads little
    assert on.moves == 1
    on.close()


def shape(*lengths: int, reading: Sequence[int] = (), kind: str = "") -> Shape:
    return Shape(kind, dict(enumerate(lengths)), frozenset(range(len(lengths))) - set(reading))


@pytest.mark.parametrize(
    ("shapes", "move"),
    [
        ([shape(1000, 1000)], None),
        ([shape(1000, 10, 10)], Move(0, 0, None)),
        ([shape(1000, 10, 10, reading=[0])], Move(1, 0, None)),
        ([shape(1000, 10, 10), shape(900)], Move(0, 0, 1)),
        ([shape(1000, 10, 10), shape(900, reading=[0])], Move(0, 0, None)),
        ([shape(1000, 10, 10), shape(900, kind="other")], Move(0, 0, None)),
        ([shape(500, 10)], None),
        ([shape(100), shape(10)], Move(0, 0, 1)),
        ([shape(100), shape(10, kind="other")], None),
        ([shape(100), shape(10, reading=[0])], None),
        ([shape(1000), shape(800)], Move(0, 0, 1)),
        ([shape(1000), shape(300)], None),
        ([shape(), shape(300)], None),
    ],
)
def test_a_row_moves_only_where_it_saves_or_joins(shapes: list[Shape], move: Move | None) -> None:
    assert balance.plan(shapes, most=3) == move


def test_lanes_that_pad_too_much_are_left_when_there_is_nowhere_to_go() -> None:
    assert balance.plan([shape(5000, 10, 10), shape(90_000)], most=2) is None


def test_no_plan_goes_to_and_fro() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(300):
        lanes = [
            {draw.randrange(10**9): draw.choice((5, 50, 500, 5000)) * draw.randint(1, 9) for _ in range(n)}
            for n in (draw.randint(1, 4), draw.randint(0, 4), draw.randint(1, 2))
        ]
        moves = 0
        while move := balance.plan([Shape("", lane, frozenset(lane)) for lane in lanes], most=4):
            if move.target is None:
                lanes.append({})
            target = lanes[-1 if move.target is None else move.target]
            target[move.row] = lanes[move.source].pop(move.row)
            lanes = [lane for lane in lanes if lane]
            moves += 1
            assert moves <= 30
