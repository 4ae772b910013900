"""Time limits of `kvcache replay` on the conversation trace, from the file to the output."""

import subprocess
import sys
import time

import pytest

from kvcache.eviction import POLICIES
from tests.support.traces import TRACE, needs_conversation

pytestmark = [pytest.mark.bench, needs_conversation]

SEVEN_CAPACITIES = "1000,3000,5000,10000,20000,30000,50000"


def replay_seconds(*options: str) -> float:
    start_s = time.perf_counter()
    command = [sys.executable, "-m", "kvcache", "replay", str(TRACE), "--json", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start_s


@pytest.mark.parametrize("policy", POLICIES)
def test_replay_of_one_policy_and_capacity_takes_at_most_5_s(policy: str) -> None:
    took_s = replay_seconds("--policy", policy, "--capacity", "10000")
    print(f"{policy}: {took_s:.1f} s")
    assert took_s <= 5


def test_replay_of_all_policies_at_seven_capacities_takes_at_most_120_s() -> None:
    took_s = replay_seconds("--capacity", SEVEN_CAPACITIES)
    print(f"all: {took_s:.1f} s")
    assert took_s <= 120
