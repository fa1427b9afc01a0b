"""What a model folder tells of itself."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

import tiny_models
from forebay.mlx_service.models.describe import NotAModelError, describe


def weights(path: Path, tensors: dict[str, object]) -> None:
    header = json.dumps(tensors).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def tensor(dtype: str, *shape: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [0, 0]}


def folder(path: Path, config: object, tensors: dict[str, object] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    weights(path / "model.safetensors", tensors or {"w": tensor("F16", 10, 10)})
    return path


def test_a_folder_tells_family_size_context_and_template(tmp_path: Path) -> None:
    facts = describe(tiny_models.build_random(tmp_path / "tiny-135M-chat", context=300))
    assert (facts.family, facts.architecture, facts.format) == ("llama", "LlamaForCausalLM", "safetensors")
    assert (facts.size_label, facts.quantization, facts.context_token_count) == ("135M", "float32", 300)
    assert facts.has_chat_template
    assert facts.disk_bytes > facts.weight_bytes >= 4 * facts.parameter_count
    assert repr(facts.path).endswith("tiny-135M-chat')")


def test_equal_folders_have_equal_outlines_and_others_not(tmp_path: Path) -> None:
    one, same = (describe(tiny_models.build_random(tmp_path / n, seed=1)) for n in ("a", "b"))
    other = describe(tiny_models.build_random(tmp_path / "c", layers=3))
    assert one.outline == same.outline != other.outline


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", {"model_type": "a"})
    assert describe(path).family == "a"
    folder(path, {"model_type": "bcd"})
    assert describe(path).family == "bcd"


def test_packed_weights_count_as_the_weights_they_hold(tmp_path: Path) -> None:
    config = {"quantization": {"bits": 4, "group_size": 32, "e": {"bits": 8}}}
    tensors = {
        "l.weight": tensor("U32", 8, 4),  # 8 x 32 of 4 bits
        "l.scales": tensor("F16", 8, 1),
        "l.biases": tensor("F16", 8, 1),
        "e.weight": tensor("U32", 8, 8),  # 8 x 32 of 8 bits
        "e.scales": tensor("F16", 8, 1),
        "__metadata__": {"format": "mlx"},
    }
    facts = describe(folder(tmp_path / "m", config, tensors))
    assert (facts.parameter_count, facts.quantization, facts.size_label) == (512, "4bit", "512")
    assert facts.context_token_count == 0
    assert not facts.has_chat_template


def test_packed_weights_of_unknown_width_are_not_guessed(tmp_path: Path) -> None:
    tensors = {"l.weight": tensor("U32", 8, 4), "l.scales": tensor("F16", 8, 1)}
    facts = describe(folder(tmp_path / "m", {"quantization_config": {"quant_method": "awq"}}, tensors))
    assert (facts.parameter_count, facts.quantization, facts.size_label) == (0, "awq", "")


@pytest.mark.parametrize(
    ("shape", "label"),
    [((7, 1000, 1000, 1000), "7.0B"), ((70, 1000, 1000, 1000), "70B"), ((2, 1000), "2.0K")],
)
def test_sizes_are_written_as_people_do(tmp_path: Path, shape: tuple[int, ...], label: str) -> None:
    path = folder(tmp_path / "m", {"text_config": {"n_positions": 8}}, {"w": tensor("BF16", *shape)})
    facts = describe(path)
    assert (facts.size_label, facts.quantization, facts.context_token_count) == (label, "bfloat16", 8)


def test_a_template_in_a_file_of_its_own_counts(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", {})
    (path / "tokenizer_config.json").write_text("[")
    assert not describe(path).has_chat_template
    (path / "chat_template.jinja").write_text("x")
    assert describe(path).has_chat_template


def broken(path: Path, how: str) -> Path:
    if how == "absent":
        return path
    path.mkdir()
    if how == "no config":
        return path
    (path / "config.json").write_text({"no json": "{", "no object": "[]"}.get(how, "{}"))
    file = path / "model.safetensors"
    content = {
        "no length": b"abc",
        "short": struct.pack("<Q", 50) + b"{}",
        "huge": struct.pack("<Q", 1 << 60),
        "no header": struct.pack("<Q", 2) + b"[]",
        "no shape": struct.pack("<Q", 8) + b'{"a":{}}',
    }.get(how)
    if how != "no weights":
        file.write_bytes(content if content is not None else struct.pack("<Q", 2) + b"{}")
    return path


@pytest.mark.parametrize(
    "how",
    [
        "absent",
        "no config",
        "no json",
        "no object",
        "no weights",
        "no length",
        "short",
        "huge",
        "no header",
        "no shape",
    ],
)
def test_what_is_no_model_is_refused_with_a_reason(tmp_path: Path, how: str) -> None:
    with pytest.raises(NotAModelError, match="m"):
        describe(broken(tmp_path / "m", how))


def test_a_model_without_tensors_has_no_quantisation(tmp_path: Path) -> None:
    assert describe(broken(tmp_path / "m", "empty")).quantization == ""
