"""Runs a contract suite on a tier, to see which of its tests fail."""

from collections.abc import Callable
from contextlib import closing

from kvcache.testing import TierTests
from kvcache.tier import Tier


def suite_test_names(suite: type[TierTests]) -> set[str]:
    """Return the names of the suite's tests."""
    return {name for name in dir(suite) if name.startswith("test_")}


def failing_tests(suite: type[TierTests], open_tier: Callable[[], Tier]) -> set[str]:
    """Return the names of the suite's tests that fail, each on a new tier."""
    failed = set()
    for name in suite_test_names(suite):
        try:
            with closing(open_tier()) as tier:
                getattr(suite(), name)(tier)
        except BaseException:  # noqa: BLE001  # the failures of pytest are no Exceptions
            failed.add(name)
    return failed
