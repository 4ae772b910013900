"""The numbers of a running engine's tiers, from the Prometheus page that it serves.

Always true: numbers of several engines on one page (data parallelism) are added up by tier, and
what the page does not say is not there, rather than 0.
"""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.error import HTTPError
from urllib.parse import unquote
from urllib.request import HTTPHandler, HTTPSHandler, Request, build_opener

from kvcache.inputs import WAIT_S, BoundedSocket, call_within
from kvcache.secrets import redact

PREFIX = "vllm:kvcache_tier_"
NBYTES = 16 << 20
"""Bytes of a page, at most."""
_LARGEST = 2.0**63

# By our name: where it is on the page, the metric's name after the prefix and the labels it has.
NUMBERS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "used_nbytes": ("usage_bytes", {}),
    "limit_nbytes": ("limit_bytes", {}),
    "pinned_slots": ("pinned", {}),
    "queued_nbytes": ("queue_usage_bytes", {}),
    "breaker_open": ("breaker_open", {}),
    "hit_blocks": ("lookups_total", {"result": "hit"}),
    "missed_blocks": ("lookups_total", {"result": "miss"}),
    "read_nbytes": ("io_bytes_total", {"direction": "read"}),
    "written_nbytes": ("io_bytes_total", {"direction": "write"}),
    "evicted_blocks": ("evictions_total", {}),
    "dropped_blocks": ("stores_total", {"result": "dropped"}),
    "rejected_blocks": ("rejections_total", {}),
    "errors": ("errors_total", {}),
}
COUNTED = frozenset(name for name, (metric, _) in NUMBERS.items() if metric.endswith("_total"))
"""Those that only grow while an engine runs; the others are as of now."""

_LINE = re.compile(rf"{PREFIX}(\w+)\{{(.*)\}} (\S+)(?: \d+)?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(slots=True)
class ScrapedTier:
    """A tier's numbers, those of `NUMBERS` that are known."""

    name: str
    kind: str
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float | None:
        """Of the blocks that were asked for, the share that was there; None if none was asked."""
        hits = self.numbers.get("hit_blocks", 0)
        asked = hits + self.numbers.get("missed_blocks", 0)
        return hits / asked if asked else None

    def since(self, before: ScrapedTier) -> ScrapedTier:
        """The same, with what was counted since `before`. Of an engine that began anew, all."""
        numbers = dict(self.numbers)
        for name in COUNTED & numbers.keys():
            more = numbers[name] - before.numbers.get(name, 0)
            numbers[name] = more if more >= 0 else numbers[name]
        return ScrapedTier(self.name, self.kind, numbers)


def tiers_of(page: str) -> list[ScrapedTier]:
    """The tiers that a page has numbers of, L1 first: the one that has slots to pin."""
    found: dict[str, ScrapedTier] = {}
    for line in page.splitlines():
        if not (match := _LINE.fullmatch(line)):
            continue
        metric, labels, number = match[1], dict(_LABEL.findall(match[2])), _number(match[3])
        if number is None:
            continue
        name, kind = (redact(labels.get(label, "")) for label in ("tier", "type"))
        tier = found.setdefault(name, ScrapedTier(name, kind))
        for field_, (its, wanted) in NUMBERS.items():
            if its == metric and wanted.items() <= labels.items():
                tier.numbers[field_] = tier.numbers.get(field_, 0) + number
    known = [tier for tier in found.values() if tier.numbers]
    return sorted(known, key=lambda tier: "pinned_slots" not in tier.numbers)


def _number(text: str) -> float | None:
    """A number of the page; None if it is none that an engine writes."""
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number) or abs(number) > _LARGEST:
        return None
    return int(number) if number.is_integer() else number


def _bounded(connection: HTTPConnection) -> None:
    connection.sock = BoundedSocket(
        connection.sock, seconds=connection.timeout or WAIT_S, nbytes=NBYTES
    )


class _Connection(HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _bounded(self)


class _SecureConnection(HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        _bounded(self)


class _Http(HTTPHandler):
    def http_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_Connection, req)


class _Https(HTTPSHandler):
    def https_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_SecureConnection, req)


def fetch(url: str, timeout: float) -> str:
    """The page at `url`, read within `timeout` seconds.

    User and password in it are sent as HTTP's basic authentication. Raises OSError that says why
    the page cannot be had, and repeats neither.
    """
    address, headers = _without_login(url)
    opener = build_opener(_Http(), _Https())

    def read() -> str:
        try:
            with opener.open(Request(address, headers=headers), timeout=timeout) as answer:
                page: bytes = answer.read()
                return page.decode("utf-8", "replace")
        except HTTPError as error:  # it is the answer too, and open
            error.close()
            raise

    try:
        return call_within(timeout, read)  # finding the host, and TLS, have no limit of their own
    except (HTTPException, ValueError) as error:  # it answers, and not as a web server does
        raise OSError(f"{type(error).__name__}: {error}") from error


def _without_login(url: str) -> tuple[str, dict[str, str]]:
    """The URL less user and password, and the header that has them instead."""
    head, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    login, at, host = host.rpartition("@")
    if not at:
        return url, {}
    token = b64encode(unquote(login).encode()).decode()
    return f"{head}{mark}{host}{slash}{path}", {"Authorization": f"Basic {token}"}
