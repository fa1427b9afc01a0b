"""What a model's name says: line, size, variant and quantisation, whatever framework spelled it.

`llama3.2:3b-instruct-q4_K_M`, `lmstudio-community/Llama-3.2-3B-Instruct-GGUF`
and `mlx-community/Llama-3.2-3B-Instruct-4bit` are one line of one size, tuned
in one way, in three packings. Everything in a name that is not known to be
size, variant, packing or the name of somebody who only republishes counts as
part of the line. So a word nobody thought of here (`coder`, `distill`,
`vision`, a date) keeps two models apart, and never makes them one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

_PUBLISHERS = frozenset(
    {
        # Makers of models, as Hugging Face, LM Studio's catalogue and gateways spell them.
        *{
            "alibaba",
            "allenai",
            "baidu",
            "bytedance",
            "bytedance-seed",
            "cohereforai",
            "coherelabs",
            "deepseek",
        },
        *{
            "deepseek-ai",
            "essentialai",
            "google",
            "huggingfacetb",
            "ibm",
            "ibm-granite",
            "liquid",
            "liquidai",
        },
        *{
            "meta",
            "meta-llama",
            "microsoft",
            "minimaxai",
            "mistral",
            "mistralai",
            "moonshotai",
            "nousresearch",
        },
        *{
            "nvidia",
            "openai",
            "qwen",
            "servicenow-ai",
            "stabilityai",
            "tiiuae",
            "zai-org",
            "zhipuai",
            "01-ai",
        },
        *{"nomic-ai", "mixedbread-ai", "baai", "snowflake", "sentence-transformers", "bigcode", "internlm"},
        # Those who only pack what others made.
        *{
            "mlx-community",
            "lmstudio-community",
            "bartowski",
            "unsloth",
            "thebloke",
            "ggml-org",
            "maziyarpanahi",
        },
        *{"mradermacher", "second-state", "qwen-gguf", "lmstudio-ai", "library", "ai", "quantfactory"},
    }
)
"""Owners whose name says nothing about the weights. Any other may have tuned what they publish under an old
name, so theirs is part of the line."""

LONGEST = 256
"""Characters beyond which a name is not read. Whoever sends such a name is testing us."""

_NOISE = frozenset({"gguf", "ggml", "mlx", "hf", "safetensors", "latest", "model"})
_TUNED = frozenset({"instruct", "instruction", "it", "chat"})
_BASE = frozenset({"base", "pt", "pretrained", "pretrain", "foundation"})
_EMBEDS = ("embed", "minilm", "bge", "rerank", "e5")
_PLAIN_IS_BASE = re.compile(
    r"llama[123]?|llama3\.[12]|codellama|qwen|qwen1\.5|qwen2|qwen2\.5|gemma|gemma2|gemma3n|smollm|smollm2"
    r"|mixtral|olmo|olmo2|falcon|falcon3|yi|yi1\.5|starcoder2|stablelm|pythia"
)
"""Lines whose makers publish the untuned weights under the plain name, and name the tuned ones."""

_ONLY_SIZE = {("phi4",): "14", ("mini", "phi4"): "3.8", ("codestral",): "22", ("mistral", "nemo"): "12"}
"""Lines that exist in one size, in thousands of millions, and are often named without it."""

_DISTILLED = {"1.5": "qwen", "7": "qwen", "14": "qwen", "32": "qwen", "70": "llama"}
"""By size, what Ollama's `deepseek-r1` is distilled into. The 8b was one and became another."""

_PACKING = re.compile(
    r"(?<![a-z0-9])(?:"
    r"(?:ud[-_])?i?q\d(?:_\d|_k(?:_(?:xs|s|m|l|xl|xxl))?|_(?:xxs|xs|s|m|l|nl))*"
    r"|t?q\d_\d|bf16|fp?(?:16|32|8)|float(?:16|32)|bfloat16|int[48]|mxfp\d|nvfp4|nf4|w\d+a\d+"
    r"|\d{1,2}(?:\.\d+)?-?bits?|awq|gptq|dwq|exl[23]|imatrix|imat|i1|bnb|autoround"
    r")(?![a-z0-9])"
)
_SAME_PACKING = {"fp16": "f16", "float16": "f16", "fp32": "f32", "float32": "f32", "bfloat16": "bf16"}
_SIZE = re.compile(r"(e)?(\d+(?:\.\d+)?)([bmt])|(\d+x\d+(?:\.\d+)?)b")
_ACTIVE = re.compile(r"a\d+(?:\.\d+)?b|\d+e")
_VERSION = re.compile(r"\d+(?:\.\d+)?[a-z]?")
_GLUED = re.compile(r"([a-z]+\d+(?:\.\d+)?)([a-z]{2,})")
_PER = {"m": 1e-3, "b": 1.0, "t": 1e3}


