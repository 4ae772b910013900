"""How a secondary tier opens and ends: wrong options, failed starts, shutdown, forks."""

from __future__ import annotations

import logging
import re
import threading
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from kvcache.process import ForkedError
from tests.support import played_tiering
from tests.support.forked_children import run_in_child
from tests.support.played_tiering import SharedFaultyTier, found, keys_of, mapped_engines, played
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("same_weights")]


# Options


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"profil": "l1-disk"}, r'unknown option "profil"; the options are .*mean "profile"\?'),
        ({"profile": 5}, "profile = 5 is not valid; write the name or the path of a profile"),
        (
            {"enable_kv_events": "yes"},
            r'enable_kv_events = "yes" is not valid; write true or false',
        ),
        ({"locality": "here"}, 'locality = "here" is not valid; write "LOCAL", "REMOTE"'),
        ({"profile": "l1-disk", "tiers": []}, 'has both "profile" and "tiers"'),
        ({"profile": "l1-dsk"}, "l1-dsk"),
        ({"profile": "l1-only"}, "lists no tier below L1"),
        ({}, "lists no tier below L1"),
        ({"tiers": []}, "KVCacheTier"),
        ({"tiers": "disk"}, "KVCacheTier"),
        ({"tiers": [{"name": "d", "kind": "disc"}]}, r'(?s)KVCacheTier.*"disc".*"disk"'),
        ({"tiers": [{"name": "d", "kind": "disk", "pth": "x"}]}, r"(?s)KVCacheTier.*pth.*path"),
        ({"tiers": [{"name": "l1", "kind": "dram"}]}, "(?s)KVCacheTier.*dram"),
    ],
)
def test_wrong_options_are_one_error_and_leave_no_thread(
    options: dict[str, object], text: str
) -> None:
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match=text) as raised:
        played_tiering.PlayedTiering(options)
    assert "Error" not in str(raised.value)
    del raised
    assert set(threading.enumerate()) <= before


def test_tier_that_cannot_be_opened_leaves_no_memory_and_no_thread(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "x")
    table = {"name": "disk", "kind": "disk", "path": path, "capacity": "8MiB"}
    first = SharedFaultyTier.table()
    mapped = mapped_engines()
    with pytest.raises(ValueError, match="path") as raised:
        played_tiering.PlayedTiering({"tiers": [first, table]})
    assert (
        raised.value.__traceback__ is not None
    )  # an exception that is kept does not keep the memory
    assert mapped_engines() == mapped
    assert SharedFaultyTier.last().closed
    eventually(
        lambda: not [t for t in threading.enumerate() if t.name.startswith("kvcache-faulty")],
        "the end of the threads",
    )


def test_start_that_fails_after_the_tiers_are_open_closes_them(
    faulty_options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("kvcache.connectors.vllm.secondary.tier.TransferQueue", refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        played_tiering.PlayedTiering(faulty_options)
    assert SharedFaultyTier.last().closed
    eventually(
        lambda: not [t for t in threading.enumerate() if t.name.startswith("kvcache-")],
        "the end of the threads",
    )


# The end


def test_shutdown_ends_threads_and_releases_vllms_memory(
    disk_options: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    engine = played_tiering.PlayedTiering(disk_options)
    assert engine.is_mapped()
    request = engine.start("a")
    engine.store(request, keys_of("a", 4))
    engine.close()  # writes the blocks that wait
    engine.tier.shutdown()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("kvcache-")]
    assert not engine.is_mapped()
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert found(disk_options, keys_of("a", 4)) == [True] * 4


def test_shutdown_ends_while_a_tier_hangs() -> None:
    engine = played_tiering.PlayedTiering({"tiers": [SharedFaultyTier.table(deadline_s=0.2)]})
    tier = SharedFaultyTier.last()
    tier.gate.clear()
    request = engine.start("a")
    engine.store(request, keys_of("a", 4))
    engine.manager.lookup(keys_of("b", 1)[0], request)
    engine.step()
    tier.waiting.acquire()
    engine.close()
    assert not engine.is_mapped()
    tier.gate.set()


def test_forked_child_cannot_use_the_tier(disk_options: dict[str, object]) -> None:
    with played(disk_options) as engine:

        def use() -> str:
            try:
                engine.tier.drain_jobs()
            except ForkedError as error:
                return str(error)
            return "used"

        assert re.search("KVCacheTier belongs to process", run_in_child(use))
