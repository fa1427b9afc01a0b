"""Imports mlx and mlx-lm for the worker, and undoes what importing them does.

Everything of mlx that the worker uses comes through here, so that the
precautions are taken before the first import whichever module comes first.
"""

from __future__ import annotations

import importlib
import os
import resource
from importlib import metadata
from typing import Any

from forebay.mlx_service import blas
from forebay.mlx_service.quick_import import FOLDER_VARIABLE, remembering

# Models are folders on this disk. A name that looks like a repository must fail, not be downloaded.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# transformers prints advice on stderr, of which the front reads the last lines to say why a worker failed.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


BLAS = blas.load()
"""What does matrix products in place of mlx's own library; None is mlx's own."""

with remembering(os.environ.get(FOLDER_VARIABLE)):
    importlib.import_module("transformers")  # mlx-lm will, and by then it is too late to make that quick


def _keep_limit(kind: int, limits: tuple[int, int]) -> None:
    """Stands in for `setrlimit`, which mlx-lm calls to lower the limit of open files for good."""


_setrlimit = resource.setrlimit
resource.setrlimit = _keep_limit
try:
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten
    from mlx_lm.generate import BatchGenerator, StopSequences, generation_stream
    from mlx_lm.models.cache import (
        ArraysCache,
        BatchKVCache,
        CacheList,
        KVCache,
        RotatingKVCache,
        make_prompt_cache,
    )
    from mlx_lm.models.rope_utils import Llama3RoPE
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
    from mlx_lm.utils import _get_classes as model_classes
    from mlx_lm.utils import load_adapters, load_config, load_model, load_tokenizer
finally:
    resource.setrlimit = _setrlimit

# The package has a function of the same name in the module's place.
generate: Any = importlib.import_module("mlx_lm.generate")

# `BatchGenerator` wires the model's memory when it is made. Wired memory and more than one request
# together have panicked macOS kernels; unwired memory has not, and costs nothing measurable.
generate.maybe_set_recommended_wired_limit = lambda: None

# Caches grow by this many tokens. Growing by mlx-lm's 256 would make a row of a dozen tokens hold twenty
# times what it needs; growing by 64 copies a cache once in 64 steps, each of which reads all of it anyway.
BatchKVCache.step = 64


VERSIONS = ", ".join(f"{name} {metadata.version(name)}" for name in ("mlx", "mlx-lm"))
"""What made the state that is written down. Another version may hold it otherwise."""


def leave_thread() -> None:
    """Gives back what this thread holds of mlx. Without this the interpreter aborts at exit."""
    mx.synchronize()
    mx.clear_streams()


__all__ = [
    "BLAS",
    "VERSIONS",
    "ArraysCache",
    "BatchGenerator",
    "BatchKVCache",
    "CacheList",
    "KVCache",
    "Llama3RoPE",
    "LoRAEmbedding",
    "LoRALinear",
    "RotatingKVCache",
    "StopSequences",
    "TokenizerWrapper",
    "generate",
    "generation_stream",
    "leave_thread",
    "load_adapters",
    "load_config",
    "load_model",
    "load_tokenizer",
    "make_prompt_cache",
    "model_classes",
    "mx",
    "nn",
    "tree_flatten",
]
