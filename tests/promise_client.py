"""A client that opens streams, says `ready` once each has begun, and reads on until it is killed."""

from __future__ import annotations

import asyncio
import sys

from forebay.inference.v1 import inference_pb2 as pb
from forebay.inference.v1 import inference_pb2_grpc
from forebay.kit.channel import connect


async def main(address: str, name: str, count: int) -> None:
    begun = asyncio.Semaphore(0)
    async with connect(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def read(number: int) -> None:
            request = pb.GenerateRequest(
                model="m",
                request_id=f"{name}-{number}",
                messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=f"{name} {number}")])],
                limits=pb.GenerationLimits(max_output_token_count=3000),
            )
            request.backend_options["scripted"].update({"token_count": 3000, "token_delay": "100ms"})
            deltas = 0
            async for event in stub.Generate(request):
                deltas += event.HasField("delta")
                if deltas == 1:
                    begun.release()

        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(read(number))
            for _ in range(count):
                await begun.acquire()
            print("ready", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
