"""Tiny models with random weights whose caches cannot be cut: windows, states, and mixtures of them.

They have the tokenizer and the template of `tiny_models`, and are made by mlx-lm from its own modules, so
that their caches are what mlx-lm's models really have.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import _get_classes

import tiny_models

WINDOW = 48
"""Tokens of a sliding window: shorter than the tests' prompts, so that it turns."""

CONFIGS: dict[str, dict[str, object]] = {
    "gemma3_text": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
    },
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": WINDOW,
    },
    "mamba": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "state_size": 8,
        "num_hidden_layers": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "falcon_h1": {  # attention and a state side by side in every layer: a list of caches
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "mamba_d_ssm": 32,
        "mamba_d_head": 8,
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
        "mamba_expand": 1,
        "mamba_chunk_size": 16,
        "rms_norm_eps": 1e-5,
    },
}
"""What `config.json` holds besides sizes of the vocabulary and of the context."""


def build(path: Path, family: str, *, seed: int = 3) -> Path:
    """Writes a model of a family into `path` and returns it."""
    tiny_models.build_random(path)
    config = json.loads((path / "config.json").read_text())
    keep = ("vocab_size", "bos_token_id", "eos_token_id", "max_position_embeddings", "rope_theta")
    config = {name: config[name] for name in keep}
    config |= {"model_type": family, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, **CONFIGS[family]}
    kind, arguments = _get_classes(config)
    mx.random.seed(seed)
    model = kind(arguments.from_dict(config))
    weights = tree_map(
        lambda array: array + 0.3 * mx.random.normal(array.shape), dict(tree_flatten(model.parameters()))
    )
    (path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    return path
