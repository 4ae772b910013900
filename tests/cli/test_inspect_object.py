"""`kvcache inspect` of an object store: it reads the blocks and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("obstore")

from kvcache import cli
from kvcache.keys import namespace, namespaced_key
from kvcache.testing import keys_of
from kvcache.tiers.framed import Framed, frame_nbytes
from kvcache.tiers.object import ObjectTier
from kvcache.tiers.object.names import block_name
from tests.support import s3_server
from tests.support.frames import BLOCK_NBYTES, kv_like_block

FIELDS = {"model": "a"}
NAMESPACES = [namespace(FIELDS), namespace({"model": "b"})]
FRAME = frame_nbytes(BLOCK_NBYTES)
KEYS = [namespaced_key(NAMESPACES[0], key) for key in keys_of("inspected", 3)] + [
    namespaced_key(NAMESPACES[1], b"one")
]
L1 = '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "1MiB"\n'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.Server]:
    with s3_server.server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the blocks of `fill`."""
    fill(url=str(tmp_path / "store"))
    return tmp_path / "store"


def fill(**options: Any) -> None:
    """Store three blocks of one namespace, with its description, and one of another."""
    with closing(Framed(ObjectTier(**options), block_nbytes=BLOCK_NBYTES)) as tier:
        blocks = [memoryview(kv_like_block(BLOCK_NBYTES, number)) for number in range(4)]
        assert tier.resolve(NAMESPACES[0], json.dumps(FIELDS)) == NAMESPACES[0]
        assert tier.store(KEYS, blocks) == [True] * 4


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code = cli.main(["inspect", "--json", *arguments])
    [found] = json.loads(capsys.readouterr().out)["tiers"]
    return code, found


def test_inspect_bucket_of_a_profile_counts_and_verifies_namespaces(
    server: s3_server.Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    s3_server.set_login(monkeypatch)
    options = server.options("some/prefix")
    fill(**options, timeout_s=30.0)
    server.put("some/prefix/kvcache/1/block/of-another-program", b"value")
    before = server.names()
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in options.items())
    profile = tmp_path / "object.toml"
    profile.write_text(f'{L1}[[tier]]\nname = "far"\nkind = "object"\n{lines}')
    code, found = inspected(capsys, "--profile", str(profile), "--verify")
    assert (code, found["kind"], found["tier"], found["blocks"]) == (0, "object", options["url"], 4)
    expected: list[tuple[Any, ...]] = [(3, 3 * FRAME, 3, {}), (1, FRAME, 1, {})]
    held = [found["namespaces"][name.hex()] for name in NAMESPACES]
    columns = ("blocks", "nbytes", "intact", "rejected")
    assert [tuple(one[column] for column in columns) for one in held] == expected
    assert held[0]["identity"] == FIELDS
    assert found["oldest"] <= found["newest"]
    assert server.names() == before


def test_inspect_folder_finds_a_damaged_block_and_keeps_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = folder / block_name(KEYS[1])
    content = bytearray(damaged.read_bytes())
    content[5000] ^= 1
    damaged.write_bytes(content)
    code, found = inspected(capsys, folder.as_uri(), "--verify")
    assert code == 1
    held = [found["namespaces"][name.hex()] for name in NAMESPACES]
    assert [(one["intact"], one["rejected"]) for one in held] == [(2, {"checksum": 1}), (1, {})]
    assert damaged.read_bytes() == content


def test_inspect_verify_of_a_block_that_is_deleted_meanwhile_reports_no_damage(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Framed.load

    def delete_then_load(self: Framed, *arguments: Any) -> list[int]:
        (folder / block_name(KEYS[3])).unlink(missing_ok=True)
        return load(self, *arguments)

    monkeypatch.setattr(Framed, "load", delete_then_load)
    code, found = inspected(capsys, folder.as_uri(), "--verify")
    assert code == 0
    assert found["namespaces"][NAMESPACES[1].hex()]["rejected"] == {"changed": 1}


def test_inspect_store_that_does_not_answer_ends_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.set_login(monkeypatch)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.Server(tmp_path).endpoint)
    assert cli.main(["inspect", "s3://kv-blocks/x"]) == 2
    assert "cannot be read" in capsys.readouterr().err
