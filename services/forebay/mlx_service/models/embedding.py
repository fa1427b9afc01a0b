"""What a folder says about how its model embeds text, read without mlx.

The layout is that of sentence-transformers: `modules.json` lists the stages
that follow the transformer, `1_Pooling/config.json` says how its outputs
become one vector, `sentence_bert_config.json` how long a text may be. A folder
that says nothing of this and holds a BERT-like encoder is pooled by the mean,
as that library does. A folder that says nothing and holds a decoder is a chat
model, and no embedding is made up from it: its vectors would be numbers
without meaning, and nobody would see that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from forebay.inference.v1 import inference_pb2 as pb

ENCODERS = frozenset(
    {"bert", "roberta", "xlm-roberta", "camembert", "distilbert", "modernbert", "nomic_bert"}
)
"""Values of `model_type` whose models read a text from both ends."""

_OFFSET = frozenset({"roberta", "xlm-roberta", "camembert"})
"""Those that count positions from behind their padding token."""

_ENCODER_TASKS = ("Model", "ForMaskedLM", "ForPreTraining")
"""Ends of the names of encoders that are no classifiers."""


class RecipeError(ValueError):
    """The folder asks for something that is not supported. The message says what."""


class Pooling(Enum):
    """How the outputs of a text's tokens become one vector. In the order in which several are joined."""

    FIRST = "cls"
    MAX = "max"
    MEAN = "mean"
    MEAN_SQRT = "mean_sqrt_len_tokens"
    WEIGHTED_MEAN = "weightedmean"
    LAST = "lasttoken"


_POOLING_KEYS = {
    "pooling_mode_cls_token": Pooling.FIRST,
    "pooling_mode_max_tokens": Pooling.MAX,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": Pooling.MEAN_SQRT,
    "pooling_mode_weightedmean_tokens": Pooling.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": Pooling.LAST,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """A linear stage after the pooling."""

    path: Path
    """Folder with its `model.safetensors`."""
    activation: str
    """`identity`, `tanh`, `relu` or `gelu`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model embeds a text."""

    is_encoder: bool
    """Whether it reads a text from both ends, as BERT does, or is a decoder."""
    poolings: tuple[Pooling, ...] = (Pooling.MEAN,)
    """Several are joined into one longer vector."""
    dense: tuple[Dense, ...] = ()
    """Linear stages after the pooling."""
    is_normalized: bool = False
    """Whether vectors are given length 1."""
    token_count: int = 0
    """Most tokens of a text, special ones included. 0 is unknown."""
    cuts: tuple[int, ...] | None = ()
    """Numbers of components to which the model is trained to be cut (Matryoshka). None is any."""
    prompts: tuple[tuple[str, str], ...] = ()
    """Texts that the model wants before a text, by name, such as `query`."""
    default_prompt: str = ""
    """Name of the one that is used where the caller names none. Empty is none."""

    def can_cut(self, dimensions: int) -> bool:
        """Whether a prefix of so many components is an embedding of its own."""
        return self.cuts is None or dimensions in self.cuts


def is_embedding_model(path: Path, config: Mapping[str, object]) -> bool:
    """Returns whether a folder's model is one for embeddings."""
    if any(_kind(entry) == "Pooling" for entry in _modules(path)) or _pooling_path(path).is_file():
        return True
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list) and architectures else ["Model"]
    return config.get("model_type") in ENCODERS and str(named[0]).endswith(_ENCODER_TASKS)


def read_recipe(path: Path, config: Mapping[str, object]) -> Recipe:
    """Returns how a folder's model embeds.

    Args:
        path: the folder.
        config: its `config.json`.

    Raises:
        RecipeError: it has a stage that is not supported.
    """
    modules = _modules(path)
    is_encoder = config.get("model_type") in ENCODERS
    kinds = [_kind(entry) for entry in modules]
    unknown = [kind for kind in kinds if kind not in {"Transformer", "Pooling", "Dense", "Normalize"}]
    if unknown:
        raise RecipeError(f"its stage {unknown[0]!r} of modules.json is not supported")
    pooling = next((str(entry.get("path")) for entry in modules if _kind(entry) == "Pooling"), "1_Pooling")
    own = _read(path / "config_sentence_transformers.json")
    prompts = {str(k): str(v) for k, v in _mapping(own.get("prompts")).items()}
    default = str(own.get("default_prompt_name") or "")
    if default and default not in prompts:
        raise RecipeError(f"its default prompt {default!r} is not among its prompts")
    settings = _read(path / pooling / "config.json")
    if settings.get("include_prompt") is False and any(prompts.values()):
        raise RecipeError("it leaves prompts out of the pooling, which is not supported")
    return Recipe(
        is_encoder=is_encoder,
        poolings=_poolings(settings),
        dense=tuple(_dense(path / str(e.get("path"))) for e in modules if _kind(e) == "Dense"),
        is_normalized="Normalize" in kinds,
        token_count=_token_count(path, config),
        cuts=_cuts({**config, **own}),
        prompts=tuple(prompts.items()),
        default_prompt=default,
    )


