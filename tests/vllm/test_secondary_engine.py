"""vLLM's own scheduler, connector and manager find blocks of another engine in kvcache's tiers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.support.played_offloading import BLOCK, PlayedOffloading, prompt
from tests.support.played_tiering import SharedFaultyTier, disk_table

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("same_weights")]


@pytest.mark.parametrize("chunk", [1, 2])
def test_second_engine_computes_no_block_that_the_first_stored(tmp_path: Path, chunk: int) -> None:
    table = disk_table(tmp_path)
    tokens = prompt("shared", 8 * BLOCK + 3)
    engine = PlayedOffloading(tmp_path, {"tiers": [table]}, chunk=chunk)
    assert engine.run("first", tokens) == 0
    engine.close()
    engine = PlayedOffloading(tmp_path, {"tiers": [table]}, chunk=chunk)
    assert engine.run("second", tokens) == 8 * BLOCK
    assert engine.loaded == 8
    assert engine.run("other", prompt("other", 4 * BLOCK)) == 0
    engine.close()


def test_engine_computes_blocks_of_a_tier_that_fails(tmp_path: Path) -> None:
    tokens = prompt("shared", 8 * BLOCK + 3)
    options = {"tiers": [SharedFaultyTier.table(deadline_s=0.5)]}
    engine = PlayedOffloading(tmp_path, options)
    engine.run("first", tokens)
    engine.close()
    engine = PlayedOffloading(tmp_path, options)
    tier = SharedFaultyTier.last()
    tier.fault = "hole"  # every third block is reported to be held, and not returned
    assert engine.run("second", tokens) == BLOCK
    tier.fault = ""
    tier.gate.clear()
    assert engine.run("third", prompt("other", 4 * BLOCK)) == 0
    tier.gate.set()
    engine.close()
