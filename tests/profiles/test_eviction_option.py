"""The option ``eviction``: a shipped policy or a class path."""

from abc import abstractmethod
from pathlib import Path

import pytest

from kvcache.eviction import POLICIES, Lru, Policy, policy_class, policy_option
from kvcache.profiles import ProfileError, load_profile

ROW = '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "64MiB"\neviction = "{}"\n'


class Ours(Lru):
    pass


class Half(Lru):
    @abstractmethod
    def more(self) -> None: ...


NO_CLASS = "no class"


def load(tmp_path: Path, eviction: str) -> object:
    profile = tmp_path / "ours.toml"
    profile.write_text(ROW.format(eviction))
    return load_profile(str(profile), environ={}).tiers[0].options["eviction"]


@pytest.mark.parametrize("eviction", [*POLICIES, f"{__name__}:Ours"])
def test_known_policy_is_accepted(tmp_path: Path, eviction: str) -> None:
    assert load(tmp_path, eviction) == eviction
    assert isinstance(policy_class(eviction)(10), Policy)


@pytest.mark.parametrize(
    ("eviction", "says"),
    [
        ("lfu", 'takes one of "gittins", "lru"'),
        ("LRU", 'did you mean "lru"?'),
        ("nowhere.at.all:Ours", "cannot import nowhere.at.all:Ours (ModuleNotFoundError"),
        (f"{__name__}:Theirs", "cannot import"),
        (f"{__name__}:NO_CLASS", "is no subclass of kvcache.eviction.Policy"),
        ("pathlib:Path", "is no subclass of kvcache.eviction.Policy"),
        (f"{__name__}:Half", "lacks more"),
        (":", "cannot import :"),
    ],
)
def test_unknown_policy_is_refused(tmp_path: Path, eviction: str, says: str) -> None:
    with pytest.raises(ProfileError) as error:
        load(tmp_path, eviction)
    assert says in str(error.value)
    assert "ours.toml" in str(error.value)
    assert f'eviction = "{eviction}"' in str(error.value)


def test_policy_that_is_not_text_is_refused(tmp_path: Path) -> None:
    profile = tmp_path / "ours.toml"
    profile.write_text(ROW.replace('"{}"', "3"))
    with pytest.raises(ProfileError, match=r"takes one of .* or a class of your own"):
        load_profile(str(profile), environ={})


def test_url_as_policy_is_neither_imported_nor_repeated() -> None:
    said = r'no policy is called "redis://\*\*\*@host"'
    with pytest.raises(ValueError, match=said) as caught:
        policy_option("redis://user:hunter2@host")
    assert "hunter2" not in str(caught.value)


def test_policy_class_with_an_unknown_name_raises() -> None:
    said = r'no policy is called "lfu"; there are "gittins", .*pkg\.mod:Class'
    with pytest.raises(ValueError, match=said):
        policy_class("lfu")
