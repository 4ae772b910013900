"""The results of replays: as JSON, as a table, and as a plot.

A hit ratio is a share of all blocks that were looked up, a token hit ratio one of all prompt
tokens. The latter include tokens of partial last blocks, which are no hits where these blocks are
not stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvcache.cli.amounts import BlockSize
from kvcache.cli.replay.plot import OPTIMUM, HitRatioPlot
from kvcache.cli.table import Painter, render
from kvcache.replay.belady import Optimum
from kvcache.replay.simulate import Outcome, TierOutcome
from kvcache.replay.trace import Trace


class ReplayResults:
    """Results of several replays of one trace.

    Args:
        trace: the trace.
        size: size of a block.
        results: for each capacity, the optimum and then the outcome of each policy.
    """

    def __init__(self, trace: Trace, size: BlockSize, results: Sequence[Outcome | Optimum]) -> None:
        self._trace = trace
        self._size = size
        self._by_capacity: list[tuple[Optimum, list[Outcome]]] = []
        for result in results:
            if isinstance(result, Optimum):
                self._by_capacity.append((result, []))
            else:
                self._by_capacity[-1][1].append(result)

    def _hit_ratio(self, hits: int) -> float:
        return hits / max(1, len(self._trace.blocks))

    def _token_hit_ratio(self, hits: int) -> float:
        return hits / max(1, sum(self._trace.tokens))

    def _rows(self) -> Iterator[tuple[Optimum, Outcome]]:
        for best, outcomes in self._by_capacity:
            for outcome in outcomes:
                yield best, outcome

    def json_objects(self) -> Iterator[dict[str, Any]]:
        """Yield an object for each capacity and policy: the output of `kvcache replay --json`."""
        for best, outcome in self._rows():
            yield {
                "policy": outcome.policy,
                "capacity_blocks": outcome.tiers[0].capacity_blocks,
                "requests": outcome.requests,
                "block_accesses": outcome.block_accesses,
                "block_tokens": self._trace.block_tokens,
                "prompt_tokens": outcome.prompt_tokens,
                "hit_ratio": self._hit_ratio(outcome.hit_blocks),
                "token_hit_ratio": self._token_hit_ratio(outcome.hit_tokens),
                "belady_hit_ratio": self._hit_ratio(best.hit_blocks),
                "belady_token_hit_ratio": self._token_hit_ratio(best.hit_tokens),
                "us_per_block": outcome.us_per_block,
                "tiers": [self._tier(tier) for tier in outcome.tiers],
            }

    def _tier(self, tier: TierOutcome) -> dict[str, Any]:
        fields: dict[str, Any] = {name: getattr(tier, name) for name in TierOutcome.__slots__}
        fields["hit_ratio"] = self._hit_ratio(tier.hit_blocks)
        if (nbytes := self._size.nbytes) is not None:
            fields["read_bytes"] = tier.read_blocks * nbytes
            fields["written_bytes"] = tier.written_blocks * nbytes
        return fields

    def text(self, name: str, *, partial: bool, paint: Painter) -> str:
        """Return a table.

        Args:
            name: of the trace.
            partial: partial last blocks were stored and counted.
            paint: colours the table.
        """
        trace, size = self._trace, self._size
        span_s = trace.times_s[-1] if len(trace) else 0.0
        span = f"{span_s / 60:,.0f} minutes" if span_s >= 120 else f"{span_s:,.3g} seconds"
        kind = "blocks" if partial else "full blocks"
        head = (
            f"{name}: {len(trace):,} requests in {span}; "
            f"{len(trace.blocks):,} {kind} of {trace.block_tokens} tokens, "
            f"{trace.distinct:,} of them distinct"
        )
        tiers = max(len(outcome.tiers) for _, outcome in self._rows())
        hits = ["hits"] if tiers > 1 else []  # with one tier, its hits are all hits
        groups: list[tuple[str, list[str]]] = [
            ("", ["capacity", "policy"]),
            ("hit ratio", ["blocks", "tokens", "optimum"]),
            *((f"L{n}", [*hits, "read", "written"]) for n in range(1, tiers + 1)),
            ("", ["µs/block"]),
        ]
        rows = [
            [
                " + ".join(size.format(tier.capacity_blocks) for tier in outcome.tiers),
                outcome.policy,
                f"{self._hit_ratio(outcome.hit_blocks):.2%}",
                f"{self._token_hit_ratio(outcome.hit_tokens):.2%}",
                f"{self._hit_ratio(best.hit_blocks):.2%}",
                *(
                    cell
                    for tier in outcome.tiers
                    for cell in (
                        *(f"{self._hit_ratio(tier.hit_blocks):.2%}" for _ in hits),
                        size.format(tier.read_blocks),
                        size.format(tier.written_blocks),
                    )
                ),
                f"{outcome.us_per_block:.2f}",
            ]
            for best, outcome in self._rows()
        ]
        unit = "blocks" if size.nbytes is None else "bytes"
        foot = (
            "blocks, optimum, hits: share of all blocks looked up; "
            f"tokens: share of all prompt tokens; read, written: {unit}"
        )
        table = render(groups, rows, paint=paint, strong="hit ratio")
        return f"{head}\n\n{table}\n{foot}"

    def plot(self, title: str, marked: int) -> HitRatioPlot:
        """Return the hit ratios by capacity, for results of one tier.

        Args:
            title: of the plot.
            marked: the position of the user's capacity.
        """
        series: dict[str, list[float]] = {OPTIMUM: []}
        labels = []
        for best, outcomes in self._by_capacity:
            labels.append(self._size.format(best.capacity_blocks))
            series[OPTIMUM].append(self._hit_ratio(best.hit_blocks))
            for outcome in outcomes:
                ratios = series.setdefault(outcome.policy, [])
                ratios.append(self._hit_ratio(outcome.hit_blocks))
        unit = f", in blocks of {self._trace.block_tokens} tokens"
        axis = "DRAM" + (unit if self._size.nbytes is None else "")
        return HitRatioPlot(title, axis, labels, series, marked)
