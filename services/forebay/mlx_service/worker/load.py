"""Loads a model from its folder, on the thread that is to run it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from forebay.kit.failure import ModelLoadFailed
from forebay.mlx_service.worker.runtime import TokenizerWrapper, load_config, load_model, load_tokenizer, mx
from forebay.mlx_service.worker.turns import share_turns
from forebay.mlx_service.worker.weights import STORED, Plan, unpack

SPARE_TOKENS = 0.01
"""Share of a vocabulary by which a draft model's may be longer or shorter. Families add a few tokens."""


def load_weights(path: Path, how: Plan = STORED) -> object:
    """Returns the model with all weights in memory. Call it on the engine's thread.

    Args:
        path: the model's folder.
        how: how weights are held.

    Raises:
        ModelLoadFailed: the folder holds no model that mlx-lm can run. The message says why.
    """
    try:
        model, _ = load_model(path, lazy=how.is_float32, strict=True, trust_remote_code=False)
        if how.is_float32:
            unpack(model, is_blocked=how.is_blocked, is_transposed=how.is_transposed)
        if mx.default_device().type == mx.DeviceType.cpu:
            share_turns(model)
    except Exception as error:
        raise _failed(path, "its weights", error) from error
    return model


def load_words(path: Path) -> TokenizerWrapper:
    """Returns a tokenizer of the caller's own. Tokenizers are not safe to share between threads.

    Raises:
        ModelLoadFailed: the folder holds no tokenizer that can be read.
    """
    try:
        config: Mapping[str, object] = load_config(path)
        return load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:
        raise _failed(path, "its tokenizer", error) from error


def load_draft(path: Path, large: Path, how: Plan = STORED) -> object:
    """Returns a small model that guesses for a large one. Call it on the engine's thread.

    Args:
        path: the small model's folder.
        large: the large model's folder.
        how: how the small model's weights are held.

    Raises:
        ModelLoadFailed: it cannot be loaded, or its tokens are not those of the large model.
    """
    small_words, large_words = load_words(path), load_words(large)
    small, known = small_words.get_vocab(), large_words.get_vocab()
    spelled = {token: text for text, token in known.items()}
    wrong = [token for text, token in small.items() if token in spelled and spelled[token] != text]
    foreign = abs(len(small) - len(known))
    if wrong or foreign > len(known) * SPARE_TOKENS:
        what = (
            f"token {min(wrong)} is another one" if wrong else f"it has {len(small)} tokens, not {len(known)}"
        )
        raise ModelLoadFailed(
            f"{path.name} cannot guess for {large.name}, for their tokenizers differ: {what}. Name a small "
            "model of the same family in draft_models, or none",
            metadata={"model": large.name, "draft_model": path.name},
        )
    return load_weights(path, how)


def _failed(path: Path, what: str, error: Exception) -> ModelLoadFailed:
    text = str(error).splitlines()[0] if str(error) else ""
    return ModelLoadFailed(
        f"{path.name}: {what} cannot be loaded: {type(error).__name__}: {text}",
        metadata={"model": path.name},
    )
