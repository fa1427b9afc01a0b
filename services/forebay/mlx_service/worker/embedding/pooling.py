"""From outputs of tokens to one vector a text, as the model's folder says."""

from __future__ import annotations

from collections.abc import Sequence

from forebay.mlx_service.models.embedding import Pooling
from forebay.mlx_service.worker.runtime import mx
from forebay.mlx_service.worker.sampling import Array

_SMALLEST = 1e-12
"""Least length that is divided by: a vector of zeros stays one."""


def pool(outputs: Array, mask: Array, poolings: Sequence[Pooling]) -> Array:
    """Returns a vector a text, in float32.

    Args:
        outputs: outputs of tokens, [texts, tokens, components].
        mask: which tokens count, [texts, tokens]. In each text those that do come first.
        poolings: how; several are joined.
    """
    outputs = outputs.astype(mx.float32)
    parts = [_pool(outputs, mask, pooling) for pooling in poolings]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def _pool(outputs: Array, mask: Array, pooling: Pooling) -> Array:
    if pooling is Pooling.FIRST:
        return outputs[:, 0]
    counts = mask.sum(axis=1)
    if pooling is Pooling.LAST:
        return outputs[mx.arange(outputs.shape[0]), counts - 1]
    if pooling is Pooling.MAX:
        return mx.where(mask[..., None], outputs, -mx.inf).max(axis=1)
    weights = mask.astype(mx.float32)
    if pooling is Pooling.WEIGHTED_MEAN:
        weights = weights * mx.arange(1, outputs.shape[1] + 1)
    # A pad's output can be anything, and 0 times anything is not always 0.
    sums = mx.where(mask[..., None], outputs * weights[..., None], 0).sum(axis=1)
    by = weights.sum(axis=1)
    return sums / (mx.sqrt(by) if pooling is Pooling.MEAN_SQRT else by)[:, None]


def normalize(vectors: Array) -> Array:
    """Returns the vectors with length 1."""
    return vectors / mx.maximum(mx.linalg.norm(vectors, axis=-1, keepdims=True), _SMALLEST)
