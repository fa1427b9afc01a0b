"""One name for a model in each framework's spelling: what is equal, what is alike, what is neither."""

from __future__ import annotations

import dataclasses
import random

import pytest

from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import ModelNotFound, WrongModel
from forebay.kit.pipeline import Call, Request, Resumption, Send
from forebay.orchestrator.config import MatchingSettings, ScorerWeights
from forebay.orchestrator.layers.route import Route
from forebay.orchestrator.routing.matching import Found, Match, Matcher
from forebay.orchestrator.routing.router import Decision, Router
from forebay.orchestrator.routing.spelling import Spelling, Variant, is_size, normal, read
from forebay.orchestrator.routing.view import EndpointView
from forebay.testing.calls import Sink

# What a name says.

SAME_MODEL = [
    # Each row is one model, as Ollama, LM Studio, Hugging Face and its republishers spell it.
    (
        "llama3.2:3b",
        "llama3.2:3b-instruct-q4_K_M",
        "llama3.2:3b-instruct-fp16",
        "llama-3.2-3b-instruct",
        "llama-3.2-3b-instruct:2",
        "llama-3.2-3b-instruct@q8_0",
        "meta-llama/Llama-3.2-3B-Instruct",
        "lmstudio-community/Llama-3.2-3B-Instruct-GGUF",
        "lmstudio-community/Llama-3.2-3B-Instruct-GGUF/Llama-3.2-3B-Instruct-Q4_K_M.gguf",
        "mlx-community/Llama-3.2-3B-Instruct-4bit",
        "mlx-community/Llama-3.2-3B-Instruct-bf16",
        "bartowski/meta-llama_Llama-3.2-3B-Instruct-GGUF",
        "hf.co/bartowski/Llama-3.2-3B-Instruct-GGUF:Q4_K_M",
        "hf.co/unsloth/Llama-3.2-3B-Instruct-GGUF:UD-Q4_K_XL",
        "/models/Llama-3.2-3B-Instruct-Q6_K.gguf",
        r"C:\models\Llama-3.2-3B-Instruct-Q6_K.gguf",
        "./Llama-3.2-3B-Instruct.IQ4_XS.gguf",
    ),
    ("llama3.1:8b", "meta-llama/Meta-Llama-3.1-8B-Instruct", "mlx-community/Meta-Llama-3.1-8B-Instruct-8bit"),
    ("llama3.3:70b", "meta/llama-3.3-70b", "mlx-community/Llama-3.3-70B-Instruct-3bit"),
    ("llama3.2-vision:11b", "Llama-3.2-11B-Vision-Instruct", "llama3.2-vision:11b-instruct-q8_0"),
    (
        "qwen2.5-coder:7b",
        "qwen2.5-coder:7b-instruct-q8_0",
        "Qwen/Qwen2.5-Coder-7B-Instruct",
        "qwen2.5-coder-7b-instruct",
        "mlx-community/Qwen2.5-Coder-7B-Instruct-4bit",
        "Qwen/Qwen2.5-Coder-7B-Instruct-GGUF",
        "Qwen/Qwen2.5-Coder-7B-Instruct-AWQ",
        "bartowski/Qwen_Qwen2_5-Coder-7B-Instruct-GGUF",
    ),
    ("qwen2.5:0.5b", "Qwen/Qwen2.5-0.5B-Instruct", "mlx-community/Qwen2.5-0.5B-Instruct-4bit"),
    ("qwen2.5vl:7b", "mlx-community/Qwen2.5-VL-7B-Instruct-8bit", "qwen2.5-vl-7b-instruct"),
    (
        "qwen3:8b",
        "Qwen/Qwen3-8B",
        "qwen/qwen3-8b",
        "bartowski/Qwen_Qwen3-8B-GGUF",
        "mlx-community/Qwen3-8B-4bit",
    ),
    ("qwen3:30b-a3b", "qwen3:30b", "Qwen/Qwen3-30B-A3B", "mlx-community/Qwen3-30B-A3B-4bit"),
    (
        "qwen3:30b-a3b-instruct-2507-q4_K_M",
        "Qwen/Qwen3-30B-A3B-Instruct-2507",
        "qwen3-30b-a3b-instruct-2507-mlx",
        "unsloth/Qwen3-30B-A3B-Instruct-2507-GGUF",
    ),
    ("qwen3-coder:30b", "Qwen/Qwen3-Coder-30B-A3B-Instruct", "qwen/qwen3-coder-30b"),
    ("gemma3n:e4b", "gemma-3n-E4B-it", "google/gemma-3n-E4B-it", "mlx-community/gemma-3n-E4B-it-lm-4bit-lm"),
    ("gemma3:12b", "google/gemma-3-12b-it", "google/gemma-3-12b", "bartowski/google_gemma-3-12b-it-GGUF"),
    ("gemma3:4b-it-qat", "mlx-community/gemma-3-4b-it-qat-4bit", "google/gemma-3-4b-it-qat-q4_0-gguf"),
    ("phi4-mini:3.8b", "phi-4-mini", "microsoft/Phi-4-mini-instruct", "phi-4-mini-instruct"),
    ("phi4:14b", "phi-4", "microsoft/phi-4", "mlx-community/phi-4-4bit"),
    (
        "deepseek-r1:7b",
        "deepseek-r1:7b-qwen-distill-q4_K_M",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        "deepseek-r1-distill-qwen-7b",
        "mlx-community/DeepSeek-R1-Distill-Qwen-7B-4bit",
    ),
    ("deepseek-r1:70b", "unsloth/DeepSeek-R1-Distill-Llama-70B-GGUF"),
    ("deepseek-r1:671b", "deepseek-r1:671b-q4_K_M"),
    ("gpt-oss:20b", "openai/gpt-oss-20b", "mlx-community/gpt-oss-20b-MXFP4-Q8", "ggml-org/gpt-oss-20b-GGUF"),
    ("mixtral:8x7b-instruct-v0.1-q4_0", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
    ("mistral:7b-instruct-v0.3-q4_K_M", "mlx-community/Mistral-7B-Instruct-v0.3-4bit"),
    ("smollm2:135m", "mlx-community/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ("granite3.3:8b", "ibm-granite/granite-3.3-8b-instruct"),
    ("tinyllama:1.1b-chat-v1.0-q4_0", "TinyLlama-1.1B-Chat-v1.0"),
    ("nomic-embed-text:v1.5", "text-embedding-nomic-embed-text-v1.5", "nomic-ai/nomic-embed-text-v1.5-GGUF"),
    ("all-minilm:22m", "all-minilm:22m-l6-v2-fp16"),
    ("llama3.2:3b-text-q4_K_M", "meta-llama/Llama-3.2-3B", "mlx-community/Llama-3.2-3B-4bit"),
    ("qwen3:8b-base", "Qwen/Qwen3-8B-Base"),
]
"""Rows whose spellings must all say the same, quantisation aside."""

EXCEPTIONS = {"all-minilm:22m-l6-v2-fp16", "mlx-community/gemma-3n-E4B-it-lm-4bit-lm"}
"""Names with a word more. Conservative on purpose: what is not understood keeps models apart."""

OTHER_MODELS = [
    ("llama3.2:3b", "mlx-community/Llama-3.2-3B-4bit", "instruct and base"),
    ("llama3.2:3b", "llama3.2:3b-text-q4_K_M", "instruct and base"),
    ("Qwen/Qwen2.5-7B", "qwen2.5:7b", "base and instruct"),
    ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B", "base and instruct"),
    ("google/gemma-3-4b-pt", "gemma3:4b", "base and instruct"),
    ("mistralai/Mistral-7B-v0.3", "mistral:7b-instruct-v0.3-q4_0", "base and instruct"),
    ("qwen2.5-coder:7b", "qwen2.5:7b", "coder and general"),
    ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "qwen3:30b-a3b", "coder and general"),
    ("llama3.2:1b", "llama3.2:1.5b", "1b and 1.5b"),
    ("llama3.2:1b", "llama3.2:3b", "1b and 3b"),
    ("qwen2.5:0.5b", "qwen2.5:5b", "0.5b and 5b"),
    ("smollm2:135m", "smollm2:1.7b", "135m and 1.7b"),
    ("smollm2:360m", "smollm2:360b", "millions and thousands of millions"),
    ("gemma3n:e2b", "gemma3n:e4b", "two effective sizes"),
    ("gemma3n:e4b", "gemma3:4b", "effective and real size"),
    ("mixtral:8x7b", "mistral:7b", "experts and none"),
    ("mixtral:8x7b", "mixtral:8x22b", "two sizes of expert"),
    ("deepseek-r1:671b", "DeepSeek-R1-Distill-Qwen-7B", "original and distilled"),
    ("deepseek-ai/DeepSeek-R1", "deepseek-r1:7b", "original and distilled"),
    ("DeepSeek-R1-Distill-Llama-8B", "DeepSeek-R1-0528-Qwen3-8B", "two distillations"),
    ("DeepSeek-R1-Distill-Llama-8B", "deepseek-r1:8b", "a tag that became another model"),
    ("DeepSeek-R1-Distill-Qwen-7B", "Qwen/Qwen2.5-7B-Instruct", "distilled and its base"),
    ("llama3.2-vision:11b", "llama3.2:11b", "vision and text"),
    ("qwen2.5vl:7b", "qwen2.5:7b", "vision and text"),
    ("llama3.1:8b", "llama3.2:8b", "two versions"),
    ("qwen2:7b", "qwen2.5:7b", "two versions"),
    ("phi3.5:3.8b", "phi4-mini:3.8b", "two lines"),
    ("phi-4", "phi-4-mini", "large and mini"),
    ("phi-4-mini-instruct", "phi-4-mini-reasoning", "instruct and reasoning"),
    ("Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen/Qwen3-30B-A3B-Thinking-2507", "instruct and thinking"),
    ("Qwen/Qwen3-4B-Instruct-2507", "qwen3:4b", "a date and none"),
    ("Mistral-7B-Instruct-v0.2", "Mistral-7B-Instruct-v0.3", "two versions"),
    ("gpt-4o-2024-08-06", "gpt-4o-2024-11-20", "two dates"),
    ("gpt-4o", "gpt-4o-mini", "large and mini"),
    ("gpt-4", "gpt-4o", "two lines"),
    ("gpt-oss:20b", "gpt-oss:120b", "two sizes"),
    ("gpt-oss:20b", "openai/gpt-oss-safeguard-20b", "another line"),
    ("Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct-1M", "another context"),
    ("phi-3-mini-4k-instruct", "phi-3-mini-128k-instruct", "another context"),
    ("gemma3:4b", "gemma3:4b-it-qat", "trained for its quantisation, and not"),
    ("llama3.1:8b", "huihui-ai/Meta-Llama-3.1-8B-Instruct-abliterated", "tampered with"),
    ("llama3.1:8b", "NousResearch/Hermes-3-Llama-3.1-8B", "a fine-tune"),
    ("llama3.1:70b", "nvidia/Llama-3.1-Nemotron-70B-Instruct-HF", "a fine-tune"),
    ("llama3.2:3b", "someone/llama3.2:3b", "a stranger's model under an old name"),
    ("hermes-3-llama-3.1-8b", "hermes-3.1-llama-3-8b", "versions changed about"),
    ("nomic-embed-text:v1", "nomic-embed-text:v1.5", "two versions"),
    ("nomic-embed-text:v1.5", "nomic-embed-code:v1.5", "two lines"),
    ("qwen3-embedding:8b", "qwen3:8b", "embedding and chat"),
    ("qwen3-embedding:8b", "qwen3-reranker:8b", "embedding and reranking"),
]


def said(name: str) -> tuple[object, ...]:
    spelling = read(name)
    assert spelling is not None
    return spelling.line, spelling.size, spelling.variant


@pytest.mark.parametrize("row", SAME_MODEL, ids=lambda row: row[0])
def test_every_framework_s_spelling_of_a_model_says_the_same(row: tuple[str, ...]) -> None:
    first, *others = row
    for other in others:
        assert (said(other) == said(first)) is (other not in EXCEPTIONS), other


@pytest.mark.parametrize(("one", "other", "why"), OTHER_MODELS, ids=str)
def test_near_misses_are_other_models(one: str, other: str, why: str) -> None:
    assert said(one) != said(other), why


def test_rows_are_told_from_one_another() -> None:
    firsts = [said(row[0]) for row in SAME_MODEL]
    assert len(set(firsts)) == len(firsts)


@pytest.mark.parametrize(
    ("name", "packing"),
    [
        ("llama3.2:3b-instruct-q4_K_M", "q4_k_m"),
        ("mlx-community/Llama-3.2-3B-Instruct-4bit", "4bit"),
        ("Llama-3.2-3B-Instruct-4-bit", "4bit"),
        ("Llama-3.2-3B-Instruct-16bit", "16bit"),
        ("llama3.2:3b-instruct-fp16", "f16"),
        ("mlx-community/Llama-3.2-3B-Instruct-bf16", "bf16"),
        ("x/Llama-3.2-3B-Instruct-UD-Q4_K_XL.gguf", "ud-q4_k_xl"),
        ("Llama-3.2-3B-Instruct.i1-IQ3_XXS.gguf", "i1-iq3_xxs"),
        ("mlx-community/gpt-oss-20b-MXFP4-Q8", "mxfp4-q8"),
        ("mlx-community/Qwen3-4B-4bit-DWQ", "4bit-dwq"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "awq"),
        ("RedHatAI/Qwen3-8B-quantized.w4a16", "w4a16"),
        ("qwen3:8b", ""),
        ("all-MiniLM-L6-v2", ""),
    ],
)
def test_a_name_says_how_the_weights_are_packed(name: str, packing: str) -> None:
    spelling = read(name)
    assert spelling is not None
    assert spelling.packing == packing


def test_what_a_framework_reports_and_what_a_name_says_are_compared_in_one_spelling() -> None:
    assert [normal(each) for each in ("Q4_K_M", "float16", "F16", "4-bit", "MXFP4", "none")] == [
        "q4_k_m",
        "f16",
        "f16",
        "4bit",
        "mxfp4",
        "none",
    ]


def test_who_asks_without_an_owner_means_the_tuned_model() -> None:
    asked, listed = read("llama-3.2-3b", is_asked=True), read("llama-3.2-3b")
    assert asked is not None
    assert listed is not None
    assert (asked.variant, listed.variant) == (Variant.TUNED, Variant.BASE)
    owned = read("meta-llama/Llama-3.2-3B", is_asked=True)
    assert owned is not None
    assert owned.variant is Variant.BASE


@pytest.mark.parametrize(
    "name", ["", ":latest", "q4_K_M", "7b", "instruct", "/", "gguf", "mlx-community/", "x" * 257]
)
def test_a_name_without_a_line_says_nothing(name: str) -> None:
    assert read(name) is None


@pytest.mark.parametrize(
    ("size", "parameters", "holds"),
    [
        ("3", 3.2, True),  # llama 3.2
        ("1", 1.24, True),
        ("1", 1.54, False),
        ("1.5", 1.54, True),
        ("1.5", 1.78, True),
        ("2", 2.6, True),  # gemma 2
        ("7", 7.6, True),
        ("7", 8.2, False),
        ("8", 8.03, True),
        ("8", 7.6, True),
        ("0.135", 0.1345, True),
        ("70", 70.6, True),
        ("8x7", 46.7, False),
        ("e4", 6.9, False),
    ],
)
def test_a_size_is_known_by_the_count_of_parameters(size: str, parameters: float, holds: bool) -> None:
    assert is_size(size, parameters) is holds


def test_no_name_however_odd_breaks_the_reading() -> None:
    source = random.Random(5)
    alphabet = "abq4k_mx7b.-:/@ %\\\n{é\x00"
    for _ in range(3000):
        name = "".join(source.choices(alphabet, k=source.randrange(24)))
        found = read(name)
        assert found is None or (found.line and isinstance(found, Spelling)), repr(name)


# What a name means over the fleet.


def model(
    name: str, *, digest: str = "", packing: str = "", parameters: float = 0.0, label: str = ""
) -> pb.Model:
    made = pb.Model(id=name, state=pb.Model.STATE_ACTIVE)
    made.weights.digest, made.weights.quantization = digest, packing
    made.weights.parameter_count, made.weights.size_label = int(parameters * 1e9), label
    return made


def find(name: str, *models: pb.Model, settings: MatchingSettings | None = None, own: str = "") -> list[str]:
    """Returns how the name was matched on each of several backends with one model each."""
    found = Matcher(settings, [own] if own else []).find(name, [(each,) for each in models])
    return [each.match.value if each is not None else "-" for each in found]


OLLAMA = model("llama3.2:3b", packing="Q4_K_M", parameters=3.2)
LMSTUDIO = model("llama-3.2-3b-instruct", packing="Q4_K_M")
MLX = model("mlx-community/Llama-3.2-3B-Instruct-4bit", packing="4bit")


def test_a_name_that_is_listed_means_those_weights_and_no_other_quantisation() -> None:
    assert find("llama3.2:3b", OLLAMA, LMSTUDIO, MLX) == ["exact", "name", "like"]
    assert find("mlx-community/Llama-3.2-3B-Instruct-4bit", OLLAMA, LMSTUDIO, MLX) == [
        "like",
        "like",
        "exact",
    ]


def test_a_name_that_nobody_lists_leaves_open_what_it_does_not_say() -> None:
    assert find("meta-llama/Llama-3.2-3B-Instruct", OLLAMA, LMSTUDIO, MLX) == ["name", "name", "name"]
    assert find("llama-3.2-3b", OLLAMA, LMSTUDIO, MLX) == ["name", "name", "name"]
    assert find("meta-llama/Llama-3.2-3B", OLLAMA, LMSTUDIO, MLX) == ["-", "-", "-"]
    assert find("llama3.2:3b-instruct-q4_K_M", OLLAMA, LMSTUDIO, MLX) == ["name", "name", "like"]


def test_equal_weights_are_found_whatever_they_are_called() -> None:
    one, other = model("one:latest", digest="sha256:a"), model("another", digest="sha256:a")
    assert find("one", one, other, model("third", digest="sha256:b")) == ["exact", "weights", "-"]
    assert find("one", model("one"), model("another")) == ["exact", "-"]  # unknown digests are not equal ones


def test_an_unknown_quantisation_is_not_taken_for_the_same() -> None:
    assert find("llama3.2:3b", OLLAMA, model("llama-3.2-3b-instruct")) == ["exact", "like"]
    assert find("llama3.2:3b", model("llama3.2:3b"), LMSTUDIO) == ["exact", "like"]


def test_a_name_without_a_size_is_completed_by_what_its_framework_counts() -> None:
    default = model("llama3.2:latest", packing="Q4_K_M", parameters=3.2)
    labelled = model("llama3.2:latest", packing="Q4_K_M", label="3.2B")
    small = model("llama3.2:latest", packing="Q4_K_M", label="1.2B")
    tiny = model("smollm2:latest", label="134.52M")
    assert find("llama-3.2-3b-instruct", default, labelled, small) == ["name", "name", "-"]
    assert find("smollm2-135m", tiny) == ["name"]
    assert find("llama3.2", default, LMSTUDIO, model("llama-3.2-1b-instruct")) == ["exact", "name", "-"]
    # Without a size and without a count, nobody knows which it is.
    assert find("llama-3.2-3b-instruct", model("llama3.2:latest")) == ["-"]
    assert find("llama-3.2-instruct", LMSTUDIO) == ["-"]


def test_two_names_without_a_size_are_the_same_unless_their_counts_differ() -> None:
    known = model("mistral-small3.2:latest", packing="Q4_K_M", parameters=24.0)
    near = model("mistralai/mistral-small-3.2", packing="Q4_K_M", parameters=23.6)
    far = model("mistralai/mistral-small-3.2", packing="Q4_K_M", parameters=119.0)
    silent = model("mistralai/mistral-small-3.2", packing="Q4_K_M")
    assert find("mistral-small3.2", known, near, far, silent) == ["exact", "name", "-", "name"]


def test_names_of_the_operator_mean_what_they_say_and_nothing_else() -> None:
    house = model("llama3.2:3b", packing="Q4_K_M")
    house.aliases.append("house")
    assert find("house", house, LMSTUDIO) == ["alias", "name"]
    assert find("house", house, LMSTUDIO, own="House") == ["alias", "-"]


def test_matching_can_be_switched_off() -> None:
    settings = MatchingSettings(automatic=False)
    assert find("llama3.2:3b", OLLAMA, LMSTUDIO, MLX, settings=settings) == ["exact", "-", "-"]


def test_a_name_nobody_can_read_is_only_ever_exact() -> None:
    assert find("instruct", model("instruct"), model("instruct-2")) == ["exact", "-"]
    assert find(":latest", model("llama3.2:3b")) == ["-"]


def test_of_two_that_fit_the_one_in_memory_is_taken() -> None:
    cold, warm = model("llama-3.2-3b-instruct@q8_0"), model("llama-3.2-3b-instruct@q4_0")
    cold.state = pb.Model.STATE_AVAILABLE
    found = Matcher().find("llama-3.2-3b", [(cold, warm)])[0]
    assert found is not None
    assert found.model is warm


def test_the_nearest_model_of_a_backend_is_taken() -> None:
    found = Matcher().find("llama3.2:3b", [(OLLAMA,), (MLX, LMSTUDIO)])[1]
    assert found is not None
    assert (found.model, found.match) == (LMSTUDIO, Match.NAME)


def test_what_was_found_is_kept_while_the_lists_are_the_same_and_no_longer() -> None:
    matcher = Matcher()
    first, second = (OLLAMA,), (MLX,)
    found = matcher.find("llama3.2:3b", [first, second])
    assert matcher.find("llama3.2:3b", [first, second]) is found
    assert matcher.find("llama3.2:3b", [first, (LMSTUDIO,)]) is not found
    assert matcher.find("llama3.2:3b", [first])[0] == Found(model=OLLAMA, match=Match.EXACT)
    for count in range(600):
        matcher.find(f"name-{count}", [first])
    assert len(matcher._kept) <= 512  # whoever asks for ever new names cannot fill the memory


# What a caller gets.


def views(*models: pb.Model) -> list[EndpointView]:
    return [EndpointView(name=name, models=(each,)) for name, each in zip("abc", models, strict=False)]


def router(settings: MatchingSettings | None = None) -> Router:
    return Router(weights=ScorerWeights(), picker="best", source=random.Random(0), matcher=Matcher(settings))


def ask(name: str, *, accepts: bool = False) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        model=name, messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="hi")])]
    )
    if accepts:
        request.accepted_degradations.append(pb.DEGRADATION_KIND_MODEL_SUBSTITUTED)
    return request


