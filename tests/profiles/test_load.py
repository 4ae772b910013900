"""Loading profiles: names and paths, values and types, overrides, and errors with their places."""

import pickle
from pathlib import Path

import pytest

from kvcache.lower.tier import LowerTier
from kvcache.profiles import ProfileError, load_profile, shipped, source
from kvcache.profiles.tiers import FrontOptions
from kvcache.tiers.dram import DramTier
from kvcache.tiers.framed import Framed
from tests.support.empty_tiers import Front
from tests.support.packages import each_shipped_profile
from tests.support.profile_files import FRONT, GIB, GOOD, HEAD, only_problem, problems, read

pytestmark = pytest.mark.usefixtures("ten_gib")


# Finding the profile


def test_default_profile_is_l1_only_with_half_of_the_memory() -> None:
    profile = load_profile(environ={})
    assert profile.name == "l1-only"
    (row,) = profile.tiers
    assert (row.name, row.kind, row.cls) == ("l1", "dram", DramTier)
    assert row.options == {"capacity": 5 * GIB, "eviction": "gittins"}


@each_shipped_profile
def test_shipped_profile_loads(name: str) -> None:
    assert load_profile(name, {}).name == name


def test_new_file_needs_no_registration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_SHIPPED_FOLDER", tmp_path)
    (tmp_path / "fresh.toml").write_text(GOOD)
    assert shipped() == ["fresh"]
    assert load_profile("fresh", {}).tiers[0].cls is Front


def test_argument_overrides_variable_and_variable_overrides_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ours", "theirs"):
        (tmp_path / f"{name}.toml").write_text(GOOD)
    ours, theirs = str(tmp_path / "ours.toml"), str(tmp_path / "theirs.toml")
    assert load_profile(ours, {"KVCACHE_PROFILE": theirs}).name == "ours"
    assert load_profile(None, {"KVCACHE_PROFILE": theirs}).name == "theirs"
    assert load_profile(None, {"KVCACHE_PROFILE": ""}).name == "l1-only"
    monkeypatch.setenv("KVCACHE_PROFILE", theirs)
    assert load_profile().name == "theirs"


def test_path_has_a_slash_or_ends_in_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "other.toml"):
        Path(name).write_text(GOOD)
    assert load_profile("./plain", {}).path == tmp_path / "plain"
    assert load_profile("other.toml", {}).path == tmp_path / "other.toml"


@pytest.mark.parametrize(
    ("profile", "near"), [("l1-onyl", True), ("L1-Only", True), ("l1_only", True), ("nope", False)]
)
def test_unknown_profile_lists_the_shipped_ones(profile: str, near: bool) -> None:
    with pytest.raises(ProfileError) as caught:
        load_profile(profile, {})
    says = str(caught.value)
    names = ", ".join(f'"{name}"' for name in shipped())
    assert f'profile "{profile}": no such profile; shipped are {names}' in says
    assert 'has a "/" or ends in ".toml"' in says
    assert ('did you mean "l1-only"?' in says) is near


def test_unknown_profile_in_the_variable_names_the_variable(tmp_path: Path) -> None:
    for profile, why in (("nope", "no such profile"), (str(tmp_path / "no.toml"), "cannot read")):
        with pytest.raises(ProfileError, match=f": environment variable KVCACHE_PROFILE: {why}"):
            load_profile(None, {"KVCACHE_PROFILE": profile})


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "no.toml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ProfileError, match=rf"cannot read {path}: {why}"):
            load_profile(f"{path}", {})


def test_syntax_error_names_its_line(file: Path) -> None:
    says = only_problem(file, GOOD + "order = lru\n")
    assert says.startswith(f"{file} is not TOML: ")
    assert "line 5" in says


def test_binary_file_is_named(file: Path) -> None:
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match=r"ours\.toml is not TOML: .*utf-8"):
        load_profile(str(file), {})


# Its values


