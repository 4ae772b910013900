"""AIBrix's variables: the used ones, those without effect, and kvcache's own overriding them."""

import logging
from pathlib import Path

import pytest

from kvcache.profiles import Profile, ProfileError, aibrix, load_profile, open_stack
from tests.support.empty_tiers import Front
from tests.support.profile_files import FRONT, GIB, GOOD, read

pytestmark = pytest.mark.usefixtures("ten_gib")

MIB = 1 << 20
P = "AIBRIX_KV_CACHE_OL_"
SAMPLE = {  # AIBrix's sample of an L1 without L2, with another size
    f"{P}L1_CACHE_ENABLED": "1",
    f"{P}L1_CACHE_EVICTION_POLICY": "S3FIFO",
    f"{P}L1_CACHE_CAPACITY_GB": "8",
    "VLLM_RPC_TIMEOUT": "1000000",
}
DISK = f'{GOOD}[[tier]]\nname = "l2"\nkind = "tests.support.empty_tiers:Lower"\n'


def report_of(profile: Profile) -> aibrix.MigrationReport:
    assert profile.aibrix is not None
    return profile.aibrix


def refused(environ: dict[str, str], profile: str | None = None) -> tuple[str, ...]:
    with pytest.raises(ProfileError) as caught:
        load_profile(profile, environ)
    return caught.value.problems


def test_table_has_all_62_variables() -> None:
    assert len(aibrix.VARIABLES) == 62


def test_profile_without_aibrix_variables_has_no_report() -> None:
    assert load_profile(None, {}).aibrix is None
    assert load_profile(None, {f"{P}L2_CACHE_BACKEND": " ", "AIBRIX": "1"}).aibrix is None


