"""Refuse to start an engine, a server or a build in a test that is not marked for it.

`make check` selects tests by mark, so a missing mark would make it slow without a failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_running: list[pytest.Item] = []


@contextmanager
def of(item: pytest.Item) -> Iterator[None]:
    """Use the marks of `item` until `with` ends."""
    _running.append(item)
    try:
        yield
    finally:
        _running.remove(item)


def require(*names: str) -> None:
    """Raise if a test runs and has none of the marks `names`."""
    for item in _running[-1:]:
        marks = {mark.name for mark in item.iter_markers()}
        assert marks.intersection(names), f"{item.nodeid}: mark it with one of {names}"
