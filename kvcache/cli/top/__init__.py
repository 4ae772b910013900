"""What the tiers of a running engine do: room, hits, bandwidth, pins, queues.

Reads the Prometheus page of a vLLM with the connector (URL, by default the one that `vllm serve`
has on this machine) every few seconds; rates are of the time between two readings. With --once, and
where there is no reading before, hits and amounts are since the engine started.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from kvcache.cli.table import RED, Painter, painter, render
from kvcache.cli.top.scrape import COUNTED, ScrapedTier, fetch, tiers_of
from kvcache.secrets import redact
from kvcache.sizes import format_size

_TIMEOUT_S = 5.0  # for a whole page
_LONGEST_S = 86400
_REDRAW = "\x1b[H\x1b[J"  # to the top left, and clear from there


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `kvcache top` takes."""
    add = parser.add_argument
    add("url", nargs="?", metavar="URL", default="http://localhost:8000/metrics")
    add("--interval", type=float, default=2.0, metavar="S", help="seconds between readings (2)")
    add("--once", action="store_true", help="read once, and end")
    add("--json", action="store_true", help="print one JSON object per reading")


def run(args: argparse.Namespace) -> int:
    """Show until Ctrl-C, which is the ordinary end; 1 if the first reading fails."""
    url = str(args.url)
    if not url.startswith(("http://", "https://")) or not 0 < args.interval <= _LONGEST_S:
        print(
            f"top: URL is {redact(url)}, --interval is {args.interval}; they take http://... or "
            f"https://..., and seconds above 0, to {_LONGEST_S}",
            file=sys.stderr,
        )
        return 2
    if url.count("/") < 3:
        url += "/metrics"
    view = _View(url, as_json=args.json)
    try:
        if not view.read() or args.once:
            return int(view.failed)
        while True:
            _sleep(args.interval)
            view.read()
    except KeyboardInterrupt:
        return 0


_sleep = time.sleep


class _View:
    """Readings of one page, shown as they come."""

    def __init__(self, url: str, *, as_json: bool) -> None:
        self._url = url
        self._shown = redact(url)
        self._as_json = as_json
        self._paint = painter(sys.stdout)
        self._before: dict[str, ScrapedTier] = {}
        self._when = 0.0
        self.failed = False

    def read(self) -> bool:
        """Read and show; say whether there was something to show."""
        now = time.monotonic()
        try:
            tiers = tiers_of(fetch(self._url, _TIMEOUT_S))
            why = (
                ""
                if tiers
                else (
                    "no numbers of kvcache there; the connector puts them on vLLM's page with the "
                    "engine's first steps, unless it runs with --disable-log-stats"
                )
            )
        except OSError as error:
            tiers, why = [], redact(str(error))
        self.failed = bool(why)
        if why:
            print(f"top: {self._shown}: {why}", file=sys.stderr)
        else:
            self._show(tiers, now - self._when if self._before else None)
        self._before, self._when = {tier.name: tier for tier in tiers}, now
        return not why

    def _show(self, tiers: list[ScrapedTier], seconds: float | None) -> None:
        if self._as_json:
            print(json.dumps(self._figures(tiers, seconds)), flush=True)
            return
        if self._paint("", RED):  # a terminal
            print(end=_REDRAW)
        lately = [self._lately(tier) for tier in tiers]
        lines = [table(lately, seconds, self._paint)]
        lines += [
            self._paint(f"{tier.name} is not asked for a while: calls to it failed", RED)
            for tier in tiers
            if tier.numbers.get("breaker_open")
        ]
        what = "since the engine started" if seconds is None else f"in the last {seconds:.1f} s"
        print("\n".join([*lines, f"{self._shown}, {what}\n"]), flush=True)

    def _lately(self, tier: ScrapedTier) -> ScrapedTier:
        return tier.since(self._before[tier.name]) if tier.name in self._before else tier

    def _figures(self, tiers: list[ScrapedTier], seconds: float | None) -> dict[str, Any]:
        """Counts are since the engine started; rates only where there was a reading before."""
        shown = []
        for tier in tiers:
            lately = self._lately(tier)
            figures: dict[str, Any] = {"tier": tier.name, "type": tier.kind, **tier.numbers}
            figures["hit_rate"] = lately.hit_rate
            if seconds is not None:
                figures |= {
                    f"{name}_per_s": lately.numbers[name] / seconds
                    for name in sorted(COUNTED & lately.numbers.keys())
                }
            shown.append(figures)
        return {"url": self._shown, "seconds": seconds, "tiers": shown}


def table(tiers: list[ScrapedTier], seconds: float | None, paint: Painter) -> str:
    """A row for each tier. With `seconds`, what was counted in them is shown per second."""
    per = "" if seconds is None else "/s"
    groups = [
        ("", ["tier"]),
        ("room", ["used", "of", "full"]),
        ("traffic", ["hits", f"read{per}", f"written{per}", f"evicted{per}"]),
        ("now", ["pinned", "queued"]),
        ("wrong", ["dropped", "rejected", "errors"]),
    ]
    rows = []
    for tier in tiers:
        of = tier.numbers.get
        used, limit = of("used_nbytes"), of("limit_nbytes")
        rows.append(
            [
                tier.name,
                _size(used),
                _size(limit),
                _share(used / limit if used is not None and limit else None),
                _share(tier.hit_rate),
                _size(of("read_nbytes"), seconds),
                _size(of("written_nbytes"), seconds),
                _count(of("evicted_blocks"), seconds),
                _count(of("pinned_slots")),
                _size(of("queued_nbytes")),
                _count(of("dropped_blocks")),
                _count(of("rejected_blocks")),
                _count(of("errors")),
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
