"""Tells from a GGUF file's head whether it can be converted for MLX, without mlx and without a weight."""

from __future__ import annotations

from collections import Counter

from forebay.mlx_service.models.gguf_file import GgufError, Head

QUANTIZED = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
"""Bits of the block formats that have a form in mlx."""

GROUP_SIZE = 32
"""Weights in a block of each of them."""

SUPPORTED = frozenset({*QUANTIZED, "F16", "F32"})

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

_BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}

WORDS = frozenset({"smollm", "default", "gpt-2", "llama-bpe"})
"""Manners of cutting text into words that can be converted."""


def check(head: Head) -> None:
    """Refuses what cannot be converted, and what would load and then talk nonsense.

    Raises:
        GgufError: with the reason, in one line for people.
    """
    architecture = head.text("general.architecture")
    if architecture != "llama":
        raise GgufError(f"models of architecture {architecture or 'unknown'} cannot be converted, only llama")
    if head.integer("llama.expert_count", 0):
        raise GgufError("mixture-of-experts models cannot be converted")
    if head.metadata.get("llama.rope.scaling.type", "none") != "none" or any(
        tensor.name == "rope_freqs.weight" for tensor in head.tensors
    ):
        raise GgufError("models with scaled rotary positions cannot be converted: fetch their MLX version")
    unsupported = Counter(tensor.type for tensor in head.tensors if tensor.type not in SUPPORTED)
    if unsupported:
        found = ", ".join(f"{kind} ({count} tensors)" for kind, count in sorted(unsupported.items()))
        raise GgufError(
            f"weights of type {found} cannot be converted without blowing them up; "
            f"use a file of type {', '.join(sorted(SUPPORTED))}, or the model's MLX version"
        )
    for tensor in head.tensors:
        mlx_name(tensor.name)
    if head.text("tokenizer.ggml.model") != "gpt2":
        raise GgufError(
            f"tokenizers of kind {head.text('tokenizer.ggml.model') or 'unknown'} cannot be converted, only "
            "gpt2"
        )
    if words(head) not in WORDS:
        raise GgufError(
            f"the file's tokenizer cuts words in the manner of {words(head)}, which is not known here"
        )
    if not head.text("tokenizer.chat_template"):
        raise GgufError("the file has no chat template, so the model cannot hold a conversation")


def mlx_name(name: str) -> str:
    """Returns the name that mlx-lm has for a tensor of a llama.

    Raises:
        GgufError: a llama has no such tensor.
    """
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in _NAMES:
        return f"{_NAMES[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _BLOCK_NAMES:
        return f"model.layers.{parts[1]}.{_BLOCK_NAMES[parts[2]]}.{parts[3]}"
    raise GgufError(f"the file has a tensor {name} that a llama has not")


def words(head: Head) -> str:
    """Returns the manner in which the file's tokenizer cuts text into words."""
    return head.text("tokenizer.ggml.pre", "default")
