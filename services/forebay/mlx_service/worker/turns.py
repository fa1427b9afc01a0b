"""Rotary positions on a CPU: the angles of a step are computed once, not in every layer.

Every layer turns its queries and keys by angles that follow from their
positions alone. mlx's kernel for GPUs computes them on its way. On a CPU mlx
spells the same out as some twenty operations for queries and for keys of each
layer, which take a small model longer than its matrices do. Here all layers
share what the first of them computed, to the same bits.
"""

from __future__ import annotations

import math
import threading
from typing import Protocol

from forebay.mlx_service.worker.runtime import Llama3RoPE, mx, nn
from forebay.mlx_service.worker.sampling import Array


class _Rope(Protocol):
    """What of mlx's modules is needed here."""

    dims: int
    traditional: bool

    def __call__(self, x: Array, offset: Array) -> Array:
        """Turns."""


def share_turns(model: nn.Module) -> None:
    """Lets the layers of a model share their angles. Does nothing for kinds of rotation not known here."""
    known: list[_Turns] = []
    for _, module in model.named_modules():
        for name, child in module.children().items():
            if type(child) in (nn.RoPE, Llama3RoPE):
                turns = _turns(child)
                alike = next((one for one in known if one.is_like(turns)), turns)
                if alike is turns:
                    known.append(turns)
                setattr(module, name, _Shared(child, alike))


def _turns(rope: nn.Module) -> _Turns:
    half = rope.dims // 2
    if isinstance(rope, nn.RoPE):
        slowing = mx.array(math.log(rope.base) / half, mx.float32)
        speeds = mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * slowing)
        return _Turns(speeds, rope.scale, is_paired=rope.traditional)
    return _Turns(mx.reciprocal(rope._freqs), 1.0, is_paired=rope.traditional)  # noqa: SLF001  # it is nowhere else


class _Turns(threading.local):
    """The angles of one step.

    Args:
        speeds: radians a position, for each pair of numbers that is turned.
        scale: what positions are multiplied with.
        is_paired: whether numbers that are turned together are neighbours; else they are half a row apart.
    """

    def __init__(self, speeds: Array, scale: float, *, is_paired: bool) -> None:
        mx.eval(speeds)
        self._speeds = speeds
        self._scale = scale
        self._axis = -1 if is_paired else -2
        self._offset: Array = None
        self._count = 0
        self._found: tuple[Array, Array] | None = None

    def __deepcopy__(self, _: object) -> _Turns:
        return self  # views of a model have the same positions

    def is_like(self, other: _Turns) -> bool:
        """Whether both turn alike."""
        return (
            self._axis == other._axis
            and self._scale == other._scale
            and bool(mx.array_equal(self._speeds, other._speeds).item())
        )

    def turn(self, x: Array, offset: Array) -> Array:
        """Returns what is turned, of shape [rows, heads, positions, numbers]."""
        cosines, sines = self._angles(offset, x.shape[2])
        half = self._speeds.shape[0]
        if self._axis == -1:
            pairs = mx.unflatten(x, -1, (half, 2))
            swapped = pairs[..., ::-1]
        else:
            pairs = mx.unflatten(x, -1, (2, half))
            swapped = pairs[..., ::-1, :]
        return mx.flatten(pairs * cosines + swapped * sines, -2)

    def _angles(self, offset: Array, count: int) -> tuple[Array, Array]:
        # mlx-lm's caches never change an array of positions in place: the next step has another one.
        is_same = offset is self._offset or (type(offset) is int and offset == self._offset)
        if self._found is None or not is_same or count != self._count:
            self._found = self._compute(offset, count)
            self._offset, self._count = offset, count
        return self._found

    def _compute(self, offset: Array, count: int) -> tuple[Array, Array]:
        if type(offset) is not int and offset.size > 1:
            offset = offset[:, None, None]
        positions = (mx.arange(count, dtype=mx.float32) + offset) * self._scale
        angles = positions[..., None] * self._speeds
        cosines, sines = mx.cos(angles), mx.sin(angles)
        return mx.stack([cosines, cosines], axis=self._axis), mx.stack([-sines, sines], axis=self._axis)


class _Shared(nn.Module):  # type: ignore[misc]  # mlx has no types here
    """Stands in for a module that turns.

    Args:
        rope: what it stands for.
        turns: the angles that it shares.
    """

    def __init__(self, rope: _Rope, turns: _Turns) -> None:
        super().__init__()
        self._rope = rope
        self._turns = turns

    def __call__(self, x: Array, offset: Array = 0) -> Array:
        """Returns what is turned."""
        dims = self._rope.dims
        if x.ndim != 4 or x.dtype != mx.float32:
            return self._rope(x, offset=offset)
        if x.shape[-1] == dims:
            return self._turns.turn(x, offset)
        return mx.concatenate([self._turns.turn(x[..., :dims], offset), x[..., dims:]], axis=-1)
