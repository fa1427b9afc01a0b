"""Channels and servers with the arguments that make them notice what happens.

The values were found by freezing, killing and idling real peers on grpcio 1.85.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import grpc

MESSAGE_BYTES = 16 * 2**20
"""Largest message. Images and batches of embeddings outgrow gRPC's 4 MiB."""

Options = list[tuple[str, int | str]]

SERVER_OPTIONS: Options = [
    # On Linux two servers could otherwise share a port, and each would get half of the calls.
    ("grpc.so_reuseport", 0),
    # Our own clients ping every second; the default would send them away with ENHANCE_YOUR_CALM.
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8192),
]

MESH_OPTIONS: Options = [
    ("grpc.keepalive_time_ms", 1_000),
    ("grpc.keepalive_timeout_ms", 1_500),
    # The argument that counts: without it a frozen peer is noticed after 60 s, whatever the two above say.
    ("grpc.http2.ping_timeout_ms", 1_500),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # The name misleads: it is how long one attempt may take until the peer's first HTTP/2 frame. A busy peer
    # needs more than 100 ms for that now and then. One that refuses is tried again after the backoff anyway.
    ("grpc.min_reconnect_backoff_ms", 1_500),
    # With jitter of a fifth: a backend that comes back after hours is connected to within a second.
    ("grpc.max_reconnect_backoff_ms", 750),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    # Retries are decided once, above, where it is known what was already sent.
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    # With the probe a reader that stops reading has 5 MB piled up for it, without it 64 KiB.
    ("grpc.http2.bdp_probe", 0),
]


def connect(
    address: str, *, tls_roots: Path | None = None, options: Sequence[tuple[str, int | str]] = ()
) -> grpc.aio.Channel:
    """Returns a channel to another process of the mesh. It connects when it is first used.

    Args:
        address: `host:port` or `unix:/path`.
        tls_roots: PEM file with the roots to trust; None is plaintext.
        options: channel arguments that go before ours.
    """
    merged = list((dict(MESH_OPTIONS) | dict(options)).items())
    if tls_roots is None:
        return grpc.aio.insecure_channel(address, options=merged)
    credentials = grpc.ssl_channel_credentials(root_certificates=tls_roots.read_bytes())
    return grpc.aio.secure_channel(address, credentials, options=merged)
