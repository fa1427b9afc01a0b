"""Puts the long tests into an order and says how long they take."""

from __future__ import annotations

import pytest

_SHORT = 0.1
"""Minutes that a long test takes which does not say more."""


def _minutes(item: pytest.Item) -> float:
    marker = item.get_closest_marker("soak")
    return float(marker.kwargs.get("minutes", _SHORT)) if marker is not None else 0.0


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Has `make soak` run what is short first, so that whoever breaks it off has seen the most."""
    if config.option.markexpr == "soak":
        items.sort(key=_minutes)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Says how long it takes."""
    minutes = sum(map(_minutes, items))
    return [f"about {minutes / 60:.1f} hours on two idle cores"] if minutes >= 1.0 else []