def test_options_are_converted_to_their_types(file: Path) -> None:
    text = HEAD + (
        'room = "50%"\ncount = 7\nratio = 2\nfast = true\npath = "/a=b"\n'
        'order = "s3fifo"\nlevel = 2\n'
    )
    options = read(file, text).tiers[0].options
    assert options == {
        "room": 5 * GIB,
        "count": 7,
        "ratio": 2.0,
        "fast": True,
        "path": "/a=b",
        "order": "s3fifo",
        "level": 2,
    }
    assert type(options["ratio"]) is float


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("ROOM", "20%", 2 * GIB),
        ("ROOM", "4096", 4096),
        ("COUNT", "12", 12),
        ("RATIO", "3", 3.0),
        ("FAST", "True", True),
        ("FAST", "false", False),
        ("PATH", "12", "12"),
        ("ORDER", "fifo", "fifo"),
        ("LEVEL", "2", 2),
    ],
)
def test_variable_overrides_the_file(file: Path, option: str, text: str, value: object) -> None:
    row = read(file, GOOD, {f"KVCACHE__L1__{option}": text}).tiers[0]
    assert row.options == {"room": GIB} | {option.lower(): value}
    assert type(row.options[option.lower()]) is type(value)


def test_variable_can_set_a_required_option(file: Path) -> None:
    assert read(file, HEAD, {"KVCACHE__L1__ROOM": "1GiB"}).tiers[0].options == {"room": GIB}


def test_tier_name_with_separators_has_a_variable(file: Path) -> None:
    text = GOOD.replace('"l1"', '"near-by_1"')
    row = read(file, text, {"KVCACHE__NEAR_BY_1__COUNT": "2"}).tiers[0]
    assert row.options["count"] == 2


def test_variables_without_the_prefix_are_no_overrides(file: Path) -> None:
    read(file, GOOD, {"KVCACHE_LOG": "x", "XKVCACHE__L1__COUNT": "x", "PATH": "/bin"})


# Wrong values: at line 5 of the file, or in a variable

WRONG_VALUES = [
    ("room", '"lots"', "lots", 'not a size; write "10GiB", "512MB", "80%"'),
    ("room", '"64G"', "64G", "unknown unit 'g'"),
    ("room", '"120%"', "120%", "a percentage above 100%"),
    ("room", "0", "0", "above zero"),
    ("room", '"-1GiB"', "-1GiB", "above zero"),
    ("count", '"seven"', "seven", "takes a whole number"),
    ("count", "1.0", "1.0", "takes a whole number"),
    ("count", "true", "true", "takes a whole number"),
    ("ratio", '"much"', "much", "takes a number"),
    ("ratio", "nan", "nan", "takes a number"),
    ("ratio", "inf", "inf", "takes a number"),
    ("fast", '"yes"', "yes", "takes true or false"),
    ("fast", "1", "1", "takes true or false"),
    ("order", '"lfru"', "lfru", 'takes one of "lru", "fifo", "s3fifo"; did you mean "lru"?'),
    ("order", '"S3-FIFO"', "S3-FIFO", 'did you mean "s3fifo"?'),
    ("order", '"random"', "random", 'takes one of "lru", "fifo", "s3fifo"'),
    ("level", "3", "3", "takes one of 1, 2"),
    ("opener", '"x"', "x", "takes nothing a profile can write"),
]


@pytest.mark.parametrize(("option", "toml", "text", "says"), WRONG_VALUES)
def test_wrong_value_is_refused_in_file_and_variable(
    file: Path, option: str, toml: str, text: str, says: str
) -> None:
    head = HEAD if option == "room" else GOOD
    line = head.count("\n") + 1
    problem = only_problem(file, f"{head}{option} = {toml}\n")
    assert problem.startswith(f"{file}, line {line}: {option} = ")
    assert text.lower() in problem.lower()
    assert says in problem

    variable = f"KVCACHE__L1__{option.upper()}"
    problem = only_problem(file, GOOD, {variable: text})
    assert problem.startswith(f"environment variable {variable}: {option} = ")
    assert text.lower() in problem.lower()
    assert says in problem


@pytest.mark.parametrize(
    ("option", "toml", "says"),
    [
        ("path", "3", "takes a string"),
        ("path", '["a"]', "takes a string"),
        ("ratio", "inf", "takes a number"),
        ("count", '"3"', "takes a whole number"),
        ("level", "true", "takes one of 1, 2"),
        ("room", "2024-01-01", "not a size"),
    ],
)
def test_file_values_must_have_the_types_of_the_options(
    file: Path, option: str, toml: str, says: str
) -> None:
    head = HEAD if option == "room" else GOOD
    assert says in only_problem(file, f"{head}{option} = {toml}\n")


