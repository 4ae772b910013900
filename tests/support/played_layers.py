"""What a forward pass reads and writes: the layers of a simulated model on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.support.played_memory import UNSOUND, PlayedGroup, RankMemory, Words


@dataclass
class RequestRow:
    """What the workers keep of a request."""

    tokens: list[int]
    tables: list[list[int]]
    computed: int
    prefixes: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    state_column: int | None = None
    accepted: int = 1
    unsound: bool = False  # vLLM computes it from wrong blocks


@dataclass
class ComputedSpan:
    """The tokens from `start` to `end` that a step computes of a request.

    Attributes:
        ignores_blocks: vLLM computes from wrong blocks, so they are not checked.
        sound: no layer has read a wrong block.
        column: of the running state.
        read: column of the state before the span.
        move: state to copy before the forward pass, from one column to another.
        keep: state to copy after it.
    """

    row: RequestRow
    start: int
    end: int
    drafts: list[int]
    prefixes: Words
    ignores_blocks: bool
    sound: bool
    column: int = -1
    read: int = -1
    move: tuple[int, int] = (0, 0)
    keep: tuple[int, int] = (0, 0)


def update_blocks(memory: RankMemory, output: Any) -> None:
    """Zero new blocks, and copy blocks of hits that end inside them."""
    for block in output.new_block_ids_to_zero or ():
        memory.zero(block)
    for copy in output.kv_cache_block_copies or ():
        memory.copy(copy.src_block_id, copy.dst_block_id)


def copy_blocks(memory: RankMemory, copies: Sequence[tuple[int, int]]) -> None:
    for source, target in copies:
        memory.copy(source, target)


def read_layer(
    memory: RankMemory, group: PlayedGroup, at: int, spans: Sequence[ComputedSpan]
) -> None:
    """Check that a layer reads right blocks, and note where vLLM itself made them wrong."""
    for span in spans:
        if span.ignores_blocks or not span.start:
            continue
        table, start = span.row.tables[group.index], span.start
        if group.kind == "state":
            last = span.prefixes[start - 1 : start]
            span.sound &= memory.holds(group, at, [table[span.read]], last, 0, 1)
        else:
            first = group.first_token(start)
            span.sound &= memory.holds(group, at, table, span.prefixes, first, start)


def write_layer(
    memory: RankMemory, group: PlayedGroup, at: int, spans: Sequence[ComputedSpan]
) -> None:
    for span in spans:
        prefixes = span.prefixes if span.sound else np.full_like(span.prefixes, UNSOUND)
        table = span.row.tables[group.index]
        if group.kind == "state":
            states = 1 + len(span.drafts)  # one after each token that may be the last
            blocks = table[span.column : span.column + states]
            memory.write(group, at, blocks, prefixes[span.end - states :], 0, states)
        else:
            memory.write(group, at, table, prefixes, span.start, span.end)


def mark_unsound(
    memory: RankMemory, groups: Sequence[PlayedGroup], spans: Sequence[ComputedSpan]
) -> None:
    """Mark what was computed before a wrong block was read as computed from it."""
    for span in spans:
        if span.sound:
            continue
        for group in groups:
            for at in range(len(memory.layers[group.index])):
                write_layer(memory, group, at, [span])
