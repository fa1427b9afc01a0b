"""Encoders that turn positions into rotations: ModernBERT and Nomic's BERT, over a table of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from forebay.mlx_service.worker.embedding.activations import activation
from forebay.mlx_service.worker.embedding.table import Table, attention, number, plain
from forebay.mlx_service.worker.runtime import mx
from forebay.mlx_service.worker.sampling import Array

_SLIDING = "sliding_attention"


class ModernBert:
    """ModernBERT: norms come first, most layers see a window, and outputs are gated.

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
        self._activate = activation(config.get("hidden_activation", "gelu"))
        self._heads = number(config, "num_attention_heads")
        self._epsilon = float(str(config.get("norm_eps", 1e-5)))
        self._reach = number(config, "local_attention", 128) // 2
        layers = number(config, "num_hidden_layers")
        self._kinds = _layer_kinds(config, layers)
        self._bases = _rope_bases(config)
        self._table = table = Table(plain(weights, "embeddings."), config, is_float32=is_float32)
        stages = ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")
        named = [f"layers.{layer}.{stage}" for layer in range(layers) for stage in (*stages, "mlp_norm")]
        named += [f"layers.{layer}.attn_norm" for layer in range(1, layers)]
        named += ["embeddings.tok_embeddings", "embeddings.norm", "final_norm"]
        table.require(f"{name}.weight" for name in named)
        table.turn(f"layers.{layer}.{stage}" for layer in range(layers) for stage in stages)

    @property
    def arrays(self) -> list[Array]:
        """All arrays that it holds."""
        return self._table.arrays

    def __call__(self, ids: Array, mask: Array) -> Array:
        """Returns an output for each token. See `Bert`."""
        table = self._table
        x = table.norm("embeddings.norm", table.rows("embeddings.tok_embeddings", ids), self._epsilon)
        places = mx.arange(ids.shape[1])
        near = mx.abs(places[:, None] - places[None]) <= self._reach
        # A pad attends to itself alone rather than to nothing, which would give no number.
        everywhere = mask[:, None, None, :]
        nearby = (everywhere & near) | mx.eye(ids.shape[1], dtype=mx.bool_)
        for layer, kind in enumerate(self._kinds):
            at = f"layers.{layer}"
            y = table.norm(f"{at}.attn_norm", x, self._epsilon) if f"{at}.attn_norm.weight" in table else x
            parts = list(mx.split(table.linear(f"{at}.attn.Wqkv", y), 3, axis=-1))
            attends = nearby if kind == _SLIDING else everywhere
            y = attention(parts, self._heads, attends, rope_base=self._bases[kind])
            x = x + table.linear(f"{at}.attn.Wo", y)
            y = table.linear(f"{at}.mlp.Wi", table.norm(f"{at}.mlp_norm", x, self._epsilon))
            value, gate = mx.split(y, 2, axis=-1)
            x = x + table.linear(f"{at}.mlp.Wo", self._activate(value) * gate)
        return table.norm("final_norm", x, self._epsilon)


_NOMIC: Mapping[str, object] = {
    "prenorm": False,
    "use_rms_norm": False,
    "rotary_emb_interleaved": False,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_scale_base": None,
    "activation_function": "swiglu",
    "num_experts": 0,
}
"""Settings of Nomic's BERT that have one value here."""


class NomicBert:
    """Nomic's BERT: norms come last, and outputs are gated.

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
        for key, value in _NOMIC.items():
            if config.get(key, value) != value:
                raise ValueError(f"its {key} {config[key]!r} is not supported")
        self._activate = activation("silu")
        self._heads = number(config, "n_head")
        self._epsilon = float(str(config.get("layer_norm_epsilon", 1e-12)))
        self._base = float(str(config.get("rotary_emb_base", 10000)))
        self._layers = layers = number(config, "n_layer")
        self._table = table = Table(plain(weights, "embeddings."), config, is_float32=is_float32)
        named = ["embeddings.word_embeddings", "embeddings.token_type_embeddings", "emb_ln"]
        stages = ("attn.Wqkv", "attn.out_proj", "mlp.fc11", "mlp.fc12", "mlp.fc2")
        norms = ("norm1", "norm2")
        named += [f"encoder.layers.{layer}.{x}" for layer in range(layers) for x in (*stages, *norms)]
        table.require(f"{name}.weight" for name in named)
        table.turn(f"encoder.layers.{layer}.{stage}" for layer in range(layers) for stage in stages)

    @property
    def arrays(self) -> list[Array]:
        """All arrays that it holds."""
        return self._table.arrays

    def __call__(self, ids: Array, mask: Array) -> Array:
        """Returns an output for each token. See `Bert`."""
        table = self._table
        x = table.rows("embeddings.word_embeddings", ids)
        x = x + table.rows("embeddings.token_type_embeddings", mx.zeros((1,), mx.int32))[None]
        x = table.norm("emb_ln", x, self._epsilon)
        attends = mask[:, None, None, :]
        for layer in range(self._layers):
            at = f"encoder.layers.{layer}"
            parts = list(mx.split(table.linear(f"{at}.attn.Wqkv", x), 3, axis=-1))
            y = attention(parts, self._heads, attends, rope_base=self._base)
            x = table.norm(f"{at}.norm1", x + table.linear(f"{at}.attn.out_proj", y), self._epsilon)
            y = table.linear(f"{at}.mlp.fc11", x) * self._activate(table.linear(f"{at}.mlp.fc12", x))
            x = table.norm(f"{at}.norm2", x + table.linear(f"{at}.mlp.fc2", y), self._epsilon)
        return x


def _layer_kinds(config: Mapping[str, object], layers: int) -> Sequence[str]:
    """Returns what each layer sees: `full_attention` or `sliding_attention`."""
    listed = config.get("layer_types")
    if isinstance(listed, list):
        return [str(kind) for kind in listed]
    every = number(config, "global_attn_every_n_layers", 3)
    return [_SLIDING if layer % every else "full_attention" for layer in range(layers)]


def _rope_bases(config: Mapping[str, object]) -> Mapping[str, float]:
    """Returns the base of the rotations for each kind of layer, as older and newer files say it."""
    whole = config.get("global_rope_theta", 160000.0)
    local = config.get("local_rope_theta") or (whole if "local_rope_theta" in config else 10000.0)
    bases = {"full_attention": whole, _SLIDING: local}
    newer = config.get("rope_parameters")
    if isinstance(newer, dict):
        for kind, settings in newer.items():
            if isinstance(settings, dict):
                if settings.get("rope_type", "default") != "default":
                    raise ValueError(f"rotations of kind {settings['rope_type']!r} are not supported")
                bases[kind] = settings.get("rope_theta", bases.get(kind))
    return {kind: float(str(base)) for kind, base in bases.items()}