class Variant(Enum):
    """What was done to the weights after they were trained."""

    TUNED = "tuned"
    """Tuned to follow instructions."""
    BASE = "base"
    """Not tuned."""
    NONE = "none"
    """There is no such difference, as for embeddings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """What one name says."""

    line: tuple[str, ...]
    """Words that tell the line, such as `llama3.2` or `coder` and `qwen2.5`, sorted."""
    size: str
    """Parameters in thousands of millions, such as `3`, `0.5` or `8x7`; `e4` counts effective ones. Empty if
    it does not say."""
    variant: Variant
    """What was done to the weights after they were trained."""
    packing: str
    """Quantisation, such as `q4_k_m`, `4bit` or `f16`. Empty if it does not say."""


@lru_cache(maxsize=4096)
def read(name: str, *, is_asked: bool = False) -> Spelling | None:
    """Returns what a name says; None if no line can be made out.

    Args:
        name: the name, in any framework's spelling.
        is_asked: whether somebody typed it, rather than a framework listed it. People who ask for
            `llama-3.2-3b` mean the one that talks; a repository of that name holds the one that does not.
    """
    if len(name) > LONGEST:
        return None
    text = name.strip().casefold().replace("\\", "/")
    for host in ("hf.co/", "huggingface.co/", "https://huggingface.co/"):
        text = text.removeprefix(host)
    text, owner = _split_owner(text)
    text = text.removesuffix(".gguf").removeprefix("text-embedding-")
    text, _, tag = text.partition(":")
    if tag.isdigit():  # LM Studio numbers the copies of one model
        tag = ""
    # A tag that is a quantisation and no more is Hugging Face's, and so is the name before it.
    is_ollama = bool(tag) and not _PACKING.fullmatch(tag)
    packing = _pack(_PACKING.findall(f"{text} {tag}"))
    words = [*_words(_PACKING.sub(" ", text)), *_tag_words(_PACKING.sub(" ", tag))]
    if owner:
        words.append(f"@{owner}")
    return _sort_out(words, packing, is_plain_tuned=is_ollama or (is_asked and "/" not in name))


def normal(quantization: str) -> str:
    """Returns a quantisation as `Spelling.packing` has it, from how a framework reports it."""
    found = _PACKING.findall(quantization.casefold())
    return _pack(found) if found else quantization.casefold()


def is_size(size: str, parameters: float) -> bool:
    """Returns whether a number of parameters is what people call that size.

    Names round, and mostly down: the "3b" of Llama 3.2 has 3.2 thousand
    millions, a "1b" 1.24 and a "7b" 7.6. Large ones round less, which keeps
    "7b" and "8b" apart.

    Args:
        size: the size a name says.
        parameters: parameters in thousands of millions.
    """
    try:
        named = float(size)
    except ValueError:  # `8x7`, `e4`: what a framework counts of those is another number
        return False
    return 0.95 <= parameters / named <= (1.3 if named < 5 else 1.12)


def _split_owner(text: str) -> tuple[str, str]:
    """Returns a name without its owner, and the owner if the name may mean something else because of them."""
    parts = text.split("/")
    if len(parts) == 1 or parts[0] in {"", ".", "..", "~"} or parts[0].endswith(":"):  # no owner, or a file
        owner, rest = "", parts[-1]
    else:
        owner, rest = parts[0], parts[-1]
    prefix, underscore, tail = rest.partition("_")  # `bartowski/Qwen_Qwen3-8B-GGUF`
    if underscore and prefix in _PUBLISHERS:
        rest = tail
    return rest, "" if owner in _PUBLISHERS else owner


def _pack(found: list[str]) -> str:
    plain = (re.sub(r"-?bits?$", "bit", each).replace("ud_", "ud-") for each in found)
    return "-".join(sorted({_SAME_PACKING.get(each, each) for each in plain}))


def _words(text: str) -> list[str]:
    text = re.sub(r"(?<=\d)_(?=\d)", ".", text)  # qwen2_5
    return [word for part in re.split(r"[-_\s@()]+", text) if (word := part.strip("."))]


def _tag_words(tag: str) -> list[str]:
    # Only in a tag: `text` is part of the name of many embedding models.
    return ["base" if word == "text" else word for word in _words(tag)]


def _sort_out(words: list[str], packing: str, *, is_plain_tuned: bool) -> Spelling | None:
    size, variant, line = "", None, list[str]()
    may_join = False  # whether the word before this one is a name that a version can belong to
    for word in words:
        joins, may_join = may_join, False
        if word in _NOISE or _ACTIVE.fullmatch(word):
            continue
        if word in _TUNED or word in _BASE:
            variant = Variant.TUNED if word in _TUNED else Variant.BASE
        elif not size and (match := _SIZE.fullmatch(word)):
            size = _size(match)
        elif joins and _VERSION.fullmatch(word):
            line[-1] += word
        elif match := _GLUED.fullmatch(word):  # qwen2.5vl
            line += match.groups()
        else:
            line.append(word)
            may_join = word.isalpha()
    if line[:1] == ["meta"] and len(line) > 1 and line[1].startswith("llama"):
        del line[0]
    if not line:
        return None
    if any(mark in word for word in line for mark in _EMBEDS):
        variant = Variant.NONE
    elif variant is None:
        is_base = not is_plain_tuned and _is_plain_base(line)
        variant = Variant.BASE if is_base else Variant.TUNED
    if is_plain_tuned and line == ["deepseek", "r1"] and size in _DISTILLED:
        line += ["distill", _DISTILLED[size]]
    key = tuple(sorted(line))
    return Spelling(line=key, size=size or _ONLY_SIZE.get(key, ""), variant=variant, packing=packing)


def _is_plain_base(line: list[str]) -> bool:
    if line[0] == "mistral":
        return all(re.fullmatch(r"v\d.*|@.*", word) for word in line[1:])
    return _PLAIN_IS_BASE.fullmatch(line[0]) is not None


def _size(match: re.Match[str]) -> str:
    effective, number, unit, experts = match.groups()
    if experts:
        return str(experts)
    return f"{effective or ''}{float(number) * _PER[unit]:g}"
