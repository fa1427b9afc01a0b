"""Loads a model from its folder, on the thread that is to run it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from forebay.kit.failure import ModelLoadFailed
from forebay.mlx_service.worker.runtime import TokenizerWrapper, load_config, load_model, load_tokenizer
from forebay.mlx_service.worker.weights import STORED, Plan, unpack


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
            unpack(model, is_blocked=how.is_blocked)
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


def _failed(path: Path, what: str, error: Exception) -> ModelLoadFailed:
    text = str(error).splitlines()[0] if str(error) else ""
    return ModelLoadFailed(
        f"{path.name}: {what} cannot be loaded: {type(error).__name__}: {text}",
        metadata={"model": path.name},
    )