# Other errors of a file

WRONG_FILES = [
    ("", None, "lists no tier", '[[tier]], kind = "dram"'),
    ("tier = []\n", None, "lists no tier", ""),
    ("tier = 3\n", 1, "tier: write tiers under [[tier]]", ""),
    ('[tier]\nkind = "dram"\n', 1, "tier: write tiers under [[tier]]", ""),
    ("version = 1\n" + GOOD, 1, "version: no such key", "[[tier]] tables, and above them"),
    (GOOD + "\n[telemetry]\non = true\n", 6, "telemetry: no such key", ""),
    (GOOD + "rome = 1\n", 5, 'rome = 1: no such option; kind "tests', 'did you mean "room"?'),
    (GOOD + '"rome" = 1\n', 5, "rome = 1: no such option", '"count", "ratio", "fast"'),
    (GOOD + "block_nbytes = 1\n", 5, "block_nbytes = 1: no such option", 'takes "room", "count"'),
    (GOOD + "clock = 1\n", 5, "clock = 1: no such option", ""),
    (HEAD, 1, 'tier "l1": room is missing', 'it takes a size: "10GiB"'),
    (GOOD.replace('"l1"', '"L1"'), 2, 'name = "L1"', "lower-case letters and digits"),
    (GOOD.replace('"l1"', '"a__b"'), 2, 'name = "a__b"', 'single "-" or "_" between'),
    (GOOD.replace('"l1"', '"-a"'), 2, 'name = "-a"', ""),
    (GOOD.replace('"l1"', "1"), 2, "name = 1", "lower-case letters and digits"),
    (GOOD.replace('name = "l1"\n', ""), 1, "name is missing", "a tier needs a name"),
    (GOOD.replace(f'kind = "{FRONT}"\n', ""), 1, "kind is missing", "a tier needs a kind"),
    (GOOD.replace(f'"{FRONT}"', "7"), 3, "kind = 7", "a tier needs a kind"),
]


@pytest.mark.parametrize(("text", "line", "wrong", "allowed"), WRONG_FILES)
def test_wrong_file_is_refused(
    file: Path, text: str, line: int | None, wrong: str, allowed: str
) -> None:
    problem = next(problem for problem in problems(file, text) if wrong in problem)
    place = f"{file}, line {line}: " if line else f"{file}: "
    assert problem.startswith(place)
    assert allowed in problem


def test_inline_table_is_read_without_a_line(file: Path) -> None:
    text = f'tier = [{{name = "l1", kind = "{FRONT}", room = "1GiB", count = COUNT}}]\n'
    assert read(file, text.replace("COUNT", "3")).tiers[0].options["count"] == 3
    problem = only_problem(file, text.replace("COUNT", "true"))
    assert problem == f"{file}: count = true: takes a whole number"


def test_lower_tier_has_the_options_of_its_wrappers(file: Path) -> None:
    lower = '[[tier]]\nname = "l2"\nkind = "tests.support.empty_tiers:Lower"\n'
    text = GOOD + lower + 'codec = "zstd"\nqueue = "1MiB"\n'
    _, row = read(file, text, {"KVCACHE__L2__DEADLINE_S": "2"}).tiers
    assert row.options == {"codec": "zstd", "queue": 1 << 20, "deadline_s": 2.0}
    assert row.options_for(Framed) == {"codec": "zstd"}
    assert row.options_for(LowerTier) == {"queue": 1 << 20, "deadline_s": 2.0}
    assert row.options_for(row.cls) == {}
    problem = only_problem(file, GOOD + 'codec = "zstd"\n' + lower)
    assert "no such option" in problem


def test_every_tier_has_the_option_announce(file: Path) -> None:
    text = GOOD + "announce = false\n" + '[[tier]]\nname = "l2"\nkind = "dram"\ncapacity = "1GiB"\n'
    front, lower = read(file, text, {"KVCACHE__L2__ANNOUNCE": "false"}).tiers
    assert front.options_for(FrontOptions) == lower.options_for(LowerTier) == {"announce": False}
    assert "announce" not in {**front.options_for(front.cls), **lower.options_for(lower.cls)}
    problem = only_problem(file, GOOD + 'announce = "no"\n')
    assert problem.endswith('announce = "no": takes true or false')


