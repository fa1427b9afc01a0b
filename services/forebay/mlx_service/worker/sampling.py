"""How tokens are picked: samplers and logits processors for rows of a batch.

Both run inside a step that all rows share, so neither may raise: what cannot
be done is refused before a row is made. A seeded row draws from keys made of
its seed and the position of the token, so its reply is the same whoever shares
the batch, and goes on the same when the row is rebuilt or continued.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

from forebay.mlx_service.worker.runtime import mx

Array: TypeAlias = Any
"""An `mx.array`. mlx has no types that mypy can follow."""

Sampler: TypeAlias = Callable[[Array], Array]
"""Takes log probabilities of shape [rows, vocabulary], gives a token a row."""

Processor: TypeAlias = Callable[[Array, Array], Array]
"""Takes a row's tokens, prompt included, and its logits of shape [1, vocabulary]; gives new logits."""

REPETITION_WINDOW = 64
"""Tokens that a repetition penalty looks back on, prompt included: what llama.cpp and Ollama use."""

_DECIMALS = 3
"""Decimals of a parameter that matter. Rounding lets rows share one sampler, hence one kernel call."""

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a row picks its tokens. Values are in the ranges that the edge checks."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """1 is off."""
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    """0 is off."""
    seed: int | None = None
    """Makes the row repeatable."""
    repetition_penalty: float = 1.0
    """1 is off."""
    presence_penalty: float = 0.0
    """0 is off."""
    frequency_penalty: float = 0.0
    """0 is off."""
    logit_bias: tuple[tuple[int, float], ...] = field(default=())
    """Pairs of token and what is added to its logit."""


def sampler(params: SamplingParams, *, position: int) -> Sampler:
    """Returns a sampler. Unseeded rows with equal parameters get the same object, and one call samples them.

    Args:
        params: how to pick.
        position: tokens of the reply that are there already; seeded draws go on from it.
    """
    temperature = round(params.temperature, _DECIMALS)
    if temperature == 0:
        return _greedy
    likely = _Likely(
        scale=1.0 / temperature,
        top_p=round(params.top_p, _DECIMALS),
        top_k=params.top_k,
        min_p=round(params.min_p, _DECIMALS),
    )
    if params.seed is None:
        return _shared(likely)
    return _Seeded(likely, seed=params.seed, position=position)


def pick(samplers: Sequence[Sampler], logits: Array) -> Array:
    """Picks a token for each row of logits, of shape [rows, vocabulary]."""
    first = samplers[0]
    if all(sample is _greedy for sample in samplers):
        return _greedy(logits)  # the likeliest is the likeliest, whatever they all sum up to
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if all(sample is first for sample in samplers):
        return first(logprobs)
    return mx.concatenate(
        [
            sample((logits if sample is _greedy else logprobs)[row : row + 1])
            for row, sample in enumerate(samplers)
        ]
    )


def pick_each(sample: Sampler, logits: Array) -> Array:
    """Picks a token for each of one row's next places, of shape [places, vocabulary], as if one by one."""
    if isinstance(sample, _Seeded):  # each place has a key of its own
        return mx.concatenate([pick([sample], logits[i : i + 1]) for i in range(logits.shape[0])])
    return pick([sample], logits)


def take_back(sample: Sampler, count: int) -> None:
    """Takes the last draws back: their tokens came to nothing."""
    if isinstance(sample, _Seeded):
        sample.take_back(count)


def processors(params: SamplingParams, *, prompt_count: int) -> list[Processor]:
    """Returns the logits processors that the parameters call for.

    Args:
        params: how to pick.
        prompt_count: tokens at the front that are prompt and not reply. Presence and frequency
            penalties look at the reply alone, a repetition penalty at the last tokens of both.
    """
    chain: list[Processor] = []
    if params.repetition_penalty != 1.0:
        chain.append(_repetition(params.repetition_penalty))
    if params.presence_penalty or params.frequency_penalty:
        chain.append(_presence(params.presence_penalty, params.frequency_penalty, prompt_count))
    if params.logit_bias:
        chain.append(_bias(params.logit_bias))
    return chain


