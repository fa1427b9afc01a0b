"""The one module that knows mlx-lm's `BatchGenerator`.

Its interface changes from release to release, so nothing else touches it.
Everything here runs on the engine's thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from forebay.mlx_service.worker.decoding import Chances
from forebay.mlx_service.worker.runtime import BatchGenerator, KVCache, make_prompt_cache, mx
from forebay.mlx_service.worker.sampling import Array, Processor, Sampler


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A row's prompt has been read up to here."""

    uid: int
    done: int
    total: int
    stopped: bool = False
    """Whether it is where reading was to stop, so that what was read can be looked at."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What attention holds of a row that left. Not evaluated: it costs nothing unless it is used."""

    tokens: tuple[int, ...]
    """The tokens it covers."""
    caches: list[KVCache]
    """One cache a layer."""


@dataclass(frozen=True, slots=True)
class Generated:
    """A row has a new token."""

    uid: int
    token: int
    chances: Chances
    ended: str | None
    """None, or `stop` after an end token, or `length` after the last token allowed."""
    kept: Kept | None = None
    """What attention holds of a row that ended."""
    drafted: int = 0
    """Tokens that were guessed in the step that begins with this one."""
    accepted: bool = False
    """Whether it was guessed, and right."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A row on its way out of a batch."""

    following: Generated | None
    """The token that the batch had picked and not told yet, if there is one."""
    caches: list[KVCache]
    """What attention holds of the tokens before it, or of all but the last if there is none."""


def can_move(model: object) -> bool:
    """Whether a model's rows can go from batch to batch: all caches can be taken out of one and put back."""
    return all(hasattr(cache, "merge") for cache in make_prompt_cache(model))


def has_plain_caches(model: object) -> bool:
    """Whether all layers keep all keys and values, which can be cut back anywhere."""
    return all(type(cache) is KVCache for cache in make_prompt_cache(model))


class Batch:
    """Rows that are generated together, one token each a step.

    Args:
        model: the model, loaded on this thread.
        rows: most rows at once.
        prefill_step: tokens of a prompt read in one step. The other rows wait for as long.
        end_tokens: tokens that end a reply.
    """

    def __init__(self, model: object, *, rows: int, prefill_step: int, end_tokens: Sequence[int]) -> None:
        self._prefill_step = prefill_step
        self._end_tokens = frozenset(end_tokens)
        self._generator = BatchGenerator(
            model,
            completion_batch_size=rows,
            prefill_batch_size=1,  # one prompt at a time: the others' tokens wait for one chunk, not for many
            prefill_step_size=prefill_step,
            stop_tokens=[[token] for token in end_tokens],
        )

    def insert(
        self,
        tokens: Sequence[int],
        *,
        most: int,
        sampler: Sampler,
        processors: Sequence[Processor],
        caches: list[KVCache] | None = None,
        cached: int = 0,
        stops: Sequence[int] = (),
    ) -> int:
        """Adds a row and returns its number. The prompt is read in the steps that follow.

        Args:
            tokens: what to read; at least one that is not cached.
            caches: what attention holds of the first `cached` tokens, which then are not read.
            most: tokens to generate at most; at least one.
            sampler: picks the tokens.
            processors: change the logits first. Must not raise.
            stops: after how many tokens, in order, one step is to end and the next to begin.
        """
        places = [cached, *stops, len(tokens)]
        (uid,) = self._generator.insert_segments(
            [[list(tokens[begin:end]) for begin, end in itertools.pairwise(places)]],
            [most],
            caches=[caches],
            all_tokens=[list(tokens[:cached])],  # processors look at all of the prompt
            samplers=[sampler],
            logits_processors=[list(processors)],
        )
        return int(uid)

    def step(self) -> tuple[list[Prefilled], list[Generated]]:
        """Generates a token a row and reads one chunk of one prompt."""
        prompts, tokens = self._generator.next()
        return (
            [
                Prefilled(
                    p.uid, int(p.progress[0]), int(p.progress[1]), p.end_of_segment and not p.end_of_prompt
                )
                for p in prompts
            ],
            [
                Generated(
                    t.uid,
                    int(t.token),
                    t.logprobs,
                    t.finish_reason,
                    None if t.finish_reason is None else Kept(tuple(t.all_tokens), t.prompt_cache),
                )
                for t in tokens
            ],
        )

    def peek(self, uid: int) -> Kept | None:
        """Returns what attention holds of a row that stays. See `remove`."""
        with mx.stream(self._generator.stream):
            found = self._generator.extract_cache([uid]).get(uid)
        if found is None or any(cache.empty() for cache in found[0]):
            return None
        return Kept(tuple(found[1]), list(found[0]))

    def remove(self, uid: int) -> Kept | None:
        """Takes a row out, whatever it is at, and returns what attention holds of it.

        Unknown rows are ignored, and of a row that read nothing there is nothing to return.
        """
        with mx.stream(self._generator.stream):
            left = self._generator.remove([uid], return_prompt_caches=True).get(uid)
        if left is None or not left[0] or any(cache.empty() for cache in left[0]):
            return None
        caches, tokens = left
        return Kept(tuple(tokens), list(caches))

    def take(self, uid: int) -> Taken | None:
        """Takes a writing row out, to go on elsewhere: nothing is computed again and no draw is lost.

        None leaves a row where it is whose prompt is still read, or whose next token is its last.
        """
        writing = self._generator._generation_batch  # noqa: SLF001 - nothing public tells what comes next
        if uid not in writing.uids:
            return None
        index = writing.uids.index(uid)
        token = int(writing._next_tokens[index].item())  # noqa: SLF001
        if token in self._end_tokens:
            return None
        following = Generated(uid, token, writing._next_logprobs[index], None)  # noqa: SLF001
        with mx.stream(self._generator.stream):
            caches, _ = self._generator.remove([uid], return_prompt_caches=True)[uid]
            mx.eval([cache.state for cache in caches])  # else it would hold on to the whole batch
        return Taken(following, list(caches))

    def share_step(self, most: int | None) -> None:
        """Reads no more tokens of a prompt in a step than so many; None reads as many as was said first."""
        self._generator.prefill_step_size = min(self._prefill_step, most or self._prefill_step)

    @property
    def cache_bytes(self) -> int:
        """Bytes that the rows' attention caches take."""
        return int(self._generator.prompt_cache_nbytes)

    def close(self) -> None:
        """Gives back what the rows hold."""
        self._generator.close()
        del self._generator


def top_tokens(logprobs: Array, count: int) -> list[tuple[int, float]]:
    """Returns the `count` likeliest tokens with their log probabilities, best first."""
    if count <= 0:
        return []
    count = min(count, logprobs.shape[-1])
    order: Array = mx.argsort(-logprobs)[:count]
    values: Array = logprobs[order]
    mx.eval(order, values)
    pairs: list[tuple[int, float]] = list(zip(order.tolist(), values.tolist(), strict=True))
    return [(token, value) for token, value in pairs if value > -1e30]  # a format's mask leaves fewer
