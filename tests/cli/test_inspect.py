"""`kvcache inspect` of a disk tier: the blocks of each namespace, and damaged ones."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from kvcache import cli
from kvcache.keys import namespace, namespaced_key
from kvcache.replica import Replica
from kvcache.sizes import DiskSize
from kvcache.testing import keys_of
from kvcache.tiers.disk import PAGE, DiskTier
from kvcache.tiers.disk.reader import DiskReader
from kvcache.tiers.framed import HEADER_NBYTES, Framed, frame_nbytes
from tests.support.disk_tiers import blocks_of, capacity_for, open_disk
from tests.support.frames import BLOCK_NBYTES, kv_like_block

NAMESPACES = [namespace({"model": model}) for model in ("a", "b")]
FRAME = frame_nbytes(BLOCK_NBYTES)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Framed]:
    """An open tier with three blocks of one namespace and one of another."""
    path, size = tmp_path / "kv", capacity_for(8, FRAME)
    inner = DiskTier(block_nbytes=FRAME, path=str(path), capacity=size)
    with closing(Framed(inner, block_nbytes=BLOCK_NBYTES, codec="zstd")) as tier:
        for name, count in zip(NAMESPACES, (3, 1), strict=True):
            for number, key in enumerate(keys_of("inspected", count)):
                block = memoryview(kv_like_block(BLOCK_NBYTES, number))
                assert tier.store([namespaced_key(name, key)], [block]) == [True]
        yield tier


@pytest.fixture
def inspected(
    tier: Framed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, Any]]:
    def inspect(*arguments: str) -> tuple[int, Any]:
        code = cli.main(["inspect", str(tmp_path / "kv"), "--json", *arguments])
        [found] = json.loads(capsys.readouterr().out)["tiers"]
        return code, found

    return inspect


def damage(path: Path, key: bytes) -> None:
    """Change a byte of the block's payload."""
    with closing(DiskReader(path)) as reader:
        [slot] = [record.slot for record in reader if record.key == key]
    with (path / "blocks").open("r+b") as file:
        file.seek(slot * FRAME + HEADER_NBYTES + 1000)
        [byte] = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def test_inspect_counts_namespaces_of_an_open_tier(
    inspected: Callable[..., tuple[int, Any]], tmp_path: Path
) -> None:
    code, found = inspected()
    assert code == 0
    assert found["tier"] == str(tmp_path / "kv")
    assert (found["kind"], found["slots"], found["blocks"]) == ("disk", 8, 4)
    assert found["open_in_process"] is not None
    sizes = {name: held.pop("nbytes") for name, held in found["namespaces"].items()}
    assert found["namespaces"] == {
        NAMESPACES[0].hex(): {"blocks": 3},
        NAMESPACES[1].hex(): {"blocks": 1},
    }
    assert all(0 < nbytes < 3 * FRAME and not nbytes % PAGE for nbytes in sizes.values())


def test_inspect_verify_finds_intact_blocks(inspected: Callable[..., tuple[int, Any]]) -> None:
    code, found = inspected("--verify")
    assert code == 0
    assert [(held["intact"], held["rejected"]) for held in found["namespaces"].values()] == [
        (3, {}), (1, {}),
    ]  # fmt: skip


def test_inspect_verify_finds_a_damaged_block_and_keeps_it(
    inspected: Callable[..., tuple[int, Any]], tier: Framed, tmp_path: Path
) -> None:
    damaged_key = namespaced_key(NAMESPACES[0], keys_of("inspected", 3)[1])
    damage(tmp_path / "kv", damaged_key)
    code, found = inspected("--verify")
    assert code == 1
    held = found["namespaces"][NAMESPACES[0].hex()]
    assert (held["intact"], held["rejected"]) == (2, {"checksum": 1})
    assert tier.contains([damaged_key]) == [True]
    assert inspected()[0] == 0  # only reading the blocks shows the damage


