"""What the servers that call themselves OpenAI-compatible really honour.

They ignore what they do not know without a word, so what a server is known to
ignore is refused here, or, if the caller accepts that, left out and said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

_STANDARD: Final = {
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "logit_bias": "logit_bias",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavor:
    """One kind of server."""

    name: str
    """As in the settings."""
    sampling: Mapping[str, str] = field(default_factory=lambda: _STANDARD)
    """Fields of `Sampling` it honours, and what it calls them."""
    output_format: bool = True
    """Whether it enforces a JSON Schema and any JSON."""
    stops: bool = True
    """Whether it ends a reply at every stop sequence. Where not, the bridge does."""
    tool_choice: bool = True
    """Whether it honours `tool_choice`."""
    images: bool = True
    """Whether it may take images. Which of its models can is another question."""
    top_logprobs: int | None = 20
    """Most likely tokens it lists at most in a stream. None streams no log probabilities."""
    token_ids: bool = False
    """Whether its log probabilities name the tokens' identifiers."""
    continues: bool = False
    """Whether it can go on from the start of a reply."""
    reasoning_history: bool = False
    """Whether it takes `reasoning_content` in earlier turns."""
    reasoning_kwargs: bool = False
    """Whether it takes the effort of reasoning as arguments of the chat template."""
    progress: bool = False
    """Whether it tells how far it is with the prompt if it is asked to."""
    comment_progress: bool = False
    """Whether it tells how far it is with the prompt in comments."""
    health: str = "/v1/models"
    """Path that answers 200 when it can serve, and never loads a model."""
    counts: bool = False
    """Whether it counts the tokens of a conversation."""
    embeds: bool = True
    """Whether it has embeddings at all."""
    dimensions: bool = True
    """Whether it gives as many components of an embedding as it is asked for."""


LLAMA_SERVER: Final = Flavor(
    name="llama-server",
    sampling={
        **_STANDARD,
        "top_k": "top_k",
        "min_p": "min_p",
        "typical_p": "typical_p",
        "repetition_penalty": "repeat_penalty",
    },
    token_ids=True,
    counts=True,
    continues=True,
    reasoning_history=True,
    progress=True,
    health="/health",
    dimensions=False,
)

MLX_LM: Final = Flavor(
    name="mlx-lm",
    sampling={
        **_STANDARD,
        "top_k": "top_k",
        "min_p": "min_p",
        "repetition_penalty": "repetition_penalty",
    },
    output_format=False,
    stops=False,
    tool_choice=False,
    images=False,
    top_logprobs=None,  # it has them in whole replies only
    reasoning_kwargs=True,
    comment_progress=True,
    health="/health",
    embeds=False,
)

VLLM: Final = Flavor(
    name="vllm",
    counts=True,
    sampling={
        **_STANDARD,
        "top_k": "top_k",
        "min_p": "min_p",
        "repetition_penalty": "repetition_penalty",
    },
    continues=True,
    reasoning_history=True,
    health="/health",
)

GENERIC: Final = Flavor(name="generic")

FLAVORS: Final = {flavor.name: flavor for flavor in (LLAMA_SERVER, MLX_LM, VLLM, GENERIC)}
"""Every flavor by its name."""
