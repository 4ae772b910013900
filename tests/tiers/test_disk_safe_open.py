"""A disk tier's directory that others have touched: refused by name, and nothing is changed."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from kvcache.testing import keys_of
from kvcache.tiers.disk import PAGE, DiskTier, safe_open
from kvcache.tiers.disk.reader import DiskReader
from tests.tiers.test_disk import blocks, capacity, held, opened

FILES = ["lock", "records", "blocks"]
KEYS = keys_of("a", 3)


def make_fifo(file: Path) -> None:
    os.mkfifo(file)


def make_socket(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(file.parent)  # a socket's whole path has 108 bytes at most
        try:
            made.bind(file.name)
        finally:
            os.chdir(here)


@pytest.fixture
def precious(tmp_path: Path) -> Iterator[Path]:
    """A file elsewhere, which stays as it is."""
    file = tmp_path / "precious"
    file.write_text("not a cache")
    file.chmod(0o640)
    yield file
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("not a cache", 0o640)


@pytest.fixture
def kv(tmp_path: Path) -> Path:
    """The directory of a tier that was closed, with three blocks."""
    with closing(opened(tmp_path / "kv")) as tier:
        tier.store(KEYS, blocks(KEYS))
    return tmp_path / "kv"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["0123456789" * 9, "x" * 4096, "12 monkeys"])
def test_disk_tier_refuses_a_foreign_file_and_leaves_it(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    (tmp_path / name).chmod(0o644)
    with pytest.raises(ValueError, match=f"path is '{tmp_path}', where '{name}' was not written"):
        opened(tmp_path)
    assert (tmp_path / name).read_text() == content
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", FILES)
def test_disk_tier_refuses_a_file_that_replaced_one_of_its_own(kv: Path, name: str) -> None:
    try:
        os.setxattr(kv / name, "user.test", b"1")
    except OSError:
        pytest.skip("this file system keeps no attributes")
    (kv / name).unlink()
    (kv / name).write_text("x" * 8192)
    with pytest.raises(ValueError, match=f"'{name}' was not written by kvcache"):
        opened(kv)
    assert (kv / name).read_text() == "x" * 8192


def test_disk_tier_that_was_copied_keeps_its_blocks(kv: Path) -> None:
    """A copy of the file of blocks has no mark."""
    for name in FILES:
        content = (kv / name).read_bytes()
        (kv / name).rename(kv / f"{name}.old")
        (kv / name).write_bytes(content)
    with closing(opened(kv)) as tier:
        assert held(tier, KEYS) == [True] * 3


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("plant", "what"),
    [
        (lambda file, other: file.symlink_to(other), "a symbolic link"),
        (lambda file, other: file.symlink_to("/nowhere/at/all"), "a symbolic link"),
        (lambda file, other: file.hardlink_to(other), r"a file with several names \(hard links\)"),
        (lambda file, other: file.mkdir(), "a directory"),
        (lambda file, other: make_fifo(file), "not a regular file"),
        (lambda file, other: make_socket(file), "a socket or a pipe"),
    ],
)
def test_disk_tier_refuses_what_is_not_a_file_of_its_own(
    kv: Path, precious: Path, name: str, plant: Callable[[Path, Path], None], what: str
) -> None:
    (kv / name).unlink()
    plant(kv / name, precious)
    with pytest.raises(ValueError, match=f"path is '{kv}', where '{name}' is {what}; move it away"):
        opened(kv)
    if name != "lock":
        with pytest.raises(ValueError, match=f"'{name}' is "):
            DiskReader(kv)


@pytest.mark.parametrize("name", FILES)
def test_disk_tier_refuses_a_file_of_another_user(
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
        opened(kv)


def test_disk_tier_refuses_the_directory_of_another_user(
    kv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid():
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    else:
        os.chown(kv, 12345, -1)
    with pytest.raises(ValueError, match=rf"path is '{kv}', which belongs to user \d+; it must"):
        opened(kv)


def test_disk_tier_warns_of_a_directory_that_others_may_write(
    kv: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for mode, warned in ((0o777, 1), (0o770, 2), (0o1777, 2), (0o755, 2)):
        kv.chmod(mode)
        with closing(opened(kv)) as tier:
            assert held(tier, KEYS) == [True] * 3
        assert len(caplog.records) == warned
    assert "other users may rename and delete its files (mode 0777)" in caplog.text


def test_disk_tier_follows_the_links_of_its_own_user(kv: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(kv)
    (tmp_path / "here").symlink_to(".")
    (tmp_path / "relative").symlink_to("../" + tmp_path.name + "/link")
    for path in ("link", "relative", "here/link", "kv/../link"):
        with closing(opened(tmp_path / path)) as tier:
            assert held(tier, KEYS) == [True] * 3
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=r"cannot be used: .*Too many levels of symbolic links"):
        opened(tmp_path / "loop" / "kv")


@pytest.mark.parametrize("below", ["", "kv"])
def test_disk_tier_does_not_follow_the_link_of_another_user(
    kv: Path, tmp_path: Path, below: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path if below else kv)
    if os.geteuid():
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    else:
        os.chown(tmp_path / "link", 12345, -1, follow_symlinks=False)
    with pytest.raises(ValueError, match=r"where 'link' is a symbolic link of user \d+; links of"):
        opened(tmp_path / "link" / below)


def test_disk_tier_makes_its_directories_for_its_user_alone(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        opened(tmp_path / "new" / "parent" / "kv").close()
    finally:
        os.umask(umask)
    made = tmp_path / "new"
    modes = {path.stat().st_mode & 0o777 for path in (made, made / "parent", made / "parent/kv")}
    assert modes == {0o700}
    assert {file.stat().st_mode & 0o777 for file in (made / "parent/kv").iterdir()} == {0o600}


def test_disk_tier_uses_the_directory_that_it_opened(
    kv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A swap of names between two steps does not lead to other files."""
    (tmp_path / "other").mkdir()
    check = safe_open.check_ownership

    def swap(folder: int, path: Path) -> None:
        check(folder, path)
        kv.rename(tmp_path / "moved")
        (tmp_path / "other").rename(kv)

    monkeypatch.setattr("kvcache.tiers.disk.directory.check_ownership", swap)
    with closing(opened(kv)) as tier:
        assert held(tier, KEYS) == [True] * 3
    assert not list(kv.iterdir())


