"""How weights are held on a CPU: as they are stored, or as float32 for a fast BLAS.

mlx's kernels for CPUs multiply quantised, float16 and bfloat16 matrices one
number at a time; only float32 goes to the BLAS. So where that one is fast and
memory allows, weights are unpacked when they are loaded. Nothing is lost by it:
float32 holds exactly what the stored numbers stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import cast

from forebay.kit.failure import ModelLoadFailed
from forebay.mlx_service.blas import Blas
from forebay.mlx_service.ledger import UNPACKED_ROOM
from forebay.mlx_service.models.describe import ModelFacts
from forebay.mlx_service.worker.runtime import LoRAEmbedding, LoRALinear, mx, nn, tree_flatten
from forebay.mlx_service.worker.sampling import Array

BLOCK = 64
"""Columns of a block: as many as the kernels for AVX-512 compute at once."""

SMALL = 1 << 17
"""Numbers in a matrix that stays in one piece: up to some eight rows, what it takes to put blocks together is
more than what they save."""


class CpuWeights(Enum):
    """How weights are to be held on a CPU."""

    AUTO = "auto"
    """As float32 where that is faster and there is room, else as stored."""
    STORED = "stored"
    """As they are stored."""
    FLOAT32 = "float32"
    """As float32, whatever that costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the weights of a model are held."""

    is_float32: bool = False
    """Whether they are unpacked to float32."""
    is_blocked: bool = False
    """Whether large matrices are laid out in blocks of columns."""
    is_transposed: bool = False
    """Whether small matrices are laid out by columns."""
    byte_count: int = 0
    """Memory that they are expected to take."""
    reason: str = ""
    """What was chosen and why, in a few words. Empty where there was no choice."""


STORED = Plan()
"""As they are stored."""


def plan(choice: CpuWeights, facts: ModelFacts, *, ceiling: int, blas: Blas | None) -> Plan:
    """Decides how a model's weights are held.

    Args:
        choice: what is wanted.
        facts: what the folder holds.
        ceiling: bytes that the model and its requests may take.
        blas: what does mlx's products. None is its own.

    Raises:
        ModelLoadFailed: float32 is asked for, and there is no room.
    """
    stored = Plan(byte_count=facts.weight_bytes)
    if mx.default_device().type != mx.DeviceType.cpu:
        return stored  # Metal computes with every kind of weight as it is
    need = 4 * facts.parameter_count
    is_blocked = blas is not None and blas.has_small_kernels
    unpacked = Plan(
        is_float32=True,
        is_blocked=is_blocked,
        is_transposed=blas is not None,
        byte_count=need,
        reason="weights held as float32",
    )
    if choice is CpuWeights.FLOAT32:
        if need > ceiling:
            raise ModelLoadFailed(
                f"{facts.path.name}: its weights take {need} bytes as float32 and memory_ceiling is {ceiling}"
            )
        return unpacked
    reason = "weights held as stored"
    if choice is CpuWeights.AUTO:
        if blas is None:
            reason += ": there is no fast BLAS"
        elif not need:
            reason += ": their number is not known"
        elif need > UNPACKED_ROOM * ceiling:
            reason += f": as float32 they would take {need} of {ceiling} bytes"
        else:
            return unpacked
    return Plan(byte_count=facts.weight_bytes, reason=reason)


def unpack(model: nn.Module, *, is_blocked: bool, is_transposed: bool = False) -> None:
    """Turns all weights of a model into float32, one layer after the other, so that few are there twice.

    Args:
        model: a model that may be loaded lazily.
        is_blocked: whether large matrices are laid out in blocks of columns.
        is_transposed: whether small ones are laid out by columns.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if type(layer) in _MATRICES]
    for name, layer in layers:
        weight = _float32(layer)
        bias = layer.get("bias")
        bias = None if bias is None else bias.astype(mx.float32)
        is_rows = isinstance(layer, nn.Embedding | nn.QuantizedEmbedding)
        new: nn.Module
        if min(weight.shape) < BLOCK or weight.size <= SMALL:
            is_turned = is_transposed and not is_rows
            new = TransposedLinear(weight, bias) if is_turned else _plain(weight, bias, is_rows=is_rows)
        elif is_blocked:
            new = BlockedEmbedding(weight) if is_rows else BlockedLinear(weight, bias)
        else:
            new = _plain(weight, bias, is_rows=is_rows)
        mx.eval(new.parameters())
        _put(model, name, new)
        layer.clear()
        del layer, weight
    others = {name: _as_float32(array) for name, array in _arrays(model).items()}
    model.load_weights(list(others.items()), strict=False)
    mx.eval(model.parameters())
    mx.clear_cache()


