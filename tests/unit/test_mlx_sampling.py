"""How a row picks its tokens: each setting does what its name says, and a seed decides the draws alone."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from forebay.mlx_service.worker.runtime import mx
from forebay.mlx_service.worker.sampling import REPETITION_WINDOW, SamplingParams, processors, sampler

CHANCES = np.array([0.05, 0.30, 0.01, 0.20, 0.24, 0.12, 0.08])
DRAWS = 20_000


def drawn(params: SamplingParams) -> np.ndarray:
    """How often each token is drawn."""
    logprobs = mx.array(np.log(np.tile(CHANCES, (DRAWS, 1))).astype(np.float32))
    tokens = np.array(sampler(params, position=0)(logprobs))
    counts: np.ndarray = np.bincount(tokens, minlength=CHANCES.size)
    shares: np.ndarray = counts / DRAWS
    return shares


def among(tokens: set[int], temperature: float = 1.0) -> np.ndarray:
    """The chances where only these tokens may be drawn."""
    kept = np.array([token in tokens for token in range(CHANCES.size)])
    chances = np.where(kept, CHANCES ** (1 / temperature), 0)
    return chances / chances.sum()


def named(value: object) -> list[str]:
    """What of the settings is not as it is where nobody says anything."""
    if not isinstance(value, SamplingParams):
        return ["chances"]
    off = SamplingParams()
    names = [
        each.name for each in fields(SamplingParams) if getattr(value, each.name) != getattr(off, each.name)
    ]
    return [f"{name}={getattr(value, name)}" for name in names] or ["plain"]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), among(set(range(7)))),
        (SamplingParams(temperature=0), among({1})),
        (SamplingParams(temperature=0.5), among(set(range(7)), 0.5)),
        (SamplingParams(temperature=2), among(set(range(7)), 2)),
        (SamplingParams(top_k=3), among({1, 4, 3})),
        (SamplingParams(top_k=1), among({1})),
        (SamplingParams(top_k=2**31 - 1), among(set(range(7)))),
        (SamplingParams(top_p=0.5), among({1, 4})),
        (SamplingParams(top_p=0.75), among({1, 4, 3, 5})),
        (SamplingParams(top_p=0.001), among({1})),
        (SamplingParams(min_p=0.5), among({1, 3, 4})),
        (SamplingParams(min_p=1.0), among({1})),
        (SamplingParams(top_k=4, top_p=0.7), among({1, 4, 3})),
        (SamplingParams(top_p=0.9, min_p=0.35, temperature=0.7), among({1, 4, 3, 5}, 0.7)),
    ],
    ids=lambda value: " ".join(named(value)),
)
def test_only_the_likely_are_drawn_and_as_often_as_they_are_likely(
    params: SamplingParams, expected: np.ndarray
) -> None:
    found = drawn(params)
    assert set(np.flatnonzero(found)) == set(np.flatnonzero(expected))
    assert np.abs(found - expected).max() < 0.03  # nine standard deviations


def test_rows_without_a_seed_share_one_sampler_and_seeded_ones_do_not() -> None:
    params = SamplingParams(temperature=0.70001, top_p=0.9)
    assert sampler(params, position=0) is sampler(SamplingParams(temperature=0.7, top_p=0.9), position=5)
    seeded = SamplingParams(temperature=0.7, seed=1)
    assert sampler(seeded, position=0) is not sampler(seeded, position=0)


@pytest.mark.parametrize("limits", [{}, {"top_p": 0.95}, {"top_k": 6}, {"min_p": 0.1}], ids=str)
def test_a_seed_draws_as_often_as_tokens_are_likely(limits: dict[str, float]) -> None:
    logprobs = mx.array(np.log(CHANCES[None]).astype(np.float32))
    pick = sampler(SamplingParams(seed=3, **limits), position=0)  # type: ignore[arg-type]  # as the ids say
    found = np.bincount([int(pick(logprobs)[0]) for _ in range(2000)], minlength=CHANCES.size) / 2000
    expected = among(set(range(7)) - ({2} if limits else set()))  # each limit leaves the rarest out
    assert set(np.flatnonzero(found)) == set(np.flatnonzero(expected))
    assert np.abs(found - expected).max() < 0.06


@pytest.mark.parametrize("limits", [{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}], ids=str)
def test_a_seed_gives_the_same_token_where_rounding_swaps_two_that_are_equally_likely(
    limits: dict[str, float],
) -> None:
    chance = np.random.default_rng(5)
    logits = np.repeat(chance.normal(0, 1.0, 30), 2).astype(np.float32)  # each token has a twin
    other = logits + np.tile([0, 1e-6], 30).astype(np.float32)
    for seed in range(200):
        params = SamplingParams(seed=seed, **limits)  # type: ignore[arg-type]  # as the ids say
        one, two = (
            int(sampler(params, position=4)(mx.array(each[None] - np.log(np.exp(each).sum())))[0])
            for each in (logits, other)
        )
        assert one == two


def test_a_seeded_row_that_goes_on_draws_as_if_it_had_never_stopped() -> None:
    params = SamplingParams(temperature=1.2, top_p=0.95, seed=-9)
    logprobs = mx.array(np.log(CHANCES[None]).astype(np.float32))
    whole, rest = sampler(params, position=0), sampler(params, position=11)
    drawn = [int(whole(logprobs)[0]) for _ in range(30)]
    assert [int(rest(logprobs)[0]) for _ in range(19)] == drawn[11:]
    assert len(set(drawn)) > 2


def changed(params: SamplingParams, tokens: list[int], *, prompt_count: int) -> np.ndarray:
    """What is left of logits after the row's processors."""
    logits = mx.array(np.array([[2.0, -1.0, 0.5, -3.0, 1.0]], np.float32))
    for process in processors(params, prompt_count=prompt_count):
        logits = process(mx.array(tokens), logits)
    left: np.ndarray = np.array(logits)[0]
    return left


def test_a_repetition_penalty_makes_what_was_said_lately_less_likely_prompt_included() -> None:
    params = SamplingParams(repetition_penalty=2.0)
    assert changed(params, [0, 1, 1, 0], prompt_count=2).tolist() == [1.0, -2.0, 0.5, -3.0, 1.0]
    long_ago = [4] + [3] * REPETITION_WINDOW
    assert changed(params, long_ago, prompt_count=0).tolist() == [2.0, -1.0, 0.5, -6.0, 1.0]
    assert not processors(SamplingParams(repetition_penalty=1.0), prompt_count=0)


def test_presence_and_frequency_count_the_reply_alone() -> None:
    said = [2, 2, 0, 1, 0, 0, 4]
    presence = changed(SamplingParams(presence_penalty=0.5), said, prompt_count=3)
    assert presence.tolist() == [1.5, -1.5, 0.5, -3.0, 0.5]
    frequency = changed(SamplingParams(frequency_penalty=0.25), said, prompt_count=3)
    assert frequency.tolist() == [1.5, -1.25, 0.5, -3.0, 0.75]
    assert changed(SamplingParams(presence_penalty=2.0), said, prompt_count=7)[2] == 0.5


def test_a_bias_is_added_after_all_penalties() -> None:
    params = SamplingParams(repetition_penalty=2.0, logit_bias=((0, 3.0), (3, -100.0)))
    assert changed(params, [0], prompt_count=1).tolist() == [4.0, -1.0, 0.5, -103.0, 1.0]