def by_name(decision: Decision) -> dict[str, tuple[str, str]]:
    return {
        each.name: (each.refused_by, each.match.value if each.match else "") for each in decision.candidates
    }


LIKE = MatchingSettings(like=True)


@pytest.mark.parametrize(("settings", "accepts"), [(None, True), (LIKE, False)])
def test_what_is_merely_alike_never_answers_unless_operator_and_caller_both_say_so(
    settings: MatchingSettings | None, accepts: bool
) -> None:
    decision = router(settings).decide(
        ask("llama3.2:3b", accepts=accepts), views(OLLAMA, MLX), tried=frozenset("a")
    )
    assert decision.chosen is None
    assert by_name(decision) == {"a": ("tried", "exact"), "b": ("model", "")}
    refused = {each.name: each.detail for each in decision.candidates}
    assert refused["b"] == (
        "it has no model llama3.2:3b, only mlx-community/Llama-3.2-3B-Instruct-4bit, and its quantisation is "
        "4bit, and that of llama3.2:3b is q4_k_m"
    )


def test_a_name_that_only_something_like_it_has_is_not_found() -> None:
    decision = router().decide(ask("llama3.2:3b-instruct-q8_0"), views(MLX))
    assert isinstance(decision.failure(), ModelNotFound)


def test_what_is_alike_answers_only_where_the_model_itself_cannot() -> None:
    request = ask("llama3.2:3b", accepts=True)
    both = router(LIKE).decide(request, views(OLLAMA, MLX))
    assert by_name(both) == {"a": ("", "exact"), "b": ("like", "like")}
    alone = router(LIKE).decide(request, views(OLLAMA, MLX), tried=frozenset("a"))
    assert alone.chosen is not None
    assert (alone.chosen.name, alone.chosen.match) == ("b", Match.LIKE)


