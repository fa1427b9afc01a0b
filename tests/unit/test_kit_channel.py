"""Channels wait no longer than what is promised of a backend's return."""

from __future__ import annotations

from forebay.kit.channel import MESH_OPTIONS

JITTER = 0.2
"""By which gRPC lengthens a wait between two attempts to connect."""


def test_a_peer_that_returns_is_connected_to_within_a_second() -> None:
    longest = dict(MESH_OPTIONS)["grpc.max_reconnect_backoff_ms"]
    assert isinstance(longest, int)
    assert longest * (1 + JITTER) < 1000
