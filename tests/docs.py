"""Tables in the docs that are generated from the code: `python tests/docs.py` writes them, a test compares them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from forebay.kit.failure import Failure

ROOT = Path(__file__).parent.parent


def failures() -> str:
    """Returns the table of every failure."""
    lines = ["| reason | code | whose | elsewhere | meaning |", "| --- | --- | --- | --- | --- |"]
    classes: list[type[Failure]] = []
    pending = list(Failure.__subclasses__())
    while pending:
        kind = pending.pop(0)
        classes.append(kind)
        pending.extend(kind.__subclasses__())
    for kind in classes:
        first_line = (kind.__doc__ or "").strip().splitlines()[0]
        elsewhere = "yes" if kind.elsewhere else ""
        lines.append(f"| {kind.reason} | {kind.code.name} | {kind.fault.value} | {elsewhere} | {first_line} |")
    return "\n".join(lines)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {"failures": ("docs/protocol.md", failures)}


def fill(name: str) -> tuple[Path, str, str]:
    """Returns a page, its text, and its text with the named table as the code has it."""
    page, make = TABLES[name]
    path = ROOT / page
    old = path.read_text()
    mark = f"<!-- table:{name} -->"
    new = re.sub(
        rf"{re.escape(mark)}\n(?:\n\|(?:.*\n)+?(?=\n))?",
        lambda _: f"{mark}\n\n{make()}\n",
        old,
        count=1,
    )
    return path, old, new


if __name__ == "__main__":
    for table in sys.argv[1:] or TABLES:
        page_path, _, text = fill(table)
        page_path.write_text(text)
