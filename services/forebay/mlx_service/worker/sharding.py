"""Runs a model that several processes share, all in step. Everything here runs on the engine's thread.

Rank 0 decides and the others do the same: they make the same batches, insert
and remove the same rows, and take the same steps, in the same order. Only rank
0 picks tokens; the others get them. So grammars, seeds and samplers exist once,
and ranks cannot drift apart over the last bit of a probability.

Every value that ranks exchange is evaluated before the next is begun. mlx may
order independent work as it likes, and two ranks that order it differently
would read each other's rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from forebay.kit.failure import ModelLoadFailed
from forebay.mlx_service.worker.batch import Batch, Generated, Kept, Prefilled
from forebay.mlx_service.worker.followers import GroupLostError
from forebay.mlx_service.worker.runtime import KVCache, load_model, make_prompt_cache, mx
from forebay.mlx_service.worker.sampling import Array, Processor, Sampler

Group: TypeAlias = Any
"""An `mx.distributed.Group`. mlx has no types that mypy can follow."""

Tell: TypeAlias = Callable[[dict[str, object]], None]


def join(rank: int, addresses: Sequence[str]) -> Group:
    """Joins the ranks over sockets, and returns when all are there.

    Args:
        rank: this process's.
        addresses: where each rank listens.

    Raises:
        ModelLoadFailed: they do not find each other.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([[address] for address in addresses], file)
        file.flush()
        os.environ.update(MLX_RANK=str(rank), MLX_HOSTFILE=file.name)
        try:
            group: Group = mx.distributed.init(strict=True, backend="ring")
        except (RuntimeError, ValueError) as error:
            raise ModelLoadFailed(
                f"the ranks of the model do not find each other: {error}", metadata={"rank": str(rank)}
            ) from error
    return group


def load_part(path: Path, group: Group, kind: str) -> object:
    """Returns this rank's part of a model, in memory.

    Raises:
        ModelLoadFailed: the model cannot be shared so, or not loaded.
    """
    try:
        model, config = load_model(path, lazy=True, strict=True, trust_remote_code=False)
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else ""
        raise ModelLoadFailed(f"{path.name}: its weights cannot be loaded: {text}") from error
    family = config.get("model_type", "unknown")
    count = int(group.size())
    try:
        if kind == "tensor":
            if not hasattr(model, "shard"):
                raise ModelLoadFailed(f"{path.name}: models of family {family} cannot be shared by tensor")
            heads = config.get("num_key_value_heads", config.get("num_attention_heads", 0))
            if isinstance(heads, int) and heads % count:
                raise ModelLoadFailed(f"{path.name}: {heads} heads cannot be shared by {count} ranks")
            model.shard(group)
        else:
            if not hasattr(getattr(model, "model", None), "pipeline"):
                raise ModelLoadFailed(f"{path.name}: models of family {family} cannot be shared by layers")
            model.model.pipeline(group)
        mx.eval(model.parameters())
    except (RuntimeError, ValueError, AttributeError) as error:
        raise ModelLoadFailed(f"{path.name}: it cannot be shared: {error}") from error
    result: object = model
    return result


class Leader:
    """Rank 0: whatever it does with the model, the others do too.

    Args:
        tell: tells the other ranks what to do.
        start: starts them and returns where each rank listens.
    """

    def __init__(self, tell: Tell, start: Callable[[], Sequence[str]]) -> None:
        self._tell = tell
        self._start = start
        self._group: Group = None
        self._batches = 0
        self._is_stepping = False
        self._caches: list[object] = []

    def load(self, path: Path, kind: str) -> object:
        """Starts the other ranks and returns this one's part of the model. See `load_part`."""
        self._group = join(0, self._start())
        model = load_part(path, self._group, kind)
        _mirror(model, self._forward)
        return model

    def new_batch(self, model: object, *, rows: int, prefill_step: int, end_tokens: Sequence[int]) -> Batch:
        """Returns an empty batch that all ranks run."""
        self._batches += 1
        return _LedBatch(
            self, self._batches, model, rows=rows, prefill_step=prefill_step, end_tokens=end_tokens
        )

    def tell(self, order: dict[str, object]) -> None:
        """Tells the other ranks what is done next."""
        self._tell(order)

    def together(
        self, do: Callable[[], tuple[list[Prefilled], list[Generated]]]
    ) -> tuple[list[Prefilled], list[Generated]]:
        """Takes a step that the other ranks were told of. One that fails here leaves them in the middle.

        Raises:
            GroupLostError: the step failed.
        """
        self._is_stepping = True
        try:
            return do()
        except Exception as error:
            raise GroupLostError("a step of a shared model failed") from error
        finally:
            self._is_stepping = False

    def spread(self, sampler: Sampler) -> Sampler:
        """Returns a sampler whose tokens all ranks get."""

        def sample(logprobs: Array) -> Array:
            mx.eval(logprobs)
            tokens: Array = sampler(logprobs).astype(mx.int32)
            mx.eval(tokens)
            return _sum(tokens, self._group)

        return sample

    def _forward(self, inputs: Array, cache: object) -> bool:
        """Tells the others of a call of the model outside a batch, such as one that measures."""
        if self._is_stepping:
            return False
        if not any(cache is known for known in self._caches):
            self._caches.append(cache)
        number = next(i for i, known in enumerate(self._caches) if cache is known)
        self._tell({"do": "forward", "cache": number, "tokens": inputs.tolist()})
        return True


