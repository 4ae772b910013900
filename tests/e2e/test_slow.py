"""With a tier slower than computing, `if_slower` decides between computing and loading."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import RunEngine
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
def test_slow_tier_is_skipped_where_the_profile_says_compute(
    tmp_path: Path, run_engine: RunEngine, if_slower: str
) -> None:
    profile = tmp_path / "slow.toml"
    profile.write_text(PROFILE)
    environment = {"KVCACHE_PROFILE": str(profile), "KVCACHE__SLOW__IF_SLOWER": if_slower}
    if if_slower == "compute":  # slower than computing on a busy machine too
        environment["KVCACHE__SLOW__SECONDS"] = "0.6"
    settings = {"dtype": "float32"}
    played = run_engine(
        (slow_tier.repeat_prompts_of_a_slow_tier,),
        blocks=100,
        l1="16MiB",
        environment=environment,
        options=settings,
    )
    facts = played.result_of(slow_tier.repeat_prompts_of_a_slow_tier)
    first, *later = (facts["tokens"][at : at + len(PROMPTS)] for at in (0, 3, 6))
    assert later == [first, first]
    assert facts["pinned"] == 0
    assert facts["computing"] > 0  # the stack has measured it
    if if_slower == "load":
        assert facts["skipped"] == 0
        assert all(facts["cached"][3:])
    else:
        # The first load shows how slow the tier is; later requests compute.
        assert facts["skipped"] > 0
        assert facts["cached"][6:] == [0, 0, 0]
