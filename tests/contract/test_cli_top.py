"""`forebay top` on a real orchestrator: what the screen shows, and what its keys do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from rich.text import Text
from textual.pilot import Pilot
from textual.widgets import Static

from contract.orchestrator_mesh import WAIT_SECONDS, Mesh
from forebay.cli.client import connected
from forebay.cli.top.screen import Rows, Top
from forebay.testing.calls import ask, with_options
from forebay.testing.scripted import ScriptedEngine

SIZE = (140, 40)


def engine(name: str, *models: str) -> ScriptedEngine:
    return ScriptedEngine(name=name, models=models or ("m",))


@asynccontextmanager
async def shown(mesh: Mesh, *, size: tuple[int, int] = SIZE) -> AsyncIterator[tuple[Top, Pilot[None]]]:
    async with connected(mesh.address) as client:
        top = Top(client, interval=0.05)
        async with top.run_test(size=size, notifications=True) as pilot:
            yield top, pilot


async def until(pilot: Pilot[None], holds: Callable[[], bool]) -> float:
    """Waits until something holds on the screen; returns the seconds that took."""
    loop = asyncio.get_running_loop()
    since = loop.time()
    while not holds():
        assert loop.time() - since < WAIT_SECONDS, screen(pilot)
        await pilot.pause(0.01)
    return loop.time() - since


def rows(pilot: Pilot[None], name: str) -> list[list[str]]:
    table = pilot.app.query_one(f"#{name}", Rows)
    return [[str(cell) for cell in table.get_row_at(place)] for place in range(table.row_count)]


def words(pilot: Pilot[None], name: str) -> str:
    return str(pilot.app.query_one(f"#{name}", Static).content)


def told(pilot: Pilot[None]) -> list[str]:
    return [str(note.message) for note in pilot.app._notifications]


def screen(pilot: Pilot[None]) -> str:
    return "\n".join(
        "".join(segment.text for segment in strip) for strip in pilot.app.screen._compositor.render_strips()
    )


async def test_the_screen_follows_a_kill_and_a_recovery(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine("a"), engine("b")) as mesh, shown(mesh) as (_, pilot):
        await until(
            pilot, lambda: [row[:2] for row in rows(pilot, "backends")] == [["a", "active"], ["b", "active"]]
        )
        assert "● live" in words(pilot, "headline")
        await mesh["a"].stop()
        await until(pilot, lambda: rows(pilot, "backends")[0][1] == "unreachable")
        await mesh["a"].start()
        await until(pilot, lambda: rows(pilot, "backends")[0][1].startswith("active"))


async def test_a_request_is_seen_while_it_runs_and_afterwards(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine("a"), engine("b", "other")) as mesh, shown(mesh) as (_, pilot):
        slow = with_options(ask(model="m"), token_count=5000, token_delay="5ms")
        call = mesh.client.Generate(slow, timeout=WAIT_SECONDS)
        await call.read()
        await until(pilot, lambda: any(row[0] == "decode" for row in rows(pilot, "live-rows")))
        assert rows(pilot, "live-rows")[0][1:4] == ["m", "a", "chat"]
        await until(pilot, lambda: len(rows(pilot, "candidates")) == 2)
        chosen, refused = rows(pilot, "candidates")
        assert (chosen[0], refused[0]) == ("a", "b")
        assert float(chosen[2]) > 0
        assert refused[3].startswith("model: ")
        call.cancel()
        await pilot.press("2")
        await until(pilot, lambda: [row[0] for row in rows(pilot, "recent-rows")] == ["cancelled"])
        await until(pilot, lambda: rows(pilot, "live-rows") == [])
        await mesh.generate(ask(model="m"))
        await until(
            pilot, lambda: [row[0] for row in rows(pilot, "recent-rows")] == ["succeeded", "cancelled"]
        )
        assert "requests 2" in words(pilot, "summary")


async def test_keys_drain_and_resume_the_backend_under_the_cursor(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine("a"), engine("b")) as mesh, shown(mesh) as (_, pilot):
        await until(pilot, lambda: len(rows(pilot, "backends")) == 2)
        await pilot.press("down", "d")
        await until(pilot, lambda: [row[1] for row in rows(pilot, "backends")] == ["active", "draining"])
        assert told(pilot) == ["b is drained"]
        await pilot.press("r")
        await until(pilot, lambda: [row[1] for row in rows(pilot, "backends")] == ["active", "active"])


async def test_keys_unload_and_load_the_model_under_the_cursor(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine("a", "m", "n")) as mesh, shown(mesh) as (_, pilot):
        await until(pilot, lambda: len(rows(pilot, "models-rows")) == 2)
        await pilot.press("u")
        await until(pilot, lambda: told(pilot) == ["choose a model first: key 3 lists them"])
        await pilot.press("3", "u")
        await until(pilot, lambda: ["m", "a", "available"] in [row[:3] for row in rows(pilot, "models-rows")])
        assert "m is unloaded from a" in told(pilot)
        await until(pilot, lambda: rows(pilot, "models-rows")[-1][0] == "m")
        await pilot.press("end", "l")
        await until(pilot, lambda: [row[2] for row in rows(pilot, "models-rows")] == ["active", "active"])
        assert "m is loaded on a" in told(pilot)


async def test_what_a_key_cannot_do_is_said_and_the_program_goes_on(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine("a")) as mesh, shown(mesh) as (_, pilot):
        await until(pilot, lambda: len(rows(pilot, "models-rows")) == 1)
        await mesh["a"].stop()
        await until(pilot, lambda: rows(pilot, "backends")[0][1] == "unreachable")
        await pilot.press("3", "u")
        await until(pilot, lambda: any("cannot be reached" in note for note in told(pilot)))
        assert pilot.app.is_running


async def test_a_lost_orchestrator_is_said_and_found_again(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine("a")) as mesh, shown(mesh) as (top, pilot):
        await until(pilot, lambda: "● live" in words(pilot, "headline") and len(rows(pilot, "backends")) == 1)
        address = mesh.address
        await mesh.up.drain()
        await mesh._stack.aclose()
        await until(pilot, lambda: "trying again" in words(pilot, "headline"))
        assert rows(pilot, "backends")[0][0] == "a"  # what was known stays on the screen
        async with Mesh(tmp_path, engine("a"), engine("c"), address=address):
            await until(pilot, lambda: "● live" in words(pilot, "headline"))
            await until(pilot, lambda: [row[0] for row in rows(pilot, "backends")] == ["a", "c"])
    assert top.return_code in (0, None)


async def test_pausing_holds_the_screen_still(tmp_path: Path) -> None:
    async with Mesh(tmp_path, engine("a")) as mesh, shown(mesh) as (top, pilot):
        await until(pilot, lambda: len(rows(pilot, "backends")) == 1)
        await pilot.press("p")
        assert "paused" in words(pilot, "headline")
        await mesh.generate(ask(model="m"))
        await until(pilot, lambda: len(top.picture.ended) == 1)
        assert rows(pilot, "recent-rows") == []
        await pilot.press("p")
        await until(pilot, lambda: len(rows(pilot, "recent-rows")) == 1)


@pytest.mark.parametrize("width", [40, 80, 200])
async def test_every_line_has_its_place_however_narrow_the_terminal_is(tmp_path: Path, width: int) -> None:
    async with Mesh(tmp_path, engine("a")) as mesh, shown(mesh, size=(width, 24)) as (top, pilot):
        await until(pilot, lambda: len(rows(pilot, "backends")) == 1)
        await pilot.press("p")  # so that these figures stay
        totals = top.picture.totals
        for field in totals.DESCRIPTOR.fields:
            if field.type == field.TYPE_INT64:
                setattr(totals, field.name, 123_456)
        top.draw()
        await pilot.pause()
        lines = screen(pilot).splitlines()
        assert [line.split()[0] for line in lines[:4]] == ["forebay", "running", "requests", "tokens/s"]
        assert [line.split()[0] for line in lines[5:7]] == ["backend", "a"]


async def test_names_from_outside_are_shown_as_they_are_and_move_nothing(tmp_path: Path) -> None:
    hostile = "[red]m[/]\x1b[2J"
    async with Mesh(tmp_path, engine("a", hostile)) as mesh, shown(mesh) as (_, pilot):
        await until(pilot, lambda: len(rows(pilot, "models-rows")) == 1)
        assert rows(pilot, "models-rows")[0][0] == "[red]m[/][2J"
        await mesh.generate(ask(model=hostile))
        await until(pilot, lambda: len(rows(pilot, "recent-rows")) == 1)
        assert isinstance(pilot.app.query_one("#recent-rows", Rows).get_row_at(0)[1], Text)


def test_without_a_terminal_it_says_what_programs_can_use(capsys: pytest.CaptureFixture[str]) -> None:
    from forebay.cli.app import main

    assert main(["top"]) == 2
    assert "needs a terminal: `forebay status --watch --json`" in capsys.readouterr().err
