"""Promises of speculation: the very tokens of plain decoding, whoever joins, leaves or stops."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import ModelLoadFailed
from forebay.mlx_service.worker.batch import Batch, Generated
from forebay.mlx_service.worker.drafting import DraftModel, PromptLookup
from forebay.mlx_service.worker.engine import Row
from forebay.mlx_service.worker.lanes import Lanes
from forebay.mlx_service.worker.load import load_draft, load_weights
from forebay.mlx_service.worker.prefix_cache import PrefixCache
from forebay.mlx_service.worker.runtime import mx
from forebay.mlx_service.worker.sampling import SamplingParams, processors, sampler
from forebay.mlx_service.worker.speculation import (
    MEASURED_ROUNDS,
    MEASURED_STEPS,
    REST_TOKENS,
    SILENT_ROUNDS,
    Solo,
    Speculation,
    Worth,
)
from mlx_worker_rig import Reply, ask, rig, until

pytestmark = pytest.mark.mlx

LOOP = (11, 12, 13, 14, 15, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_random(tmp_path_factory.mktemp("speculation") / "m")


@pytest.fixture(scope="module")
def model(folder: Path) -> object:
    return load_weights(folder)


@pytest.fixture(scope="module")
def repetitive(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A model whose greedy replies are loops: the next token depends on the last one alone."""
    path = tmp_path_factory.mktemp("speculation") / "r"
    made = load_weights(tiny_models.build_scripted(path, [f" w{i}" for i in range(9)] + ["\n"]))
    # After the last piece the end is as likely as the first piece, to the last bit: take it away.
    head = made.lm_head  # type: ignore[attr-defined]  # a module
    head.weight = mx.concatenate([head.weight[:-1], mx.zeros_like(head.weight[-1:])])
    return made


