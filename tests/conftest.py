"""The order of the suite."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first: a long one that comes last would keep one of two test processes idle."""
    items.sort(key=lambda item: "tests/system/" not in item.nodeid)