def test_embeddings_of_other_weights_are_never_alike() -> None:
    one, other = model("bge-m3:latest", packing="F16"), model("baai/bge-m3", packing="Q8_0")
    request = pb.EmbedRequest(model="bge-m3", texts=["a"])
    request.accepted_degradations.append(pb.DEGRADATION_KIND_MODEL_SUBSTITUTED)
    decision = router(LIKE).decide(request, views(one, other), tried=frozenset("a"))
    assert decision.chosen is None


class Answering:
    """A fleet of views whose backends answer with the model they were asked for."""

    def __init__(self, seen: list[EndpointView]) -> None:
        self.seen = seen

    def snapshot(self) -> list[EndpointView]:
        return self.seen

    def service(self, name: str) -> object:
        async def serve(call: Call[Request], send: Send) -> None:
            await send(pb.GenerateResponse(started=pb.Started(model=call.request.model)))
            await send(pb.GenerateResponse(finished=pb.Finished()))

        return serve


async def started(
    settings: MatchingSettings | None, request: pb.GenerateRequest, *models: pb.Model
) -> pb.Started:
    sink = Sink()
    fleet = Answering(views(*models))
    await Route(fleet=fleet, router=router(settings))(Call(request=request), sink)  # type: ignore[arg-type]  # a fleet as far as routing goes
    first = sink.events[0]
    assert isinstance(first, pb.GenerateResponse)
    return first.started


