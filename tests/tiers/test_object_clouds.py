"""ObjectTier with the protocols of Google Cloud Storage and Azure, on a scripted store."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

pytest.importorskip("obstore")

from kvcache.testing import TierTests, keys_of
from kvcache.tiers.object import ObjectTier
from kvcache.tiers.object.names import block_name
from tests.support.scripted_object_store import (
    BUCKET,
    ScriptedObjectStore,
    hang_up,
    only,
    rejecting,
)

SECRET = base64.b64encode(b"a key of an Azure account, 32 by").decode()
SIGNATURE = "sv=2024-11-04&sp=rwd&sig=c2VjcmV0LXNpZ25hdHVyZQ%3D%3D"
TOKEN = "a-bearer-token-0123"
GOOGLE, AZURE, AZURE_SAS = "google", "azure", "azure-sas"
OPTIONS: dict[str, dict[str, str]] = {
    GOOGLE: {"url": f"gs://{BUCKET}/kv"},
    AZURE: {"url": f"az://{BUCKET}/kv", "account": "acct", "account_key_env": "KV_ACCOUNT_KEY"},
    AZURE_SAS: {"url": f"az://{BUCKET}/kv", "account": "acct", "sas_token_env": "KV_SAS"},
}


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KV_ACCOUNT_KEY", SECRET)
    monkeypatch.setenv("KV_SAS", SIGNATURE)
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", TOKEN)


@pytest.fixture
def store() -> Iterator[ScriptedObjectStore]:
    with ScriptedObjectStore() as store:
        yield store


@pytest.fixture(params=OPTIONS)
def cloud(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def opened(store: ScriptedObjectStore, cloud: str, **options: Any) -> closing[ObjectTier]:
    given = OPTIONS[cloud] | {"endpoint": store.endpoint} | {"timeout_s": 30} | options
    return closing(ObjectTier(**given))


@pytest.fixture
def tier(store: ScriptedObjectStore, cloud: str) -> Iterator[ObjectTier]:
    with opened(store, cloud) as tier:
        yield tier


class TestObjectTierOnOtherClouds(TierTests):
    pass


def test_requests_have_the_credentials_of_the_cloud(
    store: ScriptedObjectStore, cloud: str, tier: ObjectTier
) -> None:
    key = keys_of("credentials", 1)[0]
    assert tier.store([key], [memoryview(b"a block")]) == [True]
    assert [*store.objects] == [f"kv/{block_name(key)}"]
    authorization = store.headers[-1].get("authorization", "")
    if cloud == AZURE_SAS:
        assert "sig=c2VjcmV0LXNpZ25hdHVyZQ%3D%3D" in store.paths[-1]
        assert not authorization
    else:
        scheme = f"Bearer {TOKEN}" if cloud == GOOGLE else "SharedKey acct:"
        assert authorization.startswith(scheme)


def test_missing_container_or_bucket_stops_the_start(
    store: ScriptedObjectStore, cloud: str
) -> None:
    store.fault = rejecting(404, "NoSuchBucket" if cloud == GOOGLE else "ContainerNotFound")
    with pytest.raises(ValueError, match=r"rejects the tier: 404 (NoSuch|ContainerNot)"):
        opened(store, cloud)


def test_denied_writes_are_declines_and_no_message_has_a_secret(
    store: ScriptedObjectStore, cloud: str, tier: ObjectTier, caplog: pytest.LogCaptureFixture
) -> None:
    keys = keys_of("denied", 2)
    secret = {GOOGLE: TOKEN, AZURE: SECRET, AZURE_SAS: SIGNATURE}[cloud]
    store.fault = only("PUT", rejecting(403, "AuthorizationFailure", f"denied: {secret}"))
    assert tier.store(keys, [memoryview(b"a block")] * 2) == [False] * 2
    store.fault = rejecting(500, "InternalError", f"failed: {secret.replace('&', '&amp;')}")
    with pytest.raises(ConnectionError) as raised:
        tier.load(keys, [memoryview(bytearray(7))] * 2)
    store.fault = hang_up
    with pytest.raises(ConnectionError) as also_raised:
        tier.contains(keys)
    shown = f"{caplog.text} {raised.value} {also_raised.value}"
    assert "403 AuthorizationFailure denied: " in shown
    assert "500 InternalError failed: " in shown
    assert "unreachable" in shown
    for part in (secret, "c2VjcmV0LXNpZ25hdHVyZQ"):
        assert part not in shown
