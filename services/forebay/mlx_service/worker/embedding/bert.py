"""BERT and those of its build: RoBERTa, XLM-R, CamemBERT and DistilBERT, over a table of weights."""

from __future__ import annotations

from collections.abc import Mapping

from forebay.mlx_service.models.embedding import first_position
from forebay.mlx_service.worker.embedding.activations import activation
from forebay.mlx_service.worker.embedding.table import Table, attention, number, plain
from forebay.mlx_service.worker.runtime import mx
from forebay.mlx_service.worker.sampling import Array

_OLD = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Names in files of the first years."""

_DISTILLED = {
    "transformer.layer.": "encoder.layer.",
    ".attention.q_lin.": ".attention.self.query.",
    ".attention.k_lin.": ".attention.self.key.",
    ".attention.v_lin.": ".attention.self.value.",
    ".attention.out_lin.": ".attention.output.dense.",
    ".sa_layer_norm.": ".attention.output.LayerNorm.",
    ".ffn.lin1.": ".intermediate.dense.",
    ".ffn.lin2.": ".output.dense.",
    ".output_layer_norm.": ".output.LayerNorm.",
}
"""DistilBERT's names, and BERT's for the same."""


class Bert:
    """An encoder.

    Args:
        config: its `config.json`.
        weights: its tensors by name.
        is_float32: whether its weights are to be unpacked to float32.

    Raises:
        ValueError: it is not supported, or tensors are missing.
    """

    def __init__(
        self, config: Mapping[str, object], weights: Mapping[str, Array], *, is_float32: bool = False
    ) -> None:
        is_distilled = config.get("model_type") == "distilbert"
        position = config.get("position_embedding_type", "absolute")
        if position != "absolute":
            raise ValueError(f"positions of kind {position!r} are not supported")
        if config.get("is_decoder"):
            raise ValueError("an encoder that is set up as a decoder is not supported")
        self._activate = activation(config.get("activation" if is_distilled else "hidden_act", "gelu"))
        self._layers = number(config, "n_layers" if is_distilled else "num_hidden_layers")
        self._heads = number(config, "n_heads" if is_distilled else "num_attention_heads")
        self._epsilon = float(str(config.get("layer_norm_eps", 1e-12)))
        self._first_position = first_position(config)
        named = plain(weights, "embeddings.", renamed={**_OLD, **(_DISTILLED if is_distilled else {})})
        self._table = table = Table(named, config, is_float32=is_float32)
        self._kinds = ("word", "position") if is_distilled else ("word", "position", "token_type")
        table.require(self._needed())
        for layer in range(self._layers):
            at = f"encoder.layer.{layer}"
            parts = [f"{at}.attention.self.{name}" for name in ("query", "key", "value")]
            table.join(parts, to=f"{at}.all")
            stages = ("all", "attention.output.dense", "intermediate.dense", "output.dense")
            table.turn(f"{at}.{stage}" for stage in stages)

    @property
    def arrays(self) -> list[Array]:
        """All arrays that it holds."""
        return self._table.arrays

    def __call__(self, ids: Array, mask: Array) -> Array:
        """Returns an output for each token.

        Args:
            ids: token identifiers, [texts, tokens], padded on the right with anything.
            mask: which of them are tokens, of the same shape.
        """
        table = self._table
        positions = mx.arange(self._first_position, self._first_position + ids.shape[1])
        x = table.rows("embeddings.word_embeddings", ids)
        # What a pad's position holds does not matter.
        x = x + table.rows("embeddings.position_embeddings", positions)[None]
        if "token_type" in self._kinds:  # one kind of segment: a text is not a pair
            x = x + table.rows("embeddings.token_type_embeddings", mx.zeros((1,), mx.int32))[None]
        x = table.norm("embeddings.LayerNorm", x, self._epsilon)
        attends = mask[:, None, None, :]
        for layer in range(self._layers):
            x = self._layer(f"encoder.layer.{layer}", x, attends)
        return x

    def _layer(self, at: str, x: Array, attends: Array) -> Array:
        table = self._table
        if f"{at}.all.weight" in table:
            parts = list(mx.split(table.linear(f"{at}.all", x), 3, axis=-1))
        else:
            parts = [table.linear(f"{at}.attention.self.{name}", x) for name in ("query", "key", "value")]
        y = table.linear(f"{at}.attention.output.dense", attention(parts, self._heads, attends))
        x = table.norm(f"{at}.attention.output.LayerNorm", x + y, self._epsilon)
        y = self._activate(table.linear(f"{at}.intermediate.dense", x))
        return table.norm(f"{at}.output.LayerNorm", x + table.linear(f"{at}.output.dense", y), self._epsilon)

    def _needed(self) -> list[str]:
        stages = [f"attention.self.{name}" for name in ("query", "key", "value")]
        stages += ["attention.output.dense", "intermediate.dense", "output.dense"]
        stages += ["attention.output.LayerNorm", "output.LayerNorm"]
        named = [f"encoder.layer.{layer}.{stage}" for layer in range(self._layers) for stage in stages]
        both = [f"{name}.{leaf}" for name in ("embeddings.LayerNorm", *named) for leaf in ("weight", "bias")]
        return [f"embeddings.{kind}_embeddings.weight" for kind in self._kinds] + both
