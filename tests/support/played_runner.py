"""The model runner of simulated workers: it plays vLLM's order within a step, on every rank.

It computes the words of `played_memory`, samples tokens, drafts tokens, and moves Mamba states as
vLLM does: before a step from the block of the last state to the running block, and after sampling
from a state that drafted tokens passed to the block that ends there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from random import Random
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from kvcache.connectors.vllm.messages import Step
from tests.support.played_copies import RankCopies
from tests.support.played_memory import UNSOUND, Prefixes, RankMemory, Words
from tests.support.played_models import PlayedModel

WRONG_TOKEN = 99
"""A drafted token that the model rejects."""


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

    `column`: of the running state; `read`: of the state before the span. `move` and `keep`: states
    to copy before and after the forward pass, from one column to another.
    """

    row: RequestRow
    start: int
    end: int
    drafts: list[int]
    prefixes: Words
    sound: bool
    column: int = -1
    read: int = -1
    move: tuple[int, int] = (0, 0)
    keep: tuple[int, int] = (0, 0)


class PlayedRunner:
    """The workers of an engine.

    Args:
        model: that they run.
        prefixes: numbers of all token sequences.
        memory: of each rank.
        copies: of each rank; empty without a connector.
        random: chooses which drafts are right.
        tokens_of: returns the tokens of a request.
        is_async: whether a step may run before the one before it is reported, so that the scheduler
            does not know its tokens.
        second_runner: whether vLLM's second model runner is played.
        reports_first: whether stores start after a step's report.

    Attributes:
        hits: of each request, the tokens that its first start found in any cache.
    """

    def __init__(
        self,
        model: PlayedModel,
        prefixes: Prefixes,
        memory: Sequence[RankMemory],
        copies: Sequence[RankCopies],
        random: Random,
        tokens_of: Callable[[str], Sequence[int]],
        *,
        is_async: bool,
        second_runner: bool,
        reports_first: bool,
    ) -> None:
        from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator

        self._model = model
        self._prefixes = prefixes
        self._memory = memory
        self._copies = copies
        self._random = random
        self._tokens_of = tokens_of
        self._is_async = is_async
        self._second_runner = second_runner
        self._reports_first = reports_first
        self._aggregator = KVOutputAggregator(len(memory))
        self._rows: dict[str, RequestRow] = {}
        self._unsound: set[str] = set()  # requests with blocks from before a reset
        self._state_tokens = next((g.block_tokens for g in model.groups if g.kind == "state"), 0)
        self.hits: dict[str, int] = {}

    def reset(self, tables: dict[str, set[int]]) -> None:
        """Note that the weights changed while requests have these blocks."""
        for row in self._rows.values():
            row.unsound = True
        self._unsound = {name for name, blocks in tables.items() if blocks}
        for block in set[int]().union(*tables.values()):
            for memory in self._memory:
                memory.spoil(block, unsound=True)
        for copies in self._copies:
            copies.reset()

    def start_again(self, names: Collection[str]) -> None:
        """Note that vLLM takes the blocks of these requests: their loads failed."""
        self._unsound.difference_update(names)

    def drafts(self, names: Sequence[str]) -> dict[str, list[int]]:
        """Return the drafted tokens of these requests, as far as they still run."""
        return {name: self._rows[name].drafts for name in names if name in self._rows}

    def run(self, output: Any) -> Any:
        """Run a step on every rank, and return what the workers report."""
        step: Step = output.kv_connector_metadata
        names = list(output.num_scheduled_tokens)
        self._update_rows(output)
        spans = [self._span(name, output) for name in names]
        for memory, copies in zip_longest(self._memory, self._copies):
            self._prepare(memory, copies, output, spans)
        for span in spans:  # in this order: a request may attend to blocks of one before it
            sound = [self._reads_sound(memory, span) for memory in self._memory]
            span.sound &= all(sound)
            for memory in self._memory:
                self._write(memory, span)
        sampled = [self._sample(span) for span in spans]
        for memory in self._memory:
            for span in spans:
                self._move_states(memory, span, span.keep)
        results = [self._report(names, sampled, None)]
        if self._copies:
            reported = [self._copy(copies, step, output) for copies in self._copies]
            results = [self._report(names, sampled, each) for each in reported]
        return self._aggregator.aggregate(results) if self._copies else results[0]

    def _prepare(
        self,
        memory: RankMemory,
        copies: RankCopies | None,
        output: Any,
        spans: Sequence[ComputedSpan],
    ) -> None:
        """Do what vLLM's model runner does before the forward pass, in its order."""
        step: Step = output.kv_connector_metadata
        if copies is not None and not self._second_runner:
            copies.fence(step)
        for block in output.new_block_ids_to_zero or ():
            memory.zero(block)
        for copy in output.kv_cache_block_copies or ():
            memory.copy(copy.src_block_id, copy.dst_block_id)
        for span in spans:
            self._move_states(memory, span, span.move)
        if copies is not None and self._second_runner:
            copies.fence(step)
        if copies is not None and output.has_sync_kv_loads:
            copies.load(step)

    def _copy(self, copies: RankCopies, step: Step, output: Any) -> Any:
        """Start the copies that follow the forward pass, and return what a rank reports."""
        from vllm.v1.outputs import KVConnectorOutput

        if not output.has_sync_kv_loads:
            copies.load(step)
        if not self._reports_first:
            copies.store(step)
        received, failed, blocks, acks = copies.report(step)
        if self._reports_first:
            copies.store(step)
        return KVConnectorOutput(
            finished_recving=received,
            failed_recving=failed,
            invalid_block_ids=blocks,
            kv_connector_worker_meta=acks,
        )

    def _report(self, names: list[str], sampled: list[list[int]], of_connector: Any) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: at for at, name in enumerate(names)},
            sampled_token_ids=sampled,
            kv_connector_output=of_connector,
        )

    def _update_rows(self, output: Any) -> None:
        for name in output.finished_req_ids:
            self._rows.pop(name, None)
            self._unsound.discard(name)
        for name in output.preempted_req_ids or ():
            self._unsound.discard(name)
            if name in self._rows:
                self._rows[name].state_column = None
        for new in output.scheduled_new_reqs:
            self._start(new.req_id, new.block_ids, new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for name, added, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if name in cached.resumed_req_ids:
                self._start(name, added, computed)
                continue
            row = self._rows[name]
            for table, blocks in zip(row.tables, added or (), strict=False):
                table.extend(blocks)
            if not self._is_async:
                row.tokens = list(self._tokens_of(name))
                row.computed = computed
            elif computed < row.computed:  # vLLM recomputes wrongly
                row.computed, row.unsound = computed, True

    def _start(self, name: str, tables: Any, computed: int) -> None:
        tokens = list(self._tokens_of(name))
        row = RequestRow(tokens, [list(table) for table in tables], computed)
        row.unsound = name in self._unsound
        self._rows[name] = row
        self.hits.setdefault(name, computed)

    def _span(self, name: str, output: Any) -> ComputedSpan:
        """Return the tokens that a request computes, and where its states lie."""
        row, scheduled = self._rows[name], output.num_scheduled_tokens[name]
        planned = output.scheduled_spec_decode_tokens.get(name) or []
        drafts = (row.drafts if self._is_async else planned)[: len(planned)]
        drafts = [*drafts, *[-1] * (len(planned) - len(drafts))]
        start, known = row.computed, len(row.tokens)
        end = start + scheduled
        assert end <= known or end == known + len(drafts), (name, start, end, known, drafts)
        del row.prefixes[known:]
        self._prefixes.extend(row.prefixes, row.tokens)
        prefixes = [*row.prefixes]
        self._prefixes.extend(prefixes, [*row.tokens, *drafts])
        numbers = np.array(prefixes[:end], dtype=np.int64)
        span = ComputedSpan(
            row, start, end, drafts if end > known else [], numbers, not row.unsound
        )
        size = self._state_tokens
        if size:
            span.column = -(-end // size) - 1
            before = (start - 1) // size if row.state_column is None else row.state_column
            if before not in (-1, span.column):
                span.move = before + row.accepted - 1, span.column
                row.accepted = 1
            row.state_column = span.column
            span.read = span.column + row.accepted - 1
        return span

    def _move_states(self, memory: RankMemory, span: ComputedSpan, move: tuple[int, int]) -> None:
        source, target = move
        for group in self._model.groups if source != target else ():
            if group.kind == "state":
                table = span.row.tables[group.index]
                memory.copy(table[source], table[target])

    def _reads_sound(self, memory: RankMemory, span: ComputedSpan) -> bool:
        """Whether the computation reads right blocks in every group."""
        if span.row.unsound or not span.start:
            return True
        sound = True
        for group in self._model.groups:
            table, start = span.row.tables[group.index], span.start
            if group.kind == "state":
                last = span.prefixes[start - 1 : start]
                sound &= memory.holds(group, [table[span.read]], last, 0, 1)
            else:
                first = group.first_token(start)
                sound &= memory.holds(group, table, span.prefixes, first, start)
        return sound

    def _write(self, memory: RankMemory, span: ComputedSpan) -> None:
        prefixes = span.prefixes if span.sound else np.full_like(span.prefixes, UNSOUND)
        for group in self._model.groups:
            table = span.row.tables[group.index]
            if group.kind == "state":
                states = 1 + len(span.drafts)  # one after each token that may be the last
                blocks = table[span.column : span.column + states]
                memory.write(group, blocks, prefixes[span.end - states :], 0, states)
            else:
                memory.write(group, table, prefixes, span.start, span.end)

    def _sample(self, span: ComputedSpan) -> list[int]:
        """Return the tokens that a request gets: right drafts, and one more."""
        row = span.row
        known = len(row.tokens)
        row.computed = span.end
        sampled: list[int] = []
        if span.end >= known:
            last = row.prefixes[-1]
            for draft in [*span.drafts, None]:
                sampled.append(continuation(last))
                last = self._prefixes.after(last, sampled[-1])
                if draft != sampled[-1]:
                    break
            row.tokens = [*row.tokens, *sampled]
            row.computed = known + len(sampled) - 1
            row.drafts = self._draft(last)
        self._keep_state(span, len(sampled) or 1)
        return sampled

    def _draft(self, prefix: int) -> list[int]:
        drafts: list[int] = []
        for _ in range(self._model.drafts):
            right = self._random.random() < 0.7
            drafts.append(continuation(prefix) if right else WRONG_TOKEN)
            prefix = self._prefixes.after(prefix, drafts[-1])
        return drafts

    def _keep_state(self, span: ComputedSpan, accepted: int) -> None:
        """Plan the copy of a state that drafted tokens passed, as vLLM makes it after sampling."""
        size, row = self._state_tokens, span.row
        row.accepted = accepted
        if not size:
            return
        running = span.end - len(span.drafts)
        aligned = (running + accepted - 1) // size * size
        if aligned >= running:
            column = aligned // size - 1
            span.keep = span.column + aligned - running, column
            if column == span.column:
                row.accepted = 1


def continuation(prefix: int) -> int:
    """Return the token that the model samples after a prefix."""
    return prefix * 7919 % 4
