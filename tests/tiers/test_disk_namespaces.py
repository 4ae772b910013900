"""The file of namespaces in a disk tier's directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcache.testing import keys_of
from kvcache.tiers.disk import namespaces
from kvcache.tiers.disk.places import open_directory

SPACE, OTHER = keys_of("namespace", 2)


@pytest.fixture
def folder(tmp_path: Path) -> int:
    return open_directory(tmp_path, make=False)


def test_resolve_namespace_that_was_never_reset_is_itself(folder: int, tmp_path: Path) -> None:
    assert namespaces.resolve(folder, tmp_path, SPACE, "") == SPACE
    assert not list(tmp_path.iterdir())


def test_forget_gives_another_name_each_time(folder: int, tmp_path: Path) -> None:
    names = {SPACE}
    for _ in range(3):
        namespaces.forget(folder, tmp_path, SPACE)
        names |= {namespaces.resolve(folder, tmp_path, SPACE, "") for _ in range(2)}
    assert len(names) == 4
    assert {len(name) for name in names} == {len(SPACE)}
    assert namespaces.resolve(folder, tmp_path, OTHER, "") == OTHER


def test_forget_after_a_process_was_killed_while_it_wrote(folder: int, tmp_path: Path) -> None:
    (tmp_path / "spaces.new").write_text("{")
    assert namespaces.resolve(folder, tmp_path, SPACE, "") == SPACE
    namespaces.forget(folder, tmp_path, SPACE)
    assert namespaces.resolve(folder, tmp_path, SPACE, "") != SPACE


def test_resolve_descriptions_are_bounded_and_resets_stay(folder: int, tmp_path: Path) -> None:
    namespaces.forget(folder, tmp_path, SPACE)
    for key in keys_of("many", namespaces.DESCRIBED + 5):
        namespaces.resolve(folder, tmp_path, key, "{}")
    kept = json.loads((tmp_path / "spaces").read_text())
    assert len(kept["about"]) == namespaces.DESCRIBED
    assert namespaces.resolve(folder, tmp_path, SPACE, "") != SPACE


@pytest.mark.parametrize("text", ["", "{", "[]", '{"reset": {"a": 1}, "about": {}}', 9000 * "["])
def test_resolve_damaged_file_is_an_error(folder: int, tmp_path: Path, text: str) -> None:
    """A guess could be the name of what was reset."""
    (tmp_path / "spaces").write_text(text)
    with pytest.raises(ValueError, match="damaged"):
        namespaces.resolve(folder, tmp_path, SPACE, "")


def test_forget_planted_link_is_not_followed(folder: int, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("theirs")
    (tmp_path / "spaces.new").symlink_to(tmp_path / "victim")
    namespaces.forget(folder, tmp_path, SPACE)
    assert (tmp_path / "victim").read_text() == "theirs"
    (tmp_path / "spaces").unlink()
    (tmp_path / "spaces").symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match="spaces"):
        namespaces.resolve(folder, tmp_path, SPACE, "")
