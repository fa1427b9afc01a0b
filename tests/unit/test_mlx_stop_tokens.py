"""Promises of stop tokens: each ends its own reply only, wherever it comes and however it was guessed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.mlx_service.worker.load import load_draft
from forebay.mlx_service.worker.speculation import Speculation, Worth
from mlx_worker_rig import Reply, Rig, ask, rig, until

pytestmark = pytest.mark.mlx

PROMPTS = ("hi", "the man in the other tent is on a train", "x" * 90, "What then?")
TEXT = "on and on and on and on and on"


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_random(tmp_path_factory.mktemp("stops") / "m", plain=True, context=4096)


def stopping(
    tokens: Sequence[int], text: str = "hi", *, most: int = 24, **fields: object
) -> pb.GenerateRequest:
    request = ask(text, most=most, include_token_ids=True, **fields)
    request.limits.stop_token_ids.extend(tokens)
    return request


def firsts(tokens: Sequence[int]) -> list[int]:
    """Places of tokens that did not come before, but for the very first."""
    return [i for i, token in enumerate(tokens) if i and token not in tokens[:i]]


async def written(running: Rig) -> list[int]:
    """The tokens of a scripted reply."""
    return (await running.generate(stopping([]))).token_ids


async def test_a_stop_token_ends_only_its_own_row_as_it_does_alone(random_model: Path) -> None:
    async with rig(random_model, context=4096) as running:
        whole = [(await running.generate(stopping([], prompt))).token_ids for prompt in PROMPTS]
        asks, expected = [], []
        for n, (prompt, tokens) in enumerate(zip(PROMPTS, whole, strict=True)):
            at = firsts(tokens)[n] if n % 2 else None  # every other row has none
            asks.append(stopping([] if at is None else [tokens[at]], prompt))
            expected.append(tokens if at is None else tokens[:at])
        assert len({len(tokens) for tokens in expected}) > 1
        async with asyncio.TaskGroup() as tasks:
            together = [tasks.create_task(running.generate(request)) for request in asks]
        for request, task, tokens in zip(asks, together, expected, strict=True):
            alone = await running.generate(request)
            assert task.result().token_ids == alone.token_ids == tokens
            assert task.result().text == alone.text
        await until(lambda: not running.engine.stats().live)


async def test_a_reply_ends_before_its_stop_token_and_says_which(tmp_path: Path) -> None:
    tiny_models.build_scripted(tmp_path, ["one ", "two", " three", " four"])
    async with rig(tmp_path) as running:
        ids = await written(running)
        reply = await running.generate(
            stopping([ids[3], ids[2]], logprobs=pb.LogprobOptions(top_logprob_count=1))
        )
        assert (reply.text, reply.token_ids) == ("one two", ids[:2])
        finished = reply.finished
        assert (finished.reason, finished.stop_token_id) == (pb.FINISH_REASON_STOP, ids[2])
        assert not finished.stop_sequence
        assert finished.usage.output_token_count == 2 == sum(delta.token_count for delta in reply.deltas)
        assert [p.token_id for delta in reply.deltas for p in delta.logprobs] == ids[:2]

        first = await running.generate(stopping(ids[:1]))
        assert (first.text, first.deltas, first.finished.stop_token_id) == ("", [], ids[0])
        assert first.finished.usage.output_token_count == 0

        limit = await running.generate(stopping([ids[2]], most=2))
        assert limit.finished.reason == pb.FINISH_REASON_LENGTH
        assert not limit.finished.HasField("stop_token_id")

        end = await running.generate(stopping(sorted(running.words.language.end_tokens)))
        assert (end.text, end.finished.reason) == ("one two three four", pb.FINISH_REASON_STOP)
        assert not end.finished.HasField("stop_token_id")  # it would have ended there anyway

        # What the reply holds already may have the token in it.
        request = stopping([ids[1]], continue_from=pb.ReplyPrefix(token_ids=ids[:2]))
        assert (await running.generate(request)).text == " three four"


async def test_what_is_held_back_is_told_when_a_stop_token_comes(tmp_path: Path) -> None:
    tiny_models.build_scripted(tmp_path, ["one ", "tw", " then", b"\xf0\x9f", b"\x90"])
    async with rig(tmp_path) as running:
        ids = await written(running)
        request = stopping([ids[2]])
        request.limits.stop_sequences.append("two")
        reply = await running.generate(request)
        assert (reply.text, reply.finished.stop_token_id) == ("one tw", ids[2])
        assert (await running.generate(stopping([ids[4]]))).text == "one tw then\ufffd"
        # A stop sequence that is complete before the token comes is what ended the reply.
        request = stopping([ids[4]])
        request.limits.stop_sequences.append("\ufffd")
        reply = await running.generate(request)
        assert (reply.text, reply.finished.stop_sequence) == ("one tw then", "\ufffd")
        assert not reply.finished.HasField("stop_token_id")


async def test_a_stop_token_ends_reasoning_too(tmp_path: Path) -> None:
    pieces = ["<think>", "let me", " see", "</think>", "The", " end"]
    tiny_models.build_scripted(tmp_path, pieces, markers=["<think>", "</think>"])
    async with rig(tmp_path) as running:
        ids = await written(running)
        reply = await running.generate(stopping([ids[2]]))
        assert (reply.reasoning, reply.text) == ("let me", "")
        assert reply.finished.stop_token_id == ids[2]
        assert reply.finished.usage.reasoning_token_count == 1


async def test_a_stop_token_that_the_format_forbids_never_comes(random_model: Path) -> None:
    constrained = pb.OutputFormat(regex="abcdef")
    async with rig(random_model) as running:
        free = await running.generate(stopping([], output_format=constrained))
        allowed = set(free.token_ids)
        others = [token for token in range(300) if token not in allowed][:4]
        reply = await running.generate(stopping(others, output_format=constrained))
        assert (reply.text, reply.token_ids) == ("abcdef", free.token_ids)
        assert not reply.finished.HasField("stop_token_id")


async def test_a_guessed_stop_token_ends_the_reply_where_it_would_without_guesses(random_model: Path) -> None:
    worth = Worth()
    worth.pays = lambda seconds, tokens: True  # type: ignore[method-assign]  # a test's own opinion
    # The model guesses for itself, so that every guess is right, the stop token's too.
    speculation = Speculation(
        lookup=False, load_draft=lambda: load_draft(random_model, random_model), worth=worth
    )

    async def replies(speculation: Speculation | None, *asks: pb.GenerateRequest) -> list[Reply]:
        async with rig(random_model, context=4096, speculation=speculation) as made:
            found = [await made.generate(one) for one in asks]
            assert made.engine.stats().faults == 0
            await until(lambda: not made.engine.stats().live)
        return found

    whole = (await replies(None, stopping([], TEXT, most=60)))[0].token_ids
    late = [i for i in firsts(whole) if i > 15][-2:]
    assert len(late) == 2
    logprobs = pb.LogprobOptions(top_logprob_count=2)
    asks = [stopping([whole[i]], TEXT, most=60, logprobs=logprobs) for i in late]
    for i, reply in zip(late, await replies(speculation, *asks), strict=True):
        assert reply.token_ids == whole[:i] == [p.token_id for d in reply.deltas for p in d.logprobs]
        finished = reply.finished
        assert (finished.reason, finished.stop_token_id) == (pb.FINISH_REASON_STOP, whole[i])
        assert finished.usage.output_token_count == i
        assert 5 < finished.usage.accepted_token_count <= finished.usage.drafted_token_count
    assert speculation.stats.drafted == speculation.stats.accepted
