"""Small GGUF files of llamas, for tests that want one to be read or converted."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

import tiny_models

HIDDEN, LAYERS, HEADS, FEED = 64, 2, 2, 96
TOKENS = [*tiny_models.byte_alphabet().values(), "th", "<|im_start|>", "<|im_end|>", "<user>"]
KINDS = [1] * 257 + [3, 3, 4]

Quant = gguf.GGMLQuantizationType


def write(
    path: Path,
    *,
    quant: Quant = Quant.F32,
    embedding: Quant | None = None,
    tied: bool = True,
    leave: str = "",
    **more: object,
) -> Path:
    """Writes a small GGUF file; `more` overrides entries, with `__` for a dot; None leaves one out."""
    writer = gguf.GGUFWriter(str(path), str(more.pop("architecture", "llama")))
    entries: dict[str, object] = {
        "llama.embedding_length": HIDDEN,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": FEED,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": 1,
        "llama.context_length": 256,
        "llama.rope.dimension_count": HIDDEN // HEADS,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": KINDS,
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.chat_template": tiny_models.CHAT_TEMPLATE,
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    for key, value in entries.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
    random = np.random.default_rng(1)
    shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (len(TOKENS), HIDDEN)
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}.weight": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.{name}.weight": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{i}.{name}.weight": (HIDDEN // 2, HIDDEN) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{i}.{name}.weight": (FEED, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{i}.ffn_down.weight"] = (HIDDEN, FEED)
    if extra := entries.get("extra"):
        shapes[str(extra)] = (HIDDEN,)
    for name, shape in shapes.items():
        if name == leave:
            continue
        data = (random.normal(0, 0.3, shape) if len(shape) == 2 else np.ones(shape)).astype(np.float32)
        kind = (embedding or quant) if name == "token_embd.weight" else quant
        if len(shape) == 1 or kind is Quant.F32:
            writer.add_tensor(name, data)
        elif kind is Quant.F16:
            writer.add_tensor(name, data.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
