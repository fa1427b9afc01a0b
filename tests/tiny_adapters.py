"""Random LoRA adapters for tiny models, made with mlx-lm's own code for training."""

from __future__ import annotations

import json
from pathlib import Path

from mlx.utils import tree_flatten

from forebay.mlx_service.worker.load import load_weights
from forebay.mlx_service.worker.runtime import mx

RANK = 4


def make_adapter(
    path: Path, base: Path, *, seed: int, rank: int = RANK, layers: int = 2, dora: bool = False
) -> Path:
    """Writes an adapter as mlx-lm's training does, with random matrices that change every answer."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    parameters = {"rank": rank, "scale": 8.0, "dropout": 0.0}
    model = load_weights(base)
    linear_to_lora_layers(model, layers, parameters, use_dora=dora)
    key = mx.random.key(seed)
    weights = {}
    for name, array in tree_flatten(model.parameters()):  # type: ignore[attr-defined]  # a module
        leaf = name.rpartition(".")[2]
        if leaf in {"lora_a", "lora_b"}:
            key, draw = mx.random.split(key)
            weights[name] = mx.random.normal(array.shape, key=draw) * 0.3
        elif dora and leaf == "m":
            weights[name] = array
    path.mkdir(parents=True)
    mx.save_safetensors(str(path / "adapters.safetensors"), weights)
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": layers,
        "lora_parameters": parameters,
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
