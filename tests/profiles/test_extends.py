"""Profiles that extend another: merging by name, places of values, errors."""

from pathlib import Path

import pytest

from kvcache.profiles import ProfileError, load_profile
from tests.support.profile_files import FRONT, GIB, GOOD, only_problem, problems, read

pytestmark = pytest.mark.usefixtures("ten_gib")

LOWER = '[[tier]]\nname = "l2"\nkind = "tests.support.empty_tiers:Lower"\n'
OTHER = LOWER.replace('"l2"', '"l3"')


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base beside the file, of the tiers l1 (lines 1 to 4) and l2 (5 to 8)."""
    path = tmp_path / "base.toml"
    path.write_text(GOOD + LOWER + 'codec = "zstd"\n')
    return path


def extending(text: str) -> str:
    return 'extends = "base.toml"\n' + text


def test_tier_of_a_known_name_changes_only_its_options(file: Path, base: Path) -> None:
    profile = read(file, extending('[[tier]]\nname = "l2"\ndeadline_s = 2\n'))
    assert profile.name == "ours"
    assert profile.bases == (base,)
    assert [row.name for row in profile.tiers] == ["l1", "l2"]
    assert profile.tiers[0].options == {"room": GIB}
    assert profile.tiers[1].options == {"codec": "zstd", "deadline_s": 2.0}


def test_every_value_keeps_its_file_and_line(file: Path, base: Path) -> None:
    text = extending('[[tier]]\nname = "l1"\ncount = 7\n')
    profile = read(file, text, {"KVCACHE__L1__FAST": "true"})
    places = {s.option.name: s.place for row in profile.tiers for s in row.settings}
    assert places == {
        "room": f"{base}, line 4",
        "count": f"{file}, line 4",
        "fast": "environment variable KVCACHE__L1__FAST",
        "codec": f"{base}, line 8",
    }


def test_new_tiers_come_last_in_file_order(file: Path, base: Path) -> None:
    more = OTHER + LOWER.replace('"l2"', '"l0"') + '[[tier]]\nname = "l1"\ncount = 2\n'
    profile = read(file, extending(more))
    assert [row.name for row in profile.tiers] == ["l1", "l2", "l3", "l0"]


def test_another_kind_replaces_the_tier_in_its_place(file: Path, base: Path) -> None:
    base.write_text(GOOD + LOWER + 'codec = "zstd"\n' + OTHER)
    kind = "tests.support.empty_tiers:Other"
    with pytest.raises(ProfileError, match=r"cannot import tests\.support\.empty_tiers:Other"):
        read(file, extending(LOWER.replace("tests.support.empty_tiers:Lower", kind)))
    kind = "kvcache.tiers.disk:DiskTier"
    text = (
        LOWER.replace("tests.support.empty_tiers:Lower", kind) + 'path = "/d"\ncapacity = "1GiB"\n'
    )
    profile = read(file, extending(text))
    assert [(row.name, row.kind) for row in profile.tiers][1] == ("l2", kind)
    assert profile.tiers[1].options == {"path": "/d", "capacity": GIB}
    assert len(profile.tiers) == 3
    same = read(file, extending(LOWER + "calls = 3\n"))  # the same kind changes nothing
    assert same.tiers[1].options == {"codec": "zstd", "calls": 3}


def test_tier_of_the_base_can_be_moved(file: Path, base: Path) -> None:
    text = 'extends = "base.toml"\nwithout = ["l2"]\n'
    assert [row.name for row in read(file, text).tiers] == ["l1"]
    assert [row.name for row in read(file, text + OTHER + LOWER).tiers] == ["l1", "l3", "l2"]


def test_file_with_the_name_of_a_shipped_profile_can_extend_it(tmp_path: Path) -> None:
    path = tmp_path / "l1-disk.toml"
    path.write_text('extends = "l1-disk"\n[[tier]]\nname = "disk"\npath = "/fast"\n')
    profile = load_profile(str(path), {})
    assert profile.tiers[1].options["path"] == "/fast"
    assert profile.bases == (load_profile("l1-disk", {}).path,)


def test_base_extends_a_path_relative_to_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "all.toml").write_text(GOOD + "count = 1\nratio = 1\n")
    (tmp_path / "site" / "rack.toml").write_text(
        'extends = "./all.toml"\n[[tier]]\nname = "l1"\ncount = 2\n'
    )
    (tmp_path / "host.toml").write_text(
        'extends = "site/rack.toml"\n[[tier]]\nname = "l1"\nlevel = 2\n'
    )
    profile = load_profile(str(tmp_path / "host.toml"), {})
    (row,) = profile.tiers
    assert row.options == {"room": GIB, "count": 2, "ratio": 1.0, "level": 2}
    assert [path.name for path in profile.bases] == ["rack.toml", "all.toml"]


# Problems

WRONG = [
    ("extends = 3\n", 1, "extends = 3: takes a shipped name, or a path from this file"),
    ('extends = "l1-dsik"\n', 1, 'did you mean "l1-disk"?'),
    ('extends = "./nothing.toml"\n', 1, "cannot read"),
    ('extends = "ours.toml"\n', 1, "is circular"),
    ('without = ["l2"]\n' + GOOD, 1, "removes tiers of a base, but there is no extends"),
    (extending('without = "l2"\n'), 2, 'takes a list of tiers, such as ["disk"]'),
    (extending('without = ["l9"]\n'), 2, 'the base has no tier "l9"; it has "l1", "l2"'),
    (extending("without = [[]]\n"), 2, "the base has no tier []"),
    (extending('[[tier]]\nname = "l11"\n'), 2, 'needs a kind, such as "dram" or "pkg.mod:Class"'),
    (extending('[[tier]]\nname = "l11"\n'), 2, 'did you mean "l1"?'),
    (GOOD + 'extends = "base.toml"\n', 5, "extends stands above the first [[tier]]"),
]


@pytest.mark.parametrize(("text", "line", "says"), WRONG)
def test_problem_names_its_line(file: Path, base: Path, text: str, line: int, says: str) -> None:
    problem = only_problem(file, text)
    assert problem.startswith(f"{file}, line {line}: ")
    assert says in problem


def test_circle_of_extends_is_reported(tmp_path: Path) -> None:
    names = ("a.toml", "b.toml", "c.toml")
    for name, extends in zip(names, ("b.toml", "c.toml", "b.toml"), strict=True):
        (tmp_path / name).write_text(f'extends = "{extends}"\n')
    with pytest.raises(ProfileError) as caught:
        load_profile(str(tmp_path / "a.toml"), {})
    (problem,) = caught.value.problems
    assert problem.startswith(f"{tmp_path / 'c.toml'}, line 1: ")
    b, c = tmp_path / "b.toml", tmp_path / "c.toml"
    assert problem.endswith(f"is circular: {b} extends {c} extends {b}")


def test_problem_in_the_base_names_the_line_in_the_base(file: Path, base: Path) -> None:
    base.write_text("version = 1\n" + GOOD + "rome = 1\n")
    found = problems(file, extending('[[tier]]\nname = "l1"\ncount = "x"\n'))
    assert [problem.split(": ")[0] for problem in found] == [
        f"{base}, line 1",
        f"{base}, line 6",
        f"{file}, line 4",
    ]


def test_base_that_is_not_toml_is_named(file: Path, base: Path) -> None:
    base.write_text("tier = [")
    assert only_problem(file, extending("")).startswith(f"{base} is not TOML: ")


def test_two_tiers_of_one_name_in_one_file_are_refused(file: Path, base: Path) -> None:
    found = problems(file, extending(2 * f'[[tier]]\nname = "l1"\nkind = "{FRONT}"\ncount = 2\n'))
    assert f"{file}, line 7: " in found[0]
    assert "two tiers have this name" in found[0]
