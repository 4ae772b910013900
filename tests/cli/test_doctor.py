"""The doctor on a healthy machine, and with things planted that are in its way."""

import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvcache import cli, host_memory
from kvcache.cli import doctor
from kvcache.cli.doctor import machine, otlp
from kvcache.keys import DIGEST_NBYTES
from kvcache.sizes import Size
from kvcache.tiers.disk import DiskTier
from kvcache.tiers.dram import DramTier
from kvcache.tiers.framed import frame_nbytes
from tests.support import doctor_tiers

Found = dict[str, list[dict[str, Any]]]
Doctor = Callable[..., tuple[int, Found]]

L1 = '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "{capacity}"\n'
DISK = '[[tier]]\nname = "disk"\nkind = "disk"\npath = "{path}"\ncapacity = "{room}"\n'


@pytest.fixture(autouse=True)
def _no_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Ask about a profile: its rows' text; gives the exit code, and the results by subject."""

    def ask(profile: str, *arguments: str) -> tuple[int, Found]:
        file = tmp_path / "asked.toml"
        file.write_text(profile)
        code = cli.main(["doctor", "--profile", str(file), "--json", *arguments])
        found: Found = {}
        for result in json.loads(capsys.readouterr().out)["checks"]:
            found.setdefault(result["subject"], []).append(result)
        return code, found

    return ask


def statuses(found: Found, subject: str) -> list[str]:
    return [result["status"] for result in found[subject]]


def profile(path: Path, capacity: str = "8MiB", room: str = "16MiB") -> str:
    return L1.format(capacity=capacity) + DISK.format(path=path, room=room)


