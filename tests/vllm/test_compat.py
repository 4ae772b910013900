"""Versions of vLLM, registration by name, the failure policy, and replicas."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from kvcache.connectors.vllm import KVCacheConnector, compat, plugin
from kvcache.connectors.vllm.compat import (
    check_vllm,
    hash_tokens,
    hooks_refusal,
    host_name,
    replica_of,
    warn_of_untested_vllm,
    warn_unless_recomputing,
)
from kvcache.connectors.vllm.vllm_names import has_name
from kvcache.replica import ALONE, Replica
from tests.support.played_models import MODELS
from tests.support.played_scheduler import Play, open_scheduler, write_config

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "version", ["0.28.0", "0.28.1rc1", "0.32.0+cpu", "0.100.1", "1.0.0", "2.3"]
)
def test_check_vllm_of_a_supported_vllm_passes(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "missing_names", lambda version: ([], []))
    check_vllm(version)


def test_check_vllm_of_the_installed_vllm_passes() -> None:
    check_vllm(vllm.__version__)


@pytest.mark.parametrize(
    "version", ["dev", "0.0.0", "0.1.dev12345+gabcdef012", "0.33.0.dev7+gabcdef012.cpu", "unknown"]
)
def test_check_vllm_of_a_source_build_passes(version: str) -> None:
    check_vllm(version)


@pytest.mark.parametrize("version", ["0.27.1", "0.27.9rc1", "0.9.2", "0.1.7", "0.11.0+cu129"])
def test_check_vllm_of_an_old_vllm_raises_with_both_versions(version: str) -> None:
    with pytest.raises(ImportError, match=r"needs vLLM 0\.28 or newer; this is ") as caught:
        check_vllm(version)
    assert version in str(caught.value)


def test_check_vllm_without_a_needed_name_raises_with_the_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "missing_names", lambda version: (["module:Name", "other:x"], []))
    with pytest.raises(
        ImportError, match=r"with vLLM 0\.34\.1, which lacks module:Name, other:x; "
    ):
        check_vllm("0.34.1")


@pytest.mark.parametrize("version", ["0.28.0", "0.33.9", "0.1.dev5+g12", "unknown"])
def test_warn_of_untested_vllm_accepts_tested_and_unknown_versions(
    version: str, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_untested_vllm(version)
    assert caplog.records == []


@pytest.mark.parametrize("others", [[], ["module:Name", "other:x"]])
def test_warn_of_untested_vllm_logs_one_line(
    others: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "missing_names", lambda version: ([], others))
    warn_of_untested_vllm("0.34.0")
    [record] = caplog.records
    assert (record.name, record.levelname) == ("kvcache.connectors.vllm.compat", "WARNING")
    assert record.getMessage() == (
        "kvcache: connector: vLLM 0.34.0 is untested "
        "(kvcache was tested with vLLM 0.28 to 0.33); continuing without "
        f"{'module:Name, other:x' if others else 'restrictions'}"
    )


def warnings_of_a_scheduler(
    folder: Path, caplog: pytest.LogCaptureFixture, *, replica: int = 0
) -> list[str]:
    """Return what kvcache warns of while vLLM's scheduler constructs its connector."""
    scheduler = open_scheduler(MODELS["full"], Play(), write_config(folder), connected=True)
    config = scheduler.vllm_config
    caplog.clear()
    config.parallel_config.data_parallel_size_local = 2
    config.parallel_config.data_parallel_rank_local = replica
    KVCacheConnector(config, KVConnectorRole.SCHEDULER, scheduler.kv_cache_config)
    return [each.getMessage() for each in caplog.records if each.name.startswith("kvcache")]


