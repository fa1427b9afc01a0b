"""The health check of containers: asks a Forebay process over gRPC and exits 0 if it says SERVING."""

from __future__ import annotations

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def main() -> int:
    """Returns the exit code."""
    address = os.environ.get("FOREBAY_HEALTH_ADDRESS", "127.0.0.1:50150")
    try:
        with grpc.insecure_channel(address) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=4)
    except grpc.RpcError as error:
        sys.stderr.write(f"{address}: {error.code().name}\n")
        return 1
    state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    sys.stderr.write(f"{address}: {state}\n")
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
