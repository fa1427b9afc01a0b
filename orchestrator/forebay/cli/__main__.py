"""The `forebay` command, also as `python -m forebay.cli`."""

from __future__ import annotations

import sys

from forebay.cli.app import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
