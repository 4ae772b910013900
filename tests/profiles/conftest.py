"""A file to write a profile to, and a container of a known size."""

from pathlib import Path

import pytest

from kvcache import host_memory
from tests.support.profile_files import GIB


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ours.toml"


@pytest.fixture
def ten_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    """The container may use 10 GiB."""
    monkeypatch.setattr(
        host_memory, "limit", lambda *_: host_memory.HostMemory(10 * GIB, "the test")
    )
