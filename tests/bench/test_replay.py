"""The time of `kvcache replay` on the conversation trace."""

import subprocess
import sys
import time

import pytest

from kvcache.eviction import POLICIES
from tests.support.eviction_traffic import TRACE, with_conversation

pytestmark = [pytest.mark.bench, with_conversation]

SEVEN = "1000,3000,5000,10000,20000,30000,50000"


def seconds(*options: str) -> float:
    begun = time.perf_counter()
    command = [sys.executable, "-m", "kvcache", "replay", str(TRACE), "--json", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


@pytest.mark.parametrize("policy", POLICIES)
def test_replay_of_one_policy_and_capacity_takes_at_most_5_s(policy: str) -> None:
    spent = seconds("--policy", policy, "--capacity", "10000")
    print(f"{policy}: {spent:.1f} s")
    assert spent <= 5


def test_replay_of_all_policies_at_seven_capacities_takes_at_most_120_s() -> None:
    spent = seconds("--capacity", SEVEN)
    print(f"all: {spent:.1f} s")
    assert spent <= 120
