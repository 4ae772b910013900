"""AIBrix's environment: what is taken, what is not and why, and that ours win."""

import logging
from pathlib import Path

import pytest

from kvcache.profiles import Profile, ProfileError, aibrix, load_profile, open_stack
from tests.support.empty_tiers import Front
from tests.support.profile_files import FRONT, GIB, GOOD, read

pytestmark = pytest.mark.usefixtures("ten_gib")

MIB = 1 << 20
P = "AIBRIX_KV_CACHE_OL_"
SAMPLE = {  # AIBrix's own sample of an L1 alone, but for the size
    f"{P}L1_CACHE_ENABLED": "1",
    f"{P}L1_CACHE_EVICTION_POLICY": "S3FIFO",
    f"{P}L1_CACHE_CAPACITY_GB": "8",
    "VLLM_RPC_TIMEOUT": "1000000",
}
DISK = f'{GOOD}[[tier]]\nname = "l2"\nkind = "tests.support.empty_tiers:Lower"\n'


def theirs(profile: Profile) -> aibrix.MigrationReport:
    assert profile.theirs is not None
    return profile.theirs


def refused(environ: dict[str, str], profile: str | None = None) -> tuple[str, ...]:
    with pytest.raises(ProfileError) as caught:
        load_profile(profile, environ)
    return caught.value.problems


def test_the_table_has_all_62() -> None:
    assert len(aibrix.VARIABLES) == 62


def test_without_them_nothing_is_said() -> None:
    assert load_profile(None, {}).theirs is None
    assert load_profile(None, {f"{P}L2_CACHE_BACKEND": " ", "AIBRIX": "1"}).theirs is None


def test_the_sample_works_as_it_is() -> None:
    profile = load_profile(None, SAMPLE)
    assert profile.name == "l1-only"
    assert profile.tiers[0].options == {"capacity": 8 * GIB, "eviction": "s3fifo"}
    assert theirs(profile) == aibrix.MigrationReport(
        taken=(
            f"{P}L1_CACHE_ENABLED = 1, as it is anyway",
            f'{P}L1_CACHE_EVICTION_POLICY as eviction of l1 = "s3fifo"',
            f'{P}L1_CACHE_CAPACITY_GB as capacity of l1 = "8GiB"',
        )
    )