def test_inspect_verify_without_zstd_reports_no_damage(
    inspected: Callable[..., tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcache.tiers.framed.format.zstandard", lambda: None)
    code, found = inspected("--verify")
    assert code == 0
    assert found["namespaces"][NAMESPACES[1].hex()]["rejected"] == {"codec": 1}


def test_inspect_verify_of_removed_blocks_reports_no_damage(
    inspected: Callable[..., tuple[int, Any]], tier: Framed, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Framed.load
    keys = [namespaced_key(NAMESPACES[0], key) for key in keys_of("inspected", 3)]

    def remove_then_load(self: Framed, *arguments: Any) -> list[int]:
        tier.remove(keys)
        return load(self, *arguments)

    monkeypatch.setattr(Framed, "load", remove_then_load)
    code, found = inspected("--verify")
    assert code == 0
    assert found["namespaces"][NAMESPACES[0].hex()]["rejected"] == {"changed": 3}
    assert found["namespaces"][NAMESPACES[1].hex()]["intact"] == 1


def test_inspect_text_has_a_row_for_each_namespace(
    tier: Framed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(tmp_path / "kv", namespaced_key(NAMESPACES[1], keys_of("inspected", 1)[0]))
    assert cli.main(["inspect", str(tmp_path / "kv"), "--verify"]) == 1
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    first, second = (name.hex()[:16] for name in NAMESPACES)
    assert [row[1:2] + row[3:] for row in rows if row[:1] == [first]] == [["3", "3", "none"]]
    assert [row[3:] for row in rows if row[:1] == [second]] == [["0", "1", "checksum"]]
    assert "Damaged: 1 blocks." in out


def test_inspect_profile_reads_its_lower_tiers(
    tier: Framed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KVCACHE__DISK__PATH", str(tmp_path / "kv"))
    assert cli.main(["inspect", "--profile", "l1-disk"]) == 0
    assert NAMESPACES[0].hex()[:16] in capsys.readouterr().out


def test_inspect_counts_keys_without_a_namespace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(open_disk(tmp_path / "kv")) as tier:
        keys = keys_of("bare", 2)
        tier.store(keys, blocks_of(keys))
    assert cli.main(["inspect", str(tmp_path / "kv"), "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)["tiers"]
    assert found["namespaces"] == {"": {"blocks": 2, "nbytes": 2 * PAGE}}
    assert found["open_in_process"] is None
    assert cli.main(["inspect", str(tmp_path / "kv"), "--verify"]) == 2
    assert "no room for a frame" in capsys.readouterr().err


def test_inspect_empty_tier_says_that_it_holds_no_blocks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_disk(tmp_path / "kv").close()
    assert cli.main(["inspect", str(tmp_path / "kv")]) == 0
    assert "It holds no blocks." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["{path}"], "No such file"),
        (["other://somewhere"], "cannot read kind 'other'; kinds that can be read are disk"),
        (["--profile", "l1-only"], "has no lower tier"),
        (["--profile", "l1-dsik"], 'did you mean "l1-disk"?'),
    ],
)
def test_inspect_unreadable_place_ends_with_code_2(
    arguments: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", *(word.format(path=tmp_path) for word in arguments)]) == 2
    assert error in capsys.readouterr().err


def test_inspect_described_namespace_has_its_identity(
    tier: Framed,
    inspected: Callable[..., tuple[int, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    about = {"model": "chat", "weights": "digest 12\x1b[31m34", "ranks": [1, 2]}
    assert tier.resolve(NAMESPACES[0], json.dumps(about)) == NAMESPACES[0]
    _, found = inspected()
    assert found["namespaces"][NAMESPACES[0].hex()]["identity"] == about
    assert "identity" not in found["namespaces"][NAMESPACES[1].hex()]
    assert cli.main(["inspect", str(tmp_path / "kv")]) == 0
    out = capsys.readouterr().out
    assert "\x1b[31m" not in out
    for words in ("chat", "digest 12", "[1, 2]"):
        assert words in out


def test_inspect_reset_namespace_is_described_under_its_new_name(
    tier: Framed, inspected: Callable[..., tuple[int, Any]], tmp_path: Path
) -> None:
    tier.forget(NAMESPACES[0])
    new_name = tier.resolve(NAMESPACES[0], json.dumps({"model": "chat"}))
    assert new_name != NAMESPACES[0]
    tier.store([namespaced_key(new_name, b"one")], [memoryview(kv_like_block(BLOCK_NBYTES, 1))])
    _, found = inspected()
    assert found["namespaces"][new_name.hex()]["identity"] == {"model": "chat"}
    assert found["namespaces"][NAMESPACES[0].hex()]["blocks"] == 3


@pytest.mark.parametrize("text", [b"[]", b"{", b"\xff", b'{"reset": [], "about": {"a": 1}}'])
def test_inspect_ignores_damaged_descriptions(
    text: bytes, inspected: Callable[..., tuple[int, Any]], tmp_path: Path
) -> None:
    (tmp_path / "kv" / "spaces").write_bytes(text)
    code, found = inspected()
    assert (code, found["blocks"]) == (0, 4)


def test_inspect_path_of_several_replicas_reads_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = keys_of("a", 3)
    with ExitStack() as stack:
        for index in range(2):
            tier = DiskTier(
                block_nbytes=PAGE,
                path=str(tmp_path),
                capacity=DiskSize(2 * capacity_for(8)),
                replica=Replica(index, 2),
            )
            stack.enter_context(closing(tier))
            tier.store(keys[index:], blocks_of(keys[index:]))
        assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tiers"]
    assert [(each["tier"], each["blocks"]) for each in found] == [
        (str(tmp_path), 3), (str(tmp_path / "replica-1"), 2),
    ]  # fmt: skip
