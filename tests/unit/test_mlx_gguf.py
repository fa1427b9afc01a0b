"""GGUF files become folders that mlx-lm loads, or are refused in words that help."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from forebay.mlx_service.fetch import default_cache_dir, ensure_default_gguf
from forebay.mlx_service.models.describe import describe
from forebay.mlx_service.models.gguf_file import GgufError, read_head
from forebay.mlx_service.models.gguf_import import convert, main
from mlx_worker_rig import ask, rig
from tiny_gguf import Quant, write

pytestmark = pytest.mark.mlx


async def reply_of(folder: Path) -> list[int]:
    async with rig(folder, context=256) as running:
        return (await running.generate(ask("the other", most=12, include_token_ids=True))).token_ids


@pytest.mark.parametrize(
    "quant", [Quant.F32, Quant.F16, Quant.Q4_0, Quant.Q4_1, Quant.Q8_0], ids=lambda q: q.name
)
async def test_a_file_becomes_a_folder_that_answers(tmp_path: Path, quant: Quant) -> None:
    told: list[float] = []
    source = write(
        tmp_path / "m.gguf", quant=quant, embedding=Quant.Q8_0 if quant is Quant.Q4_1 else None, tied=False
    )
    convert(source, tmp_path / "m", lambda what, fraction: told.append(fraction))
    facts = describe(tmp_path / "m")
    assert (facts.family, facts.context_token_count, facts.has_chat_template) == ("llama", 256, True)
    assert facts.parameter_count == sum(int(np.prod(t.shape)) for t in read_head(source).tensors)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert len(await reply_of(tmp_path / "m")) > 0
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


async def test_packed_weights_say_what_the_unpacked_ones_say(tmp_path: Path) -> None:
    source = write(tmp_path / "q.gguf", quant=Quant.Q8_0)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(source).tensors}
    convert(source, tmp_path / "q")
    convert(write(tmp_path / "f.gguf"), tmp_path / "f")
    import mlx.core as mx

    plain = dict(mx.load(str(tmp_path / "f" / "model.safetensors")))
    names = dict(zip((t.name for t in read_head(source).tensors), range(1000), strict=False))
    assert len(plain) == len(names)
    mine = mx.load(str(tmp_path / "q" / "model.safetensors"))
    stem = "model.layers.1.self_attn.q_proj"
    unpacked = mx.dequantize(
        mine[f"{stem}.weight"], mine[f"{stem}.scales"], mine[f"{stem}.biases"], group_size=32, bits=8
    )
    assert np.allclose(np.array(unpacked, np.float32), tensors["blk.1.attn_q.weight"], atol=2e-3)


def test_text_is_cut_into_tokens_as_the_file_says(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    for words, cut in (("default", ["th", "e", "Ġ", "4", "2"]), ("smollm", None), ("llama-bpe", None)):
        folder = tmp_path / words
        convert(write(tmp_path / f"{words}.gguf", tokenizer__ggml__pre=words), folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokens = tokenizer.encode("the 42<|im_end|><user>").tokens
        assert tokens[-2:] == ["<|im_end|>", "<user>"]
        if cut:
            assert tokens[:-2] == cut
        assert tokenizer.decode(tokenizer.encode("thé 42").ids) == "thé 42"
    config = json.loads((tmp_path / "default" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "qwen2"}, "architecture qwen2"),
        ({"llama__expert_count": 8}, "mixture-of-experts"),
        ({"llama__rope__scaling__type": "yarn"}, "scaled rotary"),
        ({"extra": "rope_freqs.weight"}, "scaled rotary"),
        ({"extra": "blk.0.odd.weight"}, "blk.0.odd.weight"),
        ({"quant": Quant.Q5_0}, "Q5_0"),
        ({"tokenizer__ggml__model": "llama"}, "tokenizers of kind llama"),
        ({"tokenizer__chat_template": None}, "no chat template"),
        ({"llama__rope__dimension_count": 8}, "part of each head"),
        ({"llama__block_count": None}, "llama.block_count"),
        ({"leave": "token_embd.weight"}, "no token embeddings"),
        ({"tokenizer__ggml__token_type": [1]}, "incomplete"),
        ({"tokenizer__ggml__merges": ["q zz"]}, "tokenizer is broken"),
        ({"tokenizer__ggml__pre": "odd"}, "in the manner of odd"),
    ],
    ids=str,
)
def test_what_cannot_be_converted_is_refused_and_leaves_nothing(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    source = write(tmp_path / "m.gguf", **change)  # type: ignore[arg-type]
    with pytest.raises(GgufError, match=said):
        convert(source, tmp_path / "out" / "m")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(FileExistsError):
        convert(write(tmp_path / "m.gguf"), tmp_path / "m")


def test_the_program_reports_and_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "m.gguf")
    assert main([str(source), str(tmp_path / "m")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1] == {"what": "done", "fraction": 1.0}
    assert main([str(source), str(tmp_path / "m")]) == 1
    assert "is there already" in capsys.readouterr().err
    source.write_bytes(b"no")
    assert main([str(source), str(tmp_path / "n")]) == 1


def test_weights_that_end_too_soon_leave_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "m.gguf")
    source.write_bytes(source.read_bytes()[:-20_000])
    with pytest.raises(GgufError):
        convert(source, tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


HEAD = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
KEY = struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GG", "cut short"),
        (b"ABCD" + bytes(20), "no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (HEAD + struct.pack("<Q", 1 << 60), "cut short"),
        (HEAD + KEY + struct.pack("<I", 77), "unknown kind 77"),
        (HEAD + KEY + struct.pack("<IIQ", 9, 4, 1 << 62), "cut short"),
        (HEAD + KEY + struct.pack("<IIQ", 9, 8, 1 << 40), "cut short"),
        (HEAD + struct.pack("<Q", 1) + b"\xff" + struct.pack("<I", 7), "broken"),
    ],
)
def test_a_file_that_lies_about_its_lengths_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(GgufError, match=said):
        read_head(tmp_path / "m.gguf")


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="cannot be read"):
        read_head(tmp_path / "none.gguf")


@pytest.mark.model
async def test_the_default_model_knows_the_capital_of_france(tmp_path: Path) -> None:
    source = await ensure_default_gguf(default_cache_dir(), lambda progress: None)  # once a machine
    convert(source, tmp_path / "smol")
    async with rig(tmp_path / "smol", prefill_step=None) as running:
        reply = await running.generate(ask("What is the capital of France?", most=10))
    assert "Paris" in reply.text
