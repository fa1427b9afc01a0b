"""Which of a backend's models a name means.

Frameworks spell one model differently: `llama3.2` is `llama3.2:latest` to
Ollama. A name is matched from the strictest reading to the loosest, so that a
loose reading never takes precedence over a model that is called exactly so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from forebay.inference.v1 import inference_pb2 as pb

_LATEST = ":latest"


def _as_is(name: str) -> str:
    return name


def _bare(name: str) -> str:
    return name.casefold().removesuffix(_LATEST)


_READINGS: tuple[Callable[[str], str], ...] = (_as_is, str.casefold, _bare)


def find_model(name: str, models: Iterable[pb.Model]) -> pb.Model | None:
    """Returns the model that is meant, or None if it is not among them."""
    listed = list(models)
    for read in _READINGS:
        wanted = read(name)
        for model in listed:
            if read(model.id) == wanted:
                return model
        for model in listed:
            if any(read(alias) == wanted for alias in model.aliases):
                return model
    return None


def is_called(model: pb.Model, name: str) -> bool:
    """Returns whether a name is the model's own, and not another name of it."""
    return _bare(model.id) == _bare(name)


def is_same(asked: str, answered: str, models: Iterable[pb.Model]) -> bool:
    """Returns whether two names mean one model of a backend.

    Args:
        asked: the name the backend was given.
        answered: the name it answered with.
        models: the backend's models.
    """
    if asked == answered or _bare(asked) == _bare(answered):
        return True
    listed = list(models)
    one, other = find_model(asked, listed), find_model(answered, listed)
    return one is not None and other is not None and one.id == other.id