def test_lower_tier_may_have_options_named_like_internal_arguments(file: Path) -> None:
    lower = '[[tier]]\nname = "l2"\nkind = "tests.support.empty_tiers:LowerWithNamespace"\n'
    options = {"namespace": "team", "breaker": 7, "piece_nbytes": 9}
    text = GOOD + lower + "".join(f"{name} = {value!r}\n" for name, value in options.items())
    _, row = read(file, text, {}).tiers
    assert row.options_for(row.cls) == options
    assert row.options_for(LowerTier) == {}


def test_lower_tier_with_an_option_name_of_the_stack_is_refused(file: Path) -> None:
    problem = only_problem(file, GOOD + GOOD.replace('"l1"', '"l2"'))
    assert 'its options "level" have names that the stack uses' in problem


def test_first_tier_must_be_a_front_tier(file: Path) -> None:
    text = GOOD.replace("Front", "Lower").replace('room = "1GiB"\n', "")
    problem = only_problem(file, text)
    assert problem.startswith(f'{file}, line 3: kind = "tests.support.empty_tiers:Lower": ')
    assert "the first tier must lend its memory" in problem
    assert "Lower is no subclass of kvcache.tier.FrontTier" in problem


def test_names_that_share_a_variable_are_refused(file: Path) -> None:
    text = GOOD.replace('"l1"', '"a-b"') + GOOD.replace('"l1"', '"a_b"')
    problem = problems(file, text)[0]
    assert problem.startswith(f'{file}, line 6: name = "a_b": two tiers have this name')
    assert '"a-b"' in problem


# Overrides

WRONG_OVERRIDES = [
    ("KVCACHE__L2__ROOM", "no such tier", 'the tiers here are "L1"'),
    ("KVCACHE__DISK__PATH", "no such tier", "KVCACHE__<TIER>__<OPTION>"),
    ("KVCACHE__ROOM", "no such tier", "KVCACHE__<TIER>__<OPTION>"),
    ("KVCACHE__l1__ROOM", "no such tier", 'did you mean "L1"?'),
    ("KVCACHE__L1", "no such tier", 'did you mean "L1"?'),
    ("KVCACHE__L1__ROMO", "no such option", 'did you mean "room"?'),
    ("KVCACHE__L1__", "no such option", 'takes "room", "count"'),
    ("KVCACHE__L1__BLOCK_NBYTES", "no such option", ""),
    ("KVCACHE__L1__KIND", "only the profile sets the name and kind", ""),
    ("KVCACHE__L1__NAME", "only the profile sets the name and kind", ""),
]


@pytest.mark.parametrize(("variable", "wrong", "more"), WRONG_OVERRIDES)
def test_wrong_override_is_refused(file: Path, variable: str, wrong: str, more: str) -> None:
    problem = only_problem(file, GOOD, {variable: "5GiB"})
    assert problem.startswith(f"environment variable {variable}")
    assert '"5GiB"' in problem
    assert wrong in problem
    assert more in problem


# All errors at once


def test_error_lists_every_problem(file: Path) -> None:
    text = (
        "version = 2\n\n# a comment\n[[tier]]\nname = 'l1'\n"
        f"kind = '{FRONT}'\nroom = 'lots'\norder = 'lfru'\nrome = 1\n"
    )
    environ = {"KVCACHE__L1__COUNT": "x", "KVCACHE__L3__ROOM": "1GiB"}
    with pytest.raises(ProfileError) as caught:
        read(file, text, environ)
    lines = str(caught.value).splitlines()
    assert lines[0] == 'profile "ours": 6 problems:'
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        f"{file}, line 1",
        f"{file}, line 7",
        f"{file}, line 8",
        f"{file}, line 9",
        "environment variable KVCACHE__L1__COUNT",
        'environment variable KVCACHE__L3__ROOM = "1GiB"',
    ]


def test_override_does_not_hide_a_problem_of_the_file(file: Path) -> None:
    assert "lots" in only_problem(file, HEAD + 'room = "lots"\n', {"KVCACHE__L1__ROOM": "1GiB"})


def test_error_can_be_pickled() -> None:
    error = ProfileError("ours", ["a is wrong", "b is wrong"])
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == 'profile "ours": 2 problems:\n  a is wrong\n  b is wrong'
    assert copy.problems == error.problems
