"""A tier slower than the engine: its blocks are computed again, unless it is to be waited for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Stage
from tests.support.engine import slow_tier
from tests.support.engine.lower_tier import PROMPTS

pytestmark = pytest.mark.engine

PROFILE = """
[[tier]]
name = "l1"
kind = "dram"
capacity = "16MiB"

[[tier]]
name = "slow"
kind = "tests.support.engine.slow_tier:SlowTier"
deadline_s = 60.0
seconds = 0.1
"""


@pytest.mark.parametrize("if_slower", ["compute", "load"])
def test_what_takes_less_time_is_done(tmp_path: Path, stage: Stage, if_slower: str) -> None:
    profile = tmp_path / "slow.toml"
    profile.write_text(PROFILE)
    environment = {"KVCACHE_PROFILE": str(profile), "KVCACHE__SLOW__IF_SLOWER": if_slower}
    if if_slower == "compute":  # far slower, also where others use the machine
        environment["KVCACHE__SLOW__SECONDS"] = "0.6"
    settings = {"dtype": "float32"}
    played = stage(
        (slow_tier.ask_below,), blocks=100, l1="16MiB", environment=environment, options=settings
    )
    facts = played.of(slow_tier.ask_below)
    first, *later = (facts["tokens"][at : at + len(PROMPTS)] for at in (0, 3, 6))
    assert later == [first, first]
    assert facts["pinned"] == 0
    assert facts["computing"] > 0  # it was measured
    if if_slower == "load":
        assert facts["skipped"] == 0
        assert all(facts["cached"][3:])
    else:
        # The first time shows how slow it is: after that nobody waits for it.
        assert facts["skipped"] > 0
        assert facts["cached"][6:] == [0, 0, 0]
