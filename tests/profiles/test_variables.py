"""Environment variables: kvcache's own, those of Kubernetes, and warnings about unknown ones."""

import logging
import re
from pathlib import Path

import pytest

from kvcache.profiles import ProfileError, load_profile, open_stack
from kvcache.profiles.variables import VARIABLES, unknown_variables
from tests.support.profile_files import GOOD, only_problem, problems, read

pytestmark = pytest.mark.usefixtures("ten_gib")

ROOT = Path(__file__).resolve().parents[2]

# As Kubernetes sets them for Services named kvcache, kvcache-redis, kvcache-profile, kvcache--l1.
KUBERNETES = {
    "KVCACHE_SERVICE_HOST": "10.0.0.1",
    "KVCACHE_SERVICE_PORT": "8080",
    "KVCACHE_SERVICE_PORT_METRICS": "9090",
    "KVCACHE_PORT": "tcp://10.0.0.1:8080",
    "KVCACHE_PORT_8080_TCP": "tcp://10.0.0.1:8080",
    "KVCACHE_PORT_8080_TCP_ADDR": "10.0.0.1",
    "KVCACHE_REDIS_SERVICE_HOST": "10.0.0.2",
    "KVCACHE_REDIS_PORT": "tcp://10.0.0.2:6379",
    "KVCACHE_REDIS_PORT_6379_TCP": "tcp://10.0.0.2:6379",
    "KVCACHE_REDIS_PORT_6379_TCP_PROTO": "tcp",
    "KVCACHE_REDIS_PORT_6379_TCP_PORT": "6379",
    "KVCACHE_REDIS_PORT_6379_UDP_ADDR": "10.0.0.2",
    "KVCACHE_PROFILE_PORT": "tcp://10.0.0.3:1",
    "KVCACHE__L1_SERVICE_HOST": "10.0.0.4",
    "KVCACHE__L1_PORT": "tcp://10.0.0.4:1",
    "KVCACHE__L1_PORT_1_TCP": "tcp://10.0.0.4:1",
}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("KVCACHE_L1_CAPACITY", "KVCACHE__L1__CAPACITY"),
        ("KVCACHE_L1__CAPACTIY", "KVCACHE__L1__CAPACITY"),
        ("kvcache__l1__capacity", "KVCACHE__L1__CAPACITY"),
        ("KVCACHE_PROFIL", "KVCACHE_PROFILE"),
        ("KVCACHE_PROFILES", "KVCACHE_PROFILE"),
        ("kvcache_profile", "KVCACHE_PROFILE"),
        ("KvCache_Record", "KVCACHE_RECORD"),
        ("KVCACHE_RECORDLIMIT", "KVCACHE_RECORD_LIMIT"),
        ("KVCACHE_REDIS_PORT", ""),  # no address, so it is not Kubernetes's
        ("KVCACHE_LOG", ""),
        ("KVCACHE_", ""),
    ],
)
def test_unknown_name_is_reported_with_the_nearest(name: str, meant: str) -> None:
    profile = load_profile("l1-only", {name: "hunter2"})
    (said,) = profile.unknown
    assert said.startswith(f"environment variable {name}: no such variable")
    assert said.endswith(f"did you mean {meant}?" if meant else "no effect")
    assert "hunter2" not in said


def test_known_and_foreign_names_are_not_reported() -> None:
    ours = dict.fromkeys(VARIABLES, "x") | {"KVCACHE__L1__CAPACITY": "1GiB"}
    others = {"VLLM_CPU_KVCACHE_SPACE": "1", "KVCACHED_HOME": "/", "LMCACHE_PATH": "/", "PATH": "/"}
    assert load_profile("l1-only", ours | others | KUBERNETES).unknown == ()


@pytest.mark.parametrize("option", ["SERVICE_HOST", "PORT_1_TCP", "PORT"])
def test_override_of_an_option_called_as_kubernetes_calls_is_an_override(
    file: Path, option: str
) -> None:
    said = only_problem(file, GOOD, {f"KVCACHE__L1__{option}": "tcp://10.0.0.4:1"})
    assert "no such option" in said


def test_unknown_names_are_said_beside_what_is_wrong(file: Path) -> None:
    """A misspelt KVCACHE_PROFILE explains why the tier of an override does not exist."""
    environ = {"KVCACHE_PROFIL": "l1-disk", "KVCACHE__DISK__PATH": "/d"}
    with pytest.raises(ProfileError) as caught:
        load_profile(None, environ)
    wrong, unknown_name = caught.value.problems
    assert wrong.startswith('environment variable KVCACHE__DISK__PATH = "/d": no such tier')
    assert unknown_name.endswith("did you mean KVCACHE_PROFILE?")


def test_override_of_no_tier_and_of_no_option_is_an_error(file: Path) -> None:
    assert "no such tier" in only_problem(file, GOOD, {"KVCACHE__L2__ROOM": "1GiB"})
    assert "no such option" in only_problem(file, GOOD, {"KVCACHE__L1__ROM": "1GiB"})
    assert read(file, GOOD, KUBERNETES).unknown == ()


