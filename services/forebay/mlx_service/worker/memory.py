"""Memory: what a model's rows cost, what they may cost, and who is refused.

A row is refused when it comes, not when it is half written: mlx does not raise
when memory runs out, the system ends the process. So a row reserves what it
can come to hold, prompt and longest reply, and is refused with figures if that
and what others reserved exceed the ceiling. Of all rows accepted only so many
run at once; the most expensive of them are what is counted. What reservations
do not foresee, `pressure` sees.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

from forebay.kit.failure import MemoryExhausted
from forebay.mlx_service.ledger import WANTED, mib
from forebay.mlx_service.worker.balance import PADDED
from forebay.mlx_service.worker.pressure import SOFT, Held
from forebay.mlx_service.worker.runtime import BatchKVCache, make_prompt_cache, mx

_OUT_OF_MEMORY = ("malloc", "attempting to allocate", "unable to allocate", "out of memory", "resource limit")
"""What mlx says when it cannot allocate."""


def read_memory() -> Held:
    """Returns what MLX holds in this process."""
    return Held(int(mx.get_active_memory()), int(mx.get_cache_memory()))


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception says that there is no memory: mlx has no class of its own for that."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(word in text for word in _OUT_OF_MEMORY)


def metal_memory() -> int | None:
    """Returns the bytes that Metal recommends to use at most, or None where there is no Metal."""
    if not mx.metal.is_available():
        return None
    return int(mx.device_info()["max_recommended_working_set_size"])


@dataclass(frozen=True, slots=True)
class KvCost:
    """Bytes that a row's caches take."""

    layers: tuple[tuple[int, int | None], ...] = ()
    """Of each cache that grows: bytes a token, and the tokens at which it stops growing, if it does."""
    fixed: int = 0
    """Bytes that do not depend on length."""

    @property
    def per_token(self) -> int:
        """Bytes of one more token in a short row."""
        return sum(size for size, _ in self.layers)

    def of(self, tokens: int) -> int:
        """Bytes of a row of so many tokens, with its share of padding."""
        step = int(BatchKVCache.step)
        held = (tokens + step - 1) // step * step
        grown = sum(size * (held if most is None else min(held, most)) for size, most in self.layers)
        return int(grown * PADDED) + self.fixed


def probe(model: object) -> KvCost:
    """Measures what a row costs: the model runs on one token, and what its caches allocate is looked at.

    Configuration files are not to be trusted with this: models share, compress and window their caches.
    """
    caches = make_prompt_cache(model)
    assert callable(model)
    mx.eval(model(mx.array([[0]]), cache=caches))
    layers = []
    fixed = 0
    for cache in _flat(caches):
        keys = getattr(cache, "keys", None)
        size = int(getattr(cache, "nbytes", 0))
        if keys is None:
            fixed += size
        else:
            layers.append((size // int(keys.shape[2]), getattr(cache, "max_size", None)))
    return KvCost(tuple(layers), fixed)


def _flat(caches: Sequence[object]) -> Iterator[object]:
    for cache in caches:
        inner = getattr(cache, "caches", None)
        if inner is None:
            yield cache
        else:
            yield from _flat(inner)


class Ledger:
    """Reserves memory for rows. Used on the event loop.

    Args:
        ceiling: bytes that weights and rows may take together; None sets no bound.
        rows: most rows that run at once.
    """

    def __init__(self, ceiling: int | None, *, rows: int) -> None:
        self.ceiling = ceiling
        self.weights = 0
        """Bytes of the model."""
        self.cost = KvCost()
        """What rows take."""
        self.cost_alone = KvCost()
        """What a row that runs alone takes in addition, such as a draft model's caches."""
        self._rows = rows
        self._reserved: dict[Hashable, int] = {}
        self._alone: dict[Hashable, int] = {}

    @property
    def reserved(self) -> int:
        """Bytes that those rows can come to hold that can run at once."""
        together = heapq.nlargest(self._rows, self._reserved.values())
        return sum(together) + max(self._alone.values(), default=0)

    @property
    def room_for_prefixes(self) -> int | None:
        """Bytes that may be used for what can be read again; None sets no bound."""
        if self.ceiling is None:
            return None
        return max(0, int((self.ceiling - self.weights) * SOFT) - self.reserved)

    def reserve(self, holder: Hashable, tokens: int, *, in_use: int, retry_after: timedelta) -> None:
        """Reserves what a row of so many tokens can come to hold.

        Args:
            holder: who releases it again.
            tokens: its prompt and its longest reply.
            in_use: bytes that are in use, what can be dropped at will aside.
            retry_after: when others will have left.

        Raises:
            MemoryExhausted: that is more than there is, now or ever.
        """
        need = self.cost.of(tokens)
        self._reserved[holder] = need
        self._alone[holder] = self.cost_alone.of(tokens)
        if self.ceiling is None:
            return
        wanted = max(self.weights + self.reserved, in_use + need)
        if wanted <= self.ceiling:
            return
        self.release(holder)
        ever = self.weights + need <= self.ceiling
        when = "try again when other requests have ended" if ever else "ask for less: it never fits"
        raise MemoryExhausted(
            f"{tokens} tokens of prompt and reply take up to {mib(need)}; the model takes "
            f"{mib(self.weights)}, other requests up to {mib(self.reserved)}, and the limit is "
            f"{mib(self.ceiling)}: {when}",
            metadata={
                "need_bytes": str(need),
                "weights_bytes": str(self.weights),
                "reserved_bytes": str(self.reserved),
                "in_use_bytes": str(in_use),
                "ceiling_bytes": str(self.ceiling),
                WANTED: str(wanted),
            },
            retry_after=retry_after if ever else None,
        )

    def limit(self, ceiling: int) -> int:
        """Changes the ceiling, but not to less than what was accepted can come to need, and returns it."""
        self.ceiling = max(ceiling, self.weights + self.reserved)
        return self.ceiling

    def hold(self, size: int) -> None:
        """Takes memory for weights that come in addition, such as an adapter's.

        Raises:
            MemoryExhausted: there is not so much left.
        """
        wanted = self.weights + self.reserved + size
        if self.ceiling is not None and wanted > self.ceiling:
            raise MemoryExhausted(
                f"an adapter of {mib(size)} has no room beside the model's {mib(self.weights)} and "
                f"requests of up to {mib(self.reserved)}: the limit is {mib(self.ceiling)}. Unload another "
                "one, or try again when requests have ended",
                metadata={
                    "need_bytes": str(size),
                    "ceiling_bytes": str(self.ceiling),
                    WANTED: str(wanted),
                },
            )
        self.weights += size

    def release(self, holder: Hashable) -> None:
        """Gives back what a row reserved."""
        self._reserved.pop(holder, None)
        self._alone.pop(holder, None)