async def test_an_answer_of_what_is_alike_is_marked() -> None:
    answer = await started(LIKE, ask("llama3.2:3b-instruct-q4_K_M", accepts=True), MLX)
    assert answer.model == MLX.id
    [mark] = answer.degradations
    assert (mark.kind, mark.field) == (pb.DEGRADATION_KIND_MODEL_SUBSTITUTED, "model")
    assert "its quantisation is 4bit" in mark.detail


async def test_an_answer_of_the_same_model_in_another_spelling_is_not_marked() -> None:
    answer = await started(None, ask("llama3.2:3b-instruct-q4_K_M"), LMSTUDIO)
    assert (answer.model, len(answer.degradations)) == (LMSTUDIO.id, 0)


async def test_a_backend_that_answers_with_another_model_is_still_found_out() -> None:
    class Lying(Answering):
        def service(self, name: str) -> object:
            async def serve(call: Call[Request], send: Send) -> None:
                await send(pb.GenerateResponse(started=pb.Started(model="other")))

            return serve

    route = Route(fleet=Lying(views(LMSTUDIO)), router=router())  # type: ignore[arg-type]  # as above
    with pytest.raises(WrongModel):
        await route(Call(request=ask("llama-3.2-3b")), Sink())


def test_a_match_says_how_it_was_found() -> None:
    details = {
        each.name: each.match_detail
        for each in router(LIKE)
        .decide(ask("llama3.2:3b", accepts=True), views(OLLAMA, LMSTUDIO, MLX))
        .candidates
    }
    assert details == {
        "a": "",
        "b": "line, size, variant and quantisation are those of llama3.2:3b",
        "c": "its quantisation is 4bit, and that of llama3.2:3b is q4_k_m",
    }


