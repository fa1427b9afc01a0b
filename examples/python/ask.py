"""Streams one reply from Forebay: the answer to standard output, what became of it to standard error."""

from __future__ import annotations

import asyncio
import sys

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc

DEADLINE_SECONDS = 120.0
"""A model may have to be loaded first."""

OPTIONS = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # grpcio waits a minute for the answer to a ping unless this says less, too.
    ("grpc.http2.ping_timeout_ms", 5_000),
]


class NotWholeError(Exception):
    """A stream ended well and without `finished`."""


async def ask(address: str, model: str, prompt: str) -> None:
    """Prints a reply as it comes."""
    message = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=prompt)])
    request = pb.GenerateRequest(model=model, messages=[message])
    backend, finished = "", None
    # One channel serves a whole program and all of its calls at once. Leaving the block cancels the call.
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        async for event in stub.Generate(request, timeout=DEADLINE_SECONDS):
            match event.WhichOneof("event"):
                case "started":
                    backend = event.started.backend
                case "continued":
                    backend = event.continued.backend
                case "delta":
                    print(event.delta.text, end="", flush=True)
                case "finished":
                    finished = event.finished
    if finished is None:
        raise NotWholeError("the stream ended without `finished`: what came is only a part of the answer")
    print(
        f"\nbackend {backend}, {pb.FinishReason.Name(finished.reason)},"
        f" {finished.usage.prompt_token_count} prompt tokens,"
        f" {finished.usage.output_token_count} output tokens",
        file=sys.stderr,
    )


def explain(error: grpc.aio.AioRpcError) -> list[str]:
    """Returns the lines that tell what an error says of itself."""
    lines = [f"{error.code().name}: {error.details()}"]
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has the methods of a Call
    for detail in status.details if status is not None else ():
        info, bad, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        if detail.Unpack(info):
            lines.append(f"reason {info.reason}")
            lines += [f"  {key}: {value}" for key, value in info.metadata.items()]
        elif detail.Unpack(bad):
            lines += [f"field {each.field}: {each.description}" for each in bad.field_violations]
        elif detail.Unpack(retry):
            lines.append(f"retry after {retry.retry_delay.ToTimedelta().total_seconds():g} s")
    return lines


def main(arguments: list[str]) -> int:
    """Asks what the command line says and returns the exit code."""
    if len(arguments) == 2:
        arguments = ["127.0.0.1:50150", *arguments]
    if len(arguments) != 3:
        print("usage: ask.py [ADDRESS] MODEL PROMPT", file=sys.stderr)
        return 2
    try:
        asyncio.run(ask(*arguments))
    except KeyboardInterrupt:
        return 130
    except NotWholeError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except grpc.aio.AioRpcError as error:
        print("", *explain(error), sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