def capabilities(*, probed: bool) -> list[pb.CapabilityReport]:
    """Returns what an embedding model can do: embed texts and count their tokens.

    Args:
        probed: whether it is loaded.
    """
    can = {pb.CAPABILITY_EMBED, pb.CAPABILITY_COUNT_TOKENS}
    yes, no = pb.CapabilityReport.SUPPORT_YES, pb.CapabilityReport.SUPPORT_NO
    return [
        pb.CapabilityReport(capability=each, support=yes if each in can else no, probed=probed)
        for each in pb.Capability.values()
        if each != pb.CAPABILITY_UNSPECIFIED
    ]


def _token_count(path: Path, config: Mapping[str, object]) -> int:
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if config.get("rotary_scaling_factor") and config.get("max_trained_positions"):
        positions = config["max_trained_positions"]  # beyond, its rotations would have to be stretched
    most = positions if isinstance(positions, int) and not isinstance(positions, bool) else 0
    if most:
        most -= first_position(config)
    wanted = _read(path / "sentence_bert_config.json").get("max_seq_length")
    if isinstance(wanted, int) and wanted > 0:
        return min(wanted, most) if most else wanted
    return most


def first_position(config: Mapping[str, object]) -> int:
    """Returns the number of an encoder's first position: RoBERTa counts from behind its padding token."""
    if config.get("model_type") not in _OFFSET:
        return 0
    padding = config.get("pad_token_id")
    return (padding if isinstance(padding, int) else 1) + 1


def _poolings(settings: Mapping[str, object]) -> tuple[Pooling, ...]:
    found = {pooling for key, pooling in _POOLING_KEYS.items() if settings.get(key) is True}
    named = settings.get("pooling_mode")
    if named is not None and not found:
        names = named if isinstance(named, list | tuple) else [named]
        try:
            found = {Pooling(name) for name in names}
        except ValueError as error:
            raise RecipeError(f"its pooling {named!r} is not supported") from error
    strange = [k for k, v in settings.items() if k.startswith("pooling_mode_") and v is True]
    if any(key not in _POOLING_KEYS for key in strange):
        raise RecipeError(f"its pooling {strange} is not supported")
    return tuple(pooling for pooling in Pooling if pooling in found) or (Pooling.MEAN,)


def _dense(path: Path) -> Dense:
    if not (path / "model.safetensors").is_file():
        raise RecipeError(f"its stage {path.name} has no model.safetensors")
    named = str(_read(path / "config.json").get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = named.rpartition(".")[2].lower()
    if activation not in {"identity", "tanh", "relu", "gelu"}:
        raise RecipeError(f"its activation {named!r} is not supported")
    return Dense(path=path, activation=activation)


def _cuts(config: Mapping[str, object]) -> tuple[int, ...] | None:
    listed = config.get("matryoshka_dimensions", config.get("matryoshka_dims"))
    if isinstance(listed, list):
        return tuple(sorted({n for n in listed if isinstance(n, int) and n > 0}))
    return None if config.get("is_matryoshka") is True else ()


def _pooling_path(path: Path) -> Path:
    return path / "1_Pooling" / "config.json"


def _modules(path: Path) -> Sequence[Mapping[str, object]]:
    try:
        entries = json.loads((path / "modules.json").read_bytes())
    except (OSError, ValueError):
        return ()
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else ()


def _kind(entry: Mapping[str, object]) -> str:
    """Returns the class of a stage, without the module that it once was in."""
    return str(entry.get("type", "")).rpartition(".")[2]


def _read(path: Path) -> Mapping[str, object]:
    try:
        return _mapping(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return {}


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}
