"""The terminal program behind `forebay top`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import ClassVar

from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import DataTable, Footer, Static, TabbedContent, TabPane

from forebay.cli.client import Client
from forebay.cli.problems import Problem, from_failure
from forebay.cli.top import cells
from forebay.cli.top.cells import Cells
from forebay.cli.top.follow import Follower
from forebay.cli.top.picture import Picture
from forebay.fleet.v1 import fleet_pb2 as fleet_pb
from forebay.kit.failure import Failure
from forebay.models.v1 import models_pb2 as models_pb

REDRAW = 0.2
"""Seconds between two drawings at most: news comes with every token, and nobody reads faster."""


class Rows(DataTable[object]):
    """A table that is given all its rows again and again, and keeps its cursor on the same one."""

    def __init__(self, headings: Sequence[str], *, id: str) -> None:  # noqa: A002  # textual's own name for it
        super().__init__(id=id, cursor_type="row", zebra_stripes=True)
        self._headings = tuple(headings)

    def on_mount(self) -> None:
        """Adds the columns."""
        for heading in self._headings:
            self.add_column(heading, key=heading)

    @property
    def keys(self) -> list[str]:
        """Keys of the rows, from the top."""
        return [str(row.key.value) for row in self.ordered_rows]

    @property
    def selected(self) -> str:
        """Key of the row under the cursor; empty if there is none."""
        keys = self.keys
        return keys[self.cursor_row] if 0 <= self.cursor_row < len(keys) else ""

    def fill(self, rows: Sequence[tuple[str, Cells]]) -> None:
        """Shows these rows, each under its key."""
        keys = [key for key, _ in rows]
        if keys != self.keys:
            kept, place = self.selected, self.cursor_row
            self.clear()
            for key, row in rows:
                self.add_row(*row, key=key)
            self.move_cursor(row=keys.index(kept) if kept in keys else min(place, max(0, len(keys) - 1)))
            return
        for key, row in rows:
            for heading, cell in zip(self._headings, row, strict=True):
                if self.get_cell(key, heading) != cell:
                    self.update_cell(key, heading, cell, update_width=True)


class Top(App[None]):
    """Shows an orchestrator, and drains, resumes, loads and unloads behind it.

    Args:
        client: the orchestrator.
        interval: seconds between two looks at what it is doing.
    """

    TITLE = "forebay top"
    CSS = """
    #headline, #summary, #decision { text-wrap: nowrap; text-overflow: ellipsis; }
    #headline { height: 1; background: $boost; }
    #summary { height: 3; margin: 0 0 1 0; }
    #backends { height: auto; max-height: 40%; min-height: 3; margin: 0 0 1 0; }
    TabbedContent { height: 1fr; }
    TabPane { padding: 0; }
    #why { height: auto; max-height: 30%; border-top: solid $primary-darken-2; }
    #decision { height: 1; }
    #candidates { height: auto; max-height: 10; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("d", "drain", "Drain"),
        Binding("r", "resume", "Resume"),
        Binding("l", "load", "Load"),
        Binding("u", "unload", "Unload"),
        Binding("1", "show('live')", "Live"),
        Binding("2", "show('recent')", "Recent"),
        Binding("3", "show('models')", "Models"),
        Binding("p", "pause", "Pause"),
        Binding("q", "quit", "Quit"),
    ]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, client: Client, *, interval: float) -> None:
        super().__init__()
        self.picture = Picture()
        self._client = client
        self._interval = interval
        self._is_stale = True
        self._is_paused = False

    def compose(self) -> ComposeResult:
        """Lays the screen out."""
        yield Static(id="headline")
        yield Static(id="summary")
        yield Rows(cells.BACKENDS, id="backends")
        with TabbedContent(initial="live"):
            with TabPane("Live requests", id="live"):
                yield Rows(cells.REQUESTS, id="live-rows")
            with TabPane("Recent requests", id="recent"):
                yield Rows(cells.REQUESTS, id="recent-rows")
            with TabPane("Models", id="models"):
                yield Rows(cells.MODELS, id="models-rows")
        with Vertical(id="why"):
            yield Static(id="decision")
            yield Rows(cells.CANDIDATES, id="candidates")
        yield Footer()

    def on_mount(self) -> None:
        """Begins to follow."""
        self.query_one("#backends", Rows).focus()
        self.set_interval(REDRAW, self._draw_if_stale)
        self._follow()

    @work
    async def _follow(self) -> None:
        await Follower(self._client, self.picture, interval=self._interval, on_change=self._changed).run()

    def _changed(self) -> None:
        self._is_stale = True

    def _draw_if_stale(self) -> None:
        if self._is_stale and not self._is_paused and self._is_whole:
            self._is_stale = False
            self.draw()

    @property
    def _is_whole(self) -> bool:
        """Whether everything is on the screen: not before it is laid out, nor once it is taken away."""
        return bool(self.query("#headline")) and bool(self.query("#candidates"))

    def draw(self) -> None:
        """Draws the picture."""
        picture = self.picture
        self._draw_headline()
        self.query_one("#summary", Static).update(cells.summary(picture))
        self._rows("backends").fill(
            [(name, cells.backend_row(each)) for name, each in picture.backends.items()]
        )
        self._rows("live-rows").fill([(each.request_id, cells.request_row(each)) for each in picture.active])
        self._rows("recent-rows").fill([(each.request_id, cells.request_row(each)) for each in picture.ended])
        self._rows("models-rows").fill(
            [(f"{name}/{model.id}", cells.model_row(name, model)) for name, model in picture.models()]
        )
        self._draw_decision()

    def _draw_headline(self) -> None:
        line = cells.headline(self.picture, self._client.address, is_paused=self._is_paused)
        self.query_one("#headline", Static).update(line)

    def _draw_decision(self) -> None:
        """Shows why the request under the cursor went where it went; without one, the newest."""
        place = self.query_one(TabbedContent).active
        picture = self.picture
        request = picture.request(self._rows(f"{place}-rows").selected) if place != "models" else None
        if request is None:
            request = next(iter((*reversed(picture.active), *picture.ended)), None)
        why = self.query_one("#why")
        why.display = request is not None and bool(request.candidates)
        if request is None:
            return
        self.query_one("#decision", Static).update(cells.decision_title(request))
        rows = [cells.candidate_row(each, is_chosen=_is_chosen(request, each)) for each in request.candidates]
        self._rows("candidates").fill([(str(place), row) for place, row in enumerate(rows)])

    def on_data_table_row_highlighted(self) -> None:
        """The cursor moved: another request is looked at."""
        if self._is_whole:
            self._draw_decision()

    def on_tabbed_content_tab_activated(self) -> None:
        """Another list is looked at."""
        if self._is_whole:
            self._draw_decision()

    def _rows(self, name: str) -> Rows:
        return self.query_one(f"#{name}", Rows)

    # What the keys do.

    def action_show(self, pane: str) -> None:
        """Shows a list and goes there."""
        self.query_one(TabbedContent).active = pane
        self._rows(f"{pane}-rows").focus()

    def action_pause(self) -> None:
        """Stops drawing, so that something can be read, or goes on."""
        self._is_paused = not self._is_paused
        self._is_stale = True
        self._draw_headline()

    def action_drain(self) -> None:
        """Keeps new calls away from the backend under the cursor."""
        if backend := self._backend():
            self._act(f"{backend} is drained", lambda: self._client.drain(backend))

    def action_resume(self) -> None:
        """Lets calls go to the backend under the cursor again."""
        if backend := self._backend():
            self._act(f"{backend} takes calls again", lambda: self._client.resume(backend))

    def action_load(self) -> None:
        """Loads the model under the cursor."""
        if found := self._model():
            backend, model = found
            request = models_pb.LoadModelRequest(model=model, backend=backend)
            self._act(
                f"{model} is loaded on {backend}", lambda: self._client.load(request, lambda event: None)
            )

    def action_unload(self) -> None:
        """Removes the model under the cursor from memory, once the calls on it are done."""
        if found := self._model():
            backend, model = found
            request = models_pb.UnloadModelRequest(model=model, backend=backend)
            self._act(f"{model} is unloaded from {backend}", lambda: self._client.unload(request))

    def _backend(self) -> str:
        name = self._rows("backends").selected
        if not name:
            self.notify("there is no backend yet", severity="warning")
        return name

    def _model(self) -> tuple[str, str] | None:
        if self.query_one(TabbedContent).active != "models":
            self.notify("choose a model first: key 3 lists them", severity="warning")
            return None
        backend, _, model = self._rows("models-rows").selected.partition("/")
        if not model:
            self.notify("no backend has told of a model yet", severity="warning")
            return None
        return backend, model

    @work
    async def _act(self, done: str, act: Callable[[], Awaitable[object]]) -> None:
        try:
            await act()
        except Problem as problem:
            self._complain(problem)
        except Failure as failure:
            self._complain(from_failure(failure))
        else:
            self.notify(done, markup=False)

    def _complain(self, problem: Problem) -> None:
        text = f"{problem.message}: {problem.remedy}" if problem.remedy else problem.message
        self.notify(text, severity="error", timeout=10, markup=False)


def _is_chosen(request: fleet_pb.RequestActivity, candidate: fleet_pb.Candidate) -> bool:
    is_there = candidate.backend == request.backend and not candidate.refused_by
    return is_there and request.served_model in ("", candidate.model)