@pytest.mark.parametrize(
    ("version", "replica", "count"), [("0.33.1", 0, 0), ("0.34.0", 0, 1), ("0.34.0", 1, 0)]
)
def test_connector_of_the_first_scheduler_warns_of_an_untested_vllm(
    version: str,
    replica: int,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Of the replicas that one command started, the first one warns."""
    monkeypatch.setattr(vllm, "__version__", version)
    warnings = warnings_of_a_scheduler(tmp_path, caplog, replica=replica)
    assert len([each for each in warnings if "is untested" in each]) == count


def test_hooks_refusal_of_a_vllm_with_all_hooks_is_none() -> None:
    if not has_name("v1.core.sched.output:KVConnectorBlockState.get_block_ids"):
        pytest.skip("vLLM before 0.30")
    assert hooks_refusal(["FullAttentionSpec", "MambaSpec"], states=True) is None


@pytest.mark.parametrize(
    ("missing", "states", "message"),
    [
        (
            "KVConnectorTransferResults.failed_recving",
            False,
            "FullAttentionSpec, MambaSpec, and vLLM 0.29.0 cannot report failed loads of them; ",
        ),
        ("KVConnectorBlockState.get_block_ids", False, "cannot list their blocks; vLLM 0.30 can"),
        ("KVConnectorBlockState.boundary_state_offloads", True, "cannot hand their states to a "),
        ("KVConnectorBlockState.boundary_state_offloads", False, None),
    ],
)
def test_hooks_refusal_of_an_older_vllm_names_groups_and_versions(
    monkeypatch: pytest.MonkeyPatch, missing: str, states: bool, message: str | None
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.29.0")
    monkeypatch.setattr(compat, "has_name", lambda name: not name.endswith(missing))
    refusal = hooks_refusal(["FullAttentionSpec", "MambaSpec"], states=states)
    assert refusal is None if message is None else message in (refusal or "")


def attention(block_size: int, window: int | None = None) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    fields = {"num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16}
    if window is None:
        return FullAttentionSpec(block_size=block_size, **fields)
    return SlidingWindowSpec(block_size=block_size, sliding_window=window, **fields)


@pytest.mark.parametrize(("match_unit", "tokens"), [(None, 16), (8, 8)])
def test_hash_tokens_of_several_groups_are_vllms(match_unit: int | None, tokens: int) -> None:
    """Also where the config does not have them, before 0.32."""
    from vllm.config import VllmConfig

    config = VllmConfig()
    config.cache_config.enable_prefix_caching = True
    config.cache_config.prefix_match_unit = match_unit
    specs = (attention(48), attention(32, window=64))
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    assert hash_tokens(config, SimpleNamespace(kv_cache_groups=groups)) == tokens


def test_hash_tokens_of_one_group_are_those_of_a_block() -> None:
    groups = [SimpleNamespace(kv_cache_spec=attention(32))]
    assert hash_tokens(SimpleNamespace(), SimpleNamespace(kv_cache_groups=groups)) == 32


def test_hash_tokens_in_the_config_are_used() -> None:
    groups = [SimpleNamespace(kv_cache_spec=attention(32))] * 2
    config = SimpleNamespace(kv_cache_groups=groups, hash_block_size=16)
    assert hash_tokens(SimpleNamespace(), config) == 16


def test_host_name_is_stable_and_has_three_parts() -> None:
    assert host_name() == host_name()
    assert host_name().count("/") >= 2


def test_plugin_registers_the_connector_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1 import supports_hma

    from kvcache.connectors.vllm import KVCacheConnector

    monkeypatch.setattr(KVConnectorFactory, "_registry", dict(KVConnectorFactory._registry))
    KVConnectorFactory._registry.pop(plugin.NAME, None)
    plugin.register()
    plugin.register()  # vLLM may call it more than once
    config = KVTransferConfig(kv_connector=plugin.NAME, kv_role="kv_both")
    found = KVConnectorFactory.get_connector_class(config)
    assert found is KVCacheConnector
    assert found.__name__ == plugin.NAME  # vLLM's statistics look classes up by name
    assert supports_hma(found)


def test_plugin_imports_nothing_of_the_connector() -> None:
    """vLLM logs a traceback if a plugin cannot be imported, in every process."""
    program = (
        "import sys; from kvcache.connectors.vllm import plugin\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] in ('vllm', 'torch')]\n"
        "assert 'kvcache.connectors.vllm.connector' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_connector_hits_count_as_host_memory() -> None:
    source = pytest.importorskip("vllm.v1.metrics.cache_hit_source", reason="vLLM before 0.32")

    from kvcache.connectors.vllm import KVCacheConnector

    assert KVCacheConnector._cache_hit_source is source.CacheHitSource.HOST


def test_connector_requires_no_kv_delivery() -> None:
    """vLLM recomputes a preempted request from its start if the connector requires delivery."""
    from kvcache.connectors.vllm import KVCacheConnector

    connector = KVCacheConnector.__new__(KVCacheConnector)
    assert connector.requires_kv_delivery is False


def connector(**fields: Any) -> dict[str, Any]:
    return {"kv_connector": plugin.NAME, "kv_role": "kv_both", **fields}


@pytest.mark.parametrize("inner", ["recompute", "fail", None])
@pytest.mark.parametrize("outer", ["recompute", "fail", None])
def test_failure_policy_under_multi_connector_is_the_outer_one(
    outer: str | None, inner: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.config import KVTransferConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

    plugin.register()
    policy = {"kv_load_failure_policy": outer} if outer else {}
    own = {"kv_load_failure_policy": inner} if inner else {}
    config = VllmConfig(
        kv_transfer_config=KVTransferConfig(
            kv_connector="MultiConnector",
            kv_role="kv_both",
            kv_connector_extra_config={"connectors": [connector(**own)]},
            **policy,
        )
    )
    [(_, given)] = MultiConnector._get_connector_classes_and_configs(config)
    with set_current_vllm_config(config):  # as when vLLM constructs a worker's connector
        warn_unless_recomputing(given)
    warnings = [r.getMessage() for r in caplog.records if r.name.startswith("kvcache")]
    if outer == "recompute":
        assert warnings == []
    else:
        [warning] = warnings
        assert "kv_load_failure_policy is 'fail'" in warning


def test_failure_policy_without_a_current_config_is_the_given_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from vllm.config import KVTransferConfig, VllmConfig

    for policy in ("recompute", "fail"):
        config = KVTransferConfig(**connector(kv_load_failure_policy=policy))
        warn_unless_recomputing(VllmConfig(kv_transfer_config=config))
    [record] = [r for r in caplog.records if r.name.startswith("kvcache")]
    assert "'fail'" in record.getMessage()


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(
    ("size", "local", "rank", "replicas"),
    [
        (2, 2, 1, Replica(1, 2)),
        (4, 4, 0, Replica(0, 4)),
        (
            4,
            2,
            1,
            {True: Replica(1, 4), False: Replica(1, 2)},
        ),  # vLLM's config of a dense one lacks the 2
        (1, 1, 0, ALONE),
    ],
)
def test_replica_of_an_engine_is_its_rank_on_the_host(
    dense: bool, size: int, local: int, rank: int, replicas: Any
) -> None:
    """With the config that ``EngineCoreProc.run_engine_core`` passes to a replica."""
    from vllm.config import ParallelConfig

    config = ParallelConfig(data_parallel_size=size, data_parallel_size_local=local)
    if dense and size > 1 and not hasattr(config, "elastic_ep_max_dp_size"):
        pytest.skip("this vLLM keeps no number of replicas in the config of a dense one")
    if size > 1:
        config.data_parallel_rank_local = rank
    config.data_parallel_index = rank
    if dense:
        config.reconfigure_for_independent_dp_rank()
    else:
        config.data_parallel_rank = rank
    assert replica_of(config) == (replicas[dense] if isinstance(replicas, dict) else replicas)


def test_replica_of_an_engine_behind_an_external_balancer_is_alone() -> None:
    from vllm.config import ParallelConfig

    config = ParallelConfig(
        data_parallel_size=4, data_parallel_rank=3, data_parallel_external_lb=True
    )
    config.data_parallel_rank_local = 0
    assert replica_of(config) == ALONE
