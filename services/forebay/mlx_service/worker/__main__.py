"""Runs a worker: `python -m forebay.mlx_service.worker --model DIR --model-id ID --address unix:/path`."""

import sys

from forebay.mlx_service.worker.process import main

if __name__ == "__main__":
    sys.exit(main())
