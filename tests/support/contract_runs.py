"""Runs a contract suite on a tier that may be wrong, to see which of its tests fail there."""

from collections.abc import Callable
from contextlib import closing

from kvcache.testing import TierTests
from kvcache.tier import Tier


def names_of_tests(suite: type[TierTests]) -> set[str]:
    """The names of the suite's tests."""
    return {name for name in dir(suite) if name.startswith("test_")}


def failures(suite: type[TierTests], make: Callable[[], Tier]) -> set[str]:
    """The suite's tests that do not pass on the tiers that ``make`` gives, each on a fresh one."""
    failed = set()
    for name in names_of_tests(suite):
        try:
            with closing(make()) as tier:
                getattr(suite(), name)(tier)
        except BaseException:  # noqa: BLE001  # pytest's own failures are no Exceptions
            failed.add(name)
    return failed
