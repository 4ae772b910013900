"""The doctor on a healthy machine, and on machines with one fault each."""

import itertools
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvcache import cli, host_memory
from kvcache.cli import doctor
from kvcache.cli.doctor.options import CheckOptions
from kvcache.cli.plan.capacity import cores
from kvcache.keys import DIGEST_NBYTES
from kvcache.sizes import Size
from kvcache.tiers.disk import DiskTier
from kvcache.tiers.dram import DramTier
from kvcache.tiers.framed import frame_nbytes
from tests.support import doctor_tiers

Found = dict[str, list[dict[str, Any]]]
Doctor = Callable[..., tuple[int, Found]]

MIB = 1 << 20
L1 = '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "{capacity}"\n'
DISK = '[[tier]]\nname = "disk"\nkind = "disk"\npath = "{path}"\ncapacity = "{capacity}"\n'


@pytest.fixture(autouse=True)
def _without_otel_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def options() -> CheckOptions:
    """Small amounts, and a clock on which every measured call takes half a second."""
    return CheckOptions(
        clock=itertools.count(step=0.5).__next__, disk_nbytes=4 * MIB, copy_nbytes=MIB
    )


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: CheckOptions) -> Doctor:
    """Run the doctor on a profile's text; return the exit code, and the results by subject."""

    def check(profile: str, *arguments: str, options: CheckOptions = options) -> tuple[int, Found]:
        file = tmp_path / "checked.toml"
        file.write_text(profile)
        command = ["doctor", "--profile", str(file), "--json", *arguments]
        code = doctor.run(cli.parser().parse_args(command), options)
        found: Found = {}
        for result in json.loads(capsys.readouterr().out)["checks"]:
            found.setdefault(result["subject"], []).append(result)
        return code, found

    return check


def statuses(found: Found, subject: str) -> list[str]:
    return [result["status"] for result in found[subject]]


def disk_profile(path: Path, capacity: str = "16MiB") -> str:
    return L1.format(capacity="8MiB") + DISK.format(path=path, capacity=capacity)


def lower_tier_profile(class_name: str, options: str = "") -> str:
    tier = f'[[tier]]\nname = "below"\nkind = "tests.support.doctor_tiers:{class_name}"\n{options}'
    return L1.format(capacity="8MiB") + tier