def test_going_on_with_a_reply_takes_the_weights_and_not_the_name() -> None:
    named, same = model("llama3.2:3b", digest="sha256:b"), model("other", digest="sha256:a")
    view = dataclasses.replace(EndpointView(name="a"), models=(named, same))
    begun = Resumption(weights="sha256:a", needs_same_weights=True)
    for each in (named, same):
        each.capabilities.add(capability=pb.CAPABILITY_CONTINUE, support=pb.CapabilityReport.SUPPORT_YES)
    decision = router().decide(ask("llama3.2:3b"), [view], resumption=begun)
    assert decision.chosen is not None
    assert (decision.chosen.spelling, decision.chosen.match) == ("other", Match.WEIGHTS)


def test_a_reply_is_gone_on_with_only_by_who_is_known_to_go_on_and_has_the_weights() -> None:
    able = pb.CapabilityReport(capability=pb.CAPABILITY_CONTINUE, support=pb.CapabilityReport.SUPPORT_YES)
    other, silent = model("llama3.2:3b", digest="sha256:b"), model("llama3.2:3b", digest="sha256:a")
    other.capabilities.append(able)
    views = [
        dataclasses.replace(EndpointView(name=name), models=(each,))
        for name, each in (("other", other), ("silent", silent))
    ]
    begun = Resumption(weights="sha256:a", needs_same_weights=True)
    decision = router().decide(ask("llama3.2:3b"), views, resumption=begun)
    assert decision.chosen is None
    assert {each.name: (each.refused_by, each.detail) for each in decision.candidates} == {
        "other": (
            "resumption",
            "model llama3.2:3b is not known to have the weights that began the reply",
        ),
        "silent": ("resumption", "model llama3.2:3b is not known to go on from the start of a reply"),
    }
    silent.capabilities.append(able)
    again = router().decide(ask("llama3.2:3b"), views, resumption=begun)
    assert again.chosen is not None
    assert again.chosen.name == "silent"
