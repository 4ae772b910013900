"""Opening direct tiers: the tiers below L1 of a profile, or those that an engine's JSON lists."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from kvcache.profiles import ProfileError, load_profile, open_tiers
from kvcache.replica import Replica
from kvcache.slab import PAGE
from kvcache.testing import block_of, keys_of
from kvcache.tiers.framed import Framed
from tests.support.failing_parts import FaultyTier

KEYS = keys_of("a", 5)
NAMESPACE = b"n" * 32


@pytest.fixture
def table(tmp_path: Path) -> dict[str, Any]:
    return {"name": "disk", "kind": "disk", "path": str(tmp_path / "kv"), "capacity": "1MiB"}


def problems(*profile: str, **options: Any) -> tuple[str, ...]:
    with pytest.raises(ProfileError) as raised:
        open_tiers(*profile, block_nbytes=PAGE, namespace=NAMESPACE, **options)
    return raised.value.problems


def test_tiers_of_a_list_keep_blocks_in_frames(table: dict[str, Any]) -> None:
    blocks = [block_of(key, PAGE) for key in KEYS]
    for _ in range(2):  # the second opening finds the blocks of the first
        with open_tiers(tiers=[table], block_nbytes=PAGE, namespace=NAMESPACE) as tiers:
            [tier] = tiers.tiers
            assert isinstance(tier.channel.tier, Framed)
            assert tiers.store(KEYS, blocks) == [True] * 5
            into = [bytearray(PAGE) for _ in KEYS]
            assert tiers.load(KEYS, into) == [True] * 5
            assert into == blocks
            assert tiers.stats().profile == "tiers"
            assert tiers.names == (("disk", "disk"),)
    with open_tiers(tiers=[table], block_nbytes=PAGE, namespace=b"m" * 32) as tiers:
        assert tiers.contains(KEYS) == [False] * 5


def test_profile_is_opened_without_its_l1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kvcache.profiles")
    monkeypatch.setenv("KVCACHE_PROFILE", "l1-disk")
    monkeypatch.setenv("KVCACHE__DISK__PATH", str(tmp_path / "kv"))
    monkeypatch.setenv("KVCACHE__DISK__CAPACITY", "1MiB")
    monkeypatch.setenv("KVCACHE__DISK__DEADLINE_S", "0.25")
    with open_tiers(block_nbytes=PAGE, namespace=NAMESPACE) as tiers:
        assert tiers.names == (("disk", "disk"),)
        assert tiers.stats().profile == "l1-disk"
        assert tiers.deadline_s == 0.25
    [record] = [record for record in caplog.records if "opened without L1" in record.message]
    assert record.levelno == logging.INFO
    assert record.message.endswith('without effect: tier "l1"')


def test_options_without_effect_are_logged_once(
    table: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    profile = tmp_path / "ours.toml"
    profile.write_text(
        'extends = "l1-disk"\n[[tier]]\nname = "disk"\n'
        f'path = "{table["path"]}"\ncapacity = "1MiB"\nqueue = "1MiB"\n'
    )
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", "64GiB")  # more than there is
    with open_tiers(str(profile), block_nbytes=PAGE, namespace=NAMESPACE):
        pass
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert 'KVCACHE__L1__CAPACITY: capacity = "64GiB"' in record.message
    assert f'{profile}, line 6: queue = "1MiB"' in record.message
    assert "path" not in record.message.partition("without effect")[2]


def test_list_with_an_option_without_effect_is_logged(
    table: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kvcache.profiles")
    with open_tiers(
        tiers=[table | {"writes": "hot"}], block_nbytes=PAGE, namespace=NAMESPACE, origin="config"
    ) as tiers:
        assert tiers.stats().profile == "config"
    [record] = caplog.records
    assert record.message.endswith('without effect: config[0]: writes = "hot"')


def test_variable_overrides_an_option_of_a_list(
    table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCACHE__DISK__DEADLINE_S", "7")
    with open_tiers(tiers=[table], block_nbytes=PAGE, namespace=NAMESPACE) as tiers:
        assert tiers.deadline_s == 7
    monkeypatch.setenv("KVCACHE__DSK__DEADLINE_S", "7")
    [problem] = problems(tiers=[table])
    assert "no such tier" in problem
    assert 'did you mean "DISK"?' in problem


def test_options_of_every_layer_are_used(table: dict[str, Any]) -> None:
    options = {"deadline_s": 2, "calls": 3, "if_slower": "load", "lookup": "load"}
    with open_tiers(tiers=[table | options], block_nbytes=PAGE, namespace=NAMESPACE) as tiers:
        [tier] = tiers.tiers
        assert tier.channel.deadline_s == 2
        assert len(tier.channel.workers.threads) == 3
        assert tier.loads_even_if_slower
        assert tier.channel.assumes_held


def test_lookup_of_a_shipped_profile_is_for_stacks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setenv("KVCACHE__OBJECT__URL", str(tmp_path / "objects"))
    shipped = load_profile("l1-object").tiers[1].options
    assert shipped["lookup"] == "load"
    for lookup, assumes in ((None, False), ("load", True), ("ask", False)):
        if lookup:
            monkeypatch.setenv("KVCACHE__OBJECT__LOOKUP", lookup)
        with open_tiers("l1-object", block_nbytes=PAGE, namespace=NAMESPACE) as tiers:
            assert tiers.tiers[0].channel.assumes_held == assumes


def test_profile_without_lower_tiers_is_refused_with_those_that_have_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("KVCACHE_PROFILE", raising=False)
    [problem] = problems()
    assert "l1-only.toml: lists no tier below L1" in problem
    assert '"l1-disk"' in problem
    assert '"l1-only"' not in problem


def test_profile_and_list_exclude_each_other(table: dict[str, Any]) -> None:
    [problem] = problems("l1-disk", tiers=[table], origin="config")
    assert problem == "config: takes a profile or a list of tiers, not both"


@pytest.mark.parametrize("tiers", [{"name": "disk"}, "disk", 3, ["disk"], [None]])
def test_list_of_another_type_is_refused(tiers: object) -> None:
    [problem] = problems(tiers=tiers, origin="config")
    assert problem.startswith("config: write a list of tiers")


def test_wrong_lists_are_refused_with_every_problem(table: dict[str, Any]) -> None:
    assert problems(tiers=[]) == ('tiers: lists no tier; write [{"name": ..., "kind": ...}]',)
    found = problems(tiers=[table | {"qeue": 3, "capacity": True}, {"name": "disk", "kind": "x"}])
    text = "\n".join(found)
    assert 'tiers[0]: qeue = 3: no such option; kind "disk" takes ' in text
    assert "tiers[0]: capacity = true: not a size" in text
    assert 'tiers[1]: kind = "x": no such kind' in text
    assert "two tiers have this name" in text


def test_l1_in_a_list_is_refused() -> None:
    [problem] = problems(tiers=[{"name": "l1", "kind": "dram", "capacity": "1GiB"}])
    assert problem.startswith('tiers[0]: kind = "dram": is an L1; leave it out')


def test_deeply_nested_list_is_refused(table: dict[str, Any]) -> None:
    nested: list[Any] = []
    for _ in range(200):
        nested = [nested]
    [problem] = problems(tiers=[table | {"path": nested}])
    assert "nested deeper than" in problem


class Unmade(FaultyTier):
    """A tier with a constructor that raises."""

    def __init__(self) -> None:
        raise OSError("no such server, password=hunter2")


def test_failing_constructor_closes_the_tiers_before_it(table: dict[str, Any]) -> None:
    before = set(threading.enumerate())
    kind = f"{__name__}:Unmade"
    [problem] = problems(tiers=[table, {"name": "far", "kind": kind}])
    assert problem.startswith("tiers[1]")
    assert "OSError: no such server" in problem
    assert "hunter2" not in problem
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive()
    with open_tiers(tiers=[table], block_nbytes=PAGE, namespace=NAMESPACE):
        pass  # the disk is not open any more


def test_replicas_have_disks_of_their_own(table: dict[str, Any], tmp_path: Path) -> None:
    for index in range(2):
        with open_tiers(
            tiers=[table], block_nbytes=PAGE, namespace=NAMESPACE, replica=Replica(index, 2)
        ):
            pass
    assert (tmp_path / "kv" / "replica-1" / "blocks").exists()
