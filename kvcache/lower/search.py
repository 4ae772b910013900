"""Which lower tier holds a block, and which blocks are worth a load.

Promotion and direct tiers search with the same functions. The source of a block is the number of
its tier: 0 for L1, 1 for the nearest lower tier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

from opentelemetry.trace import Span

from kvcache.lower.caller import TierCaller
from kvcache.lower.latency import ComputeModel

Caller = TypeVar("Caller", bound=TierCaller)
Source = TypeVar("Source", int, int | None)


def locate_blocks(
    tiers: Sequence[Caller],
    keys: Sequence[bytes],
    sources: list[int | None],
    compute_s: Callable[[int], float | None],
    span: Span,
    on_skip: Callable[[Caller, Sequence[bytes]], None],
) -> None:
    """Find the nearest lower tier of each block without a source.

    A tier is not asked if its lookup takes longer than to compute the blocks.

    Args:
        tiers: the lower tiers, nearest first.
        keys: of the blocks.
        sources: the source of each block; ``None`` is replaced where a tier holds the block.
        compute_s: predicts how long the engine computes what a number of these keys saves;
            ``None`` if that is unknown.
        span: the parent of the tiers' spans.
        on_skip: called with a tier that is not asked, and the keys.
    """
    for number, tier in enumerate(tiers, 1):
        missing = [at for at, source in enumerate(sources) if source is None]
        if not missing:
            break
        asked = [keys[at] for at in missing]
        limit_s = compute_s(len(asked))
        if limit_s is not None and tier.lookup_seconds(len(asked)) > limit_s:
            on_skip(tier, asked)
            continue
        for at, held in zip(missing, tier.contains(asked, span), strict=True):
            if held:
                sources[at] = number


def blocks_worth_loading(
    tiers: Sequence[TierCaller],
    sources: Sequence[int | None],
    compute_model: ComputeModel,
    depth: int,
) -> int:
    """Return how many leading blocks to load so that loading and computing take least time.

    Args:
        tiers: the lower tiers, nearest first.
        sources: the source of each block. A block with ``None`` is neither loaded nor saved.
        compute_model: predicts how long the engine computes blocks.
        depth: the number of blocks of the prompt before them.
    """
    blocks, saved_s, most_saved_s = 0, 0.0, 0.0
    for source, at, end in runs_by_source(sources):
        if source is not None:
            saved_s += compute_model.pessimistic(end - at, depth + at) or 0.0
            saved_s -= tiers[source - 1].load_seconds(end - at) if source else 0.0
        if saved_s >= most_saved_s or not compute_model.known:
            blocks, most_saved_s = end, saved_s
    return blocks


def runs_by_source(sources: Sequence[Source], start: int = 0) -> Iterator[tuple[Source, int, int]]:
    """Split ``sources[start:]`` into runs of one tier: the tier, the run's start and its end."""
    at = start
    for source, run in groupby(sources[start:]):
        end = at + sum(1 for _ in run)
        yield source, at, end
        at = end
