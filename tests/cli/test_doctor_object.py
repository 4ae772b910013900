"""The doctor with an object store: it is measured, and its clock and old blocks are reported."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("obstore")

from kvcache import cli
from kvcache.cli.doctor import object_store
from kvcache.keys import namespace, namespaced_key
from kvcache.profiles import load_profile
from kvcache.tiers.object import ObjectTier
from tests.support import s3_server

DAY_S = 86400
L1 = '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "1MiB"\n'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.Server]:
    with s3_server.server(tmp_path_factory.mktemp("s3")) as server:
        yield server


def write_profile(folder: Path, **options: Any) -> Path:
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in options.items())
    profile = folder / "object.toml"
    profile.write_text(f'{L1}[[tier]]\nname = "far"\nkind = "object"\n{lines}')
    return profile


def check(profile: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    code = cli.main(["doctor", "--profile", str(profile), "--json"])
    checks = json.loads(capsys.readouterr().out)["checks"]
    return code, [check for check in checks if check["subject"] == "far"]


def test_store_is_measured_and_left_as_it_was(
    server: s3_server.Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    s3_server.set_login(monkeypatch)
    before = server.names()
    options = server.options("measured", timeout_s=30.0)
    code, (probe, contents) = check(write_profile(tmp_path, **options), capsys)
    assert (code, probe["status"]) == (0, "OK")
    assert probe["measured"]["latency_s"] > 0
    assert (contents["status"], contents["what"]) == ("OK", "holds no blocks")
    assert server.names() == before


def test_store_that_rejects_the_credentials_is_one_failure(
    server: s3_server.Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    s3_server.set_login(monkeypatch, s3_server.UNKNOWN)
    code, [failure] = check(write_profile(tmp_path, **server.options("x")), capsys)
    assert (code, failure["status"]) == (1, "FAIL")
    assert "403" in failure["what"]
    assert s3_server.UNKNOWN.secret_key not in json.dumps(failure)


def test_store_that_does_not_answer_is_one_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    s3_server.set_login(monkeypatch)
    server = s3_server.Server(tmp_path)  # not started
    code, [failure] = check(write_profile(tmp_path, **server.options("x")), capsys)
    assert (code, failure["status"]) == (1, "FAIL")


@pytest.mark.parametrize(("ahead_s", "side"), [(3600, "ahead of"), (-3600, "behind")])
def test_wrong_clock_is_a_warning(ahead_s: int, side: str, tmp_path: Path) -> None:
    profile = load_profile(str(write_profile(tmp_path, url=str(tmp_path / "store"))), environ={})
    clock, contents = object_store.check(profile.tiers[1], lambda: time.time() + ahead_s)
    assert (clock.status, contents.status) == ("WARN", "OK")
    assert f"3600 s {side} the store's" in clock.what


@pytest.mark.parametrize(("days", "status"), [(20, "OK"), (40, "WARN")])
def test_old_blocks_are_a_warning(days: int, status: str, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with closing(ObjectTier(url=str(folder))) as tier:
        key = namespaced_key(namespace({"model": "a"}), b"key")
        assert tier.store([key], [memoryview(b"block")]) == [True]
    [block] = [path for path in folder.rglob("*") if path.is_file()]
    written = time.time() - days * DAY_S
    os.utime(block, (written, written))
    profile = load_profile(str(write_profile(tmp_path, url=str(folder))), environ={})
    [found] = object_store.check(profile.tiers[1])
    assert found.status == status
    assert f"written {days}.0 days ago" in found.what
    assert [path for path in folder.rglob("*") if path.is_file()] == [block]
