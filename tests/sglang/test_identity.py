"""Which servers share pages: a changed weight never finds the pages of earlier weights."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from tests.support import sglang_pools as pools
from tests.support.sglang_tiers import disk, faulty

pytestmark = pytest.mark.sglang

from sglang.srt.managers.cache_controller import HiCacheController  # noqa: E402
from sglang.srt.model_executor.model_runner_components.weight_updater import (  # noqa: E402
    WeightUpdater,
)
from sglang.srt.runtime_context import get_context, get_parallel  # noqa: E402

from kvcache.connectors.sglang import identity as identity_module  # noqa: E402
from kvcache.connectors.sglang.identity import (  # noqa: E402
    SETTINGS,
    UNREAD_FILES,
    UNSHARED,
    identity,
    server_settings,
    server_token,
)
from kvcache.connectors.sglang.ranks import replica_of  # noqa: E402
from kvcache.connectors.sglang.weight_updates import WeightUpdates, register, updates  # noqa: E402
from kvcache.keys import namespace  # noqa: E402
from kvcache.replica import ALONE, Replica  # noqa: E402
from tests.support.server_process import free_port  # noqa: E402

DAY_NS = 86400 * 10**9
COMMIT = 40 * "a"
UPDATE = "update_weights_from_disk"


@pytest.fixture(autouse=True)
def _no_update_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "count", 0)


@pytest.fixture(autouse=True)
def _files_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process begin tomorrow, after the files of the test were written."""
    later = time.time_ns() + DAY_NS
    monkeypatch.setattr(identity_module, "started_ns", lambda: later)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", b"old")


