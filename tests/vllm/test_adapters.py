"""LoRA adapters: blocks of one are found by requests of the same weights, whatever their name."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest

from kvcache.connectors.vllm.adapters import Adapters
from kvcache.connectors.vllm.messages import Acks
from kvcache.connectors.vllm.scheduler import SchedulerSide
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


def asks(path: str, name: str = "poet", number: int = 1, **options: Any) -> Any:
    return Request("a", 3 * BLOCK, lora_request=LoRARequest(name, number, path, **options))


def later() -> Adapters:
    """Of an engine that is started a day from now: every file is older."""
    return Adapters(started_ns=time.time_ns() + DAY_NS)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write_adapter(tmp_path / "poet")


def test_keys_same_files_elsewhere_are_the_same(path: str, tmp_path: Path) -> None:
    copy = write_adapter(tmp_path / "mount" / "poet")
    assert later().keys(asks(path), KEYS) == later().keys(asks(copy), KEYS)


def test_keys_are_those_of_no_adapter_without_one(path: str) -> None:
    adapters = later()
    assert adapters.keys(Request("a", BLOCK), KEYS) == KEYS
    assert not set(adapters.keys(asks(path), KEYS)) & set(KEYS)


def test_keys_twice_are_vllms_hashes(path: str) -> None:
    adapters, request = later(), asks(path)
    assert adapters.keys(request, adapters.keys(request, KEYS)) == KEYS


@pytest.mark.parametrize("nbytes", [16, 32])
def test_keys_keep_their_length(path: str, nbytes: int) -> None:
    keys = keys_of("chain", 3, nbytes)
    assert [len(key) for key in later().keys(asks(path), keys)] == [nbytes] * 3


def test_keys_adapter_replaced_between_two_engines_are_others(path: str) -> None:
    before = later().keys(asks(path), KEYS)
    write_adapter(Path(path), b"trained")
    assert not set(later().keys(asks(path), KEYS)) & set(before)


def test_keys_layout_of_expert_weights_counts(path: str) -> None:
    adapters = later()
    other = adapters.keys(asks(path, is_3d_lora_weight=True), KEYS)
    assert other != adapters.keys(asks(path), KEYS)


def test_keys_what_an_adapter_does_beside_its_weights_counts(path: str) -> None:
    started_ns = time.time_ns() + DAY_NS
    other = Adapters(["target_modules=['q_proj']"], started_ns=started_ns)
    assert other.keys(asks(path), KEYS) != later().keys(asks(path), KEYS)


def _young(folder: Path) -> None:
    write_adapter(folder)


def _linked(folder: Path) -> None:
    target = write_adapter(folder.parent / "version 1")
    folder.symlink_to(target)


def _missing(folder: Path) -> None:
    pass


@pytest.mark.parametrize("make", [_young, _linked, _missing])
def test_keeps_adapter_that_may_have_been_another_is_refused(
    tmp_path: Path, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = Adapters(started_ns=time.time_ns() - DAY_NS)
    make(tmp_path / "adapter")
    request = asks(str(tmp_path / "adapter"))
    with caplog.at_level(logging.WARNING, "kvcache"):
        assert not adapters.keeps(request)
        assert not adapters.keeps(request)
    assert len(caplog.records) == 1
    assert adapters.keys(request, KEYS) == []


def test_keeps_hub_snapshot_that_is_young_is_kept(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / (40 * "a")
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "1").write_bytes(b"weights")
    (snapshot / "adapter_model.safetensors").symlink_to(repository / "blobs" / "1")
    adapters = Adapters(started_ns=(snapshot / "adapter_model.safetensors").lstat().st_ctime_ns)
    os.utime(repository / "blobs" / "1")  # its time of change is now
    assert adapters.keeps(asks(str(snapshot)))


def test_keeps_adapter_loaded_in_place_is_refused(path: str, tmp_path: Path) -> None:
    adapters = later()
    assert adapters.keeps(asks(path))
    assert not adapters.keeps(asks(path, load_inplace=True))
    other = write_adapter(tmp_path / "other")
    adapters = later()
    assert adapters.keeps(asks(path))
    assert adapters.keeps(asks(other))  # of the same number: it has replaced the first
    assert not adapters.keeps(asks(path))


def test_changed_files_written_while_in_use_are_seen(path: str) -> None:
    adapters = later()
    adapters.keys(asks(path), KEYS)
    assert not adapters.changed(done=False)
    write_adapter(Path(path), b"trained")
    assert adapters.changed(done=False)
    assert not adapters.keeps(asks(path))


def test_changed_files_removed_while_in_use_are_seen(path: str) -> None:
    adapters = later()
    adapters.keys(asks(path), KEYS)
    (Path(path) / "adapter_model.safetensors").unlink()
    assert adapters.changed(done=False)


def test_keeps_trusted_names_read_no_file() -> None:
    adapters = Adapters(trusted=True)
    request = asks("/nowhere")
    assert adapters.keeps(request)
    assert adapters.keys(request, KEYS) == Adapters(trusted=True).keys(request, KEYS) != []


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> SchedulerSide:
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", str(32 * SHARD * len(RANKS)))
    side = SchedulerSide(engine_config(), cache_config(full_attention()), {}, adapters=later())
    side.open(shards())
    return side


def compute(side: SchedulerSide, request: Any, between: Any = None) -> None:
    """The engine computes the request; ``between`` happens before it is known to have stored."""
    engine = PlayedEngine(side)
    engine.admit(request, [0, 1, 2])
    step = engine.step((request, request.num_tokens))
    if between is not None:
        between()
    side.end_step(Acks({store.job: len(RANKS) for store in step.stores}, step=step.number))
    side.finish(request)


def test_scheduler_blocks_of_an_adapter_are_found_again(side: SchedulerSide, path: str) -> None:
    compute(side, asks(path))
    again = asks(path)
    again.num_tokens += 1
    assert side.matched_tokens(again, 0) == 3 * BLOCK
    side.finish(again)
    assert side.matched_tokens(Request("b", 3 * BLOCK + 1), 0) == 0  # not without it
    side.close()


def test_scheduler_adapter_replaced_while_it_computes_stores_nothing(
    side: SchedulerSide, path: str
) -> None:
    """The worker may have read either: it reads an adapter again when it has dropped it."""
    compute(side, asks(path), lambda: write_adapter(Path(path), b"trained"))
    stats = side.stats()
    assert stats is not None
    assert stats.tiers[0].used_blocks == 0
    compute(side, asks(path))  # and from then on
    assert side.matched_tokens(asks(path), 0) == 0
    assert side.stats().tiers[0].used_blocks == 0  # type: ignore[union-attr]
    side.close()