def test_doctor_warns_of_variables_that_are_not_read(
    ask: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCACHE_PROFIL", "l1-disk")
    monkeypatch.setenv("KVCACHE_REDIS_PORT", "tcp://10.0.0.2:6379")
    _, found = ask(profile(tmp_path / "disk"))
    assert statuses(found, "profile") == ["OK", "WARN"]
    assert found["profile"][1]["what"].endswith("did you mean KVCACHE_PROFILE?")


def lower(kind: str, more: str = "") -> str:
    tier = f'[[tier]]\nname = "below"\nkind = "tests.support.doctor_tiers:{kind}"\n{more}'
    return L1.format(capacity="8MiB") + tier


def test_a_healthy_machine(ask: Doctor, tmp_path: Path) -> None:
    place = tmp_path / "kv"
    code, found = ask(profile(place))
    assert code == 0
    assert statuses(found, "disk") == ["OK", "OK"]
    assert all(result["status"] != "FAIL" for results in found.values() for result in results)
    assert {"memory", "l1", "memlock", "huge pages", "profile"} <= set(found)
    assert "otlp" not in found
    for number in ("read_nbytes_per_s", "write_nbytes_per_s", "latency_s"):
        assert found["disk"][1]["measured"][number] > 0
    assert not place.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["asked.toml"]


def test_three_problems_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An L1 larger than the container, a path that cannot be, an endpoint where nobody is."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setattr(otlp, "_WAIT_S", 1.5)  # time for a second try, after which it says why
    with socket.socket() as nobody:  # bound, and does not listen
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        monkeypatch.setenv(
            "OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}"
        )
        monkeypatch.setenv("KVCACHE__L1__CAPACITY", str(2 * host_memory.limit().nbytes))
        (tmp_path / "file").write_text("no directory")
        monkeypatch.setenv("KVCACHE__DISK__PATH", str(tmp_path / "file" / "kv"))
        assert cli.main(["doctor", "--profile", "l1-disk"]) == 1
    said = capsys.readouterr().out.splitlines()
    failed = {
        line.split()[1]: (line, after.strip())
        for line, after in zip(said, [*said[1:], ""], strict=True)
        if line.startswith("FAIL")
    }
    assert set(failed) == {"l1", "disk", "otlp"}
    assert "may use" in failed["l1"][0]
    assert failed["l1"][1].startswith("fix: KVCACHE__L1__CAPACITY=")
    assert "cannot be written: Not a directory" in failed["disk"][0]
    assert "KVCACHE__DISK__PATH" in failed["disk"][1]
    assert "refused" in failed["otlp"][0]
    assert "start a collector there" in failed["otlp"][1]
    assert said[-1].startswith("3 in the way")


def test_the_fix_of_l1_is_one(ask: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = ask(L1.format(capacity=2 * host_memory.limit().nbytes))
    assert (code, statuses(found, "l1")) == (1, ["FAIL"])
    variable, _, size = found["l1"][0]["fix"].split()[0].partition("=")
    monkeypatch.setattr(
        host_memory, "available", lambda *_: host_memory.HostMemory(2**62, "enough")
    )
    monkeypatch.setenv(variable, size)
    code, found = ask(L1.format(capacity=2 * host_memory.limit().nbytes))
    assert (code, statuses(found, "l1")) == (0, ["OK"])


def test_an_l1_that_an_engine_has_is_no_failure(
    ask: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        host_memory, "available", lambda *_: host_memory.HostMemory(1 << 20, "a test")
    )
    pid = os.getpid()
    with closing(DramTier(block_nbytes=4096, capacity=Size(8 << 20))), monkeypatch.context() as it:
        it.setattr(os, "getpid", lambda: -1)  # so that it is another process's
        code, found = ask(L1.format(capacity="8MiB"))
    assert (code, statuses(found, "l1")) == (0, ["WARN"])
    assert re.search(rf"is open here \(process .*\b{pid}\b", found["l1"][0]["what"])
    monkeypatch.setattr(machine, "_other_slabs", dict)
    code, found = ask(L1.format(capacity="8MiB"))
    assert (code, statuses(found, "l1")) == (1, ["FAIL"])


def test_everything_wrong_with_a_profile_is_a_line(ask: Doctor) -> None:
    code, found = ask('[[tier]]\nname = "l1"\nkind = "dram"\ncapcity = "1GiB"\n')
    assert code == 1
    assert statuses(found, "profile") == ["FAIL", "FAIL"]
    assert 'did you mean "capacity"?' in found["profile"][0]["what"]
    assert statuses(found, "memory") == ["OK"]  # the machine is looked at all the same


def test_block_bytes_that_are_no_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--block-bytes", "much"]) == 2
    assert "--block-bytes is 'much'" in capsys.readouterr().err


class TestDisk:
    def test_a_tier_that_is_open_is_said_to_be_and_keeps_all(
        self, ask: Doctor, tmp_path: Path
    ) -> None:
        path, size, key = tmp_path / "kv", 1 << 20, b"k" * 64
        with closing(DiskTier(block_nbytes=4096, path=str(path), capacity=size)) as tier:  # type: ignore[arg-type]
            tier.store([key], [memoryview(b"b" * 4096)])
            before = {file.name: file.read_bytes() for file in path.iterdir()}
            code, found = ask(profile(path, room="1MiB"))
            assert {file.name: file.read_bytes() for file in path.iterdir()} == before
            buffer = bytearray(4096)
            assert tier.load([key], [memoryview(buffer)]) == [4096]
        assert code == 0
        assert statuses(found, "disk") == ["OK"] * 3
        assert f"open in process {os.getpid()}" in found["disk"][0]["what"]

    def test_doctor_of_a_directory_with_a_foreign_file_names_it(
        self, ask: Doctor, tmp_path: Path
    ) -> None:
        (tmp_path / "kv").mkdir(mode=0o700)
        (tmp_path / "kv" / "blocks").write_text("precious")
        code, found = ask(profile(tmp_path / "kv", room="1MiB"))
        assert (code, statuses(found, "disk")) == (1, ["FAIL"])
        assert "'blocks' was not written by kvcache" in found["disk"][0]["what"]
        assert "KVCACHE__DISK__PATH" in found["disk"][0]["fix"]
        assert [file.name for file in (tmp_path / "kv").iterdir()] == ["blocks"]

    def test_no_room(self, ask: Doctor, tmp_path: Path) -> None:
        code, found = ask(profile(tmp_path / "kv", room=f"{10**6}TiB"))
        assert (code, statuses(found, "disk")[0]) == (1, "FAIL")
        assert "a smaller KVCACHE__DISK__CAPACITY" in found["disk"][0]["fix"]

    def test_a_place_that_is_not_ours_to_look_at(
        self, ask: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        exists = Path.exists

        def refuse(path: Path) -> bool:
            if path.name == "kv":
                raise PermissionError(13, "Permission denied")
            return exists(path)

        monkeypatch.setattr(Path, "exists", refuse)
        code, found = ask(profile(tmp_path / "kv"))
        assert (code, statuses(found, "disk")) == (1, ["FAIL"])
        assert "Permission denied" in found["disk"][0]["what"]

    def test_without_direct_io(
        self, ask: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "O_DIRECT", 1 << 30)  # no such flag
        opened = os.open

        def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if flags & 1 << 30:
                raise OSError(22, "no direct I/O here")
            return opened(path, flags, *more, **named)

        monkeypatch.setattr(os, "open", refuse)
        code, found = ask(profile(tmp_path))
        assert (code, statuses(found, "disk")) == (0, ["OK", "WARN"])
        assert "no O_DIRECT" in found["disk"][1]["what"]
        assert found["disk"][1]["measured"]["read_nbytes_per_s"] > 0

    def test_where_a_file_needs_a_name(
        self, ask: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on NFS: the name is gone at once."""
        opened = os.open

        def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(95, "no such files here")
            return opened(path, flags, *more, **named)

        monkeypatch.setattr(os, "open", refuse)
        code, found = ask(profile(tmp_path))
        assert (code, statuses(found, "disk")) == (0, ["OK", "OK"])
        assert [file.name for file in tmp_path.iterdir()] == ["asked.toml"]


class TestOtherTiers:
    @pytest.fixture(autouse=True)
    def _empty(self) -> Iterator[None]:
        doctor_tiers.Kept.asked.clear()
        doctor_tiers.Sized.sizes.clear()
        doctor_tiers.Kept.held.clear()
        yield
        doctor_tiers.Hanging.let_go.set()

    def test_a_good_one_is_measured_and_keeps_what_it_had(self, ask: Doctor) -> None:
        doctor_tiers.Kept.held.update({b"an engine's": b"block"})
        closed = doctor_tiers.Kept.closed
        code, found = ask(lower("Kept"))
        assert (code, statuses(found, "below")) == (0, ["OK"])
        assert set(found["below"][0]["measured"]) == {
            "latency_s", "write_nbytes_per_s", "read_nbytes_per_s",
        }  # fmt: skip
        assert doctor_tiers.Kept.held == {b"an engine's": b"block"}
        assert doctor_tiers.Kept.closed == closed + 1
        ask(lower("Kept"))
        first, second = doctor_tiers.Kept.asked
        assert (
            first[:DIGEST_NBYTES] != second[:DIGEST_NBYTES]
        )  # nobody's namespace, not even its own

    def test_one_that_is_made_for_a_size_is_not_opened_for_another(self, ask: Doctor) -> None:
        code, found = ask(lower("Sized"))
        assert (code, statuses(found, "below")) == (0, ["WARN"])
        assert doctor_tiers.Sized.sizes == []
        code, found = ask(lower("Sized"), "--block-bytes", "256KiB")
        assert statuses(found, "below") == ["OK"]
        assert doctor_tiers.Sized.sizes == [frame_nbytes(256 << 10)]

    @pytest.mark.parametrize(
        ("kind", "status", "what"),
        [
            ("Refusing", "FAIL", "cannot be used: ConnectionError: nobody there"),
            ("Failing", "FAIL", "cannot be used: OSError: the line is cut"),
            ("Wrong", "FAIL", "did not give the same one back"),
            ("Full", "WARN", "did not take a block"),
            ("Sticky", "WARN", "keeps what was removed"),
        ],
    )
    def test_what_is_wrong_with_it_is_said(
        self, kind: str, status: str, what: str, ask: Doctor
    ) -> None:
        code, found = ask(lower(kind))
        assert (code, statuses(found, "below")) == (int(status == "FAIL"), [status])
        assert what in found["below"][0]["what"]
        assert 'asked.toml, line 5: tier "below"' in found["below"][0]["fix"]
        assert not doctor_tiers.Kept.held

    def test_one_that_hangs_is_left_behind(
        self, ask: Doctor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        doctor_tiers.Hanging.let_go.clear()
        monkeypatch.setattr(doctor, "WAIT_S", 0.05)
        code, found = ask(lower("Hanging"))
        assert (code, statuses(found, "below")) == (1, ["FAIL"])
        assert "no answer in" in found["below"][0]["what"]

    def test_no_secret_is_said(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "secret.toml"
        file.write_text(lower("Refusing", 'password = "hunter2"\n'))
        assert cli.main(["doctor", "--profile", str(file)]) == 1
        assert "hunter2" not in capsys.readouterr().out