def _sum(tokens: Array, group: Group) -> Array:
    total: Array = mx.distributed.all_sum(tokens, group=group)
    mx.eval(total)
    return total.astype(mx.uint32)


def _mirror(model: object, forward: Callable[[Array, object], bool]) -> None:
    """Makes a model tell of its calls, and end each before the next begins."""
    kind: Any = type(model)

    class Mirrored(kind):  # type: ignore[misc]  # the class is known only now
        def __call__(self, inputs: Array, cache: object = None, **more: object) -> Array:
            is_told = forward(inputs, cache)
            result: Array = super().__call__(inputs, cache=cache, **more)
            if is_told:
                mx.eval(result)
            return result

    model.__class__ = Mirrored


class _LedBatch(Batch):
    """A batch of rank 0's, which the other ranks run too."""

    def __init__(
        self,
        leader: Leader,
        number: int,
        model: object,
        *,
        rows: int,
        prefill_step: int,
        end_tokens: Sequence[int],
    ) -> None:
        super().__init__(model, rows=rows, prefill_step=prefill_step, end_tokens=end_tokens)
        self._leader = leader
        self._number = number
        self._shared: int | None = None
        self._tell("new", rows=rows, prefill_step=prefill_step, end_tokens=list(end_tokens))

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
        """Adds a row, here and elsewhere.

        See `Batch.insert`; caches of other calls are not taken, and where nothing is kept no step has to end.
        """
        assert caches is None, "what was read before is of this rank only"
        uid = super().insert(tokens, most=most, sampler=self._leader.spread(sampler), processors=processors)
        self._tell("insert", tokens=list(tokens), most=most)
        return uid

    def step(self) -> tuple[list[Prefilled], list[Generated]]:
        """Takes a step with all ranks."""
        self._tell("step")
        return self._leader.together(super().step)

    def remove(self, uid: int) -> Kept | None:
        """Takes a row out everywhere. What attention holds of it is of no use: each rank has a part."""
        self._tell("remove", uid=uid)
        super().remove(uid)
        return None

    def share_step(self, most: int | None) -> None:
        """See `Batch.share_step`."""
        if most != self._shared:
            self._shared = most
            self._tell("share", most=most)
        super().share_step(most)

    def close(self) -> None:
        """Gives back what the rows hold, everywhere."""
        with contextlib.suppress(GroupLostError):  # then there is nobody left to tell
            self._tell("close")
        super().close()

    def _tell(self, what: str, **more: object) -> None:
        self._leader.tell({"do": what, "batch": self._number, **more})


class Follower:
    """Any other rank: does what rank 0 does.

    Args:
        model: this rank's part.
        group: the ranks.
    """

    def __init__(self, model: object, group: Group) -> None:
        self._model = model
        self._group = group
        self._batches: dict[int, Batch] = {}
        self._caches: dict[int, object] = {}

    def obey(self, order: Mapping[str, Any]) -> None:
        """Does what rank 0 does next."""
        do = order["do"]
        if do == "forward":
            self._forward(order["cache"], order["tokens"])
        elif do == "new":
            self._caches.clear()
            self._batches[order["batch"]] = Batch(
                self._model,
                rows=order["rows"],
                prefill_step=order["prefill_step"],
                end_tokens=order["end_tokens"],
            )
        elif do == "insert":
            self._batches[order["batch"]].insert(
                order["tokens"], most=order["most"], sampler=self._take(), processors=()
            )
        elif do == "step":
            self._batches[order["batch"]].step()
        elif do == "remove":
            self._batches[order["batch"]].remove(order["uid"])
        elif do == "share":
            self._batches[order["batch"]].share_step(order["most"])
        elif do == "close":
            self._batches.pop(order["batch"]).close()
        else:
            raise ValueError(f"rank 0 does what is not known here: {do!r}")

    def close(self) -> None:
        """Gives back everything."""
        while self._batches:
            self._batches.popitem()[1].close()
        self._caches.clear()
        del self._model

    def _forward(self, number: int, tokens: list[list[int]]) -> None:
        if number not in self._caches:
            self._caches[number] = make_prompt_cache(self._model)
        assert callable(self._model)
        mx.eval(self._model(mx.array(tokens), cache=self._caches[number]))

    def _take(self) -> Sampler:
        """Returns a sampler that takes rank 0's tokens. One a row: what all rows share is called once."""

        def sample(logprobs: Array) -> Array:
            mx.eval(logprobs)  # the model's own exchanges come first, as on rank 0
            return _sum(mx.zeros(logprobs.shape[:-1], mx.int32), self._group)

        return sample
