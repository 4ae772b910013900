"""Read the metrics of tiers from the Prometheus page of a running engine.

Invariants: the numbers of several engines on one page (data parallelism) are added up by tier. A
metric that the page lacks is absent, not 0.
"""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, Request, build_opener

from kvcache.inputs import WAIT_S, BoundedSocket, call_within
from kvcache.secrets import redact

PREFIX = "vllm:kvcache_tier_"
NBYTES = 16 << 20
"""The most bytes that are read of a page."""
_LARGEST = 2.0**63

# By the name in `--json`: the metric's name after the prefix, and the labels that it must have.
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
COUNTERS = frozenset(name for name, (metric, _) in NUMBERS.items() if metric.endswith("_total"))
"""Names of the numbers that only grow while an engine runs; the others are gauges."""

_LINE = re.compile(rf"{PREFIX}(\w+)\{{(.*)\}} (\S+)(?: \d+)?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(slots=True)
class ScrapedTier:
    """The numbers of one tier, by their names in ``NUMBERS``; unknown ones are absent."""

    name: str
    kind: str
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float | None:
        """The share of lookups that were hits; None without lookups."""
        hits = self.numbers.get("hit_blocks", 0)
        lookups = hits + self.numbers.get("missed_blocks", 0)
        return hits / lookups if lookups else None

    def since(self, previous: ScrapedTier) -> ScrapedTier:
        """Return the tier with the growth of its counters since ``previous``.

        A counter that shrank belongs to a restarted engine, and counts from 0.
        """
        numbers = dict(self.numbers)
        for name in COUNTERS & numbers.keys():
            growth = numbers[name] - previous.numbers.get(name, 0)
            numbers[name] = growth if growth >= 0 else numbers[name]
        return ScrapedTier(self.name, self.kind, numbers)


def tiers_of(page: str) -> list[ScrapedTier]:
    """Return the tiers of a page, L1 first: only L1 has slots to pin."""
    found: dict[str, ScrapedTier] = {}
    for line in page.splitlines():
        if not (match := _LINE.fullmatch(line)):
            continue
        metric, labels = match[1], dict(_LABEL.findall(match[2]))
        number = _parse_number(match[3])
        if number is None:
            continue
        name, kind = (redact(labels.get(label, "")) for label in ("tier", "type"))
        tier = found.setdefault(name, ScrapedTier(name, kind))
        for key, (its_metric, its_labels) in NUMBERS.items():
            if its_metric == metric and its_labels.items() <= labels.items():
                tier.numbers[key] = tier.numbers.get(key, 0) + number
    known = [tier for tier in found.values() if tier.numbers]
    return sorted(known, key=lambda tier: "pinned_slots" not in tier.numbers)


def _parse_number(text: str) -> float | None:
    """Parse a number of the page; return None for one that no engine writes."""
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number) or abs(number) > _LARGEST:
        return None
    return int(number) if number.is_integer() else number


def _limit_answer(connection: HTTPConnection) -> None:
    """Limit the seconds and bytes of the server's answer."""
    connection.sock = BoundedSocket(
        connection.sock, seconds=connection.timeout or WAIT_S, nbytes=NBYTES
    )


class _LimitedConnection(HTTPConnection):
    """A connection that limits the server's answer."""

    def connect(self) -> None:
        super().connect()
        _limit_answer(self)


class _LimitedTlsConnection(HTTPSConnection):
    """A TLS connection that limits the server's answer."""

    def connect(self) -> None:
        super().connect()
        _limit_answer(self)


class _HttpHandler(HTTPHandler):
    """Opens http URLs with a limited connection."""

    def http_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_LimitedConnection, req)


class _HttpsHandler(HTTPSHandler):
    """Opens https URLs with a limited connection."""

    def https_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_LimitedTlsConnection, req)


def fetch(url: str, timeout_s: float) -> str:
    """Return the page at ``url``, read within ``timeout_s`` seconds.

    A user and password in the URL are sent as HTTP basic authentication.

    Raises:
        OSError: the page cannot be read. The message contains neither user nor password.
    """

    def read() -> str:
        address, headers = _split_login(url)
        opener = build_opener(_HttpHandler(), _HttpsHandler())
        try:
            with opener.open(Request(address, headers=headers), timeout=timeout_s) as response:
                page: bytes = response.read()
                return page.decode("utf-8", "replace")
        except HTTPError as error:  # the error is also the open response
            error.close()
            raise

    try:
        # The timeout of a connection does not cover name resolution and the TLS handshake.
        return call_within(timeout_s, read)
    except (HTTPException, ValueError) as error:  # a bad URL, or no HTTP server
        raise OSError(f"{type(error).__name__}: {error}") from error


def _split_login(url: str) -> tuple[str, dict[str, str]]:
    """Return the URL without user and password, and the header that contains them."""
    parts = urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    token = b64encode(unquote(login).encode()).decode()
    return parts._replace(netloc=host).geturl(), {"Authorization": f"Basic {token}"}
