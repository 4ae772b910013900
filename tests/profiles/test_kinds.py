"""Kinds: shipped names, names of installed packages, class paths, and errors for all others."""

from importlib import metadata
from pathlib import Path

import pytest

from kvcache.profiles import load_profile, tiers
from kvcache.tiers.dram import DramTier
from tests.support.empty_tiers import Front
from tests.support.profile_files import FRONT, GOOD, only_problem, read

pytestmark = pytest.mark.usefixtures("ten_gib")

WRONG_KINDS = [
    (
        "drma",
        'no such kind; there are "disk", "dram", "mooncake", "object", "redis"',
        'did you mean "dram"?',
    ),
    ("tape", 'or "pkg.mod:Class"', ""),
    ("redis://localhost:6379", "no such kind", ""),
    ("no_such_package:Tier", "cannot import", "ModuleNotFoundError: No module named 'no_such"),
    ("tests.support.empty_tiers:Fornt", "cannot import", "AttributeError"),
    ("tests.support.empty_tiers:", "cannot import", ""),
    (":Front", "cannot import", ""),
    ("tests.support.empty_tiers:NOT_A_CLASS", "is no subclass of kvcache.tier.Tier", ""),
    ("tests.support.empty_tiers:Path", "cannot import", ""),
    ("pathlib:Path", "pathlib:Path is no subclass of kvcache.tier.Tier", ""),
    ("tests.support.empty_tiers:Unfinished", "lacks load, store", ""),
    ("tests.support.empty_tiers:Unreadable", "annotations of Unreadable cannot be read", "'Path'"),
]


@pytest.mark.parametrize(("kind", "wrong", "more"), WRONG_KINDS)
def test_wrong_kind_is_refused(file: Path, kind: str, wrong: str, more: str) -> None:
    problem = only_problem(file, GOOD.replace(FRONT, kind))
    assert problem.startswith(f'{file}, line 3: kind = "{kind}": ')
    assert wrong in problem
    assert more in problem


def test_module_that_fails_to_import_is_named_with_the_cause(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_tier_of_ours.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    problem = only_problem(file, GOOD.replace(FRONT, "broken_tier_of_ours:Tier"))
    assert "cannot import broken_tier_of_ours:Tier (ZeroDivisionError: division by zero)" in problem


def test_module_that_exits_while_imported_is_named(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ending_tier_of_ours.py").write_text("raise SystemExit('no licence')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    problem = only_problem(file, GOOD.replace(FRONT, "ending_tier_of_ours:Tier"))
    assert "cannot import ending_tier_of_ours:Tier (SystemExit: no licence)" in problem


def test_missing_package_names_the_extra(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiers.KINDS, "far", ("no_such_package.far:FarTier", "far"))
    problem = only_problem(file, GOOD.replace(FRONT, "far"))
    assert "pip install 'kvcache[far]'" in problem
    assert "No module named 'no_such_package'" in problem


def installed(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    """Register these names and class paths in the entry-point group."""
    found = metadata.EntryPoints(
        metadata.EntryPoint(name, path, tiers.GROUP) for name, path in points
    )
    monkeypatch.setattr(tiers, "entry_points", lambda group: found.select(group=group))


def test_installed_package_registers_kinds(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, ("acme", FRONT), ("acme", FRONT), ("dram", "no_such_package:Dram"))
    assert read(file, GOOD.replace(FRONT, "acme")).tiers[0].cls is Front
    assert load_profile("l1-only", {}).tiers[0].cls is DramTier
    problem = only_problem(file, GOOD.replace(FRONT, "acne"))
    assert 'there are "acme", "disk", "dram"' in problem
    assert 'did you mean "acme"?' in problem


def test_kind_of_two_packages_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, ("acme", FRONT), ("acme", "other.pkg:Tier"))
    problem = only_problem(file, GOOD.replace(FRONT, "acme"))
    assert 'several packages register it; write one of "other.pkg:Tier", "tests.support' in problem
