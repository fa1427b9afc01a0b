"""Whether MLX can run here, found out without importing it."""

from __future__ import annotations

import importlib.util
import platform
import sys

_MACHINES = {"darwin": ("arm64",), "linux": ("x86_64", "aarch64")}
"""Systems and machines that MLX publishes builds for."""


def missing() -> str:
    """Returns what is missing and what to do about it, in one sentence. Empty if MLX can run."""
    if importlib.util.find_spec("mlx") is not None and importlib.util.find_spec("mlx_lm") is not None:
        return ""
    machine = platform.machine()
    if machine not in _MACHINES.get(sys.platform, ()):
        return (
            f"MLX has no build for {platform.system()} on {machine}: it runs on Apple silicon, and on "
            "Linux on x86_64 and aarch64. Use another backend here, such as Ollama"
        )
    return "MLX is not installed: pip install 'forebay[mlx]'"
