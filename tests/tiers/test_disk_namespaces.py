"""namespace_file: resets and descriptions of namespaces in a disk tier's directory."""

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


def test_resolve_of_namespace_never_reset_returns_it(folder: int, tmp_path: Path) -> None:
    assert namespace_file.resolve(folder, tmp_path, SPACE, "") == SPACE
    assert not list(tmp_path.iterdir())


def test_reset_changes_the_name_each_time(folder: int, tmp_path: Path) -> None:
    names = {SPACE}
    for _ in range(3):
        namespace_file.reset(folder, tmp_path, SPACE)
        names |= {namespace_file.resolve(folder, tmp_path, SPACE, "") for _ in range(2)}
    assert len(names) == 4
    assert {len(name) for name in names} == {len(SPACE)}
    assert namespace_file.resolve(folder, tmp_path, OTHER, "") == OTHER


def test_reset_after_a_kill_while_writing_succeeds(folder: int, tmp_path: Path) -> None:
    (tmp_path / "spaces.new").write_text("{")
    assert namespace_file.resolve(folder, tmp_path, SPACE, "") == SPACE
    namespace_file.reset(folder, tmp_path, SPACE)
    assert namespace_file.resolve(folder, tmp_path, SPACE, "") != SPACE


def test_resolve_of_many_namespaces_bounds_descriptions_and_keeps_resets(
    folder: int, tmp_path: Path
) -> None:
    namespace_file.reset(folder, tmp_path, SPACE)
    for key in keys_of("many", namespace_file.MAX_DESCRIPTIONS + 5):
        namespace_file.resolve(folder, tmp_path, key, "{}")
    kept = json.loads((tmp_path / "spaces").read_text())
    assert len(kept["about"]) == namespace_file.MAX_DESCRIPTIONS
    assert namespace_file.resolve(folder, tmp_path, SPACE, "") != SPACE


@pytest.mark.parametrize("text", ["", "{", "[]", '{"reset": {"a": 1}, "about": {}}', 9000 * "["])
def test_resolve_with_damaged_file_raises_value_error(
    folder: int, tmp_path: Path, text: str
) -> None:
    """A guess could return the name of a namespace that was reset."""
    (tmp_path / "spaces").write_text(text)
    with pytest.raises(ValueError, match="damaged"):
        namespace_file.resolve(folder, tmp_path, SPACE, "")


def test_reset_and_resolve_do_not_follow_a_link(folder: int, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("theirs")
    (tmp_path / "spaces.new").symlink_to(tmp_path / "victim")
    namespace_file.reset(folder, tmp_path, SPACE)
    assert (tmp_path / "victim").read_text() == "theirs"
    (tmp_path / "spaces").unlink()
    (tmp_path / "spaces").symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match="spaces"):
        namespace_file.resolve(folder, tmp_path, SPACE, "")
