"""The interface `mlx.grpc.engine.MlxEngine`, if the package that has its messages is installed."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

from google.protobuf.runtime_version import VersionError

from forebay.kit.failure import InvalidRequest

logger = logging.getLogger(__name__)

PACKAGE = "smg_grpc_proto"
SERVICE = "mlx.grpc.engine.MlxEngine"

WORKER_FLAG = "--smg"
"""Makes a worker serve the interface too."""

Message: TypeAlias = Any
"""A message of the package, which is known only where it is installed."""


@dataclass(frozen=True, slots=True)
class Api:
    """The package's modules."""

    messages: ModuleType
    services: ModuleType
    common: ModuleType


def api() -> Api | None:
    """Returns the interface, or None where its package is not installed or does not fit the others."""
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    try:
        return Api(
            importlib.import_module(f"{PACKAGE}.generated.mlx_engine_pb2"),
            importlib.import_module(f"{PACKAGE}.generated.mlx_engine_pb2_grpc"),
            importlib.import_module(f"{PACKAGE}.generated.common_pb2"),
        )
    except (ImportError, RuntimeError, TypeError, VersionError) as error:
        # Generated code refuses older runtimes, and protobuf a second file of the same name.
        logger.warning("%s is not served: %s", SERVICE, error)
        return None


def refuse(path: str, text: str) -> InvalidRequest:
    """Returns the failure that a field of a request is."""
    return InvalidRequest(f"{path}: {text}", violations=[(path, text)])
