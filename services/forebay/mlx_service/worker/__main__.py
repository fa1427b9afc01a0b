"""Runs a worker: `python -m forebay.mlx_service.worker --model DIR --model-id ID --address unix:/path`."""

import gc
import sys

gc.disable()  # imports leave next to no garbage, and looking for it takes a third of their time

from forebay.mlx_service.worker.process import main  # noqa: E402 - see above

if __name__ == "__main__":
    gc.freeze()  # what was imported stays, so nobody need look at it again
    gc.enable()
    sys.exit(main())
