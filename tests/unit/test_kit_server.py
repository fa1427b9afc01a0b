"""What a server has waiting while nobody calls."""

from __future__ import annotations

import asyncio

from forebay.kit.config import ServerSettings
from forebay.kit.server import serving
from forebay.testing.client import client
from forebay.testing.scripted import ScriptedEngine


def _that_wait_for_calls() -> list[str]:
    named = (getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks())
    return [name for name in named if name.startswith("AioServer._request")]


async def test_one_task_waits_for_the_next_call_however_many_methods_there_are() -> None:
    engine = ScriptedEngine()
    async with serving(
        ServerSettings.model_validate({"address": "127.0.0.1:0"}), inference=engine, models=engine
    ) as up:
        await up.set_ready(True)
        async with client(up.address) as peer:
            models = await peer.list_models()
        assert [model.id for model in models] == ["scripted"]
        assert len(_that_wait_for_calls()) == 1
