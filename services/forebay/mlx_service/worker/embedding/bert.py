"""BERT and its relatives, as functions over a table of weights.

The table is what the safetensors file holds, under its own names, so there is
no second spelling of the architecture to keep in step. Quantised weights
(`scales` beside `weight`) are used as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from forebay.mlx_service.models.embedding import first_position
from forebay.mlx_service.worker.runtime import mx
from forebay.mlx_service.worker.sampling import Array

_PREFIXES = ("bert.", "roberta.", "camembert.", "model.")
"""What stands before every name where a head was trained on top."""

_UNUSED = ("pooler.", "cls.", "lm_head.", "embeddings.position_ids")
"""Tensors that no embedding needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a BERT's `config.json` says."""

    layers: int
    heads: int
    epsilon: float
    activation: str
    first_position: int
    quantization: Mapping[str, object]

    @classmethod
    def of(cls, config: Mapping[str, object]) -> Shape:
        """Returns what a `config.json` says.

        Raises:
            ValueError: it asks for something that is not supported.
        """
        position = config.get("position_embedding_type", "absolute")
        if position != "absolute":
            raise ValueError(f"positions of kind {position!r} are not supported")
        if config.get("is_decoder"):
            raise ValueError("an encoder that is set up as a decoder is not supported")
        activation = str(config.get("hidden_act", "gelu"))
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is not supported")
        quantization = config.get("quantization")
        return cls(
            layers=int(str(config["num_hidden_layers"])),
            heads=int(str(config["num_attention_heads"])),
            epsilon=float(str(config.get("layer_norm_eps", 1e-12))),
            activation=activation,
            first_position=first_position(config),
            quantization=quantization if isinstance(quantization, dict) else {},
        )


def gelu(x: Array) -> Array:
    """Returns the exact GELU."""
    return x * 0.5 * (1 + mx.erf(x * (1 / math.sqrt(2))))


def gelu_tanh(x: Array) -> Array:
    """Returns GELU by its approximation with the hyperbolic tangent."""
    return x * 0.5 * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def relu(x: Array) -> Array:
    """Returns what is positive, else 0."""
    return mx.maximum(x, 0)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": relu,
}
"""Activations by their names in `config.json`."""


class Bert:
    """An encoder.

    Args:
        config: its `config.json`.
        weights: its tensors by name.

    Raises:
        ValueError: it is not supported, or tensors are missing.
    """

    def __init__(self, config: Mapping[str, object], weights: Mapping[str, Array]) -> None:
        self._shape = Shape.of(config)
        self._activate = ACTIVATIONS[self._shape.activation]
        self._weights = _plain(weights)
        missing = sorted(self._needed() - self._weights.keys())
        if missing:
            raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
        for name in _linear_names(self._shape.layers):
            if f"{name}.scales" not in self._weights:
                # Laid out for a product from the right. The plain BLAS of mlx on CPUs takes half the time
                # with it, and Metal does not mind.
                weight = self._weights[f"{name}.weight"]
                self._weights[f"{name}.weight"] = mx.contiguous(weight.T)

    @property
    def arrays(self) -> list[Array]:
        """All arrays that it holds."""
        return list(self._weights.values())

    def __call__(self, ids: Array, mask: Array) -> Array:
        """Returns an output for each token.

        Args:
            ids: token identifiers, [texts, tokens], padded on the right with anything.
            mask: which of them are tokens, of the same shape.
        """
        shape = self._shape
        positions = mx.arange(shape.first_position, shape.first_position + ids.shape[1])
        x = self._rows("embeddings.word_embeddings", ids)
        x = x + self._rows("embeddings.position_embeddings", positions)[None]
        # One kind of segment: a text is not a pair. What a pad's position holds does not matter.
        x = x + self._rows("embeddings.token_type_embeddings", mx.zeros((1,), mx.int32))[None]
        x = self._norm("embeddings.LayerNorm", x)
        attends = mask[:, None, None, :]
        for layer in range(shape.layers):
            x = self._layer(f"encoder.layer.{layer}", x, attends)
        return x

    def _layer(self, at: str, x: Array, attends: Array) -> Array:
        texts, tokens, width = x.shape
        heads = self._shape.heads

        def part(name: str) -> Array:
            y = self._linear(f"{at}.attention.self.{name}", x)
            return y.reshape(texts, tokens, heads, -1).transpose(0, 2, 1, 3)

        y = mx.fast.scaled_dot_product_attention(
            part("query"),
            part("key"),
            part("value"),
            scale=1 / math.sqrt(width // heads),
            mask=attends,
        )
        y = y.transpose(0, 2, 1, 3).reshape(texts, tokens, width)
        x = self._norm(
            f"{at}.attention.output.LayerNorm", x + self._linear(f"{at}.attention.output.dense", y)
        )
        y = self._activate(self._linear(f"{at}.intermediate.dense", x))
        return self._norm(f"{at}.output.LayerNorm", x + self._linear(f"{at}.output.dense", y))

    def _linear(self, name: str, x: Array) -> Array:
        weights = self._weights
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        if f"{name}.scales" not in weights:
            return mx.addmm(bias, x, weight)
        multiply: Callable[..., Array] = mx.quantized_matmul
        scales, biases = weights[f"{name}.scales"], weights.get(f"{name}.biases")
        return multiply(x, weight, scales=scales, biases=biases, transpose=True, **self._bits(name)) + bias

    def _rows(self, name: str, index: Array) -> Array:
        weight = self._weights[f"{name}.weight"]
        if f"{name}.scales" not in self._weights:
            return weight[index]
        scales, biases = self._weights[f"{name}.scales"], self._weights.get(f"{name}.biases")
        unpack: Callable[..., Array] = mx.dequantize
        return unpack(
            weight[index],
            scales=scales[index],
            biases=None if biases is None else biases[index],
            **self._bits(name),
        )

    def _bits(self, name: str) -> dict[str, object]:
        own = self._shape.quantization.get(name)
        settings = {**self._shape.quantization, **(own if isinstance(own, dict) else {})}
        return {key: settings[key] for key in ("group_size", "bits", "mode") if key in settings}

    def _norm(self, name: str, x: Array) -> Array:
        weights = self._weights
        return mx.fast.layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], self._shape.epsilon)

    def _needed(self) -> set[str]:
        names = {f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
        layers = range(self._shape.layers)
        norms = [f"encoder.layer.{i}.{at}output.LayerNorm" for i in layers for at in ("attention.", "")]
        stages = ["embeddings.LayerNorm", *norms, *_linear_names(self._shape.layers)]
        return names | {f"{stage}.{leaf}" for stage in stages for leaf in ("weight", "bias")}


def _linear_names(layers: int) -> list[str]:
    stages = [f"attention.self.{name}" for name in ("query", "key", "value")]
    stages += ["attention.output.dense", "intermediate.dense", "output.dense"]
    return [f"encoder.layer.{layer}.{stage}" for layer in range(layers) for stage in stages]


def _plain(weights: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the tensors that are needed, by names without what stands before all of them."""
    found = next((p for p in _PREFIXES if any(name.startswith(f"{p}embeddings.") for name in weights)), "")
    named = {name.removeprefix(found): tensor for name, tensor in weights.items()}
    # Files of the first years call the norms' tensors by other names.
    named = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        ): tensor
        for name, tensor in named.items()
    }
    return {name: tensor for name, tensor in named.items() if not name.startswith(_UNUSED)}
