"""Skips tests of profiles and pages where a package of their tiers is not installed.

Mooncake has no wheel for the newest Python.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from kvcache.profiles import shipped

needs_mooncake = pytest.mark.skipif(
    find_spec("mooncake") is None, reason="no Mooncake for this Python"
)


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a test of this profile or page."""
    return [needs_mooncake] if "mooncake" in name else []


each_shipped_profile = pytest.mark.parametrize(
    "name", [pytest.param(name, id=name, marks=marks_of(name)) for name in shipped()]
)
"""The names of the shipped profiles with tiers that can be opened here."""
