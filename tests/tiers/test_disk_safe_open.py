"""DiskTier with files that other users changed: it raises, names the file, and changes nothing."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from kvcache.testing import keys_of
from kvcache.tiers.disk import PAGE, DiskTier, safe_open
from kvcache.tiers.disk.directory import check_usable
from kvcache.tiers.disk.reader import DiskReader
from tests.support.disk_tiers import (
    blocks_of,
    capacity_for,
    load_hits,
    open_disk,
    require_attributes,
)

FILES = ["lock", "records", "blocks"]
KEYS = keys_of("a", 3)


def make_fifo(file: Path) -> None:
    os.mkfifo(file)


def make_socket(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        previous = Path.cwd()
        os.chdir(file.parent)  # the path of a socket has at most 108 bytes
        try:
            listener.bind(file.name)
        finally:
            os.chdir(previous)


@pytest.fixture
def outside_file(tmp_path: Path) -> Iterator[Path]:
    """A file outside the tier's directory, which must not change."""
    file = tmp_path / "outside"
    file.write_text("not a cache")
    file.chmod(0o640)
    yield file
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("not a cache", 0o640)


@pytest.fixture
def kv(tmp_path: Path) -> Path:
    """The directory of a closed tier with three blocks."""
    with closing(open_disk(tmp_path / "kv")) as tier:
        tier.store(KEYS, blocks_of(KEYS))
    return tmp_path / "kv"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["0123456789" * 9, "x" * 4096, "12 monkeys"])
def test_disk_with_foreign_file_raises_and_keeps_it(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    (tmp_path / name).chmod(0o644)
    with pytest.raises(ValueError, match=f"path is '{tmp_path}', where '{name}' was not written"):
        open_disk(tmp_path)
    assert (tmp_path / name).read_text() == content
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", FILES)
def test_disk_with_replaced_file_raises_and_keeps_it(kv: Path, name: str) -> None:
    require_attributes(kv)
    (kv / name).unlink()
    (kv / name).write_text("x" * 8192)
    with pytest.raises(ValueError, match=f"'{name}' was not written by kvcache"):
        open_disk(kv)
    assert (kv / name).read_text() == "x" * 8192


def test_disk_with_copied_files_keeps_its_blocks(kv: Path) -> None:
    """A copy of `blocks` has no mark."""
    for name in FILES:
        content = (kv / name).read_bytes()
        (kv / name).rename(kv / f"{name}.old")
        (kv / name).write_bytes(content)
    with closing(open_disk(kv)) as tier:
        assert load_hits(tier, KEYS) == [True] * 3


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (lambda file, other: file.symlink_to(other), "a symbolic link"),
        (lambda file, other: file.symlink_to("/nowhere/at/all"), "a symbolic link"),
        (lambda file, other: file.hardlink_to(other), r"a file with several names \(hard links\)"),
        (lambda file, other: file.mkdir(), "a directory"),
        (lambda file, other: make_fifo(file), "not a regular file"),
        (lambda file, other: make_socket(file), "a socket or a pipe"),
    ],
)
def test_disk_with_link_or_special_file_raises_and_names_its_kind(
    kv: Path, outside_file: Path, name: str, plant: Callable[[Path, Path], None], kind: str
) -> None:
    (kv / name).unlink()
    plant(kv / name, outside_file)
    with pytest.raises(ValueError, match=f"path is '{kv}', where '{name}' is {kind}; move it away"):
        open_disk(kv)
    if name != "lock":
        with pytest.raises(ValueError, match=f"'{name}' is "):
            DiskReader(kv)


