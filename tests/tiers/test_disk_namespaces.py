"""The file of namespaces in a disk tier's directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcache.testing import keys_of
from kvcache.tiers.disk import namespace_file
from kvcache.tiers.disk.safe_open import open_directory

SPACE, OTHER = keys_of("namespace", 2)


@pytest.fixture
def folder(tmp_path: Path) -> int:
    return open_directory(tmp_path, make=False)


def test_resolve_namespace_that_was_never_reset_is_itself(folder: int, tmp_path: Path) -> None:
    assert namespace_file.resolve(folder, tmp_path, SPACE, "") == SPACE
    assert not list(tmp_path.iterdir())


def test_forget_gives_another_name_each_time(folder: int, tmp_path: Path) -> None:
    names = {SPACE}
    for _ in range(3):
        namespace_file.forget(folder, tmp_path, SPACE)
        names |= {namespace_file.resolve(folder, tmp_path, SPACE, "") for _ in range(2)}
    assert len(names) == 4
    assert {len(name) for name in names} == {len(SPACE)}
    assert namespace_file.resolve(folder, tmp_path, OTHER, "") == OTHER


def test_forget_after_a_process_was_killed_while_it_wrote(folder: int, tmp_path: Path) -> None:
    (tmp_path / "spaces.new").write_text("{")
    assert namespace_file.resolve(folder, tmp_path, SPACE, "") == SPACE
    namespace_file.forget(folder, tmp_path, SPACE)
    assert namespace_file.resolve(folder, tmp_path, SPACE, "") != SPACE


def test_resolve_descriptions_are_bounded_and_resets_stay(folder: int, tmp_path: Path) -> None:
    namespace_file.forget(folder, tmp_path, SPACE)
    for key in keys_of("many", namespace_file.DESCRIBED + 5):
        namespace_file.resolve(folder, tmp_path, key, "{}")
    kept = json.loads((tmp_path / "spaces").read_text())
    assert len(kept["about"]) == namespace_file.DESCRIBED
    assert namespace_file.resolve(folder, tmp_path, SPACE, "") != SPACE


@pytest.mark.parametrize("text", ["", "{", "[]", '{"reset": {"a": 1}, "about": {}}', 9000 * "["])
def test_resolve_damaged_file_is_an_error(folder: int, tmp_path: Path, text: str) -> None:
    """A guess could be the name of what was reset."""
    (tmp_path / "spaces").write_text(text)
    with pytest.raises(ValueError, match="damaged"):
        namespace_file.resolve(folder, tmp_path, SPACE, "")


def test_forget_planted_link_is_not_followed(folder: int, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("theirs")
    (tmp_path / "spaces.new").symlink_to(tmp_path / "victim")
    namespace_file.forget(folder, tmp_path, SPACE)
    assert (tmp_path / "victim").read_text() == "theirs"
    (tmp_path / "spaces").unlink()
    (tmp_path / "spaces").symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match="spaces"):
        namespace_file.resolve(folder, tmp_path, SPACE, "")
