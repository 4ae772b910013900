"""What replays found: as JSON, as a table, and as the curves of a plot.

Ratios are of all blocks that were asked for; ratios of tokens are of all prompt tokens, those in a
last block that is not full included, which cannot be found where such blocks are not kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvcache.cli.amounts import BlockSize
from kvcache.cli.replay.plot import OPTIMUM, Curves
from kvcache.cli.table import Painter, render
from kvcache.replay.belady import Optimum
from kvcache.replay.simulate import Outcome, TierOutcome
from kvcache.replay.trace import Trace


class Replayed:
    """Results, in the order of capacities, each capacity's optimum first."""

    def __init__(self, trace: Trace, size: BlockSize, results: Sequence[Outcome | Optimum]) -> None:
        self._trace = trace
        self._size = size
        self._results: list[tuple[Optimum, list[Outcome]]] = []
        for result in results:
            if isinstance(result, Optimum):
                self._results.append((result, []))
            else:
                self._results[-1][1].append(result)

    def _of_blocks(self, hits: int) -> float:
        return hits / max(1, len(self._trace.blocks))

    def _of_tokens(self, hits: int) -> float:
        return hits / max(1, sum(self._trace.tokens))

    def _each(self) -> Iterator[tuple[Optimum, Outcome]]:
        for best, outcomes in self._results:
            for outcome in outcomes:
                yield best, outcome

    def figures(self) -> Iterator[dict[str, Any]]:
        """What `kvcache replay --json` prints: an object for each capacity and policy."""
        for best, outcome in self._each():
            yield {
                "policy": outcome.policy,
                "capacity_blocks": outcome.tiers[0].capacity_blocks,
                "requests": outcome.requests,
                "block_accesses": outcome.block_accesses,
                "block_tokens": self._trace.block_tokens,
                "prompt_tokens": outcome.prompt_tokens,
                "hit_ratio": self._of_blocks(outcome.hit_blocks),
                "token_hit_ratio": self._of_tokens(outcome.hit_tokens),
                "belady_hit_ratio": self._of_blocks(best.hit_blocks),
                "belady_token_hit_ratio": self._of_tokens(best.hit_tokens),
                "us_per_block": outcome.us_per_block,
                "tiers": [self._tier(tier) for tier in outcome.tiers],
            }

    def _tier(self, tier: TierOutcome) -> dict[str, Any]:
        found: dict[str, Any] = {name: getattr(tier, name) for name in TierOutcome.__slots__}
        found["hit_ratio"] = self._of_blocks(tier.hit_blocks)
        if (nbytes := self._size.nbytes) is not None:
            found["read_bytes"] = tier.read_blocks * nbytes
            found["written_bytes"] = tier.written_blocks * nbytes
        return found

    def text(self, name: str, *, partial: bool, paint: Painter) -> str:
        """The same for people."""
        trace, size = self._trace, self._size
        span_s = trace.times_s[-1] if len(trace) else 0.0
        span = f"{span_s / 60:,.0f} minutes" if span_s >= 120 else f"{span_s:,.3g} seconds"
        kind = "blocks" if partial else "full blocks"
        head = (
            f"{name}: {len(trace):,} requests in {span}; "
            f"{len(trace.blocks):,} {kind} of {trace.block_tokens} tokens, "
            f"{trace.distinct:,} of them distinct"
        )
        tiers = max(len(outcome.tiers) for _, outcome in self._each())
        hits = ["hits"] if tiers > 1 else []  # of one tier they are those of all
        groups: list[tuple[str, list[str]]] = [
            ("", ["capacity", "policy"]),
            ("hit ratio", ["blocks", "tokens", "optimum"]),
            *((f"L{n}", [*hits, "read", "written"]) for n in range(1, tiers + 1)),
            ("", ["µs/block"]),
        ]
        rows = [
            [
                " + ".join(size.shown(tier.capacity_blocks) for tier in outcome.tiers),
                outcome.policy,
                f"{self._of_blocks(outcome.hit_blocks):.2%}",
                f"{self._of_tokens(outcome.hit_tokens):.2%}",
                f"{self._of_blocks(best.hit_blocks):.2%}",
                *(
                    cell
                    for tier in outcome.tiers
                    for cell in (
                        *(f"{self._of_blocks(tier.hit_blocks):.2%}" for _ in hits),
                        size.shown(tier.read_blocks),
                        size.shown(tier.written_blocks),
                    )
                ),
                f"{outcome.us_per_block:.2f}",
            ]
            for best, outcome in self._each()
        ]
        unit = "blocks" if size.nbytes is None else "bytes"
        foot = (
            "blocks, optimum, hits: of the blocks asked for; tokens: of all prompt tokens; "
            f"read, written: in {unit}"
        )
        table = render(groups, rows, paint=paint, strong="hit ratio")
        return f"{head}\n\n{table}\n{foot}"

    def curves(self, title: str, marked: int) -> Curves:
        """Hit ratios by capacity, where every result is of one tier."""
        series: dict[str, list[float]] = {OPTIMUM: []}
        labels = []
        for best, outcomes in self._results:
            labels.append(self._size.shown(best.capacity_blocks))
            series[OPTIMUM].append(self._of_blocks(best.hit_blocks))
            for outcome in outcomes:
                found = series.setdefault(outcome.policy, [])
                found.append(self._of_blocks(outcome.hit_blocks))
        unit = f", in blocks of {self._trace.block_tokens} tokens"
        axis = "DRAM" + (unit if self._size.nbytes is None else "")
        return Curves(title, axis, labels, series, marked)
