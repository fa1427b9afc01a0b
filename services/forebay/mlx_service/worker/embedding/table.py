"""The weights of an encoder, under the names that its file gives them, and what is computed with them.

There is no second spelling of an architecture to keep in step. Quantised
weights (`scales` beside `weight`) are used as they are, unless they are to be
held as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from forebay.mlx_service.worker.runtime import mx
from forebay.mlx_service.worker.sampling import Array


class Table:
    """Tensors by name.

    Args:
        tensors: the file's.
        config: `config.json`, for the settings of quantised tensors.
        is_float32: whether they are unpacked to float32.
    """

    def __init__(
        self, tensors: Mapping[str, Array], config: Mapping[str, object], *, is_float32: bool = False
    ) -> None:
        quantization = config.get("quantization")
        self._quantization: Mapping[str, object] = quantization if isinstance(quantization, dict) else {}
        self._tensors = dict(tensors)
        self._turned: set[str] = set()
        if is_float32:
            self._unpack()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Array:
        return self._tensors[name]

    @property
    def arrays(self) -> list[Array]:
        """All arrays that it holds."""
        return list(self._tensors.values())

    def require(self, names: Iterable[str]) -> None:
        """Makes sure that tensors are there.

        Raises:
            ValueError: some are not.
        """
        missing = sorted(set(names) - self._tensors.keys())
        if missing:
            raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")

    def join(self, names: Sequence[str], to: str) -> None:
        """Joins linear layers of the same input to one that computes them at once, if none is packed."""
        if any(f"{name}.scales" in self._tensors for name in names):
            return
        for leaf in ("weight", "bias"):
            parts = [self._tensors.pop(f"{name}.{leaf}", None) for name in names]
            found = [part for part in parts if part is not None]
            if len(found) == len(names):
                self._tensors[f"{to}.{leaf}"] = mx.concatenate(found)

    def turn(self, names: Iterable[str]) -> None:
        """Lays matrices out for a product from the right, which a BLAS has less to copy for."""
        for name in names:
            if f"{name}.weight" in self._tensors and f"{name}.scales" not in self._tensors:
                self._tensors[f"{name}.weight"] = mx.contiguous(self._tensors[f"{name}.weight"].T)
                self._turned.add(name)

    def linear(self, name: str, x: Array) -> Array:
        """Returns a linear layer's outputs. It need not have a bias."""
        weight, bias = self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias")
        if f"{name}.scales" not in self._tensors:
            weight = weight if name in self._turned else weight.T
            return x @ weight if bias is None else mx.addmm(bias, x, weight)
        multiply: Callable[..., Array] = mx.quantized_matmul
        y = multiply(x, weight, **self._packing(name), transpose=True, **self._bits(name))
        return y if bias is None else y + bias

    def rows(self, name: str, index: Array) -> Array:
        """Returns rows of a matrix."""
        weight = self._tensors[f"{name}.weight"][index]
        if f"{name}.scales" not in self._tensors:
            return weight
        unpack: Callable[..., Array] = mx.dequantize
        packing = {key: None if x is None else x[index] for key, x in self._packing(name).items()}
        return unpack(weight, **packing, **self._bits(name))

    def norm(self, name: str, x: Array, epsilon: float) -> Array:
        """Returns what a layer norm gives. It need not have a bias."""
        return mx.fast.layer_norm(
            x, self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias"), epsilon
        )

    def _packing(self, name: str) -> dict[str, Array | None]:
        return {"scales": self._tensors[f"{name}.scales"], "biases": self._tensors.get(f"{name}.biases")}

    def _bits(self, name: str) -> dict[str, object]:
        own = self._quantization.get(name)
        settings = {**self._quantization, **(own if isinstance(own, dict) else {})}
        return {key: settings[key] for key in ("group_size", "bits", "mode") if key in settings}

    def _unpack(self) -> None:
        unpack: Callable[..., Array] = mx.dequantize
        for name in [key.removesuffix(".scales") for key in self._tensors if key.endswith(".scales")]:
            packing = {
                key: x if x is None or not mx.issubdtype(x.dtype, mx.floating) else x.astype(mx.float32)
                for key, x in self._packing(name).items()
            }
            weight = unpack(self._tensors[f"{name}.weight"], **packing, **self._bits(name), dtype=mx.float32)
            self._tensors[f"{name}.weight"] = weight
            for leaf in ("scales", "biases"):
                self._tensors.pop(f"{name}.{leaf}", None)
        for name, tensor in self._tensors.items():
            if mx.issubdtype(tensor.dtype, mx.floating):
                self._tensors[name] = tensor.astype(mx.float32)


def attention(parts: Sequence[Array], heads: int, attends: Array, *, rope_base: float | None = None) -> Array:
    """Returns what tokens get from the tokens they attend to.

    Args:
        parts: queries, keys and values, each [texts, tokens, components].
        heads: how many heads there are.
        attends: which tokens attend to which, in a form that broadcasts to [texts, heads, tokens, tokens].
        rope_base: base of the rotations that positions are turned into. None has none.
    """
    texts, tokens, width = parts[0].shape
    size = width // heads
    split = [part.reshape(texts, tokens, heads, size).transpose(0, 2, 1, 3) for part in parts]
    if rope_base is not None:
        rotate: Callable[..., Array] = mx.fast.rope
        settings = {"traditional": False, "base": rope_base, "scale": 1.0, "offset": 0}
        split[:2] = [rotate(part, size, **settings) for part in split[:2]]
    query, key, value = split
    y = mx.fast.scaled_dot_product_attention(query, key, value, scale=size**-0.5, mask=attends)
    return y.transpose(0, 2, 1, 3).reshape(texts, tokens, width)


def number(config: Mapping[str, object], key: str, default: int | None = None) -> int:
    """Returns a whole number of `config.json`.

    Raises:
        ValueError: it is not there, and there is no default.
    """
    value = config.get(key, default)
    if value is None:
        raise ValueError(f"its config.json has no {key}")
    return int(str(value))


def plain(
    weights: Mapping[str, Array], first: str, *, renamed: Mapping[str, str] | None = None
) -> dict[str, Array]:
    """Returns the tensors of an encoder, by names without what stands before all of them.

    Args:
        weights: all tensors of the file, those of a head that was trained on top included.
        first: how the names of some tensors of the encoder itself begin.
        renamed: parts of names, and what stands for them.
    """
    found = next((p for p in _PREFIXES if any(name.startswith(p + first) for name in weights)), "")
    named: dict[str, Array] = {}
    for name, tensor in weights.items():
        short = name.removeprefix(found)
        for old, new in (renamed or {}).items():
            short = short.replace(old, new)
        if not short.startswith(_UNUSED):
            named[short] = tensor
    return named


_PREFIXES = ("bert.", "roberta.", "camembert.", "distilbert.", "model.")
"""What stands before every name where a head was trained on top."""

_UNUSED = ("pooler.", "cls.", "lm_head.", "head.", "decoder.", "vocab_", "embeddings.position_ids")
"""Tensors that no embedding needs."""
