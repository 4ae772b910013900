"""ObjectTier: the forms of a URL, options, credentials and TLS; no secret is repeated."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("obstore")

from kvcache.testing import keys_of
from kvcache.tiers.object import ObjectTier
from kvcache.tiers.object.location import open_location, parse_url
from tests.support.certificates import make_certificates
from tests.support.scripted_object_store import ScriptedObjectStore, hang_up, rejecting

SECRET = "correct-horse-battery-77"


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the variables that options name, and no others that obstore reads."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    for name in ("KV_SCRIPTED_ACCESS_KEY", "KV_SCRIPTED_SECRET_KEY", "KV_SECRET"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("KV_EMPTY", "")


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("s3://my-bucket", ("s3", "my-bucket", "")),
        ("s3://my.bucket/", ("s3", "my.bucket", "")),
        ("gs://bucket/team/kv", ("gs", "bucket", "team/kv")),
        ("az://container/a_b.c=d/", ("az", "container", "a_b.c=d")),
        ("file:///var/a%20b/", ("file", "/var/a b", "")),
        ("/var/cache/./kv/../x", ("file", "/var/cache/x", "")),
    ],
)
def test_url_has_scheme_name_and_prefix(url: str, parts: tuple[str, str, str]) -> None:
    assert parse_url(url) == parts


NO_STORE, NO_SCHEME, NO_NAME = "names no object store; ", "url begins with ", "names no bucket or"
NO_PATH, NO_PREFIX, NO_SECRETS = (
    "names no absolute path",
    "a prefix has letters",
    "url contains a u",
)


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        (NO_STORE, ["", "bucket", "relative/folder", "s3:bucket", f"user:{SECRET}@bucket", "/a\0"]),
        (NO_SCHEME, ["http://bucket", "memory:///", "S3://bucket", "://bucket"]),
        (NO_NAME, ["s3://", "s3:///prefix", "s3://bu cket", "s3://-bucket", "gs://b\xe9/a"]),
        (NO_PATH, ["file://host/folder", "file://", "file:///a%00b"]),
        (
            NO_PREFIX,
            [f"s3://b/{each}" for each in ("../x", "a//b", "a/./b", "a b", "a\nb", "\xe9")],
        ),
        (NO_SECRETS, [f"s3://user:{SECRET}@b", f"s3://b?token={SECRET}", f"az://c#{SECRET}"]),
    ],
)
def test_invalid_url_is_an_error_without_secrets(text: str, urls: list[str]) -> None:
    for url in urls:
        with pytest.raises(ValueError, match=text) as raised:
            ObjectTier(url=url)
        assert SECRET not in str(raised.value)
        assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"region": "r", "url": "gs://b"}, "region is for a url that begins with s3://"),
        ({"account": "a", "url": "s3://b"}, "account is for a url that begins with az://"),
        ({"service_account_file": "/x", "url": "s3://b"}, "for a url that begins with gs://"),
        ({"endpoint": "http://h", "url": "/x"}, "begins with s3:// or gs:// or az://"),
        ({"ca_file": "/x", "url": "/x"}, "begins with s3:// or gs:// or az://"),
        ({"sas_token_env": "KV_SECRET", "url": "gs://b"}, "begins with az://"),
        ({"access_key_env": "KV_SECRET"}, "access_key_env and secret_key_env are set together"),
        ({"secret_key_env": "KV_SECRET"}, "access_key_env and secret_key_env are set together"),
        (
            {"access_key_env": "KV_UNSET", "secret_key_env": "KV_SECRET"},
            "access_key_env is 'KV_UNSET', and this environment variable is not set, or empty",
        ),
        (
            {"access_key_env": "KV_SECRET", "secret_key_env": "KV_EMPTY"},
            "secret_key_env is 'KV_EMPTY', and this environment variable is not set, or empty",
        ),
        (
            {"access_key_env": "KV_SECRET", "secret_key_env": SECRET},
            "secret_key_env is a name, and this environment variable is not set, or empty",
        ),
        ({"endpoint": "host:9000"}, "endpoint is 'host:9000', which is no http:// or https:// URL"),
        ({"endpoint": "ftp://host"}, "which is no http:// or https:// URL"),
        ({"endpoint": "https://"}, "which is no http:// or https:// URL"),
        ({"endpoint": "https://host:port"}, "which is no http:// or https:// URL"),
        ({"endpoint": "HTTP://host"}, "which is no http:// or https:// URL"),
        ({"endpoint": "http://host/\n"}, "endpoint contains a line break, or another"),
        ({"endpoint": "http://h\xfc"}, "which is no http:// or https:// URL"),
        ({"region": "eu\n"}, "region contains a line break, or another unprintable character"),
        ({"url": "/tmp/\udcff"}, "which cannot be used: .*surrogates not allowed"),
        ({"endpoint": f"https://u:{SECRET}@host"}, "endpoint is no http:// or https:// URL"),
        ({"endpoint": f"https://host?sig={SECRET}"}, "endpoint is no http:// or https:// URL"),
        ({"ca_file": "/does/not/exist"}, "ca_file is '/does/not/exist', which is not a readable"),
        ({"ca_file": __file__, "endpoint": "http://h"}, "ca_file is for an endpoint that begins"),
        ({"ca_file": __file__}, "its options cannot be used: No certificates found"),
        ({"connections": 0}, "connections is 0; it must be 1 to 1024"),
        ({"connections": 1025}, "connections is 1025; it must be 1 to 1024"),
        ({"timeout_s": 0}, "timeout_s is 0; it takes seconds above 0, to 3600"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"timeout_s": 3601}, "timeout_s is 3601"),
        ({"url": "az://c"}, "its options cannot be used: .*Account must be specified"),
        ({"url": "gs://b", "service_account_file": __file__}, "its options cannot be used: "),
    ],
)
def test_invalid_option_is_an_error_without_secrets(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text) as raised:
        ObjectTier(**({"url": "s3://b"} | options))
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\udcff"])
@pytest.mark.parametrize("option", ["access_key_env", "secret_key_env", "session_token_env"])
def test_secret_with_a_line_break_is_an_error_that_names_the_option(
    monkeypatch: pytest.MonkeyPatch, option: str, end: str
) -> None:
    monkeypatch.setenv("KV_BROKEN", SECRET + end)
    options: dict[str, Any] = {"access_key_env": "KV_SECRET", "secret_key_env": "KV_SECRET"}
    with pytest.raises(ValueError, match=f"{option} contains a line break") as raised:
        ObjectTier(**{"url": "s3://b", **options, option: "KV_BROKEN"})
    assert SECRET not in str(raised.value)


def test_line_break_in_a_variable_of_the_provider_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key\n")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with pytest.raises(ValueError, match=r"options cannot be used: .*line break") as raised:
        ObjectTier(url="s3://b", endpoint="http://127.0.0.1:9")
    assert SECRET not in str(raised.value)


def test_folder_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"which cannot be used: .*Not a directory"):
        ObjectTier(url=str(tmp_path / "file" / "folder"))


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
def test_endpoint_and_credentials_come_from_the_variables_of_the_provider(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-the-provider")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    with ScriptedObjectStore() as store:
        monkeypatch.setenv(variable, store.endpoint)
        with closing(ObjectTier(url="s3://bucket/of/team")) as tier:
            tier.contains(keys_of("a", 1))
        for headers in store.headers:
            assert "Credential=key-of-the-provider/" in headers["authorization"]
            assert "/eu-central-1/" in headers["authorization"]
        assert all(name.startswith("of/team/kvcache/1/") for _, name in store.requests)


def test_invalid_endpoint_of_a_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(ValueError, match=r"^AWS_ENDPOINT_URL is 'nonsense', which is no http://"):
        ObjectTier(url="s3://bucket")


def test_secret_of_the_provider_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-the-provider")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with ScriptedObjectStore() as store:
        store.fault = rejecting(403, "Code", f"the secret is {SECRET}")
        with pytest.raises(ValueError, match="the secret is ") as raised:
            ObjectTier(url="s3://bucket", endpoint=store.endpoint)
    assert SECRET not in str(raised.value)


def test_host_without_credentials_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedObjectStore() as metadata_service, ScriptedObjectStore() as store:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", metadata_service.endpoint)
        metadata_service.fault = rejecting(404)
        text = r"found no credentials \(404 .*\); set access_key_env and secret_key_env, or the pro"
        with pytest.raises(ValueError, match=text):
            ObjectTier(url="s3://bucket", endpoint=store.endpoint)
        assert metadata_service.requests[0][1].endswith("latest/api/token")
        assert not store.requests


def test_service_for_credentials_that_is_down_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with ScriptedObjectStore() as metadata_service, ScriptedObjectStore() as store:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", metadata_service.endpoint)
        for fault in (hang_up, rejecting(503)):
            caplog.clear()
            metadata_service.fault = fault
            with closing(ObjectTier(url="s3://bucket", endpoint=store.endpoint)) as tier:
                assert "unreachable (found no credentials (" in caplog.text
                with pytest.raises(ConnectionError, match="found no credentials"):
                    tier.contains(keys_of("a", 1))


def test_session_token_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KV_TOKEN", "a-session-token")
    with ScriptedObjectStore() as store:
        with closing(ObjectTier(**store.options(session_token_env="KV_TOKEN"))):
            pass
        assert [headers["x-amz-security-token"] for headers in store.headers] == ["a-session-token"]


@pytest.mark.parametrize(
    ("url", "options", "host"),
    [
        ("s3://b", {"region": "eu-west-3"}, "s3.eu-west-3.amazonaws.com"),
        ("s3://b", {}, "s3.us-east-1.amazonaws.com"),
        ("gs://b", {}, "storage.googleapis.com"),
        ("az://c", {"account": "kv"}, "kv.blob.core.windows.net"),
        ("az://c", {"account": "kv", "endpoint": "https://host/x"}, "host"),
    ],
)
def test_location_names_the_host_and_no_secret(
    url: str, options: dict[str, str], host: str
) -> None:
    options |= {"az": {"sas_token_env": "KV_SAS"}}.get(url[:2], {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KV_SAS", f"sv=2024&sig={SECRET}")
        location = open_location(url, options, request_s=1, connections=4)
    assert (location.host, location.port) == (host, 443)
    assert SECRET not in repr(location)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def tls_store(certificates: Path) -> Iterator[ScriptedObjectStore]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    with ScriptedObjectStore(context) as store:
        yield store


def test_https_store_is_used_with_its_authority_alone(
    tls_store: ScriptedObjectStore, certificates: Path
) -> None:
    keys = keys_of("tls", 2)
    trusted = tls_store.options(ca_file=str(certificates / "ca.pem"), timeout_s=30)
    with closing(ObjectTier(**trusted)) as tier:
        assert tier.store(keys, [memoryview(b"a block")] * 2) == [True] * 2
        assert tier.contains(keys) == [True] * 2
    for options in ({"ca_file": str(certificates / "other.pem")}, {}):
        with pytest.raises(ValueError, match="certificate is invalid: UnknownIssuer; ca_file"):
            ObjectTier(**tls_store.options(timeout_s=30, **options))


def test_https_to_a_server_without_tls_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with ScriptedObjectStore() as store:
        options = store.options(timeout_s=30)
        options["endpoint"] = options["endpoint"].replace("http://", "https://")
        ObjectTier(**options).close()
    assert "unreachable (the server does not speak TLS; write http://" in caplog.text


def test_payload_is_signed_over_http_only(
    tls_store: ScriptedObjectStore, certificates: Path
) -> None:
    with ScriptedObjectStore() as plain:
        for store, extra in ((plain, {}), (tls_store, {"ca_file": str(certificates / "ca.pem")})):
            with closing(ObjectTier(**store.options(timeout_s=30, **extra))) as tier:
                tier.store(keys_of("signed", 1), [memoryview(b"a block")])
        digests = [store.headers[-1]["x-amz-content-sha256"] for store in (plain, tls_store)]
    assert len(digests[0]) == 64
    assert digests[1] == "UNSIGNED-PAYLOAD"
