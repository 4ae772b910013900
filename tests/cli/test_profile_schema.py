"""The JSON schema accepts the profiles that the loader accepts, and rejects invalid ones."""

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kvcache import cli, host_memory
from kvcache.profiles import ProfileError, load_profile, tiers
from kvcache.profiles.schema import schema
from tests.support.packages import each_shipped_profile

DRAM = '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "1GiB"\n'
DISK = '[[tier]]\nname = "d"\nkind = "disk"\npath = "/d"\ncapacity = "1GiB"\n'
CLASS_PATH = '[[tier]]\nname = "x"\nkind = "tests.support.empty_tiers:Lower"\nno_such_option = 1\n'
EXTENDS = 'extends = "l1-disk"\n'


@pytest.fixture(autouse=True)
def fixed_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "limit", lambda *_: host_memory.HostMemory(1 << 40, "a test"))


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema.Draft202012Validator.check_schema(schema())
    return jsonschema.Draft202012Validator(schema())


def loads(file: Path, text: str) -> bool:
    file.write_text(text)
    try:
        load_profile(str(file), {})
    except ProfileError:
        return False
    return True


@each_shipped_profile
def test_schema_accepts_shipped_profiles(validator: Any, name: str) -> None:
    text = load_profile(name, {}).path.read_text()
    validator.validate(tomllib.loads(text))


VALID = [
    DRAM,
    DRAM + 'eviction = "s3fifo"\n',
    DRAM + DISK,
    DRAM + DISK + 'codec = "zstd"\ndeadline_s = 2\nqueue = 1\nthreads = 8\n',
    DRAM.replace('"1GiB"', "1073741824"),
    DRAM.replace("1GiB", " 1.5 gib "),
    DRAM.replace("1GiB", "50%"),
    DRAM.replace("dram", "kvcache.tiers.dram:DramTier"),
    EXTENDS,
    EXTENDS + 'without = ["disk"]\n',
    EXTENDS + '[[tier]]\nname = "disk"\npath = "/d"\n',
    EXTENDS + DISK,
]

INVALID = [
    "",
    "tier = []\n",
    "version = 1\n" + DRAM,
    'without = ["l1"]\n' + DRAM,
    "extends = 1\n",
    EXTENDS + "without = 1\n",
    EXTENDS + '[[tier]]\npath = "/d"\n',
    DRAM + "no_such_option = 1\n",
    DRAM + 'codec = "zstd"\n',
    DRAM.replace('"1GiB"', "true"),
    DRAM.replace('"1GiB"', "0"),
    DRAM.replace("1GiB", "1 GB or so"),
    DRAM.replace("1GiB", "-1GiB"),
    DRAM.replace("dram", "drma"),
    DRAM.replace('"l1"', '"L1"'),
    DRAM.replace('name = "l1"\n', ""),
    DRAM.replace('kind = "dram"\n', ""),
    DRAM.replace('capacity = "1GiB"\n', ""),
    DRAM + 'eviction = "lfru"\n',
    DISK,
    DRAM + DISK.replace("1GiB", "50%"),
    DRAM + DISK + 'threads = "4"\n',
    DRAM + DISK + "deadline_s = true\n",
    DRAM + DISK + 'codec = "lz4"\n',
]


@pytest.mark.parametrize("text", VALID)
def test_schema_accepts_valid_profiles(validator: Any, tmp_path: Path, text: str) -> None:
    assert loads(tmp_path / "profile.toml", text)
    validator.validate(tomllib.loads(text))


@pytest.mark.parametrize("text", INVALID)
def test_schema_rejects_invalid_profiles(validator: Any, tmp_path: Path, text: str) -> None:
    assert not loads(tmp_path / "profile.toml", text)
    assert not validator.is_valid(tomllib.loads(text))


def test_schema_accepts_any_option_of_a_class_path(validator: Any, tmp_path: Path) -> None:
    """The loader imports the class and knows its options; the schema does not."""
    assert not loads(tmp_path / "profile.toml", DRAM + CLASS_PATH)
    validator.validate(tomllib.loads(DRAM + CLASS_PATH))


def test_schema_accepts_any_option_of_a_tier_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(tiers.KINDS, "far", ("no_such_package.far:FarTier", "far"))
    document = tomllib.loads(DRAM + '[[tier]]\nname = "f"\nkind = "far"\nanything = 1\n')
    jsonschema.Draft202012Validator(schema()).validate(document)
    first = tomllib.loads(DRAM.replace("dram", "far"))
    assert not jsonschema.Draft202012Validator(schema()).is_valid(first)


def test_schema_describes_options_with_the_docstring_of_their_class() -> None:
    (disk,) = [one for one in schema()["$defs"]["below"]["allOf"]
               if one["if"]["properties"]["kind"]["const"] == "disk"]  # fmt: skip
    options = disk["then"]["properties"]
    described = "a directory for this tier alone, created if it does not exist."
    assert options["path"]["description"].startswith(described)
    assert options["queue"]["default"] == "256MiB"
    assert options["codec"]["enum"] == ["none", "zstd"]
    assert all(option is True or option["description"] for option in options.values())


def test_profile_schema_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["profile", "schema"], ["profile", "schema", "--json"]):
        assert cli.main(argv) == 0
        assert json.loads(capsys.readouterr().out) == schema()
