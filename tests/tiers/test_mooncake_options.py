"""MooncakeTier: options that are refused when the engine starts."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("kvcache.tiers.mooncake")

from kvcache.sizes import Size
from kvcache.tiers.mooncake import MooncakeTier
from kvcache.tiers.mooncake.options import metadata_address, parse_address

VALID: dict[str, Any] = {"master": "127.0.0.1:50051"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"master": "cache.example"}, "which is no host with a port"),
        ({"master": ""}, "which is no host with a port"),
        ({"master": "cache.example:0"}, "which is no host with a port"),
        ({"master": "cache.example:65536"}, "which is no host with a port"),
        ({"master": "user:pass-77@cache.example:50051"}, "^master is no host with a port"),
        ({"master": "tcp://cache.example:50051"}, "which is no host with a port"),
        ({"daemon": "127.0.0.1"}, "daemon is '127.0.0.1', which is no host with a port"),
        ({"metadata": "p2p"}, "which has no valid form"),
        ({"metadata": "ftp://cache.example:80"}, "which has no valid form"),
        ({"metadata": "http://cache.example"}, "which has no valid form"),
        ({"metadata": "http://[::1"}, "which has no valid form"),
        ({"metadata": "redis://:pass-77@cache.example:6379"}, "metadata contains a user"),
        ({"hostname": "host:12345"}, "hostname is 'host:12345', which is no name or address"),
        ({"devices": "mlx5_0"}, 'devices is for protocol = "rdma"'),
        ({"daemon": "127.0.0.1:1", "share": Size(1)}, "daemon is set; share"),
        ({"daemon": "127.0.0.1:1", "protocol": "rdma"}, "daemon is set; share"),
        ({"share": Size(1 << 60)}, "share asks for 1048576TiB"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"timeout_s": 3601.0}, "timeout_s is 3601.0"),
    ],
)
def test_invalid_option_raises_value_error(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("(", r"\(")) as caught:
        MooncakeTier(**(VALID | options))
    assert "pass-77" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("cache.example:50051", ("cache.example", 50051)),
        ("10.0.0.7:1", ("10.0.0.7", 1)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_parse_address_returns_host_and_port(text: str, address: tuple[str, int]) -> None:
    assert parse_address("master", text) == address


def test_metadata_address_is_that_of_the_url() -> None:
    assert metadata_address("P2PHANDSHAKE") is None
    assert metadata_address("http://cache.example:8080/metadata") == ("cache.example", 8080)
    assert metadata_address("etcd://[::1]:2379") == ("::1", 2379)