def test_open_stack_warns_once_of_all_unknown_names(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KVCACHE__L1__CAPACITY", "1MiB")
    monkeypatch.setenv("KVCACHE_L1_CAPACITY", "1MiB")
    monkeypatch.setenv("KVCACHE_PROFIL", "l1-disk")
    caplog.set_level(logging.WARNING, "kvcache.profiles")
    open_stack(block_nbytes=4096).close()
    (record,) = caplog.records
    assert "did you mean KVCACHE__L1__CAPACITY?; " in record.getMessage()
    assert record.getMessage().endswith("did you mean KVCACHE_PROFILE?")


@pytest.mark.parametrize(
    ("environ", "option"),
    [
        ({"KVCACHE__L1__ROOM": "1 parsec"}, 'KVCACHE__L1__ROOM: room = "1 parsec"'),
        ({"KVCACHE__L1__COUNT": "many"}, 'KVCACHE__L1__COUNT: count = "many"'),
        ({"KVCACHE__L1__PW": "hunter2"}, "KVCACHE__L1__PW: PW = ***"),
    ],
)
def test_bad_value_of_a_variable_is_reported_with_its_name(
    file: Path, environ: dict[str, str], option: str
) -> None:
    for problem in problems(file, GOOD, environ):
        assert problem.startswith(f"environment variable {option}")


def test_value_that_a_tier_refuses_is_reported_with_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    for name, value in (("L1__CAPACITY", "1MiB"), ("DISK__PATH", taken), ("DISK__CAPACITY", "1MB")):
        monkeypatch.setenv(f"KVCACHE__{name}", str(value))
    with pytest.raises(ProfileError) as caught:
        open_stack("l1-disk", block_nbytes=4096)
    (problem,) = caught.value.problems
    assert problem.startswith(f"environment variable KVCACHE__DISK__PATH: path is '{taken}'")
    monkeypatch.setenv("KVCACHE__DISK__PATH", str(tmp_path / "folder"))
    monkeypatch.setenv("KVCACHE__DISK__CAPACITY", "4096")
    with pytest.raises(ProfileError) as caught:
        open_stack("l1-disk", block_nbytes=4096)
    (problem,) = caught.value.problems
    assert problem.startswith("environment variable KVCACHE__DISK__CAPACITY: capacity is 4096")


@pytest.mark.parametrize(
    ("option", "value"),
    [("level", "99"), ("calls", "0"), ("calls", "9999999999"), ("deadline_s", "-1.0"),
     ("deadline_s", "1e+300"), ("threads", "0"), ("threads", "99999999"), ("codec", "zip")],
)  # fmt: skip
def test_value_that_any_part_of_the_stack_refuses_is_reported_with_the_variable(
    option: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, given in (
        ("L1__CAPACITY", "1MiB"), ("DISK__CAPACITY", "1MiB"), ("DISK__PATH", str(tmp_path / "d")),
        (f"DISK__{option.upper()}", value),
    ):  # fmt: skip
        monkeypatch.setenv(f"KVCACHE__{name}", given)
    with pytest.raises(ProfileError) as caught:
        open_stack("l1-disk", block_nbytes=4096).close()
    (problem,) = caught.value.problems
    assert problem.startswith(f"environment variable KVCACHE__DISK__{option.upper()}: {option} ")


def test_error_that_names_no_option_is_reported_with_the_variables(file: Path) -> None:
    row = read(file, GOOD, {"KVCACHE__L1__COUNT": "7"}).tiers[0]
    where = f'{file}, line 1: tier "l1", changed by environment variable KVCACHE__L1__COUNT'
    assert row.locate("cannot start") == f"{where}: cannot start"
    assert row.locate("the accounts do not match") == f"{where}: the accounts do not match"
    assert row.locate("of room there is none").startswith(f"{file}, line 4: of room")


def test_the_page_has_every_variable_and_no_other() -> None:
    page = (ROOT / "docs" / "profiles.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(KVCACHE_\w+)` \| (.+) \|$", page, re.MULTILINE))
    assert rows == VARIABLES


def test_pages_and_sources_use_no_variable_that_is_not_listed() -> None:
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.yaml")]
    for room in ("kvcache", "tiers", "profiles", "connectors"):
        files += [*(ROOT / room).rglob("*.py"), *(ROOT / room).rglob("*.toml")]
    shown = {
        name: path.name
        for path in files
        for name in re.findall(
            r"(?<!\w)KVCACHE_[A-Z]+(?:_[A-Z]+)*(?![A-Z_a-z0-9])", path.read_text()
        )
    }
    examples = {"KVCACHE_REDIS_PORT", "KVCACHE_PORT", "KVCACHE_PROFIL"}  # not read
    assert set(shown) - set(VARIABLES) - examples == set()
    assert unknown_variables(dict.fromkeys(VARIABLES, "")) == ()
