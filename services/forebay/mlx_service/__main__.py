"""Runs the MLX service: `python -m forebay.mlx_service`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from forebay.kit import process
from forebay.mlx_service import requirements
from forebay.mlx_service.config import MlxSettings
from forebay.mlx_service.service import serve


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the service and returns its exit code: 69 where MLX is missing."""
    if missing := requirements.missing():
        print(f"forebay mlx: {missing}", file=sys.stderr)  # noqa: T201 - one readable line, before there is a log
        return process.EX_UNAVAILABLE
    return process.main("mlx", MlxSettings, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
