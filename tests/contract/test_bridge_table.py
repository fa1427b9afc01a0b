"""The table of what each framework can do is what the bridges answer."""

from __future__ import annotations

from pathlib import Path

import pytest

import bridge_table

pytestmark = pytest.mark.mlx


async def test_the_table_of_capabilities_is_what_the_bridges_answer(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core", reason="MLX has no build for this machine")
    text = bridge_table.PAGE.read_text()
    lines = text[text.index(bridge_table.MARK) :].splitlines()[2:]
    written = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")
    ]
    found = await bridge_table.columns(tmp_path)
    made = [
        [c.strip() for c in line.strip("|").split("|")] for line in bridge_table.table(found).splitlines()
    ]
    # Without llama-server, its column alone is left out.
    columns = [0, *(i for i, name in enumerate(written[0]) if name in found)]
    assert [[row[i] for i in columns] for row in written] == made, "run `python tests/bridge_table.py`"