def test_doctor_unread_variable_is_a_warning(
    check: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCACHE_PROFIL", "l1-disk")
    monkeypatch.setenv("KVCACHE_REDIS_PORT", "tcp://10.0.0.2:6379")
    _, found = check(disk_profile(tmp_path / "disk"))
    assert statuses(found, "profile") == ["OK", "WARN"]
    assert found["profile"][1]["what"].endswith("did you mean KVCACHE_PROFILE?")


def test_doctor_healthy_machine_passes_and_is_measured(check: Doctor, tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    code, found = check(disk_profile(folder))
    assert code == 0
    assert statuses(found, "disk") == ["OK", "OK"]
    assert all(result["status"] != "FAIL" for results in found.values() for result in results)
    assert {"memory", "l1", "memlock", "huge pages", "profile"} <= set(found)
    assert "otlp" not in found
    assert found["disk"][1]["measured"] == {
        "write_nbytes_per_s": 8 * MIB, "read_nbytes_per_s": 8 * MIB, "latency_s": 0.5,
    }  # fmt: skip
    copied = MIB // cores() * cores()
    assert found["l1"][0]["measured"] == {"copy_nbytes_per_s": 2 * copied}
    assert not folder.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["checked.toml"]


def test_doctor_three_faults_are_three_failures(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: CheckOptions,
) -> None:
    """An L1 larger than the container, an impossible path, an endpoint without a server."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    # The exporter logs the cause with its second attempt.
    options = replace(options, otlp_timeout_s=1.5)
    with socket.socket() as unused_port:  # bound, but not listening
        unused_port.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        monkeypatch.setenv(
            "OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{unused_port.getsockname()[1]}"
        )
        monkeypatch.setenv("KVCACHE__L1__CAPACITY", str(2 * host_memory.limit().nbytes))
        (tmp_path / "file").write_text("no directory")
        monkeypatch.setenv("KVCACHE__DISK__PATH", str(tmp_path / "file" / "kv"))
        command = ["doctor", "--profile", "l1-disk"]
        assert doctor.run(cli.parser().parse_args(command), options) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = {
        line.split()[1]: (line, next_line.strip())
        for line, next_line in zip(lines, [*lines[1:], ""], strict=True)
        if line.startswith("FAIL")
    }
    assert set(failed) == {"l1", "disk", "otlp"}
    assert "may use" in failed["l1"][0]
    assert failed["l1"][1].startswith("fix: KVCACHE__L1__CAPACITY=")
    assert "cannot be written: Not a directory" in failed["disk"][0]
    assert "KVCACHE__DISK__PATH" in failed["disk"][1]
    assert "refused" in failed["otlp"][0]
    assert "start a collector there" in failed["otlp"][1]
    assert lines[-1].startswith("3 failures, ")


def test_doctor_suggested_l1_capacity_passes(
    check: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = L1.format(capacity=2 * host_memory.limit().nbytes)
    code, found = check(profile)
    assert (code, statuses(found, "l1")) == (1, ["FAIL"])
    variable, _, size = found["l1"][0]["fix"].split()[0].partition("=")
    monkeypatch.setattr(
        host_memory, "available", lambda *_: host_memory.HostMemory(2**62, "a test")
    )
    monkeypatch.setenv(variable, size)
    code, found = check(profile)
    assert (code, statuses(found, "l1")) == (0, ["OK"])


def test_doctor_memory_that_another_l1_holds_is_a_warning(
    check: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: CheckOptions
) -> None:
    monkeypatch.setattr(host_memory, "available", lambda *_: host_memory.HostMemory(MIB, "a test"))
    profile, pid = L1.format(capacity="8MiB"), os.getpid()
    with (
        closing(DramTier(block_nbytes=4096, capacity=Size(8 * MIB))),
        monkeypatch.context() as patch,
    ):
        patch.setattr(os, "getpid", lambda: -1)  # so that the slab is another process's
        code, found = check(profile)
    assert (code, statuses(found, "l1")) == (0, ["WARN"])
    assert re.search(rf"is open here \(process .*\b{pid}\b", found["l1"][0]["what"])
    without_processes = replace(options, proc=tmp_path)
    code, found = check(profile, options=without_processes)
    assert (code, statuses(found, "l1")) == (1, ["FAIL"])


def test_doctor_invalid_profile_has_a_failure_for_each_problem(check: Doctor) -> None:
    code, found = check('[[tier]]\nname = "l1"\nkind = "dram"\ncapcity = "1GiB"\n')
    assert code == 1
    assert statuses(found, "profile") == ["FAIL", "FAIL"]
    assert 'did you mean "capacity"?' in found["profile"][0]["what"]
    assert statuses(found, "memory") == ["OK"]  # the machine is checked nevertheless


def test_doctor_invalid_block_bytes_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--block-bytes", "much"]) == 2
    assert "--block-bytes is 'much'" in capsys.readouterr().err


class TestDisk:
    def test_open_tier_is_reported_and_unchanged(self, check: Doctor, tmp_path: Path) -> None:
        path, key = tmp_path / "kv", b"k" * 64
        with closing(DiskTier(block_nbytes=4096, path=str(path), capacity=MIB)) as tier:  # type: ignore[arg-type]
            tier.store([key], [memoryview(b"b" * 4096)])
            before = {file.name: file.read_bytes() for file in path.iterdir()}
            code, found = check(disk_profile(path, capacity="1MiB"))
            assert {file.name: file.read_bytes() for file in path.iterdir()} == before
            buffer = bytearray(4096)
            assert tier.load([key], [memoryview(buffer)]) == [4096]
        assert code == 0
        assert statuses(found, "disk") == ["OK"] * 3
        assert f"open in process {os.getpid()}" in found["disk"][0]["what"]

    def test_foreign_file_in_the_directory_is_named(self, check: Doctor, tmp_path: Path) -> None:
        (tmp_path / "kv").mkdir(mode=0o700)
        (tmp_path / "kv" / "blocks").write_text("precious")
        code, found = check(disk_profile(tmp_path / "kv", capacity="1MiB"))
        assert (code, statuses(found, "disk")) == (1, ["FAIL"])
        assert "'blocks' was not written by kvcache" in found["disk"][0]["what"]
        assert "KVCACHE__DISK__PATH" in found["disk"][0]["fix"]
        assert [file.name for file in (tmp_path / "kv").iterdir()] == ["blocks"]

    def test_capacity_above_free_space_is_a_failure(self, check: Doctor, tmp_path: Path) -> None:
        code, found = check(disk_profile(tmp_path / "kv", capacity=f"{10**6}TiB"))
        assert (code, statuses(found, "disk")[0]) == (1, "FAIL")
        assert "a smaller KVCACHE__DISK__CAPACITY" in found["disk"][0]["fix"]

    def test_unreadable_path_is_a_failure(
        self, check: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        exists = Path.exists

        def refuse(path: Path) -> bool:
            if path.name == "kv":
                raise PermissionError(13, "Permission denied")
            return exists(path)

        monkeypatch.setattr(Path, "exists", refuse)
        code, found = check(disk_profile(tmp_path / "kv"))
        assert (code, statuses(found, "disk")) == (1, ["FAIL"])
        assert "Permission denied" in found["disk"][0]["what"]

    def test_file_system_without_direct_io_is_a_warning(
        self, check: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "O_DIRECT", 1 << 30)  # a flag that does not exist
        opened = os.open

        def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if flags & 1 << 30:
                raise OSError(22, "no direct I/O here")
            return opened(path, flags, *more, **named)

        monkeypatch.setattr(os, "open", refuse)
        code, found = check(disk_profile(tmp_path))
        assert (code, statuses(found, "disk")) == (0, ["OK", "WARN"])
        assert "no O_DIRECT" in found["disk"][1]["what"]
        assert found["disk"][1]["measured"]["read_nbytes_per_s"] == 8 * MIB

    def test_file_system_without_unnamed_files_keeps_no_file(
        self, check: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on NFS: the check deletes its file's name at once."""
        opened = os.open

        def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(95, "no such files here")
            return opened(path, flags, *more, **named)

        monkeypatch.setattr(os, "open", refuse)
        code, found = check(disk_profile(tmp_path))
        assert (code, statuses(found, "disk")) == (0, ["OK", "OK"])
        assert [file.name for file in tmp_path.iterdir()] == ["checked.toml"]


class TestLowerTier:
    @pytest.fixture(autouse=True)
    def _reset_tiers(self) -> Iterator[None]:
        doctor_tiers.DictTier.stored_keys.clear()
        doctor_tiers.FixedSizeTier.opened_with.clear()
        doctor_tiers.DictTier.blocks.clear()
        yield
        doctor_tiers.HangingTier.released.set()

    def test_working_tier_is_measured_and_unchanged(self, check: Doctor) -> None:
        doctor_tiers.DictTier.blocks.update({b"an engine's": b"block"})
        closed = doctor_tiers.DictTier.closed
        code, found = check(lower_tier_profile("DictTier"))
        assert (code, statuses(found, "below")) == (0, ["OK"])
        assert found["below"][0]["measured"] == {
            "latency_s": 0.5, "write_nbytes_per_s": 2 * MIB, "read_nbytes_per_s": 2 * MIB,
        }  # fmt: skip
        assert doctor_tiers.DictTier.blocks == {b"an engine's": b"block"}
        assert doctor_tiers.DictTier.closed == closed + 1
        check(lower_tier_profile("DictTier"))
        first, second = doctor_tiers.DictTier.stored_keys
        assert first[:DIGEST_NBYTES] != second[:DIGEST_NBYTES]  # a new namespace for each check

    def test_tier_for_one_block_size_needs_block_bytes(self, check: Doctor) -> None:
        code, found = check(lower_tier_profile("FixedSizeTier"))
        assert (code, statuses(found, "below")) == (0, ["WARN"])
        assert doctor_tiers.FixedSizeTier.opened_with == []
        code, found = check(lower_tier_profile("FixedSizeTier"), "--block-bytes", "256KiB")
        assert statuses(found, "below") == ["OK"]
        assert doctor_tiers.FixedSizeTier.opened_with == [frame_nbytes(256 << 10)]

    @pytest.mark.parametrize(
        ("class_name", "status", "what"),
        [
            ("UnopenableTier", "FAIL", "cannot be used: ConnectionError: connection refused"),
            ("UnreadableTier", "FAIL", "cannot be used: OSError: the line is cut"),
            ("CorruptingTier", "FAIL", "did not return the same bytes"),
            ("FullTier", "WARN", "declined a block"),
            ("UndeletingTier", "WARN", "keeps removed blocks"),
        ],
    )
    def test_faulty_tier_is_reported(
        self, class_name: str, status: str, what: str, check: Doctor
    ) -> None:
        code, found = check(lower_tier_profile(class_name))
        assert (code, statuses(found, "below")) == (int(status == "FAIL"), [status])
        assert what in found["below"][0]["what"]
        assert 'checked.toml, line 5: tier "below"' in found["below"][0]["fix"]
        assert not doctor_tiers.DictTier.blocks

    def test_hanging_tier_fails_after_the_timeout(
        self, check: Doctor, options: CheckOptions
    ) -> None:
        doctor_tiers.HangingTier.released.clear()
        code, found = check(
            lower_tier_profile("HangingTier"), options=replace(options, tier_timeout_s=0.05)
        )
        assert (code, statuses(found, "below")) == (1, ["FAIL"])
        assert "no answer in" in found["below"][0]["what"]

    def test_secret_in_a_profile_is_not_printed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: CheckOptions
    ) -> None:
        file = tmp_path / "secret.toml"
        file.write_text(lower_tier_profile("UnopenableTier", 'password = "hunter2"\n'))
        command = ["doctor", "--profile", str(file)]
        assert doctor.run(cli.parser().parse_args(command), options) == 1
        assert "hunter2" not in capsys.readouterr().out
