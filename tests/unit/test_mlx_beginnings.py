"""Where a prompt's messages end, in tokens: what two conversations share, and never more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.mlx_service.worker.beginnings import common, shared_length, tokens_within
from forebay.mlx_service.worker.words import Words

pytestmark = pytest.mark.mlx

TALK = [
    pb.Message(role=role, parts=[pb.Part(text=text)])
    for role, text in (
        (pb.ROLE_SYSTEM, "Answer in verse 🙂."),
        (pb.ROLE_USER, "Who are you?"),
        (pb.ROLE_ASSISTANT, "A lathe."),
        (pb.ROLE_USER, "Whose?"),
    )
]


@pytest.fixture
async def words(tmp_path: Path) -> AsyncIterator[Words]:
    made = Words(tiny_models.build_random(tmp_path / "m"))
    await made.load()
    yield made
    made.close()


async def test_every_message_ends_where_a_conversation_that_goes_on_otherwise_parts(words: Words) -> None:
    prompt = await words.prompt(TALK, ends=[1, 2, 3, 4])
    for count in (1, 2, 3):
        other = pb.Message(role=pb.ROLE_ASSISTANT, parts=[pb.Part(text="#")])
        parting = await words.prompt([*TALK[:count], other])
        assert prompt.ends[count] <= common(prompt.tokens, parting.tokens)
    text = await words.run(lambda: words.tokenizer.decode(list(prompt.tokens[: prompt.ends[2]])))
    assert text.endswith("Who are you?<|im_end|>\n")
    assert prompt.ends[4] < len(prompt.tokens), "the reply's beginning is no message's"


async def test_what_the_reply_holds_already_moves_no_message(words: Words) -> None:
    plain = await words.prompt(TALK, ends=[2, 4])
    for prefix in (pb.ReplyPrefix(text="the"), pb.ReplyPrefix(token_ids=[1, 2, 3])):
        going_on = await words.prompt(TALK, ends=[2, 4], prefix=prefix)
        assert going_on.ends == plain.ends
    assert (await words.prompt(TALK)).ends == {}


def test_a_template_that_wants_a_message_of_the_users_gets_one() -> None:
    def picky(messages: object) -> str:
        assert isinstance(messages, list)
        if not any(message["role"] == "user" for message in messages):
            raise TemplateError("no user query")
        return "".join(f"[{message['content']}]" for message in messages)

    system = [{"role": "system", "content": "s"}]
    text = picky([*system, {"role": "user", "content": "hello"}])
    assert shared_length(picky, text, system) == len("[s][")


def test_a_template_that_takes_no_such_beginning_tells_nothing() -> None:
    def broken(_: object) -> str:
        raise KeyError("content")

    assert shared_length(broken, "text", []) is None


def test_tokens_that_reach_beyond_the_end_are_not_within() -> None:
    offsets = [(0, 1), (1, 3), (3, 4), (3, 4), (4, 9)]
    assert [tokens_within(offsets, n) for n in (0, 1, 2, 3, 4, 8, 9)] == [0, 1, 1, 2, 4, 4, 5]


def test_the_common_beginning_is_found() -> None:
    assert common("", "abc") == 0
    assert common("abd", "abc") == 2
    assert common("abc", "abc") == 3
    assert common((1, 2, 3), (1, 2, 3, 4)) == 3
