"""Promises of an embedding model's worker: nothing is cut, left out or made up in silence."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import tiny_models
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import (
    BackendError,
    BackendUnavailable,
    CapabilityUnsupported,
    ContextExceeded,
    InvalidRequest,
    ModelLoadFailed,
    ModelNotFound,
)
from forebay.kit.pipeline import Call
from forebay.mlx_service import requirements
from tiny_encoders import Reference, build, cosine, unit, write, write_stages

if requirements.missing():
    pytest.skip(requirements.missing(), allow_module_level=True)

from forebay.mlx_service.models.describe import describe
from forebay.mlx_service.worker.embedding.service import DEFAULT_TOKEN_COUNT, assemble
from mlx_embed_rig import MODEL, learned, rig

pytestmark = pytest.mark.mlx

LONG = "river " * 60  # 62 tokens with the special ones
CUT = pb.DEGRADATION_KIND_PROMPT_TRUNCATED
IGNORED = pb.DEGRADATION_KIND_OPTION_IGNORED


@pytest.fixture
def model(tmp_path):
    return build(tmp_path / "tiny")


async def test_texts_are_embedded_in_order_each_as_it_is_alone(model):
    reference = Reference(model)
    async with rig(model) as running:
        texts = ["the river is deep", "", "a mill", "the river is deep", "old stones and water."]
        response = await running.embed(*texts)
        vectors = [list(e.values) for e in response.embeddings]
        assert vectors[0] == vectors[3]
        for text, vector in zip(texts, vectors, strict=True):
            ((alone,),) = [await running.vectors(text)]
            assert cosine(alone, vector) >= 0.99999
            (tokens,) = await running.service._texts.tokens([text])
            ids = np.frombuffer(tokens, np.int32).tolist()
            assert vector == pytest.approx(unit(reference.outputs(ids).mean(axis=0)), abs=1e-5)
    assert (response.backend, response.model, response.dimension_count) == ("mlx", MODEL, 32)
    assert response.normalized
    assert response.usage.prompt_token_count == 6 + 2 + 4 + 6 + 8
    assert response.weights.family == "bert"
    assert response.weights.digest.startswith("sha256:")
    assert not response.degradations


async def test_the_tokenizer_s_own_cuts_and_pads_are_not_used(model):
    async with rig(model) as running:
        response = await running.embed("river " * 40)
        assert response.usage.prompt_token_count == 42


async def test_many_texts_are_counted_and_embedded_in_several_goes(model):
    async with rig(model) as running:
        texts = [f"{'river ' * (i % 20)}{chr(97 + i % 26)}" for i in range(700)]
        response = await running.embed(*texts)
        assert len(response.embeddings) == 700
        assert running.engine.stats().texts < 700
        assert response.usage.prompt_token_count == sum(i % 20 + 3 for i in range(700))


async def test_texts_that_are_too_long_are_named_and_never_cut(model):
    async with rig(model) as running:
        with pytest.raises(ContextExceeded) as caught:
            await running.embed("a", LONG, "b", LONG)
        failure = caught.value
        assert (
            "2 of 4 texts cannot be embedded, the first of them texts[1]: it has 62 tokens" in failure.message
        )
        assert [path for path, _ in failure.violations] == ["texts[1]", "texts[3]"]
        assert failure.metadata == {
            "prompt_token_count": "62",
            "context_token_count": "48",
            "index": "1",
        }
        assert "river" not in str(failure.to_status())


async def test_texts_that_are_too_long_are_cut_where_that_is_accepted_and_it_is_said(model):
    async with rig(model) as running:
        response = await running.embed("a", LONG, accepted_degradations=[CUT])
        (degradation,) = response.degradations
        assert (degradation.kind, degradation.field) == (CUT, "texts[1]")
        assert degradation.detail == "Of its 62 tokens 48 are embedded."
        assert response.usage.prompt_token_count == 3 + 48
        same = await running.vectors("river " * 46)
        assert list(response.embeddings[1].values) == pytest.approx(same[0], abs=1e-5)


async def test_the_rest_is_embedded_where_some_of_it_is_accepted(model):
    async with rig(model) as running:
        response = await running.embed("a", LONG, allow_partial=True)
        assert [len(e.values) for e in response.embeddings] == [32, 0]
        assert [(f.index, f.reason) for f in response.failures] == [(1, "CONTEXT_EXCEEDED")]
        assert response.usage.prompt_token_count == 3
        with pytest.raises(ContextExceeded):
            await running.embed(LONG, allow_partial=True)


async def test_a_text_that_fails_inside_is_named_with_the_others(model):
    async with rig(model) as running:
        forward = running.engine._forward
        (bad,) = await running.service._texts.tokens(["mill"])

        def failing(texts):
            if bad in texts:
                raise ArithmeticError
            return forward(texts)

        running.engine._forward = failing
        with pytest.raises(BackendError) as caught:
            await running.embed("a", "mill")
        assert [path for path, _ in caught.value.violations] == ["texts[1]"]
        response = await running.embed("a", "mill", LONG, allow_partial=True)
        assert [f.reason for f in response.failures] == ["BACKEND_ERROR", "CONTEXT_EXCEEDED"]
        with pytest.raises(BackendError):
            await running.embed("a", "mill", LONG)


async def test_components_are_cut_only_where_the_model_is_made_for_it(tmp_path, model):
    async with rig(model) as running:
        assert (await running.embed("a", dimension_count=32)).dimension_count == 32
        for wanted in (8, 64):
            with pytest.raises(CapabilityUnsupported, match=f"gives 32 components and not {wanted}"):
                await running.embed("a", dimension_count=wanted)
            response = await running.embed("a", dimension_count=wanted, accepted_degradations=[IGNORED])
            assert response.dimension_count == len(response.embeddings[0].values) == 32
            assert [d.field for d in response.degradations] == ["dimension_count"]
    some = build(tmp_path / "some", config={"matryoshka_dimensions": [8, 16, 0, "x"]})
    async with rig(some) as running:
        (whole,) = await running.vectors("the mill")
        response = await running.embed("the mill", dimension_count=8)
        assert list(response.embeddings[0].values) == pytest.approx(unit(np.array(whole[:8])), abs=1e-5)
        assert (response.dimension_count, response.normalized) == (8, True)
        with pytest.raises(CapabilityUnsupported, match="it can be cut to 8, 16"):
            await running.embed("a", dimension_count=9)
    anyone = build(tmp_path / "any", config={"is_matryoshka": True})
    async with rig(anyone) as running:
        assert (await running.embed("a", dimension_count=5)).dimension_count == 5


async def test_vectors_that_are_not_normalised_are_not_said_to_be(tmp_path):
    async with rig(build(tmp_path, normalize=False)) as running:
        assert not (await running.embed("the river")).normalized


def prompted(text: str) -> dict[str, object]:
    options = pb.EmbedRequest()
    options.backend_options["mlx"]["prompt"] = text
    return {"backend_options": options.backend_options}


async def test_prompts_are_the_model_s_own_and_chosen_by_name(tmp_path):
    own = {"prompts": {"query": "the river ", "document": ""}, "default_prompt_name": "query"}
    async with rig(build(tmp_path, own=own)) as running:
        plain = await running.vectors("mill", **prompted("document"))
        assert await running.vectors("mill") == await running.vectors("the river mill", **prompted(""))
        assert await running.vectors("mill") == await running.vectors("mill", **prompted("query"))
        assert await running.vectors("mill") != plain
        counted = await running.service.count_tokens(conversation(pb.Part(text="mill")))
        assert counted.token_count == (await running.embed("mill", "mill")).usage.prompt_token_count == 10
        with pytest.raises(InvalidRequest, match="the model's prompts are: document, query"):
            await running.embed("mill", **prompted("search"))


async def test_unknown_options_are_refused(model):
    async with rig(model) as running:
        request = pb.EmbedRequest(model=MODEL, texts=["a"])
        request.backend_options["mlx"]["pooling"] = "max"
        request.backend_options["mlx"]["prompt"] = 3
        with pytest.raises(InvalidRequest) as caught:
            await running.service.embed(Call(request=request))
        assert [path for path, _ in caught.value.violations] == [
            "backend_options[mlx].pooling",
            "backend_options[mlx].prompt",
        ]


async def test_a_cancelled_call_leaves_nothing_in_the_queue(model):
    async with rig(model) as running:
        task = asyncio.ensure_future(
            running.embed(*(f"river {chr(97 + i % 26)} mill" * (i % 9) for i in range(900)))
        )
        while not running.engine._jobs:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await running.embed("a")
        assert not running.engine._jobs
        assert running.engine.stats().waiting == 0
        assert running.engine._waiting_tokens == 0


# Other calls.


async def test_it_does_not_generate(model):
    async def send(event):
        raise AssertionError(event)

    async with rig(model) as running:
        with pytest.raises(CapabilityUnsupported, match="embeds text and does not generate it"):
            await running.service.generate(Call(request=pb.GenerateRequest(model=MODEL)), send)


def conversation(*parts: pb.Part, **more) -> Call[pb.CountTokensRequest]:
    messages = [pb.Message(role=pb.ROLE_USER, parts=parts)] * 2
    return Call(request=pb.CountTokensRequest(model=MODEL, messages=messages, **more))


async def test_tokens_are_counted_as_embed_counts_them(model):
    async with rig(model) as running:
        counted = await running.service.count_tokens(
            conversation(pb.Part(text="the "), pb.Part(text="river"))
        )
        assert (counted.token_count, counted.backend, counted.model) == (8, "mlx", MODEL)
        assert counted.token_count == (await running.embed("the river", "the river")).usage.prompt_token_count
        with pytest.raises(CapabilityUnsupported, match="images"):
            await running.service.count_tokens(conversation(pb.Part(image=pb.Blob(data=b"x"))))
        with pytest.raises(CapabilityUnsupported, match="no tools"):
            await running.service.count_tokens(conversation(pb.Part(text="a"), tools=[pb.Tool(name="t")]))


async def test_the_model_is_listed_with_what_it_can_do(model):
    async with rig(model, token_count=20) as running:
        (listed,) = (await running.service.list_models(pb.ListModelsRequest(backends=["mlx"]))).models
        assert not (await running.service.list_models(pb.ListModelsRequest(backends=["other"]))).models
        with pytest.raises(ContextExceeded):
            await running.embed("river " * 19)
        await running.embed("river " * 18)
    assert (listed.context_token_count, listed.loaded_context_token_count) == (48, 20)
    assert listed.memory_bytes > 0
    yes = {c.capability for c in listed.capabilities if c.support == pb.CapabilityReport.SUPPORT_YES}
    assert yes == {pb.CAPABILITY_EMBED, pb.CAPABILITY_COUNT_TOKENS}
    assert all(c.probed for c in listed.capabilities)
    assert len(listed.capabilities) == len(pb.Capability.values()) - 1


async def test_another_model_and_one_that_is_being_loaded_are_refused(model):
    service, _, texts = assemble(
        model, describe(model), identity=learned(model), model_id=MODEL, backend="mlx", token_count=None
    )
    with pytest.raises(BackendUnavailable, match="is being loaded"):
        await service.embed(Call(request=pb.EmbedRequest(model=MODEL, texts=["a"])))
    texts.close()
    async with rig(model) as running:
        with pytest.raises(ModelNotFound):
            await running.service.embed(Call(request=pb.EmbedRequest(model="other", texts=["a"])))


async def test_a_folder_without_a_tokenizer_says_so(model):
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadFailed, match=r"tokenizer\.json cannot be read"):
        async with rig(model):
            raise AssertionError


async def test_a_decoder_embeds_and_has_no_vector_for_a_text_without_tokens(tmp_path):
    path = tiny_models.build_random(tmp_path, hidden=16, layers=1)
    write_stages(path, ["Transformer", "Pooling", "Normalize"], ["lasttoken"])
    async with rig(path) as running:
        alone = await running.vectors("the river")
        both = await running.vectors("the river", "a much longer text, which makes the batch wide")
        assert both[0] == pytest.approx(alone[0], abs=1e-5)
        with pytest.raises(InvalidRequest, match="it has no tokens"):
            await running.embed("")


def test_a_model_that_does_not_say_how_long_a_text_may_be_has_a_limit_still(tmp_path):
    path = tiny_models.build_random(tmp_path, hidden=16, layers=1)
    write_stages(path, ["Transformer", "Pooling"], ["lasttoken"])
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    write(path / "config.json", config)
    service, _, texts = assemble(
        path, describe(path), identity=learned(path), model_id=MODEL, backend="mlx", token_count=None
    )
    texts.close()
    assert service._served.token_count == DEFAULT_TOKEN_COUNT


async def test_many_and_long_texts_in_one_call_are_answered_as_they_are_alone(tmp_path):
    texts = [f"the old river {chr(97 + i % 26)} {chr(97 + i // 26)}" for i in range(340)]
    async with rig(build(tmp_path)) as running:
        together = await running.vectors(*texts)
        for index in (0, 170, 339):
            (alone,) = await running.vectors(texts[index])
            assert together[index] == pytest.approx(alone, abs=1e-5)
