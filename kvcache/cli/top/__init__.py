"""Show what the tiers of a running engine do: usage, hits, bandwidth, pins and queues.

Reads the metrics page of a vLLM with the connector (URL; default: a `vllm serve` on this machine)
every few seconds. Rates are for the time between two readings. With --once, and in the first
reading, figures count from the engine's start.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from kvcache.cli.table import RED, Painter, painter, render
from kvcache.cli.top.scrape import COUNTERS, ScrapedTier, fetch, tiers_of
from kvcache.secrets import redact
from kvcache.sizes import format_size

_LONGEST_INTERVAL_S = 86400
REDRAW = "\x1b[H\x1b[J"
"""Moves the cursor to the top left of a terminal, and clears the screen."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kvcache top`."""
    add = parser.add_argument
    add("url", nargs="?", metavar="URL", default="http://localhost:8000/metrics")
    add("--interval", type=float, default=2.0, metavar="S", help="seconds between readings (2)")
    add("--once", action="store_true", help="read once, then exit")
    add("--json", action="store_true", help="print one JSON object per reading")


def run(
    args: argparse.Namespace,
    *,
    timeout_s: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Show readings until Ctrl-C, which returns 0; return 1 if the first reading fails.

    ``timeout_s`` is for reading one page.
    """
    url = str(args.url)
    is_http = url.startswith(("http://", "https://"))
    if not is_http or not 0 < args.interval <= _LONGEST_INTERVAL_S:
        print(
            f"top: URL is {redact(url)}, --interval is {args.interval}; URL begins with http:// or "
            f"https://, and the interval is above 0 and at most {_LONGEST_INTERVAL_S} s",
            file=sys.stderr,
        )
        return 2
    if url.count("/") < 3:
        url += "/metrics"
    monitor = _Monitor(url, as_json=args.json, timeout_s=timeout_s, clock=clock)
    try:
        if not monitor.read() or args.once:
            return int(monitor.failed)
        while True:
            sleep(args.interval)
            monitor.read()
    except KeyboardInterrupt:
        return 0


class _Monitor:
    """Reads one page again and again, and prints each reading."""

    def __init__(
        self, url: str, *, as_json: bool, timeout_s: float, clock: Callable[[], float]
    ) -> None:
        self._url = url
        self._safe_url = redact(url)
        self._as_json = as_json
        self._timeout_s = timeout_s
        self._clock = clock
        self._paint = painter(sys.stdout)
        self._previous: dict[str, ScrapedTier] = {}
        self._previous_s = 0.0
        self.failed = False

    def read(self) -> bool:
        """Read the page and print it; return whether it had metrics of tiers."""
        now_s = self._clock()
        tiers: list[ScrapedTier] = []
        problem = (
            "the page has no metrics of kvcache; the connector adds them with the engine's first "
            "steps, unless the engine runs with --disable-log-stats"
        )
        try:
            tiers = tiers_of(fetch(self._url, self._timeout_s))
        except OSError as error:
            problem = redact(str(error))
        self.failed = not tiers
        if self.failed:
            print(f"top: {self._safe_url}: {problem}", file=sys.stderr)
        else:
            self._print(tiers, now_s - self._previous_s if self._previous else None)
        self._previous, self._previous_s = {tier.name: tier for tier in tiers}, now_s
        return not self.failed

    def _print(self, tiers: list[ScrapedTier], seconds: float | None) -> None:
        if self._as_json:
            print(json.dumps(self._to_json(tiers, seconds)), flush=True)
            return
        if self._paint("", RED):  # a terminal
            print(end=REDRAW)
        recent = [self._since_previous(tier) for tier in tiers]
        lines = [table(recent, seconds, self._paint)]
        lines += [
            self._paint(
                f"{tier.name}: circuit breaker open (calls failed); its blocks count as misses", RED
            )
            for tier in tiers
            if tier.numbers.get("breaker_open")
        ]
        period = "since the engine started" if seconds is None else f"in the last {seconds:.1f} s"
        print("\n".join([*lines, f"{self._safe_url}, {period}\n"]), flush=True)

    def _since_previous(self, tier: ScrapedTier) -> ScrapedTier:
        return tier.since(self._previous[tier.name]) if tier.name in self._previous else tier

    def _to_json(self, tiers: list[ScrapedTier], seconds: float | None) -> dict[str, Any]:
        """Counts are since the engine started; rates are there from the second reading on."""
        objects = []
        for tier in tiers:
            recent = self._since_previous(tier)
            figures: dict[str, Any] = {"tier": tier.name, "type": tier.kind, **tier.numbers}
            figures["hit_rate"] = recent.hit_rate
            if seconds is not None:
                figures |= {
                    f"{name}_per_s": recent.numbers[name] / seconds
                    for name in sorted(COUNTERS & recent.numbers.keys())
                }
            objects.append(figures)
        return {"url": self._safe_url, "seconds": seconds, "tiers": objects}


def table(tiers: list[ScrapedTier], seconds: float | None, paint: Painter) -> str:
    """Return a table with a row for each tier; with ``seconds``, traffic is per second."""
    per = "" if seconds is None else "/s"
    groups = [
        ("", ["tier"]),
        ("room", ["used", "of", "full"]),
        ("traffic", ["hits", f"read{per}", f"written{per}", f"evicted{per}"]),
        ("now", ["pinned", "queued"]),
        ("problems", ["dropped", "rejected", "errors"]),
    ]
    rows = []
    for tier in tiers:
        get = tier.numbers.get
        used, limit = get("used_nbytes"), get("limit_nbytes")
        rows.append(
            [
                tier.name,
                _size(used),
                _size(limit),
                _share(used / limit if used is not None and limit else None),
                _share(tier.hit_rate),
                _size(get("read_nbytes"), seconds),
                _size(get("written_nbytes"), seconds),
                _count(get("evicted_blocks"), seconds),
                _count(get("pinned_slots")),
                _size(get("queued_nbytes")),
                _count(get("dropped_blocks")),
                _count(get("rejected_blocks")),
                _count(get("errors")),
            ]
        )
    return render(groups, rows, paint=paint, strong="room")


def _size(nbytes: float | None, seconds: float | None = None) -> str:
    return "-" if nbytes is None else format_size(int(nbytes / (seconds or 1)))


def _count(number: float | None, seconds: float | None = None) -> str:
    if number is None:
        return "-"
    return f"{number / seconds:,.1f}" if seconds else f"{number:,.0f}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
