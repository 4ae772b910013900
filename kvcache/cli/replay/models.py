"""`kvcache replay --model`: the options that go with it, and its results as JSON or as a table."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from kvcache.cli.amounts import Amount
from kvcache.cli.table import Painter, render
from kvcache.replay.groups import GroupsOutcome, ModelBlocks
from kvcache.replay.trace import Trace
from kvcache.sizes import format_size
from kvcache.slab import slot_nbytes_for

OTHER_SIZES = ("tiers", "plot", "partial", "bytes_per_token", "bytes_per_block")
"""Options that describe one group of blocks of one size."""


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together with `--model`."""
    for name in OTHER_SIZES:
        if getattr(args, name):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} does not go together with --model")
    for amount in args.capacity or ():
        if not amount.nbytes:
            raise ValueError(
                f"--capacity {amount.text} is a number of blocks: the groups of a model have "
                'blocks of several sizes, so pass a size ("64GiB")'
            )


def slots(model: ModelBlocks, trace: Trace, amounts: Sequence[Amount]) -> list[int]:
    """Return the slots of each capacity; the default is a tenth of the trace's distinct tokens.

    Raises:
        ValueError: a capacity is less than one slot.
    """
    slot_nbytes = slot_nbytes_for(model.slot_nbytes)
    if not amounts:
        nbytes = trace.distinct * trace.block_tokens * model.token_nbytes / 10
        return [max(1, int(nbytes) // slot_nbytes)]
    for amount in amounts:
        if amount.nbytes < slot_nbytes:
            size = format_size(model.slot_nbytes)
            raise ValueError(f"a capacity of {amount.text} is less than one slot ({size})")
    return [amount.nbytes // slot_nbytes for amount in amounts]


class ModelResults:
    """Results of several replays of one trace for one model.

    Args:
        trace: the trace.
        model: the groups of the model.
        outcomes: one for each capacity and policy.
    """

    def __init__(self, trace: Trace, model: ModelBlocks, outcomes: Sequence[GroupsOutcome]) -> None:
        self._trace = trace
        self._model = model
        self._outcomes = outcomes
        self._names = [group.needs.label for group in model.groups]

    def json_objects(self) -> Iterator[dict[str, Any]]:
        """Yield an object for each capacity and policy."""
        slot_nbytes = self._model.slot_nbytes
        for outcome in self._outcomes:
            held = zip(self._names, outcome.held_blocks, strict=True)
            tokens = max(1, outcome.prompt_tokens)
            yield {
                "policy": outcome.policy,
                "model": self._model.name,
                "capacity_bytes": outcome.capacity_blocks * slot_nbytes,
                "requests": outcome.requests,
                "prompt_tokens": outcome.prompt_tokens,
                "token_hit_ratio": outcome.hit_tokens / tokens,
                "lost_token_ratio": outcome.lost_tokens / tokens,
                "held_bytes": {name: slots * slot_nbytes for name, slots in held},
                "read_bytes": outcome.read_blocks * slot_nbytes,
                "written_bytes": outcome.written_blocks * slot_nbytes,
                "us_per_key": outcome.cpu_s / max(1, outcome.keys) * 1e6,
            }

    def text(self, name: str, paint: Painter) -> str:
        """Return a table.

        Args:
            name: of the trace.
            paint: colours the table.
        """
        trace, model = self._trace, self._model
        blocks = [
            f"{label}: {group.layers} layers, {format_size(group.block_nbytes)} "
            f"for {group.block_tokens} tokens in {parts} slot{'s' if parts > 1 else ''}"
            for label, group, parts in zip(self._names, model.groups, model.parts, strict=True)
        ]
        head = (
            f"{name}: {len(trace):,} requests, {sum(trace.tokens):,} tokens\n"
            f"{model.name}, slots of {format_size(model.slot_nbytes)}; {'; '.join(blocks)}"
        )
        groups: list[tuple[str, list[str]]] = [
            ("", ["capacity", "policy"]),
            ("tokens", ["hits", "lost"]),
            ("held", self._names),
            ("L1", ["read", "written"]),
            ("", ["µs/key"]),
        ]
        rows = [
            [
                format_size(fields["capacity_bytes"]),
                fields["policy"],
                f"{fields['token_hit_ratio']:.2%}",
                f"{fields['lost_token_ratio']:.2%}",
                *map(format_size, fields["held_bytes"].values()),
                format_size(fields["read_bytes"]),
                format_size(fields["written_bytes"]),
                f"{fields['us_per_key']:.2f}",
            ]
            for fields in self.json_objects()
        ]
        foot = (
            "hits: share of all prompt tokens; lost: tokens of full attention that were held, "
            "but a window or state was missing"
        )
        return f"{head}\n\n{render(groups, rows, paint=paint, strong='tokens')}\n{foot}"