@pytest.mark.parametrize("name", FILES)
def test_disk_with_file_of_another_user_raises_value_error(
    kv: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, real = os.geteuid(), os.fstat

    def fstat(file: int) -> os.stat_result:
        found = real(file)
        if Path(f"/proc/self/fd/{file}").readlink().name == name:
            return os.stat_result([*found[:4], 12345, *found[5:]])
        return found

    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.raises(ValueError, match=rf"is a file of user 12345 \(this process is user {user}"):
        open_disk(kv)


def test_disk_in_directory_of_another_user_raises_value_error(
    kv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid():
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    else:
        os.chown(kv, 12345, -1)
    with pytest.raises(ValueError, match=rf"path is '{kv}', which belongs to user \d+; it must"):
        open_disk(kv)


def test_disk_in_directory_writable_by_others_warns(
    kv: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for mode, warned in ((0o777, 1), (0o770, 2), (0o1777, 2), (0o755, 2)):
        kv.chmod(mode)
        with closing(open_disk(kv)) as tier:
            assert load_hits(tier, KEYS) == [True] * 3
        assert len(caplog.records) == warned
    assert "other users can rename and delete its files (mode 0777)" in caplog.text


def test_disk_path_with_links_of_its_user_is_followed(kv: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(kv)
    (tmp_path / "here").symlink_to(".")
    (tmp_path / "relative").symlink_to("../" + tmp_path.name + "/link")
    for path in ("link", "relative", "here/link", "kv/../link"):
        with closing(open_disk(tmp_path / path)) as tier:
            assert load_hits(tier, KEYS) == [True] * 3
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=r"cannot be used: .*Too many levels of symbolic links"):
        open_disk(tmp_path / "loop" / "kv")


@pytest.mark.parametrize("below", ["", "kv"])
def test_disk_path_with_link_of_another_user_raises_value_error(
    kv: Path, tmp_path: Path, below: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path if below else kv)
    if os.geteuid():
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    else:
        os.chown(tmp_path / "link", 12345, -1, follow_symlinks=False)
    with pytest.raises(
        ValueError, match=r"where 'link' is a symbolic link of user \d+; only links of"
    ):
        open_disk(tmp_path / "link" / below)


def test_disk_creates_directories_for_its_user_alone(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        open_disk(tmp_path / "new" / "parent" / "kv").close()
    finally:
        os.umask(umask)
    new = tmp_path / "new"
    modes = {path.stat().st_mode & 0o777 for path in (new, new / "parent", new / "parent/kv")}
    assert modes == {0o700}
    assert {file.stat().st_mode & 0o777 for file in (new / "parent/kv").iterdir()} == {0o600}


def test_disk_directory_swapped_after_open_has_no_effect(
    kv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renaming the directory between two steps does not lead to other files."""
    (tmp_path / "other").mkdir()
    check = safe_open.check_ownership

    def swap(folder: int, path: Path) -> None:
        check(folder, path)
        kv.rename(tmp_path / "moved")
        (tmp_path / "other").rename(kv)

    monkeypatch.setattr("kvcache.tiers.disk.directory.check_ownership", swap)
    with closing(open_disk(kv)) as tier:
        assert load_hits(tier, KEYS) == [True] * 3
    assert not list(kv.iterdir())


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("~/kv", "/srv/home/kv"),
        ("$KV_ROOT/kv", "/mnt/fast/kv"),
        ("/data/${KV_ROOT}x", "/data//mnt/fastx"),
        ("a/~/b", "a/~/b"),
        ("/costs/5$", "/costs/5$"),
        (".", "."),
    ],
)
def test_expand_path_replaces_home_and_variables(
    path: str, expanded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/srv/home")
    monkeypatch.setenv("KV_ROOT", "/mnt/fast")
    assert safe_open.expand_path(path) == Path.cwd() / expanded


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "path is ''; it takes a directory"),
        ("  ", "it takes a directory"),
        ("/a\0b", "it takes a directory"),
        ("$KV_NOT_SET/kv", "the environment variable 'KV_NOT_SET' is not set"),
        ("/mnt/${KV_EMPTY}", "the environment variable 'KV_EMPTY' is not set"),
        ("~no-such-user/kv", "there is no such home directory"),
    ],
)
def test_disk_with_invalid_path_raises_value_error(
    path: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KV_EMPTY", "")
    with pytest.raises(ValueError, match=message):
        DiskTier(block_nbytes=PAGE, path=path, capacity=capacity_for(4))
    assert not list(tmp_path.iterdir())


def test_disk_with_older_format_starts_empty(kv: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "kvcache")
    with (kv / "records").open("r+b") as records:
        records.write(b"kvcdisk1")
    with closing(open_disk(kv)) as tier:
        assert load_hits(tier, KEYS) == [False] * 3
    assert "of another format or block size deleted" in caplog.text


def empty_records(kv: Path) -> None:
    (kv / "records").write_bytes(b"")


def delete_records(kv: Path) -> None:
    (kv / "records").unlink()


def zero_geometry(kv: Path) -> None:
    with (kv / "records").open("r+b") as records:
        records.write(bytes(PAGE))


@pytest.mark.parametrize("damage", [empty_records, delete_records, zero_geometry])
def test_disk_without_records_starts_empty_and_stores_again(
    kv: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    require_attributes(kv)
    damage(kv)
    check_usable(kv)
    with closing(open_disk(kv)) as tier:
        assert tier.contains(KEYS) == [False] * 3
        assert tier.store(KEYS, blocks_of(KEYS)) == [True] * 3
    assert caplog.messages == [
        f"kvcache: disk tier at {kv}: records are gone (deleted or emptied); it starts empty"
    ]
    with closing(open_disk(kv)) as tier:
        assert load_hits(tier, KEYS) == [True] * 3


@pytest.mark.parametrize("damage", [empty_records, delete_records, zero_geometry])
def test_disk_without_records_keeps_a_blocks_file_that_may_be_foreign(
    kv: Path, damage: Callable[[Path], None]
) -> None:
    with suppress(OSError):
        os.removexattr(kv / "blocks", "user.kvcache")
    damage(kv)
    content = (kv / "blocks").read_bytes()
    for open_directory in (check_usable, open_disk):
        with pytest.raises(ValueError, match="'blocks' was not written by kvcache; move it away"):
            open_directory(kv)
    assert (kv / "blocks").read_bytes() == content


def test_disk_with_unmarked_blocks_file_of_previous_release_keeps_blocks(kv: Path) -> None:
    """That release did not mark `blocks`, and its `records` do not claim a mark."""
    with suppress(OSError):
        os.removexattr(kv / "blocks", "user.kvcache")
    with (kv / "records").open("r+b") as records:
        records.seek(24)
        records.write(bytes(1))
    os.truncate(kv / "blocks", 3 * PAGE)
    with closing(open_disk(kv)) as tier:
        assert load_hits(tier, KEYS) == [True] * 3
