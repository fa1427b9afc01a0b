"""Activation functions of encoders."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from forebay.mlx_service.worker.runtime import mx
from forebay.mlx_service.worker.sampling import Array

_EDGE = 5.0
"""Beyond this the normal distribution is taken to be 0 or 1: it is, within 3e-7."""

_ABOVE = (
    3.989419531e-01,
    5.259524206e-02,
    5.550062048e-03,
    3.305866146e-04,
    4.412208142e-06,
    -1.411886559e-08,
)
_BELOW = (1.0, 2.984979028e-01, 3.867203713e-02, 2.778689523e-03, 1.108153725e-04)
"""Of the fraction of polynomials of x² that, times x, is the normal distribution less a half, within 5e-8."""


def gelu(x: Array) -> Array:
    """Returns GELU, on a CPU within 1e-5: mlx's error function takes it longer than all matrix products."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return x * 0.5 * (1 + mx.erf(x * (1 / math.sqrt(2))))
    inner = mx.clip(x, -_EDGE, _EDGE)
    square = inner * inner
    return x * (inner * _polynomial(_ABOVE, square) / _polynomial(_BELOW, square) + 0.5)


def gelu_tanh(x: Array) -> Array:
    """Returns GELU by its approximation with the hyperbolic tangent."""
    return x * 0.5 * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def relu(x: Array) -> Array:
    """Returns what is positive, else 0."""
    return mx.maximum(x, 0)


def silu(x: Array) -> Array:
    """Returns x times its logistic function."""
    return x * mx.sigmoid(x)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": relu,
    "silu": silu,
}
"""Activations by their names in `config.json`."""


def activation(name: object) -> Callable[[Array], Array]:
    """Returns the activation of such a name.

    Raises:
        ValueError: there is none.
    """
    found = ACTIVATIONS.get(str(name))
    if found is None:
        raise ValueError(f"activation {str(name)!r} is not supported; {', '.join(ACTIVATIONS)} are")
    return found


def _polynomial(coefficients: Sequence[float], x: Array) -> Array:
    """Returns a polynomial's value. The first coefficient is the constant."""
    *rest, value = coefficients
    total: Array = x * value + rest[-1]
    for coefficient in reversed(rest[:-1]):
        total = total * x + coefficient
    return total