def write_model(folder: Path, weights: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.bin").write_bytes(weights)
    return folder


def fields(path: object, *, explicit: str = "", pool: Any = None, **settings: Any) -> Any:
    """Return the identity of a server with these settings."""
    with get_context().override_server_args(model_path=str(path), **settings):
        return identity(
            pools.config({}),
            pool or pools.mha_pool(),
            explicit=explicit,
            updates=updates,
            token=server_token(),
        )


def server(path: object, options: dict[str, Any], pool: Any, **of_config: Any) -> Any:
    """Open the backend of a server of the model at ``path``."""
    with get_context().override_server_args(model_path=str(path)):
        return pools.open_backend(pools.config(options, **of_config), pool)


def test_new_weights_at_the_same_path_find_no_page_of_the_old_ones(
    tmp_path: Path, model: Path
) -> None:
    options = {"tiers": [disk(tmp_path / "disk")]}
    pool, keys = pools.mha_pool(), pools.page_keys(3)
    before = server(model, options, pool)
    assert all(before.batch_set_v1(keys, pools.indices(pool, range(3))))
    before.close()
    again = server(model, options, pool)
    assert again.batch_exists(keys) == 3
    again.close()
    write_model(model, b"new")
    after = server(model, options, pool)
    assert after.batch_exists(keys) == 0
    assert after.batch_get_v1(keys, pools.indices(pool, range(3))) == [False] * 3
    after.close()


def test_weights_updated_while_the_engine_runs_find_no_page_of_the_old_ones(model: Path) -> None:
    pool, keys = pools.mha_pool(), pools.page_keys(2)
    backend = server(model, {"tiers": [faulty(shared="update")]}, pool)
    assert all(backend.batch_set_v1(keys, pools.indices(pool, [0, 1])))
    assert backend.batch_exists(keys) == 2
    try_update()
    assert backend.batch_exists(keys) == 0
    assert all(backend.batch_set_v1(keys, pools.indices(pool, [0, 1])))
    assert backend.batch_exists(keys) == 2
    try_reset()  # pages of the old weights that were stored late
    assert backend.batch_exists(keys) == 0
    attached = server(model, {"tiers": [faulty(shared="update")]}, pools.mha_pool())
    assert attached.batch_exists(keys) == 0  # attached after the update


def try_update() -> None:
    """Call SGLang's update of weights; without an engine it fails after the hook."""
    with pytest.raises(AttributeError):
        WeightUpdater.update_weights_from_disk(None, "path", "auto")


def try_reset() -> None:
    """Call SGLang's reset of a cache; without an engine it fails, and the hook runs."""
    with pytest.raises(AttributeError):
        HiCacheController.reset(None)


def test_flush_without_an_update_keeps_the_pages(model: Path) -> None:
    pool, keys = pools.mha_pool(), pools.page_keys(2)
    backend = server(model, {"tiers": [faulty()]}, pool)
    assert all(backend.batch_set_v1(keys, pools.indices(pool, [0, 1])))
    try_reset()
    assert backend.batch_exists(keys) == 2


def test_ranks_name_pages_alike_after_an_update(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcache.connectors.sglang.storage.server_token", lambda: "one server")
    options = {"tiers": [faulty(shared="ranks after update")]}
    pool, keys = pools.mla_pool(), pools.page_keys(2)
    writer = server(model, options, pool, mla=True, tp=(0, 2))
    reader = server(model, options, pools.mla_pool(), mla=True, tp=(1, 2))
    try_update()
    assert all(writer.batch_set_v1(keys, pools.indices(pool, [0, 1])))
    assert reader.batch_exists(keys) == 2


@pytest.mark.parametrize("name", ["begin_weight_update", "end_weight_update", UPDATE])
def test_each_way_of_an_update_is_noticed(name: str) -> None:
    with pytest.raises((AttributeError, TypeError)):
        getattr(WeightUpdater, name)(None)
    assert updates.count == 2


def test_identity_ignores_path_and_served_name(tmp_path: Path, model: Path) -> None:
    assert fields(model)["weights"].startswith("digest ")
    assert fields(model) == fields(write_model(tmp_path / "copy", b"old"))


def test_identity_of_a_snapshot_is_its_commit(tmp_path: Path) -> None:
    folder = tmp_path / "models--meta--llama" / "snapshots" / COMMIT
    blobs = tmp_path / "models--meta--llama" / "blobs"
    refs = tmp_path / "models--meta--llama" / "refs"
    for each in (folder, blobs, refs):
        each.mkdir(parents=True)
    (refs / "main").write_text(COMMIT)
    for name, content in (("config.json", "{}"), ("model.bin", "weights")):
        (blobs / name).write_text(content)
        (folder / name).symlink_to(Path("../../blobs", name))
    cache = {"download_dir": str(tmp_path)}
    assert fields("meta/llama", **cache)["weights"] == f"commit {COMMIT}"
    assert fields(folder) == fields("meta/llama", **cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity_module, "started_ns", lambda: time.time_ns() - DAY_NS)
        assert "changed after the engine started" in fields("meta/llama", **cache)[UNSHARED]
        patch.setenv("SGLANG_USE_MODELSCOPE", "true")
        assert "ModelScope" in fields("meta/llama", **cache)[UNSHARED]


@pytest.mark.parametrize(
    "setting",
    [
        {"kv_cache_dtype": "fp8_e5m2"},
        {"context_length": 1024},
        {"json_model_override_args": '{"rope_theta": 1}'},
        {"attention_backend": "torch_native"},
        {"quantization": "fp8"},
        {"mamba_ssm_dtype": "bfloat16"},
        {"quantize_and_serve": True},
        {"forward_hooks": [{"name": "steer"}]},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_identity_covers_settings(model: Path, setting: dict[str, Any]) -> None:
    assert namespace(fields(model)) != namespace(fields(model, **setting))


def test_identity_names_settings_that_sglang_has(model: Path) -> None:
    with get_context().override_server_args(model_path=str(model)):
        settings = server_settings()
    assert {*SETTINGS, *UNREAD_FILES} <= settings.keys()


def test_identity_covers_the_host_pool(model: Path) -> None:
    other = [pools.mha_pool("page_first"), pools.mha_pool(dtype="float16")]
    found = {namespace(fields(model, pool=pool)) for pool in [pools.mha_pool(), *other]}
    assert len(found) == 3


UNIDENTIFIED: dict[str, dict[str, Any]] = {
    "dummy weights": {"load_format": "dummy"},
    "remote weights": {"load_format": "remote"},
    "scales elsewhere": {"quantization_param_path": "scales.json"},
    "experts elsewhere": {"kt_weight_path": "experts"},
    "configuration elsewhere": {"decrypted_config_file": "config.json"},
    "weights of another process": {"weight_cache_mode": "consumer"},
    "draft model that is missing": {"speculative_draft_model_path": "meta/none"},
}


@pytest.mark.parametrize("how", UNIDENTIFIED.values(), ids=UNIDENTIFIED)
def test_identity_that_is_unknown_is_shared_with_no_server(
    model: Path, how: dict[str, Any]
) -> None:
    first, second = fields(model, **how), fields(model, **how)
    assert first[UNSHARED] == second[UNSHARED]
    assert namespace(first) != namespace(second)
    assert fields(model, explicit="run 7", **how) == fields(model, explicit="run 7", **how)


def test_identity_outside_of_a_server_is_shared_with_none() -> None:
    found = identity(
        pools.config({}), pools.mha_pool(), explicit="", updates=updates, token=server_token()
    )
    assert found[UNSHARED] == "this process has no settings of an SGLang server"


def test_identity_of_code_in_another_repository_is_unknown(model: Path) -> None:
    (model / "config.json").write_text('{"auto_map": {"AutoModel": "other/code--m.M"}}')
    assert UNSHARED not in fields(model)
    assert "another repository" in fields(model, trust_remote_code=True)[UNSHARED]


def test_identity_of_files_younger_than_the_engine_is_unknown(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity_module, "started_ns", lambda: time.time_ns() - DAY_NS)
    assert "changed after the engine started" in fields(model)[UNSHARED]


def test_identity_covers_the_draft_model(tmp_path: Path, model: Path) -> None:
    draft = {"speculative_draft_model_path": str(write_model(tmp_path / "draft", b"draft"))}
    before = fields(model, **draft)
    assert before["draft weights"].startswith("digest ")
    write_model(tmp_path / "draft", b"other")
    assert namespace(fields(model, **draft)) != namespace(before)


def test_identity_option_and_variable_replace_the_weights(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fields(model, explicit="run 7")
    write_model(model, b"new")
    assert fields(model, explicit="run 7") == before
    assert fields(model, explicit="run 8") != before
    monkeypatch.setenv("KVCACHE_IDENTITY", "run 7")
    assert fields(model) == before


def test_updates_that_may_have_been_missed_make_the_weights_unknown(model: Path) -> None:
    late = WeightUpdates()
    late.watch(before_start=False)
    assert "did not load kvcache's plugin" in late.unseen_reason()
    with get_context().override_server_args(model_path=str(model)):
        found = identity(
            pools.config({}), pools.mha_pool(), explicit="", updates=late, token="token"
        )
    assert "plugin" in str(found[UNSHARED])


def test_function_that_this_sglang_lacks_makes_the_weights_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert updates.unseen_reason() == ""
    monkeypatch.setattr("kvcache.connectors.sglang.weight_updates.RESET", "sglang.srt.no.function")
    assert "has no sglang.srt.no.function" in updates.unseen_reason()


def test_plugin_does_nothing_in_a_process_without_a_scheduler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fresh = WeightUpdates()
    monkeypatch.setattr("kvcache.connectors.sglang.weight_updates.updates", fresh)
    monkeypatch.delitem(sys.modules, "sglang.srt.managers.scheduler", raising=False)
    register()
    assert fresh.unseen_reason()


def test_plugin_is_an_entry_point_of_sglangs_plugins() -> None:
    import tomllib

    project = Path(__file__).parents[2] / "pyproject.toml"
    points = tomllib.loads(project.read_text())["project"]["entry-points"]
    [value] = points["sglang.srt.plugins"].values()
    assert EntryPoint("kvcache", value, "sglang.srt.plugins").load() is register


def test_token_is_shared_by_the_ranks_of_a_server(tmp_path: Path) -> None:
    import torch.distributed as distributed

    assert server_token() != server_token()
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        assert server_token() == server_token()
    finally:
        distributed.destroy_process_group()


def test_token_of_two_processes_of_a_server_is_equal() -> None:
    code = (
        "import sys; from torch import distributed; "
        "from kvcache.connectors.sglang.identity import server_token; "
        "distributed.init_process_group('gloo', init_method=sys.argv[1], "
        "rank=int(sys.argv[2]), world_size=2); "
        "print(server_token()); distributed.barrier()"
    )
    address = f"tcp://127.0.0.1:{free_port()}"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, address, str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = [rank.communicate()[0].strip() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert first == second
    assert len(first) == 32


@pytest.mark.parametrize(
    ("parallel", "replica"),
    [
        ({"launch_world_size": 1, "launch_world_rank": 0}, ALONE),
        ({"launch_world_size": 4, "launch_world_rank": 3}, Replica(3, 4)),
        ({"launch_world_size": 16, "launch_world_rank": 9, "nnodes": 2}, Replica(1, 8)),
        (
            {"launch_world_size": 2, "launch_world_rank": 1, "dp_size": 3, "dp_rank": 2},
            Replica(5, 6),
        ),
    ],
)
def test_rank_has_a_number_on_its_host(parallel: dict[str, int], replica: Replica) -> None:
    values = {"dp_size": 1, "dp_rank": None, "nnodes": 1, **parallel}
    with get_parallel().override(**values):
        assert replica_of(pools.config({})) == replica


def test_rank_outside_of_a_server_is_that_of_its_config() -> None:
    assert replica_of(pools.config({}, tp=(1, 2))) == Replica(1, 2)
