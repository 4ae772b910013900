"""Profiles for tests to load, and their problems."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from kvcache.profiles import Profile, ProfileError, load_profile

GIB = 1 << 30
FRONT = "tests.support.empty_tiers:Front"
HEAD = f'[[tier]]\nname = "l1"\nkind = "{FRONT}"\n'  # lines 1 to 3
GOOD = HEAD + 'room = "1GiB"\n'


def read(file: Path, text: str, environ: Mapping[str, str] | None = None) -> Profile:
    file.write_text(text, encoding="utf-8")
    return load_profile(str(file), environ or {})


def problems(file: Path, text: str, environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(ProfileError) as caught:
        read(file, text, environ)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def only_problem(file: Path, text: str, environ: Mapping[str, str] | None = None) -> str:
    (problem,) = problems(file, text, environ)
    return problem
