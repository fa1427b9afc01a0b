"""Picks a model where the user named none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from forebay.cli.client import Client
from forebay.cli.problems import ExitCode, Problem
from forebay.inference.v1 import inference_pb2 as pb
from forebay.kit.failure import InvalidRequest, ModelNotFound
from forebay.mlx_service.default_model import DEFAULT_EMBEDDING_MODEL

_USABLE = (pb.Model.STATE_ACTIVE, pb.Model.STATE_LOADING, pb.Model.STATE_AVAILABLE)


def support(model: pb.Model, capability: pb.Capability.ValueType) -> bool | None:
    """Returns whether a model can do something, or None where nobody knows."""
    for report in model.capabilities:
        if report.capability == capability:
            return {pb.CapabilityReport.SUPPORT_YES: True, pb.CapabilityReport.SUPPORT_NO: False}.get(
                report.support
            )
    return None


def pick(models: Iterable[pb.Model], capability: pb.Capability.ValueType) -> str:
    """Returns the model to use: the first in memory that can do it, else the only one that can.

    One that is known to be able to goes before one of which nothing is known,
    except that nothing known counts as unable where the model says that it can
    embed and nothing else.

    Raises:
        Problem: there is none, or there are several and none is in memory.
    """
    usable = [m for m in models if m.state in _USABLE or m.state == pb.Model.STATE_UNSPECIFIED]
    able = [m for m in usable if support(m, capability) is True]
    unknown = [m for m in usable if support(m, capability) is None and not _embeds_only(m, capability)]
    for group in (able, unknown):
        active = [m for m in group if m.state == pb.Model.STATE_ACTIVE]
        if active:
            return active[0].id
    ids = sorted({m.id for m in (*able, *unknown)})
    if len(ids) == 1:
        return ids[0]
    word = pb.Capability.Name(capability).removeprefix("CAPABILITY_").lower()
    if not ids:
        example = f" {DEFAULT_EMBEDDING_MODEL.id}" if capability == pb.CAPABILITY_EMBED else ""
        raise Problem(
            f"there is no model that can {word}",
            remedy=f"fetch one with `forebay models pull{example}`, or see `forebay doctor`",
            code=ExitCode.NOT_FOUND,
        )
    raise Problem(
        f"there are {len(ids)} models and none is loaded; name one with --model",
        code=ExitCode.REQUEST,
        lines=ids,
    )


def _embeds_only(model: pb.Model, capability: pb.Capability.ValueType) -> bool:
    return (
        capability == pb.CAPABILITY_GENERATE
        and support(model, pb.CAPABILITY_EMBED) is True
        and support(model, pb.CAPABILITY_GENERATE) is None
    )


async def with_model(
    client: Client,
    model: str,
    capability: pb.Capability.ValueType,
    attempt: Callable[[str], Awaitable[None]],
    *,
    backend: str = "",
) -> None:
    """Runs `attempt` with the named model, or with none, or with one picked where none is refused.

    An orchestrator with a default model takes a request without one. Anything
    else refuses it before it sends an event, so a second attempt shows nothing twice.
    """
    if model:
        await attempt(model)
        return
    try:
        await attempt("")
    except (InvalidRequest, ModelNotFound) as refusal:
        if isinstance(refusal, InvalidRequest) and not _is_about_model(refusal):
            raise
    else:
        return
    listing = await client.models([backend] if backend else [])
    await attempt(pick(listing.models, capability))


def _is_about_model(refusal: InvalidRequest) -> bool:
    return not refusal.violations or any(path == "model" for path, _ in refusal.violations)
