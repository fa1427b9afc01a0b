"""The pages tell the truth about the code."""

from __future__ import annotations

import re

import pytest

import docs
from forebay.cli.settings import settings_types
from forebay.kit.config import SECTIONS, load

PAGES = [docs.ROOT / "README.md", docs.ROOT / "CONTRIBUTING.md", *sorted((docs.ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("table", docs.TABLES)
def test_a_table_is_what_the_code_says(table: str) -> None:
    path, old, new = docs.fill(table)
    assert old == new, f"{path.name} is out of date: run `python tests/docs.py`"
    assert f"<!-- table:{table} -->" in old


def test_the_example_configuration_documents_every_key_as_the_code_has_it() -> None:
    assert docs.EXAMPLE.read_text() == docs.example(), "run `python tests/docs.py`"


def test_the_example_configuration_is_right_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    types = settings_types()
    assert load(types, path=docs.EXAMPLE) == {name: kind() for name, kind in types.items()}


def test_every_key_has_a_meaning() -> None:
    for name in SECTIONS:
        assert "|  |" not in docs.section(name), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: object) -> None:
    path = docs.ROOT / str(page)
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_make_target_in_the_pages_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9 -]+):(?!=)", (docs.ROOT / "Makefile").read_text(), re.MULTILINE))
    names = {name for line in targets for name in line.split()}
    for page in PAGES:
        for name in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE):
            assert name in names, f"{page.name} names make {name}"


def test_the_stack_tables_have_a_row_for_every_layer() -> None:
    stack = (docs.ROOT / "orchestrator/forebay/orchestrator/stack.py").read_text()
    page = (docs.ROOT / "docs/architecture.md").read_text()
    layers = set(
        re.findall(r"(?:lambda inner: |return |^        )([A-Z][a-z]+)(?:\(|,$)", stack, re.MULTILINE)
    )
    layers |= set(re.findall(r"= ([A-Z][a-z]+)\(inner", stack)) | set(
        re.findall(r"around=([A-Z][a-z]+)\(", stack)
    )
    assert {"Account", "Verify", "Limit", "Span", "Route", "Watchdog"} <= layers
    assert [name for name in sorted(layers) if f"| `{name}` |" not in page] == []
