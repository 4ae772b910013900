"""The numbers of a running engine's tiers, from the Prometheus page that it serves.

Always true: numbers of several engines on one page (data parallelism) are added up by tier, and
what the page does not say is not there, rather than 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

PREFIX = "vllm:kvcache_tier_"

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
class Tier:
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

    def since(self, before: Tier) -> Tier:
        """The same, with what was counted since `before`. Of an engine that began anew, all."""
        numbers = dict(self.numbers)
        for name in COUNTED & numbers.keys():
            more = numbers[name] - before.numbers.get(name, 0)
            numbers[name] = more if more >= 0 else numbers[name]
        return Tier(self.name, self.kind, numbers)


def tiers_of(page: str) -> list[Tier]:
    """The tiers that a page has numbers of, L1 first: the one that has slots to pin."""
    found: dict[str, Tier] = {}
    for line in page.splitlines():
        if not (match := _LINE.fullmatch(line)):
            continue
        metric, labels, number = match[1], dict(_LABEL.findall(match[2])), float(match[3])
        number = int(number) if number.is_integer() else number
        tier = found.setdefault(
            labels.get("tier", ""), Tier(labels.get("tier", ""), labels.get("type", ""))
        )
        for name, (its, wanted) in NUMBERS.items():
            if its == metric and wanted.items() <= labels.items():
                tier.numbers[name] = tier.numbers.get(name, 0) + number
    known = [tier for tier in found.values() if tier.numbers]
    return sorted(known, key=lambda tier: "pinned_slots" not in tier.numbers)


def fetch(url: str, timeout: float) -> str:
    """The page at `url`. Raises OSError that says why it cannot be had."""
    from http.client import HTTPException
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=timeout) as answer:
            text: str = answer.read().decode("utf-8", "replace")
            return text
    except HTTPException as error:  # it answers, and not as a web server does
        raise OSError(f"{type(error).__name__}: {error}") from error