@pytest.mark.parametrize(
    ("path", "means"),
    [
        ("~/kv", "/srv/ours/kv"),
        ("$KV_ROOT/kv", "/mnt/fast/kv"),
        ("/data/${KV_ROOT}x", "/data//mnt/fastx"),
        ("a/~/b", "a/~/b"),
        ("/costs/5$", "/costs/5$"),
        (".", "."),
    ],
)
def test_location_expands_home_and_variables(
    path: str, means: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/srv/ours")
    monkeypatch.setenv("KV_ROOT", "/mnt/fast")
    assert safe_open.expand_path(path) == Path.cwd() / means


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "path is ''; it takes a directory"),
        ("  ", "it takes a directory"),
        ("/a\0b", "it takes a directory"),
        ("$KV_NOT_SET/kv", "the environment variable 'KV_NOT_SET' is not set"),
        ("/mnt/${KV_EMPTY}", "the environment variable 'KV_EMPTY' is not set"),
        ("~nobody-of-that-name/kv", "there is no such home directory"),
    ],
)
def test_disk_tier_refuses_a_path_that_means_nothing(
    path: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KV_EMPTY", "")
    with pytest.raises(ValueError, match=says):
        DiskTier(block_nbytes=PAGE, path=path, capacity=capacity(4))
    assert not list(tmp_path.iterdir())


def test_disk_tier_of_an_older_format_starts_empty(
    kv: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kvcache")
    with (kv / "records").open("r+b") as records:
        records.write(b"kvcdisk1")
    with closing(opened(kv)) as tier:
        assert held(tier, KEYS) == [False] * 3
    assert "of another format or block size deleted" in caplog.text


def test_disk_tier_opens_the_files_of_the_release_before(kv: Path) -> None:
    """Its files of blocks have no mark, and their records do not say that they have."""
    with suppress(OSError):
        os.removexattr(kv / "blocks", "user.kvcache")
    with (kv / "records").open("r+b") as records:
        records.seek(24)
        records.write(bytes(1))
    os.truncate(kv / "blocks", 3 * PAGE)
    with closing(opened(kv)) as tier:
        assert held(tier, KEYS) == [True] * 3
