"""LoRA adapters: a request finds the blocks of an adapter with the same files, name and path."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest

from kvcache.connectors.vllm.identity.adapters import Adapters
from kvcache.connectors.vllm.messages import Acks
from kvcache.connectors.vllm.scheduler.side import SchedulerSide
from kvcache.testing import keys_of
from tests.support.played_engine import (
    BLOCK,
    RANKS,
    SHARD,
    PlayedEngine,
    Request,
    cache_config,
    engine_config,
    full_attention,
    shards,
)

pytestmark = pytest.mark.engine

KEYS = keys_of("chain", 3)
DAY_NS = 86400 * 10**9


def write_adapter(folder: Path, weights: bytes = b"weights") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text("{}")
    return str(folder)


def request_of(path: str, name: str = "poet", number: int = 1, **options: Any) -> Any:
    return Request("a", 3 * BLOCK, lora_request=LoRARequest(name, number, path, **options))


def adapters_of_a_later_engine() -> Adapters:
    """Return the adapters of an engine that starts in a day: every file is older."""
    return Adapters(started_ns=time.time_ns() + DAY_NS)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write_adapter(tmp_path / "poet")


def test_keys_of_equal_files_at_two_paths_are_equal(path: str, tmp_path: Path) -> None:
    copy = write_adapter(tmp_path / "mount" / "poet")
    assert adapters_of_a_later_engine().keys(
        request_of(path), KEYS
    ) == adapters_of_a_later_engine().keys(request_of(copy), KEYS)


def test_keys_without_an_adapter_are_unchanged(path: str) -> None:
    adapters = adapters_of_a_later_engine()
    assert adapters.keys(Request("a", BLOCK), KEYS) == KEYS
    assert not set(adapters.keys(request_of(path), KEYS)) & set(KEYS)


def test_keys_of_keys_are_vllms_hashes(path: str) -> None:
    adapters, request = adapters_of_a_later_engine(), request_of(path)
    assert adapters.keys(request, adapters.keys(request, KEYS)) == KEYS


@pytest.mark.parametrize("nbytes", [16, 32])
def test_keys_have_the_length_of_the_hashes(path: str, nbytes: int) -> None:
    keys = keys_of("chain", 3, nbytes)
    assert [len(key) for key in adapters_of_a_later_engine().keys(request_of(path), keys)] == [
        nbytes
    ] * 3


def test_keys_after_the_files_were_replaced_differ(path: str) -> None:
    before = adapters_of_a_later_engine().keys(request_of(path), KEYS)
    write_adapter(Path(path), b"trained")
    assert not set(adapters_of_a_later_engine().keys(request_of(path), KEYS)) & set(before)


def test_keys_with_another_expert_layout_differ(path: str) -> None:
    adapters = adapters_of_a_later_engine()
    other = adapters.keys(request_of(path, is_3d_lora_weight=True), KEYS)
    assert other != adapters.keys(request_of(path), KEYS)


def test_keys_with_other_engine_settings_differ(path: str) -> None:
    started_ns = time.time_ns() + DAY_NS
    other = Adapters(["target_modules=['q_proj']"], started_ns=started_ns)
    assert other.keys(request_of(path), KEYS) != adapters_of_a_later_engine().keys(
        request_of(path), KEYS
    )


def _young(folder: Path) -> None:
    write_adapter(folder)


def _linked(folder: Path) -> None:
    target = write_adapter(folder.parent / "version 1")
    folder.symlink_to(target)


def _missing(folder: Path) -> None:
    pass


@pytest.mark.parametrize("make", [_young, _linked, _missing])
def test_keeps_adapter_younger_than_the_engine_is_refused_once(
    tmp_path: Path, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = Adapters(started_ns=time.time_ns() - DAY_NS)
    make(tmp_path / "adapter")
    request = request_of(str(tmp_path / "adapter"))
    with caplog.at_level(logging.WARNING, "kvcache"):
        assert not adapters.keeps(request)
        assert not adapters.keeps(request)
    assert len(caplog.records) == 1
    assert adapters.keys(request, KEYS) == []


def test_keeps_young_snapshot_is_kept(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / (40 * "a")
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "1").write_bytes(b"weights")
    (snapshot / "adapter_model.safetensors").symlink_to(repository / "blobs" / "1")
    adapters = Adapters(started_ns=(snapshot / "adapter_model.safetensors").lstat().st_ctime_ns)
    os.utime(repository / "blobs" / "1")  # sets its ctime to now
    assert adapters.keeps(request_of(str(snapshot)))


def test_keeps_adapter_loaded_in_place_is_refused(path: str, tmp_path: Path) -> None:
    adapters = adapters_of_a_later_engine()
    assert adapters.keeps(request_of(path))
    assert not adapters.keeps(request_of(path, load_inplace=True))
    other = write_adapter(tmp_path / "other")
    adapters = adapters_of_a_later_engine()
    assert adapters.keeps(request_of(path))
    assert adapters.keeps(request_of(other))  # the same number: it replaced the first
    assert not adapters.keeps(request_of(path))


def test_changed_after_files_were_written_is_true(path: str) -> None:
    adapters = adapters_of_a_later_engine()
    adapters.keys(request_of(path), KEYS)
    assert not adapters.changed(done=False)
    write_adapter(Path(path), b"trained")
    assert adapters.changed(done=False)
    assert not adapters.keeps(request_of(path))


def test_changed_after_files_were_removed_is_true(path: str) -> None:
    adapters = adapters_of_a_later_engine()
    adapters.keys(request_of(path), KEYS)
    (Path(path) / "adapter_model.safetensors").unlink()
    assert adapters.changed(done=False)


def test_keeps_trusted_name_reads_no_file() -> None:
    adapters = Adapters(trusted=True)
    request = request_of("/nowhere")
    assert adapters.keeps(request)
    assert adapters.keys(request, KEYS) == Adapters(trusted=True).keys(request, KEYS) != []


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> SchedulerSide:
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", str(32 * SHARD * len(RANKS)))
    side = SchedulerSide(
        engine_config(), cache_config(full_attention()), {}, adapters=adapters_of_a_later_engine()
    )
    side.open(shards())
    return side


def compute(side: SchedulerSide, request: Any, between: Any = None) -> None:
    """Compute and store a request; ``between`` is called before its store is acknowledged."""
    engine = PlayedEngine(side)
    engine.admit(request, [0, 1, 2])
    step = engine.step((request, request.num_tokens))
    if between is not None:
        between()
    side.end_step(Acks({store.job: len(RANKS) for store in step.stores}, step=step.number))
    side.finish(request)


def test_scheduler_finds_blocks_of_the_same_adapter(side: SchedulerSide, path: str) -> None:
    compute(side, request_of(path))
    again = request_of(path)
    again.num_tokens += 1
    assert side.matched_tokens(again, 0) == 3 * BLOCK
    side.finish(again)
    assert side.matched_tokens(Request("b", 3 * BLOCK + 1), 0) == 0  # without the adapter
    side.close()


def test_scheduler_stores_nothing_of_an_adapter_replaced_meanwhile(
    side: SchedulerSide, path: str
) -> None:
    """The worker may have read either version: it reads an adapter again after dropping it."""
    compute(side, request_of(path), lambda: write_adapter(Path(path), b"trained"))
    stats = side.stats()
    assert stats is not None
    assert stats.tiers[0].used_blocks == 0
    compute(side, request_of(path))  # nor later
    assert side.matched_tokens(request_of(path), 0) == 0
    assert side.stats().tiers[0].used_blocks == 0  # type: ignore[union-attr]
    side.close()