class TransposedLinear(nn.Module):  # type: ignore[misc]  # mlx has no types here
    """A linear layer whose weights are laid out by columns, [inputs, outputs], as products read them.

    Args:
        weight: the matrix, [outputs, inputs].
        bias: what is added, if anything.
    """

    def __init__(self, weight: Array, bias: Array | None = None) -> None:
        super().__init__()
        self.columns = mx.contiguous(weight.T)
        if bias is not None:
            self.bias = bias

    @property
    def weight(self) -> Array:
        """The matrix as other layers have it, [outputs, inputs]."""
        return self.columns.T

    def __call__(self, x: Array) -> Array:
        """Returns the layer's outputs."""
        y = x @ self.columns
        return y + self.bias if "bias" in self else y

    def to_lora(self, r: int, scale: float, dropout: float) -> nn.Module:
        """Returns this layer with an adapter's matrices beside it. mlx-lm asks for it by this name."""
        return LoRALinear.from_base(self, r=r, scale=scale, dropout=dropout)


class BlockedLinear(nn.Module):  # type: ignore[misc]  # mlx has no types here
    """A linear layer whose weights are laid out in blocks of columns, each of them contiguous.

    A row times a matrix is bound by how fast the matrix can be read. A BLAS copies a large one into its own
    order first; a block is small enough to be read as it is. Up to some dozens of rows that is two to four
    times faster. It also makes a row's result independent of how many rows there are.

    Args:
        weight: the matrix, [outputs, inputs].
        bias: what is added, if anything.
    """

    def __init__(self, weight: Array, bias: Array | None = None) -> None:
        super().__init__()
        self._outputs = int(weight.shape[0])
        padding = -self._outputs % BLOCK
        if padding:
            weight = mx.concatenate([weight, mx.zeros((padding, weight.shape[1]), weight.dtype)])
        self.blocks = mx.contiguous(weight.reshape(-1, BLOCK, weight.shape[1]).transpose(0, 2, 1))
        if bias is not None:
            self.bias = bias

    @property
    def weight(self) -> Array:
        """The matrix as other layers have it, [outputs, inputs]. It is put together anew each time."""
        blocks = self.blocks
        return blocks.transpose(0, 2, 1).reshape(-1, blocks.shape[1])[: self._outputs]

    def __call__(self, x: Array) -> Array:
        """Returns the layer's outputs."""
        y = x.reshape(1, -1, x.shape[-1]) @ self.blocks
        y = y.transpose(1, 0, 2).reshape(*x.shape[:-1], -1)[..., : self._outputs]
        return y + self.bias if "bias" in self else y

    def to_lora(self, r: int, scale: float, dropout: float) -> nn.Module:
        """Returns this layer with an adapter's matrices beside it. mlx-lm asks for it by this name."""
        return LoRALinear.from_base(self, r=r, scale=scale, dropout=dropout)


class BlockedEmbedding(BlockedLinear):
    """A table of rows, which is the last layer's matrix too. See `BlockedLinear`."""

    def __call__(self, x: Array) -> Array:
        """Returns the rows of such numbers."""
        return self.blocks[x // BLOCK, :, x % BLOCK]

    def as_linear(self, x: Array) -> Array:
        """Returns the products with all rows."""
        return super().__call__(x)

    def to_lora(self, r: int, scale: float, dropout: float) -> nn.Module:
        """Returns this layer with an adapter's matrices beside it."""
        return LoRAEmbedding.from_base(self, r=r, scale=scale, dropout=dropout)


_MATRICES = {nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding}
"""Layers that are replaced. Kinds that models derive from them may use their weights in other ways."""


def _float32(layer: nn.Module) -> Array:
    """Returns a layer's matrix as float32. Scales come first: products of float16 would be rounded."""
    if not isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return layer.weight.astype(mx.float32)
    is_affine = layer.mode == "affine"
    biases = layer.get("biases")
    return mx.dequantize(
        layer.weight,
        scales=layer.scales.astype(mx.float32) if is_affine else layer.scales,
        biases=None if biases is None else biases.astype(mx.float32),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=mx.float32,
    )


def _plain(weight: Array, bias: Array | None, *, is_rows: bool) -> nn.Module:
    layer = nn.Embedding(1, 1) if is_rows else nn.Linear(1, 1, bias=False)
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    *path, leaf = name.split(".")
    at: object = model
    for step in path:
        at = at[int(step)] if isinstance(at, list) else cast("Mapping[str, object]", at)[step]
    if isinstance(at, list):
        at[int(leaf)] = layer
    else:
        setattr(at, leaf, layer)


def _arrays(model: nn.Module) -> dict[str, Array]:
    return dict(tree_flatten(model.parameters()))


def _as_float32(array: Array) -> Array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
