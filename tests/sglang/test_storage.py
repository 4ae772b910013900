"""The backend against SGLang's own host pools and factory: bytes, holes, layouts, ranks."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.support import sglang_pools as pools
from tests.support.sglang_tiers import OpenedFaultyTier, disk, faulty

pytestmark = pytest.mark.sglang

from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo  # noqa: E402

PAGES = 8
EXPLICIT = {"identity": "tests"}
POOLS = {
    "mha": pools.mha_pool,
    "mla": pools.mla_pool,
    "mha with wide values": lambda layout: pools.mha_pool(layout, v_head_dim=16),
}
LAYOUTS_OF = {  # SGLang's own limits
    "mha": (*pools.LAYOUTS, "page_head"),
    "mha with wide values": pools.LAYOUTS[:2],
}
SHAPES = [(kind, layout) for kind in POOLS for layout in LAYOUTS_OF.get(kind, pools.LAYOUTS)]


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {"tiers": [disk(tmp_path / "disk")], **EXPLICIT}


def stored(backend: Any, pool: Any, keys: list[str], seed: int = 1) -> list[bytes]:
    """Fill the pool, store its first pages and return their bytes; overwrite the pool."""
    pools.fill(pool, seed)
    pages = list(range(len(keys)))
    wanted = [pools.page_bytes(pool, page) for page in pages]
    assert backend.batch_set_v1(keys, pools.indices(pool, pages)) == [True] * len(keys)
    pools.fill(pool, seed + 1)
    return wanted


@pytest.mark.parametrize(("kind", "layout"), SHAPES)
def test_storage_loads_the_bytes_that_it_stored(
    options: dict[str, Any], kind: str, layout: str
) -> None:
    pool = POOLS[kind](layout)
    backend = pools.open_backend(pools.config(options, mla=kind == "mla"), pool)
    keys = pools.page_keys(PAGES)
    wanted = stored(backend, pool, keys)
    assert backend.batch_exists(keys) == PAGES
    others = [pools.page_bytes(pool, page) for page in range(PAGES)]
    elsewhere = [page + 10 for page in reversed(range(PAGES))]
    assert backend.batch_get_v1(keys, pools.indices(pool, elsewhere)) == [True] * PAGES
    assert [pools.page_bytes(pool, page) for page in elsewhere] == wanted
    assert [pools.page_bytes(pool, page) for page in range(PAGES)] == others
    backend.close()


@pytest.mark.parametrize("layout", pools.LAYOUTS)
def test_storage_of_a_batch_with_a_hole_finds_the_pages_before_it(
    options: dict[str, Any], layout: str
) -> None:
    pool = pools.mha_pool(layout)
    backend = pools.open_backend(pools.config(options), pool)
    keys = pools.page_keys(PAGES)
    wanted = stored(backend, pool, keys)
    asked = [*keys[:3], *pools.page_keys(1, "z"), *keys[3:]]
    assert backend.batch_exists(asked) == 3
    loaded = backend.batch_get_v1(asked, pools.indices(pool, range(PAGES + 1)))
    assert loaded == [True] * 3 + [False] + [True] * 5
    assert [pools.page_bytes(pool, page) for page in range(3)] == wanted[:3]
    backend.close()


@pytest.mark.parametrize("layout", pools.LAYOUTS)
def test_storage_page_without_one_part_is_not_held(layout: str) -> None:
    pool = pools.mha_pool(layout)
    backend = pools.open_backend(pools.config({"tiers": [faulty()], **EXPLICIT}), pool)
    keys, tier = pools.page_keys(PAGES), OpenedFaultyTier.opened[-1]
    stored(backend, pool, keys)
    parts = len(tier.held) // PAGES
    assert parts == (2 * pools.LAYERS if layout == "layer_first" else 2)
    del tier.held[list(tier.held)[5 * parts]]  # a part of page 5
    assert backend.batch_exists(keys) == 5
    loaded = backend.batch_get_v1(keys, pools.indices(pool, range(PAGES)))
    assert loaded == [page != 5 for page in range(PAGES)]
    backend.close()


def test_storage_pages_that_a_tier_declines_are_not_stored() -> None:
    pool = pools.mha_pool()
    backend = pools.open_backend(pools.config({"tiers": [faulty()], **EXPLICIT}), pool)
    OpenedFaultyTier.opened[-1].fault = "decline"
    keys = pools.page_keys(2)
    assert backend.batch_set_v1(keys, pools.indices(pool, range(2))) == [False, False]
    assert not backend.exists(keys[0])
    backend.close()


def test_storage_names_the_page_before_a_batch_as_its_parent() -> None:
    pool = pools.mha_pool()
    backend = pools.open_backend(pools.config({"tiers": [faulty()], **EXPLICIT}), pool)
    keys, tier = pools.page_keys(4), OpenedFaultyTier.opened[-1]
    stored(backend, pool, keys[:2])
    last = list(tier.held)[-1]
    info = HiCacheStorageExtraInfo(prefix_keys=keys[:2])
    assert all(backend.batch_set_v1(keys[2:], pools.indices(pool, [2, 3]), info))
    assert tier.parents == [None, last]
    backend.close()


def test_storage_without_an_index_for_each_token_transfers_nothing(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    pool = pools.mha_pool()
    backend = pools.open_backend(pools.config(options), pool)
    keys = pools.page_keys(2)
    assert backend.batch_set_v1(keys, pools.indices(pool, range(3))) == [False, False]
    assert "has other memory than 2 pages need" in caplog.text
    assert backend.batch_exists(keys) == 0
    assert backend.batch_get_v1(keys, pools.indices(pool, [0])) == [False, False]
    backend.close()


# Names of pages


@pytest.mark.parametrize(
    "other",
    [
        {"layout": "page_first"},
        {"dtype": "float16"},
        {"v_head_dim": 4},
        {"tp": (1, 2)},
        {"tp": (0, 2)},
        {"model": "another"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_storage_finds_no_page_of_another_format_or_rank(other: dict[str, Any]) -> None:
    options = {"tiers": [faulty(shared=str(other))], **EXPLICIT}
    of_rank = {name: other[name] for name in ("tp", "model") if name in other}
    of_pool = {name: value for name, value in other.items() if name not in of_rank}
    first, second = pools.mha_pool(), pools.mha_pool(**of_pool)
    keys = pools.page_keys(2)
    backend = pools.open_backend(pools.config(options), first)
    stored(backend, first, keys)
    again = pools.open_backend(pools.config(options), pools.mha_pool())
    assert again.batch_exists(keys) == 2
    assert pools.open_backend(pools.config(options, **of_rank), second).batch_exists(keys) == 0


def test_storage_of_mla_is_written_by_one_rank_and_read_by_all() -> None:
    options = {"tiers": [faulty(shared="mla")], **EXPLICIT}
    writing, reading = pools.mla_pool(), pools.mla_pool()
    writer = pools.open_backend(pools.config(options, mla=True, tp=(0, 2)), writing)
    reader = pools.open_backend(pools.config(options, mla=True, tp=(1, 2)), reading)
    keys, tier = pools.page_keys(4), OpenedFaultyTier.opened[-1]
    assert reader.batch_set_v1(keys, pools.indices(reading, range(4))) == [True] * 4
    assert tier.held == {}
    wanted = stored(writer, writing, keys)
    assert reader.batch_exists(keys) == 4
    assert reader.batch_get_v1(keys, pools.indices(reading, range(4))) == [True] * 4
    assert [pools.page_bytes(reading, page) for page in range(4)] == wanted


def test_storage_of_mla_on_two_ranks_refuses_disks_alone(tmp_path: Path) -> None:
    storage = pools.config({"tiers": [disk(tmp_path)], **EXPLICIT}, mla=True, tp=(1, 2))
    with pytest.raises(ValueError, match="only one process can open a disk tier"):
        pools.open_backend(storage, pools.mla_pool())


def test_storage_of_mla_on_two_ranks_warns_of_a_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"tiers": [disk(tmp_path), faulty()], **EXPLICIT}
    pools.open_backend(pools.config(options, mla=True, tp=(0, 2)), pools.mla_pool()).close()
    assert "only one process can open tier disk" in caplog.text


def test_storage_ranks_have_directories_of_their_own(options: dict[str, Any]) -> None:
    keys, opened = pools.page_keys(2), []
    for rank in range(2):
        pool = pools.mha_pool()
        opened.append(pools.open_backend(pools.config(options, tp=(rank, 2)), pool))
        stored(opened[-1], pool, keys, seed=rank)
    assert [backend.batch_exists(keys) for backend in opened] == [2, 2]


# Reset and end


def test_storage_after_clear_finds_new_pages_only(options: dict[str, Any]) -> None:
    pool = pools.mha_pool()
    backend = pools.open_backend(pools.config(options), pool)
    keys = pools.page_keys(3)
    stored(backend, pool, keys)
    assert backend.clear()
    assert backend.batch_exists(keys) == 0
    wanted = stored(backend, pool, keys[:1], seed=5)
    assert backend.batch_exists(keys) == 1
    assert backend.batch_get_v1(keys[:1], pools.indices(pool, [7])) == [True]
    assert pools.page_bytes(pool, 7) == wanted[0]
    backend.close()
    after = pools.open_backend(pools.config(options), pool)
    assert after.batch_exists(keys) == 0
    stored(after, pool, keys)
    assert after.clear()  # the second reset of one namespace in this process
    assert after.batch_exists(keys) == 0
    after.close()


def test_storage_of_mla_after_clear_is_shared_by_all_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvcache.connectors.sglang.storage.server_token", lambda: "one server")
    options = {"tiers": [faulty(shared="clear")], **EXPLICIT}
    writing, reading = pools.mla_pool(), pools.mla_pool()
    writer = pools.open_backend(pools.config(options, mla=True, tp=(0, 2)), writing)
    reader = pools.open_backend(pools.config(options, mla=True, tp=(1, 2)), reading)
    keys = pools.page_keys(2)
    stored(writer, writing, keys)
    writer.clear()
    reader.clear()
    assert reader.batch_exists(keys) == 0
    stored(writer, writing, keys)
    assert reader.batch_exists(keys) == 2


def test_storage_survives_a_restart(options: dict[str, Any]) -> None:
    pool, keys = pools.mha_pool(), pools.page_keys(3)
    backend = pools.open_backend(pools.config(options), pool)
    wanted = stored(backend, pool, keys)
    backend.close()
    again = pools.open_backend(pools.config(options), pool)
    assert again.batch_exists(keys) == 3
    assert again.batch_get_v1(keys, pools.indices(pool, range(3))) == [True] * 3
    assert [pools.page_bytes(pool, page) for page in range(3)] == wanted
    again.close()


def test_storage_after_close_finds_and_stores_nothing(options: dict[str, Any]) -> None:
    pool, keys = pools.mha_pool(), pools.page_keys(2)
    backend = pools.open_backend(pools.config(options), pool)
    stored(backend, pool, keys)
    backend.close()
    backend.close()
    assert backend.batch_exists(keys) == 0
    assert backend.batch_get_v1(keys, pools.indices(pool, [0, 1])) == [False, False]
    assert backend.batch_set_v1(keys, pools.indices(pool, [0, 1])) == [False, False]


# Options


def test_storage_opens_the_profile_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCACHE__DISK__PATH", str(tmp_path))
    monkeypatch.setenv("KVCACHE__DISK__CAPACITY", "8MiB")
    monkeypatch.setenv("KVCACHE__DISK__DEADLINE_S", "60")
    pool, keys = pools.mha_pool(), pools.page_keys(2)
    backend = pools.open_backend(pools.config({"profile": "l1-disk", **EXPLICIT}), pool)
    stored(backend, pool, keys)
    backend.close()
    monkeypatch.setenv("KVCACHE_PROFILE", "l1-disk")
    again = pools.open_backend(pools.config(EXPLICIT), pool)
    assert again.batch_exists(keys) == 2
    again.close()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"profile": "l1-diks"}, "l1-disk"),
        ({"profile": "l1-only"}, "l1-only"),
        ({}, "l1-only"),
        ({"tiers": [{"name": "disk", "kind": "disk"}]}, "path is missing"),
        ({"tiers": [{"name": "disk", "kind": "disc"}]}, "no such kind"),
        ({"tiers": [faulty(no_such=1)]}, "tiers.*no_such.*no such option"),
        ({"tires": []}, "tires: no such option"),
    ],
)
def test_storage_with_a_wrong_option_is_refused_at_the_start(
    options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        pools.open_backend(pools.config(options), pools.mha_pool())


# Threads, metrics


def test_storage_called_by_three_threads_moves_right_bytes(options: dict[str, Any]) -> None:
    pool = pools.mha_pool()
    backend = pools.open_backend(pools.config(options), pool)
    first, second = pools.page_keys(6), pools.page_keys(6, "b")
    wanted = stored(backend, pool, first)
    pools.fill(pool, 9)
    written = [pools.page_bytes(pool, page) for page in range(6)]
    results: dict[str, Any] = {}

    def run(name: str, call: Any, *arguments: Any) -> Thread:
        thread = Thread(target=lambda: results.update({name: call(*arguments)}))
        thread.start()
        return thread

    for thread in (
        run("set", backend.batch_set_v1, second, pools.indices(pool, range(6))),
        run("get", backend.batch_get_v1, first, pools.indices(pool, range(10, 16))),
        run("exists", backend.batch_exists, first),
    ):
        thread.join()
    assert results == {"set": [True] * 6, "get": [True] * 6, "exists": 6}
    assert [pools.page_bytes(pool, page) for page in range(10, 16)] == wanted
    assert backend.batch_get_v1(second, pools.indices(pool, range(16, 22))) == [True] * 6
    assert [pools.page_bytes(pool, page) for page in range(16, 22)] == written
    backend.close()


def test_storage_reports_pages_to_sglangs_metrics(options: dict[str, Any]) -> None:
    pool, keys = pools.mha_pool(), pools.page_keys(3)
    backend = pools.open_backend(pools.config(options, metrics=True), pool)
    stored(backend, pool, keys)
    backend.batch_get_v1(keys[:2], pools.indices(pool, [0, 1]))
    stats = backend.get_stats()
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([3], [2])
    assert len(stats.backup_bandwidth) == len(stats.prefetch_bandwidth) == 1
    assert backend.get_stats().backup_pgs == []
    backend.close()


def test_storage_without_metrics_reports_none(options: dict[str, Any]) -> None:
    backend = pools.open_backend(pools.config(options), pools.mha_pool())
    assert backend.get_stats() is None
    backend.close()


def test_storage_has_a_span_for_each_call(options: dict[str, Any], exported: Any) -> None:
    pool, keys = pools.mha_pool(), pools.page_keys(2)
    backend = pools.open_backend(pools.config(options), pool)
    stored(backend, pool, keys)
    backend.batch_exists(keys)
    backend.batch_get_v1(keys, pools.indices(pool, [0, 1]))
    backend.close()
    spans = {span.name: span for span in exported.get_finished_spans()}
    names = {"kvcache.store", "kvcache.lookup", "kvcache.load"}
    assert names | {f"kvcache.tier.{name}" for name in ("store", "contains", "load")} <= set(spans)
    assert spans["kvcache.load"].attributes["kvcache.block.hit"] == 4
    assert spans["kvcache.store"].attributes["kvcache.block.stored"] == 4
    load = spans["kvcache.tier.load"].parent
    assert load.span_id == spans["kvcache.load"].context.span_id


def test_storage_refuses_calls_without_the_interface(options: dict[str, Any]) -> None:
    backend = pools.open_backend(pools.config(options), pools.mha_pool())
    for call in (backend.get, backend.set, backend.batch_get, backend.batch_set):
        with pytest.raises(NotImplementedError, match="interface_v1 must be 1"):
            call("key")
    backend.close()