class Clock:
    """A step takes a second, whatever it does."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


@dataclass(eq=False)
class Ask:
    tokens: Sequence[int]
    most: int = 60
    params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0))
    speculates: bool = True
    told: list[Generated] = field(default_factory=list)

    def insert(self, into: Lanes) -> int:
        return into.insert(
            self.tokens,
            most=self.most,
            sampler=sampler(self.params, position=0),
            processors=processors(self.params, prompt_count=len(self.tokens)),
            speculates=self.speculates,
        )

    @property
    def tokens_told(self) -> list[int]:
        return [token.token for token in self.told]

    @property
    def is_over(self) -> bool:
        return bool(self.told) and self.told[-1].ended is not None


def lanes(
    model: object,
    speculation: Speculation | None = None,
    *,
    ends: Sequence[int] = (),
    clock: Callable[[], float] | None = None,
) -> Lanes:
    return Lanes(
        lambda _: Batch(model, rows=8, prefill_step=64, end_tokens=ends),
        clock=clock or Clock(),
        balances=True,
        speculation=speculation,
        model_of=lambda _: model,
        end_tokens=ends,
    )


def run(on: Lanes, *asks: Ask) -> None:
    live = {ask.insert(on): ask for ask in asks}
    while not all(ask.is_over for ask in asks):
        for token in on.step()[1]:
            live[token.uid].told.append(token)


def plain(model: object, ask: Ask, *, ends: Sequence[int] = ()) -> list[int]:
    same = Ask(ask.tokens, ask.most, ask.params)
    run(lanes(model, ends=ends), same)
    return same.tokens_told


def drafted(model: object, small: object, **settings: object) -> Speculation:
    made = Speculation(load_draft=lambda: small, **settings)  # type: ignore[arg-type]  # a test's shorthand
    assert made.load(model).per_token > 0
    made.start(vocabulary=272, chunk=16)
    return made


def some_params(draw: random.Random) -> SamplingParams:
    return draw.choice(
        [
            SamplingParams(temperature=0),
            SamplingParams(temperature=0, repetition_penalty=1.2, frequency_penalty=0.3),
            SamplingParams(temperature=0.2, seed=draw.randrange(99)),
            SamplingParams(temperature=0.9, top_k=5, seed=draw.randrange(99), presence_penalty=0.2),
        ]
    )


async def test_a_repetitive_reply_takes_fewer_steps_and_is_the_same(repetitive: object) -> None:
    ask = Ask(LOOP, 200)
    speculation = Speculation()
    on = lanes(repetitive, speculation)
    uid = ask.insert(on)
    steps = 0
    while not ask.is_over:
        _, written = on.step()
        ask.told += written
        steps += 1
        assert {token.uid for token in written} <= {uid}
    assert ask.tokens_told == plain(repetitive, ask)
    assert steps < 100
    stats = speculation.stats
    assert stats.accepted > 100
    assert stats.drafted >= stats.accepted
    assert sum(token.drafted for token in ask.told) == stats.drafted
    assert sum(token.accepted for token in ask.told) == stats.accepted
    assert on.widths == [] or on.cache_bytes == 0


@pytest.mark.parametrize("kind", ["lookup", "draft"])
@pytest.mark.parametrize(
    "seed", [None, 1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 30))]
)
def test_any_mix_of_joins_and_leaves_gives_the_very_tokens_of_plain_decoding(
    model: object,
    repetitive: object,
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    seed: int | None,
) -> None:
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    print(f"seed {seed}")
    draw = random.Random(seed)
    ends = [draw.randrange(250) for _ in range(3)]
    if kind == "lookup":
        speculation, model = Speculation(), repetitive
    else:
        # The model guesses for itself, so that nearly all is right; or noise does, so that nothing is.
        other = load_weights(tiny_models.build_random(tmp_path_factory.mktemp("draft") / "d", seed=5))
        speculation = drafted(model, draw.choice((model, model, other)), lookup=draw.random() < 0.5)
    on = lanes(model, speculation, ends=ends)
    waiting = [
        Ask(
            LOOP * draw.randint(2, 9) if draw.random() < 0.5 else [draw.randrange(250) for _ in range(40)],
            draw.choice((1, 2, 30, 70)),
            some_params(draw),
            draw.random() < 0.9,
        )
        for _ in range(6)
    ]
    live: dict[int, Ask] = {}
    done: list[Ask] = []
    while waiting or live:
        if waiting and (not live or draw.random() < 0.04):
            ask = waiting.pop()
            live[ask.insert(on)] = ask
        for token in on.step()[1]:
            live[token.uid].told.append(token)
        for uid, ask in list(live.items()):
            if ask.is_over:
                done.append(live.pop(uid))
            elif draw.random() < 0.005:
                kept = on.remove(uid)
                whole = [*ask.tokens, *ask.tokens_told]
                assert kept is None or list(kept.tokens) == whole[: len(kept.tokens)]
                assert kept is None or {int(c.offset) for c in kept.caches} == {len(kept.tokens)}
                done.append(live.pop(uid))
    on.close()
    assert speculation.stats.drafted > 0 or seed != 1
    for ask in done:
        told = ask.tokens_told
        assert told == plain(model, ask, ends=ends)[: len(told)]
        assert not ask.is_over or ask.told[-1].ended == ("stop" if told[-1] in ends else "length")
        assert len(told) <= ask.most


def test_a_limit_and_an_end_token_in_the_middle_of_a_right_run_end_the_reply_there(
    repetitive: object,
) -> None:
    whole = plain(repetitive, Ask(LOOP, 120))
    for most in (50, 52, 55):
        ask = Ask(LOOP, most)
        run(lanes(repetitive, Speculation()), ask)
        assert ask.tokens_told == whole[:most]
        assert ask.told[-1].ended == "length"
        assert ask.told[-1].kept is not None
        assert list(ask.told[-1].kept.tokens) == [*LOOP, *whole[: most - 1]]


def test_an_end_token_in_the_middle_of_a_right_run_ends_the_reply_there(model: object) -> None:
    prompt = tuple(range(1, 40))
    whole = plain(model, Ask(prompt, 80))
    firsts = [i for i, token in enumerate(whole) if i > 20 and token not in whole[:i]]
    assert len(firsts) >= 5
    for place in firsts[:3]:
        speculation = drafted(model, model, lookup=False)
        ask = Ask(prompt, 200)
        run(lanes(model, speculation, ends=[whole[place]]), ask)
        assert ask.tokens_told == whole[: place + 1]
        assert ask.told[-1].ended == "stop"
        assert speculation.stats.accepted > 0


def test_another_row_sends_the_one_that_speculates_back_to_a_batch_at_once(repetitive: object) -> None:
    speculation = Speculation()
    on = lanes(repetitive, speculation)
    one, other = Ask(LOOP, 150), Ask(LOOP[::-1], 20)
    uids = {one.insert(on): one}
    while speculation.stats.accepted < 20:
        for token in on.step()[1]:
            uids[token.uid].told.append(token)
    uids[other.insert(on)] = other
    drafted = speculation.stats.drafted
    while not other.is_over:
        told = on.step()[1]
        assert sum(uids[token.uid] is one for token in told) <= 1
        for token in told:
            uids[token.uid].told.append(token)
        if not other.is_over:
            assert speculation.stats.drafted == drafted
    while not one.is_over:
        one.told += on.step()[1]
    assert speculation.stats.drafted > drafted  # alone again, it speculates again
    assert one.tokens_told == plain(repetitive, one)
    assert other.tokens_told == plain(repetitive, other)


def test_a_row_that_follows_a_format_is_left_alone(repetitive: object) -> None:
    speculation = Speculation()
    ask = Ask(LOOP, 100, speculates=False)
    run(lanes(repetitive, speculation), ask)
    assert speculation.stats.drafted == 0


def test_text_that_does_not_repeat_costs_no_guess(model: object) -> None:
    speculation = Speculation()
    ask = Ask(range(1, 100), 100, SamplingParams(temperature=3.0, seed=3))
    run(lanes(model, speculation), ask)
    assert speculation.stats.tries == 0


def test_guesses_that_are_wrong_switch_speculation_off(model: object, folder: Path) -> None:
    other = load_weights(tiny_models.build_random(folder.parent / "other", seed=9))
    speculation = drafted(model, other, lookup=False)
    ask = Ask(range(1, 60), 180, SamplingParams(temperature=3.0, seed=1))
    run(lanes(model, speculation), ask)
    stats = speculation.stats
    assert stats.given_up >= 1
    assert stats.steps < 120
    assert ask.tokens_told == plain(model, ask)


class TestWorth:
    def test_nothing_is_tried_before_there_is_something_to_compare_with(self) -> None:
        worth = Worth()
        assert not worth.is_due
        for _ in range(MEASURED_STEPS):
            worth.without(1.0)
        assert worth.is_due

    def test_what_pays_goes_on_and_what_does_not_rests_longer_each_time(self) -> None:
        worth = Worth()
        for _ in range(MEASURED_STEPS):
            worth.without(1.0)
        worth.begin()
        assert all(worth.pays(3.0, 4) for _ in range(3 * MEASURED_ROUNDS))
        rests = []
        for _ in range(3):
            worth.begin()
            rounds = 1
            while worth.pays(3.0, 2):
                rounds += 1
            assert rounds == MEASURED_ROUNDS
            rest = 0
            while not worth.is_due:
                worth.without(1.0)
                rest += 1
            rests.append(rest)
        assert rests == [REST_TOKENS, 2 * REST_TOKENS, 4 * REST_TOKENS]


class TestPromptLookup:
    def test_it_guesses_what_followed_the_longest_run_last(self) -> None:
        lookup = PromptLookup()
        assert lookup.draft([1, 2, 3], 4) == []
        lookup = PromptLookup()
        assert lookup.draft([1, 2, 3, 9, 8, 1, 2, 3], 2) == [9, 8]
        assert lookup.draft([1, 2, 3, 9, 8, 1, 2, 3, 7, 6, 2, 3], 2) == [7, 6]
        assert lookup.draft([1, 2, 3, 9, 8, 1, 2, 3, 7, 6, 2, 3], 0) == []

    def test_a_loop_is_guessed_on_and_on(self) -> None:
        assert PromptLookup().draft([5, 6, 7, 5, 6, 7, 5, 6], 7) == [7, 5, 6, 7, 5, 6, 7]

    def test_it_knows_what_was_added_since(self) -> None:
        lookup = PromptLookup()
        tokens = [1, 2, 3, 4]
        assert lookup.prepare(tokens)
        assert lookup.draft(tokens, 3) == []
        tokens += [1, 2]
        assert lookup.draft(tokens, 3) == [3, 4, 1]


class TestDraftModel:
    def test_it_catches_up_a_chunk_a_step(self, model: object) -> None:
        drafter = DraftModel(model, vocabulary=272, chunk=16)
        tokens = list(range(50))
        steps = 0
        while not drafter.prepare(tokens):
            steps += 1
        assert steps == 3
        assert drafter.cache_bytes > 0
        assert len(drafter.draft(tokens, 5)) == 5
        assert drafter.draft(tokens, 0) == []

    def test_it_forgets_what_did_not_come(self, model: object) -> None:
        tokens = list(range(30))
        drafter = DraftModel(model, vocabulary=272, chunk=64)
        guesses = drafter.draft(tokens, 6)
        for right in (0, 3, 5, 6):
            grown = [*tokens, *guesses[:right], 99]
            fresh = DraftModel(model, vocabulary=272, chunk=64)
            used = DraftModel(model, vocabulary=272, chunk=64)
            assert used.draft(tokens, 6) == guesses
            assert used.draft(grown, 6) == fresh.draft(grown, 6)

    def test_it_guesses_only_tokens_that_the_large_model_knows(self, model: object) -> None:
        assert max(DraftModel(model, vocabulary=3, chunk=64).draft([1, 2, 3], 9)) < 3


def test_a_reply_with_nothing_to_guess_goes_back_to_its_batch(repetitive: object) -> None:
    speculation = Speculation()
    on = lanes(repetitive, speculation)
    ask = Ask(LOOP, 150)
    ask.insert(on)
    while speculation.stats.accepted < 10:
        ask.told += on.step()[1]
    speculation._looker.draft = lambda tokens, most: []  # type: ignore[method-assign]  # nothing to find any more
    for _ in range(SILENT_ROUNDS):
        ask.told += on.step()[1]
    drafted = speculation.stats.drafted
    while not ask.is_over:
        ask.told += on.step()[1]
    assert speculation.stats.drafted == drafted
    assert speculation.stats.given_up == 0
    assert ask.tokens_told == plain(repetitive, ask)


class Windowed:
    """A model whose caches cannot be cut back."""

    layers = ()

    def make_cache(self) -> list[object]:
        from mlx_lm.models.cache import RotatingKVCache

        return [RotatingKVCache(8)]


def test_models_whose_caches_cannot_be_cut_back_do_not_speculate(model: object) -> None:
    speculation = Speculation()
    assert speculation.load(Windowed()).per_token == 0
    assert not any(speculation.is_wanted(1, LOOP * 5, 1.0) for _ in range(40))
    with pytest.raises(ModelLoadFailed, match="draft_models"):
        Speculation(load_draft=lambda: model).load(Windowed())
    with pytest.raises(ModelLoadFailed, match="name another"):
        Speculation(load_draft=Windowed).load(model)


# Through the engine and the service.


def eager() -> Speculation:
    """Speculation to which it always pays."""
    worth = Worth()
    worth.pays = lambda seconds, tokens: True  # type: ignore[method-assign]  # a test's own opinion
    return Speculation(worth=worth)


@pytest.fixture(scope="module")
def looping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_random(tmp_path_factory.mktemp("looping") / "m", plain=True, context=4096)


TEXT = "on and on and on and on and on"


async def replies(path: Path, speculation: Speculation | None, *asks: pb.GenerateRequest) -> list[Reply]:
    async with rig(
        path, context=4096, speculation=speculation, prefixes=PrefixCache(max_bytes=1 << 24)
    ) as made:
        found = [await made.generate(one) for one in asks]
        assert made.engine.stats().faults == 0
    return found


async def test_a_reply_is_the_same_event_by_event_and_says_how_much_was_guessed(looping: Path) -> None:
    logprobs = pb.LogprobOptions(top_logprob_count=2)
    whole = (await replies(looping, None, ask(TEXT, most=180)))[0].text
    asks = [
        ask(TEXT, most=180, include_token_ids=True, logprobs=logprobs),
        ask(TEXT, most=180, stops=[whole[140:146]], include_token_ids=True),
        ask(TEXT, most=150, include_token_ids=True, sampling=pb.Sampling(temperature=0.3, seed=4)),
        ask(TEXT, most=120, sampling=pb.Sampling(temperature=0, repetition_penalty=1.05)),
    ]
    speculation = eager()
    plain, guessed = await replies(looping, None, *asks), await replies(looping, speculation, *asks)
    for one, other in zip(plain, guessed, strict=True):
        assert one.text == other.text
        # Tokens of a stop sequence come along if some before them have not been told yet.
        common = min(len(one.token_ids), len(other.token_ids))
        assert one.token_ids[:common] == other.token_ids[:common]
        assert one.finished.stop_sequence or len(one.token_ids) == len(other.token_ids)
        assert one.finished.reason == other.finished.reason
        assert one.finished.stop_sequence == other.finished.stop_sequence
        usage = other.finished.usage
        assert one.finished.usage.output_token_count == usage.output_token_count
        assert one.finished.usage.prompt_token_count == usage.prompt_token_count
        assert one.finished.usage.drafted_token_count == 0
        assert 0 <= usage.accepted_token_count <= min(usage.drafted_token_count, usage.output_token_count)
    assert guessed[0].finished.usage.accepted_token_count > 30
    a = [p for delta in plain[0].deltas for p in delta.logprobs]
    b = [p for delta in guessed[0].deltas for p in delta.logprobs]
    assert [p.token_id for p in a] == [p.token_id for p in b]
    assert [p.logprob for p in a] == pytest.approx([p.logprob for p in b], abs=1e-3)


async def test_a_row_that_is_cancelled_while_it_speculates_leaves_right_prefixes(looping: Path) -> None:
    speculation = eager()
    cache = PrefixCache(max_bytes=1 << 24, min_tokens=4)
    async with rig(looping, context=4096, speculation=speculation, prefixes=cache) as made:
        prompt = (await made.words.prompt(ask(TEXT).messages)).tokens
        ticket = made.engine.submit(Row(tokens=prompt, most=3000, sampling=SamplingParams(temperature=0)))
        await until(lambda: speculation.stats.accepted > 40)
        ticket.cancel()
        await until(lambda: not made.engine.stats().live)
        whole = (await made.generate(ask(TEXT, most=400, include_token_ids=True))).token_ids
        continued = await made.generate(
            ask(
                TEXT,
                most=200,
                include_token_ids=True,
                continue_from=pb.ReplyPrefix(token_ids=whole[:200]),
            )
        )
        assert continued.finished.usage.cached_token_count > len(prompt)
    plain = (await replies(looping, None, ask(TEXT, most=400, include_token_ids=True)))[0].token_ids
    assert whole == plain
    assert continued.token_ids == plain[200:400]


async def test_a_step_that_fails_while_a_row_speculates_costs_it_nothing(
    looping: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = (await replies(looping, None, ask(TEXT, most=300)))[0].text
    speculation = eager()
    step = Solo.step
    calls = 0

    def failing(solo: Solo) -> object:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("the device hiccups")
        return step(solo)

    monkeypatch.setattr(Solo, "step", failing)
    async with rig(looping, context=4096, speculation=speculation) as made:
        assert (await made.generate(ask(TEXT, most=300))).text == plain
        assert made.engine.stats().faults == 1


async def test_a_draft_model_is_part_of_what_is_counted(looping: Path, folder: Path) -> None:
    small = tiny_models.build_random(folder.parent / "small", hidden=32, layers=1)
    async with rig(looping, ceiling=1 << 30) as made:
        alone = made.engine.stats()
        row = Row(tokens=(1,) * 100, most=100, sampling=SamplingParams(temperature=0))
        made.engine.submit(row).cancel()
        ticket = made.engine.submit(row)
        reserved = made.engine.stats().reserved_bytes
        ticket.cancel()
    speculation = Speculation(load_draft=lambda: load_draft(small, looping))
    async with rig(looping, ceiling=1 << 30, speculation=speculation) as made:
        assert made.engine.stats().weights_bytes > alone.weights_bytes + 50_000
        ticket = made.engine.submit(row)
        assert made.engine.stats().reserved_bytes > reserved
        ticket.cancel()
        assert made.engine.stats().reserved_bytes == 0


def test_a_draft_model_with_other_tokens_is_refused_with_the_remedy(looping: Path, folder: Path) -> None:
    other = tiny_models.build_scripted(folder.parent / "words", [f"word{i}" for i in range(9)])
    with pytest.raises(ModelLoadFailed, match="their tokenizers differ") as found:
        load_draft(other, looping)
    assert "draft_models" in found.value.message


@pytest.mark.parametrize(("more", "fits"), [(2, True), (9, False)])
def test_a_draft_model_may_have_a_few_tokens_of_its_own(
    looping: Path, tmp_path: Path, more: int, fits: bool
) -> None:
    small = tiny_models.build_random(tmp_path / "small", hidden=32, layers=1)
    tokenizer = json.loads((small / "tokenizer.json").read_text())
    last = tokenizer["added_tokens"][-1]
    for i in range(1, more + 1):
        tokenizer["added_tokens"].append(last | {"id": last["id"] + i, "content": f"<more{i}>"})
    (small / "tokenizer.json").write_text(json.dumps(tokenizer))
    if fits:
        assert callable(load_draft(small, looping))
    else:
        with pytest.raises(ModelLoadFailed, match="tokens, not"):
            load_draft(small, looping)
