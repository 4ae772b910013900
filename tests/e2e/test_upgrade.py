"""Two engines of different vLLM run one after the other on one directory of the `l1-disk` profile.

The first one is of the oldest supported release, or of the usual one where the tests run with the
oldest.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import pytest

from tests.e2e.conftest import RunEngine
from tests.e2e.test_below import SMALL, on_disk
from tests.support.engine import lower_tier
from tests.support.engine.engine import BLOCK, Engine, EngineSettings
from tests.support.engine.other_vllm import other_python, run_with
from tests.support.engine.process import EngineRun, startup

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        other_python() is None, reason="needs the environment of another vLLM, as make test has"
    ),
]


def release(engine: Engine) -> str:
    """Return the first release that computes the same bytes as this engine's, or its own."""
    import vllm

    from kvcache.connectors.vllm.identity.releases import first_equal

    return first_equal(vllm.__version__, "cpu")


def page_digests(engine: Engine) -> list[str]:
    """Return a digest of each page of vLLM's own cache that was written."""
    import torch

    worker = engine.core.engine_core.engine_core.model_executor.driver_worker.worker
    pages = [page for cache in worker.model_runner.kv_caches for page in cache if page.any()]
    data = [page.contiguous().view(torch.uint8).numpy().tobytes() for page in pages]
    return sorted({blake2b(each, digest_size=8).hexdigest() for each in data})


@dataclass(frozen=True, slots=True)
class UpgradeRuns:
    before: EngineRun
    after: EngineRun
    reference: EngineRun  # of the release of `after`, without kvcache

    @property
    def shares_blocks(self) -> bool:
        """Whether the releases were measured to compute equal bytes."""
        return bool(self.before.result_of(release) == self.after.result_of(release))


@pytest.fixture(scope="module")
def runs(
    checkpoint: Path, run_engine: RunEngine, tmp_path_factory: pytest.TempPathFactory
) -> UpgradeRuns:
    python = other_python()
    assert python is not None
    folder = tmp_path_factory.mktemp("upgrade")
    options = {"dtype": "bfloat16"}
    environment = on_disk(folder) | {"PYTHONHASHSEED": "0"}  # 0.28 has no fixed seed of its own
    before = run_with(
        python,
        EngineSettings(str(checkpoint), options=options, environment=environment, **SMALL),
        (release, lower_tier.complete_prompts, page_digests, lower_tier.lower_tier_counts),
        folder,
    )
    after = run_engine(
        (release, lower_tier.complete_prompts, lower_tier.lower_tier_counts),
        options=options,
        environment=environment,
        **SMALL,
    )
    reference = run_engine(
        (lower_tier.complete_prompts, page_digests), options=options, blocks=SMALL["blocks"]
    )
    for run in (before, after, reference):
        run.result_of(startup)
    return UpgradeRuns(before, after, reference)


def test_upgrade_tokens_equal_those_without_kvcache(runs: UpgradeRuns) -> None:
    right = runs.reference.result_of(lower_tier.complete_prompts)
    for run in (runs.before, runs.after):
        answers = run.result_of(lower_tier.complete_prompts)
        assert [each["tokens"] for each in answers] == [each["tokens"] for each in right]


def test_upgrade_finds_blocks_only_of_a_release_with_equal_bytes(runs: UpgradeRuns) -> None:
    assert runs.before.result_of(lower_tier.lower_tier_counts)["stored"] > 0
    first, *_ = runs.after.result_of(lower_tier.complete_prompts)
    loaded = runs.after.result_of(lower_tier.lower_tier_counts)["loaded"]
    if runs.shares_blocks:
        assert first["cached"] >= 4 * BLOCK
        assert loaded > 0
    else:
        assert (first["cached"], loaded) == (0, 0)


def test_upgrade_between_releases_that_share_blocks_keeps_every_page(runs: UpgradeRuns) -> None:
    if not runs.shares_blocks:
        pytest.skip("these releases do not share blocks")
    pages = runs.before.result_of(page_digests)
    assert pages == runs.reference.result_of(page_digests)
    assert len(pages) > 4 * 10  # of each layer, more than the prompts' shared blocks