def _greedy(logprobs: Array) -> Array:
    return mx.argmax(logprobs, axis=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Likely:
    """Which tokens are likely enough to be drawn."""

    scale: float
    top_p: float
    top_k: int
    min_p: float

    def draw(self, logprobs: Array, key: Array | None) -> Array:
        """Draws a token a row among the likely: by rank, then by mass, then by share of the likeliest."""
        vocabulary = logprobs.shape[-1]
        ranks = min(self.top_k or vocabulary, vocabulary)
        if ranks == vocabulary and self.top_p >= 1.0 and self.min_p <= 0.0:
            return mx.random.categorical(logprobs * self.scale, key=key)
        # One sort serves all three rules, and the draw is made among the sorted tokens.
        if ranks < vocabulary:
            best = mx.argpartition(-logprobs, kth=ranks - 1, axis=-1)[..., :ranks]
            within = mx.argsort(-mx.take_along_axis(logprobs, best, axis=-1), axis=-1)
            order = mx.take_along_axis(best, within, axis=-1)
        else:
            order = mx.argsort(-logprobs, axis=-1)
        ranked = mx.take_along_axis(logprobs, order, axis=-1).astype(mx.float32)
        kept = mx.arange(ranks) == 0  # rounding must never leave nothing: the likeliest token stays
        if self.top_p < 1.0:
            mass = mx.exp(ranked)
            before = mx.cumsum(mass, axis=-1) - mass
            ranked = mx.where(
                kept | (before < self.top_p * mass.sum(axis=-1, keepdims=True)), ranked, -mx.inf
            )
        if self.min_p > 0.0:
            ranked = mx.where(kept | (ranked >= ranked[..., :1] + math.log(self.min_p)), ranked, -mx.inf)
        if key is None:
            rank = mx.random.categorical(ranked * self.scale)
        else:
            # Luck belongs to tokens and not to ranks: of two that are equally likely either may come first,
            # as rounding has it in a batch of this shape, and a seed must give the same token in any.
            luck = mx.random.gumbel(logprobs.shape, key=key)
            rank = mx.argmax(ranked * self.scale + mx.take_along_axis(luck, order, axis=-1), axis=-1)
        return mx.take_along_axis(order, rank[..., None], axis=-1).squeeze(-1)


@lru_cache(maxsize=128)
def _shared(likely: _Likely) -> Sampler:
    def sample(logprobs: Array) -> Array:
        return likely.draw(logprobs, None)

    return sample


class _Seeded:
    """Draws with keys made of seed and position, one a call."""

    def __init__(self, likely: _Likely, *, seed: int, position: int) -> None:
        self._likely = likely
        self._seed = seed
        self._position = position

    def __call__(self, logprobs: Array) -> Array:
        key = mx.random.key(_mix(self._seed, self._position))
        self._position += 1
        return self._likely.draw(logprobs, key)

    def take_back(self, count: int) -> None:
        """Goes back by so many draws."""
        self._position -= count


def _mix(seed: int, position: int) -> int:
    """Mixes seed and position into 64 bits that look unrelated for neighbours (splitmix64's finish)."""
    z = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _repetition(penalty: float) -> Processor:
    def process(tokens: Array, logits: Array) -> Array:
        recent = tokens[-REPETITION_WINDOW:]
        chosen = logits[:, recent]
        logits[:, recent] = mx.where(chosen < 0, chosen * penalty, chosen / penalty)
        return logits

    return process


def _presence(presence: float, frequency: float, prompt_count: int) -> Processor:
    def process(tokens: Array, logits: Array) -> Array:
        reply = tokens[prompt_count:]
        if reply.size == 0:
            return logits
        counts = mx.zeros((logits.shape[-1],), mx.float32).at[reply].add(1.0)
        penalty = counts * frequency + (counts > 0) * presence
        return logits - penalty[None].astype(logits.dtype)

    return process


def _bias(pairs: tuple[tuple[int, float], ...]) -> Processor:
    tokens = [token for token, _ in pairs]
    values = [value for _, value in pairs]

    def process(_: Array, logits: Array) -> Array:
        return logits.at[:, mx.array(tokens)].add(mx.array(values, logits.dtype))

    return process
