"""Turns a GGUF file into a folder that mlx-lm loads. Run as a program, so that nobody else has to import mlx.

    python -m forebay.mlx_service.models.gguf_import SOURCE.gguf FOLDER

Standard output tells how far it is, a JSON object a line; the last line on
standard error says what is wrong, and the exit code is then 1. The folder
appears whole or not at all.

The weights keep their quantisation: 4 and 8 bit GGUF blocks of 32 are what mlx
calls affine groups of 32. K-quants have no such form; they would be blown up
to 16 bits, four times the size that people chose, so they are refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from forebay.mlx_service.models.gguf_check import GROUP_SIZE, QUANTIZED, check, mlx_name, words
from forebay.mlx_service.models.gguf_file import GgufError, Head, read_head

Report: TypeAlias = Callable[[str, float], None]
"""Is told what is done now and which fraction of the whole is done."""

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CONTROL, _USER_DEFINED = 3, 4
"""Kinds of tokens that are not made of others: those that steer, and those that are text."""


def convert(source: Path, folder: Path, report: Report = lambda what, fraction: None) -> None:
    """Writes the model of a GGUF file into a new folder.

    Args:
        source: the GGUF file.
        folder: where to put it. Must not exist.
        report: is told how far it is.

    Raises:
        GgufError: the file is broken, or of a kind that cannot be converted. The message says which.
        FileExistsError: the folder is there.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already")
    report("reading the head", 0.0)
    head = read_head(source)
    check(head)
    config = _config(head)
    tokenizer = _tokenizer(head)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        scratch.chmod(0o755)
        report("converting weights", 0.2)
        _write_weights(source, head, scratch / "model.safetensors")
        report("writing the tokenizer", 0.9)
        tokenizer.save(str(scratch / "tokenizer.json"))
        (scratch / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(head), indent=1))
        (scratch / "config.json").write_text(json.dumps(config, indent=1))
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    report("done", 1.0)


def _config(head: Head) -> dict[str, object]:
    hidden, heads = head.integer("llama.embedding_length"), head.integer("llama.attention.head_count")
    head_dim = head.integer("llama.attention.key_length", hidden // heads)
    if head.integer("llama.rope.dimension_count", head_dim) != head_dim:
        raise GgufError("models that rotate only part of each head cannot be converted")
    embedding = next((t for t in head.tensors if t.name == "token_embd.weight"), None)
    if embedding is None:
        raise GgufError("the file has no token embeddings")
    config: dict[str, object] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": head.integer("llama.block_count"),
        "intermediate_size": head.integer("llama.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": head.integer("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": head.number("llama.attention.layer_norm_rms_epsilon", 1e-5),
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": head.integer("llama.context_length"),
        "rope_theta": head.number("llama.rope.freq_base", 10000.0),
        # GGUF stores the rows of q and k in the order that rotating neighbouring pairs wants.
        "rope_traditional": True,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in head.tensors),
        "bos_token_id": head.integer("tokenizer.ggml.bos_token_id", 0),
        "eos_token_id": head.integer("tokenizer.ggml.eos_token_id"),
    }
    quantization = _quantization(head)
    if quantization:
        config["quantization"] = quantization
    return config


def _quantization(head: Head) -> dict[str, object]:
    """What most tensors have, and by name those that differ."""
    bits = {
        mlx_name(t.name).removesuffix(".weight"): QUANTIZED[t.type]
        for t in head.tensors
        if t.type in QUANTIZED
    }
    if not bits:
        return {}
    ((most, _),) = Counter(bits.values()).most_common(1)
    others = {name: {"group_size": GROUP_SIZE, "bits": n} for name, n in bits.items() if n != most}
    return {"group_size": GROUP_SIZE, "bits": most, **others}


def _write_weights(source: Path, head: Head, target: Path) -> None:
    from forebay.mlx_service.models import gguf_weights  # noqa: PLC0415  # mlx only once the file is known good

    gguf_weights.write(source, target, mlx_name, expected=len(head.tensors))


def _tokenizer(head: Head) -> Tokenizer:
    tokens = [str(token) for token in head.items("tokenizer.ggml.tokens")]
    kinds = head.items("tokenizer.ggml.token_type")
    merges = [_pair(str(merge)) for merge in head.items("tokenizer.ggml.merges")]
    if not tokens or len(kinds) != len(tokens):
        raise GgufError("the file's tokenizer is incomplete")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=words(head) == "llama-bpe"))
    except Exception as error:
        raise GgufError(f"the file's tokenizer is broken: {error}") from error
    tokenizer.pre_tokenizer = _pre_tokenizer(words(head))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _USER_DEFINED
        ]
    )
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _pre_tokenizer(manner: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut into words before they are cut into tokens."""
    if manner == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if manner in {"default", "gpt-2"}:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _tokenizer_config(head: Head) -> Mapping[str, object]:
    tokens = head.items("tokenizer.ggml.tokens")
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": head.text("tokenizer.chat_template"),
        "model_max_length": head.integer("llama.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = head.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            config[f"{name}_token"] = tokens[token]
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Converts a file as the command line says, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m forebay.mlx_service.models.gguf_import", description="Converts a GGUF file for MLX."
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args(argv)

    def report(what: str, fraction: float) -> None:
        print(json.dumps({"what": what, "fraction": fraction}), flush=True)  # noqa: T201  # the caller reads it

    try:
        convert(arguments.source, arguments.folder, report)
    except (GgufError, OSError) as error:
        print(str(error), file=sys.stderr)  # noqa: T201  # one readable line
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