def test_sample_of_aibrix_sets_capacity_and_policy() -> None:
    profile = load_profile(None, SAMPLE)
    assert profile.name == "l1-only"
    assert profile.tiers[0].options == {"capacity": 8 * GIB, "eviction": "s3fifo"}
    assert report_of(profile) == aibrix.MigrationReport(
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
def test_capacity_is_multiplied_by_ranks(gib: str, ranks: int, nbytes: int) -> None:
    profile = load_profile(None, {f"{P}L1_CACHE_CAPACITY_GB": gib}, ranks=ranks)
    assert profile.tiers[0].options["capacity"] == nbytes


@pytest.mark.parametrize("policy", ["FIFO", "LRU", "S3FIFO", "s3fifo", " lru "])
def test_policy_is_mapped_to_the_name_in_kvcache(policy: str) -> None:
    profile = load_profile(None, {f"{P}L1_CACHE_EVICTION_POLICY": policy})
    assert profile.tiers[0].options["eviction"] == policy.strip().lower()


@pytest.mark.parametrize(("given", "writes"), [("ALL", "all"), ("hot", "hot"), ("EVICTED", "all")])
def test_ingestion_type_sets_writes_of_lower_tiers(file: Path, given: str, writes: str) -> None:
    profile = read(file, DISK, {f"{P}L2_CACHE_INGESTION_TYPE": given})
    assert profile.tiers[1].options == {"writes": writes}
    assert report_of(profile).taken == (f'{P}L2_CACHE_INGESTION_TYPE as writes of l2 = "{writes}"',)


# kvcache's own settings win


def test_kvcache_variable_overrides_one_option() -> None:
    profile = load_profile(None, SAMPLE | {"KVCACHE__L1__CAPACITY": "2GiB"})
    assert profile.tiers[0].options == {"capacity": 2 * GIB, "eviction": "s3fifo"}
    where = "environment variable KVCACHE__L1__CAPACITY"
    overruled = f"{P}L1_CACHE_CAPACITY_GB (capacity of l1 is from {where})"
    assert report_of(profile).overruled == (overruled,)


@pytest.mark.parametrize("by_argument", [True, False])
def test_users_profile_overrides_one_option(file: Path, by_argument: bool) -> None:
    text = '[[tier]]\nname = "a"\nkind = "dram"\ncapacity = "1GiB"\n'
    file.write_text(text)
    ours = {} if by_argument else {"KVCACHE_PROFILE": str(file)}
    profile = load_profile(str(file) if by_argument else None, SAMPLE | ours)
    assert profile.tiers[0].options == {"capacity": GIB, "eviction": "s3fifo"}
    assert report_of(profile).overruled == (
        f"{P}L1_CACHE_CAPACITY_GB (capacity of a is from {file}, line 4)",
    )


@pytest.mark.parametrize("name", [None, "l1-only", "l1-disk", "l1-redis", "l1-disk-redis"])
@pytest.mark.parametrize("by_argument", [True, False])
def test_default_of_a_shipped_profile_is_overridden(name: str | None, by_argument: bool) -> None:
    environ = SAMPLE | ({"KVCACHE_PROFILE": name} if name and not by_argument else {})
    profile = load_profile(name if by_argument else None, environ)
    assert profile.name == (name or "l1-only")
    assert profile.tiers[0].options == {"capacity": 8 * GIB, "eviction": "s3fifo"}
    assert report_of(profile).overruled == ()
    plain = load_profile(profile.name, {})
    assert [row.options for row in profile.tiers[1:]] == [row.options for row in plain.tiers[1:]]


def test_extending_file_overrides_the_options_it_sets(file: Path) -> None:
    text = 'extends = "l1-disk"\n[[tier]]\nname = "l1"\ncapacity = "3GiB"\n'
    profile = read(file, text, SAMPLE)
    assert profile.tiers[0].options == {"capacity": 3 * GIB, "eviction": "s3fifo"}
    assert report_of(profile).overruled == (
        f"{P}L1_CACHE_CAPACITY_GB (capacity of l1 is from {file}, line 4)",
    )


def test_copy_of_a_shipped_profile_counts_as_the_users(file: Path) -> None:
    text = load_profile("l1-only", {}).path.read_text()
    profile = read(file, text, SAMPLE)
    assert profile.tiers[0].options == load_profile("l1-only", {}).tiers[0].options
    assert len(report_of(profile).overruled) == 2


def test_option_that_no_tier_has_is_reported_without_effect(file: Path) -> None:
    profile = read(file, GOOD, SAMPLE | {f"{P}L2_CACHE_INGESTION_TYPE": "HOT"})
    assert profile.tiers[0].cls is Front
    assert report_of(profile).no_effect == (
        f"{P}L1_CACHE_EVICTION_POLICY (no first tier has the option eviction)",
        f"{P}L1_CACHE_CAPACITY_GB (no first tier has the option capacity)",
        f"{P}L2_CACHE_INGESTION_TYPE (no tier below the first has the option writes)",
    )


# Refused


def test_disabled_l1_is_refused_unless_kvcache_sets_its_size(file: Path) -> None:
    off = {f"{P}L1_CACHE_ENABLED": "0", f"{P}L2_CACHE_BACKEND": "INFINISTORE"}
    (problem,) = refused(off)
    assert problem.startswith(f'environment variable {P}L1_CACHE_ENABLED = "0": it asks for no L1')
    assert "KVCACHE__L1__CAPACITY" in problem
    assert refused(off | {"KVCACHE_PROFILE": "l1-redis"}) == (problem,)
    assert refused(off | SAMPLE | off) == (
        problem,
    )  # a size in AIBrix's variables does not enable it
    file.write_text(DISK.replace(FRONT, "dram").replace("room", "capacity"))
    for ours in ({"KVCACHE__L1__CAPACITY": "1GiB"}, {"KVCACHE_PROFILE": str(file)}):
        report = report_of(load_profile(None, off | ours))
        assert report.overruled[0].startswith(f"{P}L1_CACHE_ENABLED (there is an L1")
        assert report.no_effect[0].startswith(
            f"{P}L2_CACHE_BACKEND (kvcache has none of AIBrix's backends"
        )


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
def test_bad_value_is_one_error_that_names_the_variable(
    name: str, given: str, allowed: str
) -> None:
    (problem,) = refused({P + name: given})
    assert problem.startswith(f'environment variable {P}{name} = "{given}": {allowed}')


def test_bad_values_are_listed_with_other_problems() -> None:
    environ = {f"{P}L1_CACHE_CAPACITY_GB": "x", "KVCACHE__L1__CAPCITY": "1GiB"}
    assert len(refused(environ)) == 2


# No effect


@pytest.mark.parametrize(
    "name", [name for name, entry in aibrix.VARIABLES.items() if isinstance(entry, aibrix.NoEffect)]
)
def test_variable_without_effect_is_reported_with_its_reason(name: str) -> None:
    if name == "L1_CACHE_ENABLED":
        return
    variable = name if name == aibrix.SYNC else P + name
    profile = load_profile(None, {variable: "any-value"})
    entry = aibrix.VARIABLES[name]
    assert report_of(profile).no_effect == (f"{variable} ({entry.text.replace('`', '')})",)
    assert "any-value" not in str(profile.aibrix)
    assert profile.tiers[0].options == load_profile(None, {}).tiers[0].options


def test_variables_with_one_reason_share_a_sentence() -> None:
    environ = {f"{P}INFINISTORE_HOST_ADDR": "h", f"{P}INFINISTORE_SERVICE_PORT": "1"}
    (report,) = report_of(load_profile(None, environ)).no_effect
    names = f"{P}INFINISTORE_HOST_ADDR, {P}INFINISTORE_SERVICE_PORT"
    assert report.startswith(f"{names} (there is no InfiniStore tier; ")


def test_unknown_aibrix_variable_is_reported_with_the_nearest() -> None:
    environ = {f"{P}L1_CACHE_CAPCITY_GB": "8", f"{P}PRIS_REMOTE_ADDR": "h"}
    wrong, old = report_of(load_profile(None, environ)).no_effect
    assert wrong.startswith(f"{P}L1_CACHE_CAPCITY_GB (AIBrix has no such variable; did you mean ")
    assert f'"{P}L1_CACHE_CAPACITY_GB"' in wrong
    assert old.startswith(f"{P}PRIS_REMOTE_ADDR (there is no PrisKV tier")


# One line


def test_open_stack_logs_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvcache.profiles")
    monkeypatch.setenv(f"{P}L1_CACHE_CAPACITY_GB", "0.0078125")
    with open_stack(block_nbytes=MIB, ranks=2) as stack:
        assert stack.front.slab.slots == 16
    monkeypatch.setenv(f"{P}CHUNK_SIZE", "512")
    open_stack(block_nbytes=MIB).close()
    logged = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "kvcache.profiles"]
    report = (
        f"kvcache: profile: AIBrix's variables: taken: {P}L1_CACHE_CAPACITY_GB as capacity of l1 = "
    )
    unused = f". no effect: {P}CHUNK_SIZE (blocks are not moved in chunks of tokens)"
    assert logged == [("INFO", f"{report}{16 * MIB}"), ("WARNING", f"{report}{8 * MIB}{unused}")]
