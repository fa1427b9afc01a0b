"""Loads an embedding model from its folder, on the thread that is to run it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from forebay.kit.failure import ModelLoadFailed
from forebay.mlx_service.models.embedding import ENCODERS, Dense, Recipe
from forebay.mlx_service.worker.embedding.activations import ACTIVATIONS
from forebay.mlx_service.worker.embedding.bert import Bert
from forebay.mlx_service.worker.embedding.pooling import normalize, pool
from forebay.mlx_service.worker.embedding.rotary import ModernBert, NomicBert
from forebay.mlx_service.worker.runtime import load_model, model_classes, mx
from forebay.mlx_service.worker.sampling import Array
from forebay.mlx_service.worker.weights import STORED, Plan, unpack

Outputs: TypeAlias = Callable[[Array, Array], Array]
"""Gives an output for each token of a batch, given identifiers and which of them are tokens."""


class TextEmbedder:
    """Embeds batches of tokens.

    Args:
        outputs: the transformer.
        recipe: what becomes of its outputs.
        dense: weights and bias of each of the recipe's linear stages.
    """

    def __init__(
        self, outputs: Outputs, recipe: Recipe, dense: Iterable[tuple[Array, Array | None]] = ()
    ) -> None:
        self._outputs = outputs
        self._recipe = recipe
        self._dense = list(dense)

    def __call__(self, ids: Array, mask: Array) -> Array:
        """Returns a vector a text, in float32.

        Args:
            ids: token identifiers, [texts, tokens], padded on the right.
            mask: which of them are tokens.
        """
        vectors = pool(self._outputs(ids, mask), mask, self._recipe.poolings)
        for (weight, bias), stage in zip(self._dense, self._recipe.dense, strict=True):
            vectors = vectors @ weight.T
            if bias is not None:
                vectors = vectors + bias
            vectors = _ACTIVATIONS[stage.activation](vectors)
        return normalize(vectors) if self._recipe.is_normalized else vectors


_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "tanh": mx.tanh,
    "relu": ACTIVATIONS["relu"],
    "gelu": ACTIVATIONS["gelu"],
}


_OTHERS: Mapping[str, type[ModernBert | NomicBert]] = {"modernbert": ModernBert, "nomic_bert": NomicBert}
"""Encoders that are not of BERT's build, by `model_type`."""


def load_embedder(path: Path, recipe: Recipe, how: Plan = STORED) -> TextEmbedder:
    """Returns the model with all weights in memory. Call it on the engine's thread.

    Args:
        path: the model's folder.
        recipe: how it embeds.
        how: how weights are held.

    Raises:
        ModelLoadFailed: the folder holds no model that can embed. The message says why.
    """
    try:
        config = json.loads((path / "config.json").read_bytes())
        outputs = _encoder(path, config, how) if recipe.is_encoder else _decoder(path, config, how)
        dense = [_linear(stage) for stage in recipe.dense]
        mx.eval(dense)
    except ModelLoadFailed:
        raise
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else ""
        raise ModelLoadFailed(
            f"{path.name}: its weights cannot be loaded: {type(error).__name__}: {text}",
            metadata={"model": path.name},
        ) from error
    return TextEmbedder(outputs, recipe, dense)


def _encoder(path: Path, config: Mapping[str, object], how: Plan) -> Outputs:
    weights: dict[str, Array] = {}
    for file in sorted(path.glob("model*.safetensors")):
        weights.update(_tensors(file))
    build: type[Bert | ModernBert | NomicBert] = _OTHERS.get(str(config.get("model_type")), Bert)
    model = build(config, weights, is_float32=how.is_float32)
    mx.eval(model.arrays)
    return model


def _decoder(path: Path, config: Mapping[str, object], how: Plan) -> Outputs:
    """Returns a language model without its last layer.

    It reads from left to right, so pads on the right change nothing before them.
    """
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        raise ModelLoadFailed(
            f"{path.name}: a decoder that reads from both ends is not supported",
            metadata={"model": path.name},
        )
    try:
        model_classes(config)
    except ValueError as error:
        raise ModelLoadFailed(
            f"{path.name}: models of type {config.get('model_type')!r} are not supported for embeddings; "
            f"{', '.join(sorted(ENCODERS))} are, and decoders that mlx-lm knows",
            metadata={"model": path.name},
        ) from error
    # Without the last layer there is nothing to tie, and some folders leave its weights out.
    model, _ = load_model(
        path,
        lazy=how.is_float32,
        strict=True,
        trust_remote_code=False,
        model_config={"tie_word_embeddings": True},
        get_model_classes=_classes,
    )
    if how.is_float32:
        unpack(model, is_blocked=how.is_blocked)
    body = getattr(model, "model", None)
    if body is None:
        raise ModelLoadFailed(
            f"{path.name}: no embeddings can be had from {config.get('model_type')} models",
            metadata={"model": path.name},
        )
    return lambda ids, mask: body(ids)


def _classes(config: dict[str, object]) -> tuple[type, type]:
    """Returns mlx-lm's classes for a model, made to take weights that were saved without the last layer."""
    model, arguments = model_classes(config)
    inherited = getattr(model, "sanitize", None)

    def sanitize(self: object, weights: dict[str, Array]) -> dict[str, Array]:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("lm_head.")}
        if not any(name.startswith("model.") for name in weights):
            weights = {f"model.{name}": tensor for name, tensor in weights.items()}
        return weights if inherited is None else inherited(self, weights)

    return type("Headless", (model,), {"sanitize": sanitize}), arguments


def _linear(stage: Dense) -> tuple[Array, Array | None]:
    weights = _tensors(stage.path / "model.safetensors")
    return weights["linear.weight"].astype(mx.float32), weights.get("linear.bias")


def _tensors(file: Path) -> dict[str, Array]:
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)  # as always without metadata
    return tensors