@pytest.mark.parametrize(
    ("gib", "ranks", "nbytes"),
    [("1", 1, GIB), ("1", 4, 4 * GIB), ("0.5", 3, 3 * GIB // 2), ("2000", 1, 2000 * GIB)],
)
def test_capacity_is_of_each_rank(gib: str, ranks: int, nbytes: int) -> None:
    profile = load_profile(None, {f"{P}L1_CACHE_CAPACITY_GB": gib}, ranks=ranks)
    assert profile.tiers[0].options["capacity"] == nbytes


@pytest.mark.parametrize("policy", ["FIFO", "LRU", "S3FIFO", "s3fifo", " lru "])
def test_policies_have_our_names(policy: str) -> None:
    profile = load_profile(None, {f"{P}L1_CACHE_EVICTION_POLICY": policy})
    assert profile.tiers[0].options["eviction"] == policy.strip().lower()


@pytest.mark.parametrize(("given", "writes"), [("ALL", "all"), ("hot", "hot"), ("EVICTED", "all")])
def test_what_is_written_below(file: Path, given: str, writes: str) -> None:
    profile = read(file, DISK, {f"{P}L2_CACHE_INGESTION_TYPE": given})
    assert profile.tiers[1].options == {"writes": writes}
    assert theirs(profile).taken == (f'{P}L2_CACHE_INGESTION_TYPE as writes of l2 = "{writes}"',)


# Ours win


def test_our_variables_win_by_option() -> None:
    profile = load_profile(None, SAMPLE | {"KVCACHE__L1__CAPACITY": "2GiB"})
    assert profile.tiers[0].options == {"capacity": 2 * GIB, "eviction": "s3fifo"}
    where = "environment variable KVCACHE__L1__CAPACITY"
    overruled = f"{P}L1_CACHE_CAPACITY_GB (capacity of l1 is from {where})"
    assert theirs(profile).overruled == (overruled,)


@pytest.mark.parametrize("by_argument", [True, False])
def test_a_profile_that_was_chosen_wins_by_option(file: Path, by_argument: bool) -> None:
    text = '[[tier]]\nname = "a"\nkind = "dram"\ncapacity = "1GiB"\n'
    file.write_text(text)
    ours = {} if by_argument else {"KVCACHE_PROFILE": str(file)}
    profile = load_profile(str(file) if by_argument else None, SAMPLE | ours)
    assert profile.tiers[0].options == {"capacity": GIB, "eviction": "s3fifo"}
    assert theirs(profile).overruled == (
        f"{P}L1_CACHE_CAPACITY_GB (capacity of a is from {file}, line 4)",
    )


@pytest.mark.parametrize("name", [None, "l1-only", "l1-disk", "l1-redis", "l1-disk-redis"])
@pytest.mark.parametrize("by_argument", [True, False])
def test_defaults_of_a_shipped_profile_are_overridden(name: str | None, by_argument: bool) -> None:
    environ = SAMPLE | ({"KVCACHE_PROFILE": name} if name and not by_argument else {})
    profile = load_profile(name if by_argument else None, environ)
    assert profile.name == (name or "l1-only")
    assert profile.tiers[0].options == {"capacity": 8 * GIB, "eviction": "s3fifo"}
    assert theirs(profile).overruled == ()
    plain = load_profile(profile.name, {})
    assert [row.options for row in profile.tiers[1:]] == [row.options for row in plain.tiers[1:]]


def test_a_file_that_extends_a_shipped_profile_wins_by_what_it_says_itself(file: Path) -> None:
    text = 'extends = "l1-disk"\n[[tier]]\nname = "l1"\ncapacity = "3GiB"\n'
    profile = read(file, text, SAMPLE)
    assert profile.tiers[0].options == {"capacity": 3 * GIB, "eviction": "s3fifo"}
    assert theirs(profile).overruled == (
        f"{P}L1_CACHE_CAPACITY_GB (capacity of l1 is from {file}, line 4)",
    )


def test_a_copy_of_a_shipped_profile_is_the_users_own(file: Path) -> None:
    text = load_profile("l1-only", {}).path.read_text()
    profile = read(file, text, SAMPLE)
    assert profile.tiers[0].options == load_profile("l1-only", {}).tiers[0].options
    assert len(theirs(profile).overruled) == 2


def test_an_option_that_no_tier_has_has_no_effect(file: Path) -> None:
    profile = read(file, GOOD, SAMPLE | {f"{P}L2_CACHE_INGESTION_TYPE": "HOT"})
    assert profile.tiers[0].cls is Front
    assert theirs(profile).no_effect == (
        f"{P}L1_CACHE_EVICTION_POLICY (no first tier has the option eviction)",
        f"{P}L1_CACHE_CAPACITY_GB (no first tier has the option capacity)",
        f"{P}L2_CACHE_INGESTION_TYPE (no tier below the first has the option writes)",
    )


# Refused


def test_an_l1_that_is_switched_off_is_refused_unless_ours_say_how_much(file: Path) -> None:
    off = {f"{P}L1_CACHE_ENABLED": "0", f"{P}L2_CACHE_BACKEND": "INFINISTORE"}
    (problem,) = refused(off)
    assert problem.startswith(f'environment variable {P}L1_CACHE_ENABLED = "0": blocks are kept in')
    assert "KVCACHE__L1__CAPACITY" in problem
    assert refused(off | {"KVCACHE_PROFILE": "l1-redis"}) == (problem,)
    assert refused(off | SAMPLE | off) == (problem,)  # how much it would be is not to have one
    file.write_text(DISK.replace(FRONT, "dram").replace("room", "capacity"))
    for ours in ({"KVCACHE__L1__CAPACITY": "1GiB"}, {"KVCACHE_PROFILE": str(file)}):
        said = theirs(load_profile(None, off | ours))
        assert said.overruled[0].startswith(f"{P}L1_CACHE_ENABLED (there is an L1")
        assert said.no_effect[0].startswith(f"{P}L2_CACHE_BACKEND (AIBrix's backends are not here")


@pytest.mark.parametrize(
    ("name", "given", "allowed"),
    [
        ("L1_CACHE_ENABLED", "yes", 'takes "1", "true", "0" or "false"'),
        ("L1_CACHE_CAPACITY_GB", "80GB", "takes a number above zero, of GiB"),
        ("L1_CACHE_CAPACITY_GB", "0", "takes a number above zero, of GiB"),
        ("L1_CACHE_CAPACITY_GB", "-1", "takes a number above zero, of GiB"),
        ("L1_CACHE_CAPACITY_GB", "nan", "takes a number above zero, of GiB"),
        ("L1_CACHE_CAPACITY_GB", "inf", "takes a number above zero, of GiB"),
        ("L1_CACHE_EVICTION_POLICY", "S3-FIFO", 'takes one of "FIFO", "LRU", "S3FIFO"; did you'),
        ("L2_CACHE_INGESTION_TYPE", "HTO", 'takes one of "ALL", "HOT", "EVICTED"; did you'),
    ],
)
def test_a_bad_value_is_one_error_that_names_the_variable(
    name: str, given: str, allowed: str
) -> None:
    (problem,) = refused({P + name: given})
    assert problem.startswith(f'environment variable {P}{name} = "{given}": {allowed}')


def test_bad_values_are_said_with_everything_else() -> None:
    environ = {f"{P}L1_CACHE_CAPACITY_GB": "x", "KVCACHE__L1__CAPCITY": "1GiB"}
    assert len(refused(environ)) == 2


# No effect


@pytest.mark.parametrize(
    "name", [name for name, entry in aibrix.VARIABLES.items() if isinstance(entry, aibrix.NoEffect)]
)
def test_what_has_no_effect_says_why_and_stops_nothing(name: str) -> None:
    if name == "L1_CACHE_ENABLED":
        return
    variable = name if name == aibrix.SYNC else P + name
    profile = load_profile(None, {variable: "any-value"})
    entry = aibrix.VARIABLES[name]
    assert theirs(profile).no_effect == (f"{variable} ({entry.says.replace('`', '')})",)
    assert "any-value" not in str(profile.theirs)
    assert profile.tiers[0].options == load_profile(None, {}).tiers[0].options


def test_one_reason_is_said_once() -> None:
    environ = {f"{P}INFINISTORE_HOST_ADDR": "h", f"{P}INFINISTORE_SERVICE_PORT": "1"}
    (said,) = theirs(load_profile(None, environ)).no_effect
    names = f"{P}INFINISTORE_HOST_ADDR, {P}INFINISTORE_SERVICE_PORT"
    assert said.startswith(f"{names} (there is no InfiniStore tier; ")


def test_what_aibrix_does_not_know_is_said() -> None:
    environ = {f"{P}L1_CACHE_CAPCITY_GB": "8", f"{P}PRIS_REMOTE_ADDR": "h"}
    wrong, old = theirs(load_profile(None, environ)).no_effect
    assert wrong.startswith(f"{P}L1_CACHE_CAPCITY_GB (AIBrix has no such variable; did you mean ")
    assert f'"{P}L1_CACHE_CAPACITY_GB"' in wrong
    assert old.startswith(f"{P}PRIS_REMOTE_ADDR (there is no PrisKV tier")


# One line


def test_opening_says_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvcache.profiles")
    monkeypatch.setenv(f"{P}L1_CACHE_CAPACITY_GB", "0.0078125")
    with open_stack(block_nbytes=MIB, ranks=2) as stack:
        assert stack.front.slab.slots == 16
    monkeypatch.setenv(f"{P}CHUNK_SIZE", "512")
    open_stack(block_nbytes=MIB).close()
    ours = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "kvcache.profiles"]
    said = f"kvcache: of AIBrix's variables: taken: {P}L1_CACHE_CAPACITY_GB as capacity of l1 = "
    unused = f". no effect: {P}CHUNK_SIZE (blocks are not moved in chunks of tokens)"
    assert ours == [("INFO", f"{said}{16 * MIB}"), ("WARNING", f"{said}{8 * MIB}{unused}")]
