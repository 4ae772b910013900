"""The model runner of simulated workers: it does vLLM's work within a step, on every rank.

It computes the words of `played_memory`, samples tokens, drafts tokens, and moves Mamba states as
vLLM does: before a step from the block of the last state to the running block, and after sampling
from a state that drafted tokens passed to the block that ends there. The order of its work and of
the calls of the connector is that of `model_runners`. On a device, all of it is queued.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from tests.support.model_runners import Batch, Stage
from tests.support.played_layers import (
    ComputedSpan,
    RequestRow,
    copy_blocks,
    mark_unsound,
    read_layer,
    update_blocks,
    write_layer,
)
from tests.support.played_memory import PlayedGroup, Prefixes, layer_name
from tests.support.played_models import PlayedModel
from tests.support.played_ranks import PlayedRank
from tests.support.reordering_device import ReorderedEvent

WRONG_TOKEN = 99
"""A drafted token that the model rejects."""


class PlayedRunner:
    """The workers of an engine.

    Args:
        model: that they run.
        prefixes: numbers of all token sequences.
        ranks: all of them.
        random: chooses which drafts are right, and the kind of each forward pass.
        tokens_of: returns the tokens of a request.
        is_async: whether a step may run before the one before it is reported, so that the scheduler
            does not know its tokens.
        second_runner: whether vLLM's second model runner is played.

    Attributes:
        hits: of each request, the tokens that its first start found in any cache.
    """

    def __init__(
        self,
        model: PlayedModel,
        prefixes: Prefixes,
        ranks: Sequence[PlayedRank],
        random: Random,
        tokens_of: Callable[[str], Sequence[int]],
        *,
        is_async: bool,
        second_runner: bool,
    ) -> None:
        from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator

        self._model = model
        self._prefixes = prefixes
        self._ranks = ranks
        self._random = random
        self._tokens_of = tokens_of
        self._is_async = is_async
        self._second_runner = second_runner
        self._aggregator = KVOutputAggregator(len(ranks))
        self._output_stream = ranks[0].device.new_stream() if ranks[0].device else None
        self._sampled: list[list[int]] = []
        self._copied: ReorderedEvent | None = None  # the last sampled tokens are on the host
        self._rows: dict[str, RequestRow] = {}
        self._unsound: set[str] = set()  # requests with blocks from before a reset
        # By rank: of requests that waited for a load at a reset, the blocks.
        self._outdated: list[dict[str, set[int]]] = [{} for _ in ranks]
        self._state_tokens = next((g.block_tokens for g in model.groups if g.kind == "state"), 0)
        self.hits: dict[str, int] = {}

    def reset(self, tables: Mapping[str, set[int]], loading: Collection[str]) -> None:
        """Note that the weights changed while requests have these blocks; some are `loading`."""
        for row in self._rows.values():
            row.unsound = True
        self._unsound = {name for name, blocks in tables.items() if blocks}
        for outdated in self._outdated:
            outdated.update({name: tables[name] for name in loading if name in tables})
        self._spoil(self._ranks, set[int]().union(*tables.values()))

    def _spoil(self, ranks: Sequence[PlayedRank], blocks: Collection[int]) -> None:
        """Note that vLLM may compute from blocks that were computed before a reset."""
        for rank in ranks:
            for block in blocks:
                rank.queue(partial(rank.memory.spoil, block, unsound=True))

    def start_again(self, names: Collection[str]) -> None:
        """Note that vLLM takes the blocks of these requests: their loads failed."""
        self._unsound.difference_update(names)

    def drafts(self, names: Sequence[str]) -> dict[str, list[int]]:
        """Return the drafted tokens of these requests, as far as they still run."""
        return {name: self._rows[name].drafts for name in names if name in self._rows}

    def run(self, output: Any) -> Callable[[], Any]:
        """Run a step on every rank. Returns a function that waits for it and returns its result."""
        names = list(output.num_scheduled_tokens)
        self._update_rows(output)
        spans = [self._span(name, output) for name in names]
        mode = self._random.choice(("NONE", "PIECEWISE", "FULL"))
        batch = Batch(names, output.total_num_scheduled_tokens, mode)
        self._sampled, self._copied = [], None
        reports = self._play(output, spans, batch)
        results = [self._result(names, report) for report in reports]
        for rank, outdated, report in zip(self._ranks, self._outdated, reports, strict=True):
            for name in (report.finished_recving or ()) if report is not None else ():
                self._spoil([rank], outdated.pop(name, ()))
        connected = self._ranks[0].connector is not None
        result = self._aggregator.aggregate(results) if connected else results[0]
        copied = self._copied

        def get_output() -> Any:
            if copied is not None:
                copied.wait()
            return result

        return get_output

    def _play(self, output: Any, spans: Sequence[ComputedSpan], batch: Batch) -> list[Any]:
        """Play a step on all ranks, stage by stage, and return the reports of the connector."""
        steps = [(rank, rank.step(output, batch)) for rank in self._ranks]
        stage: Stage | None = None
        reports: dict[int, Any] = {}
        while not reports:
            stages: set[Stage] = set()
            # The contexts of the forward pass are nested, so they are left in reverse order.
            order = list(enumerate(steps))
            for at, (rank, step) in order[::-1] if stage == "forward" else order:
                with rank.current():
                    try:
                        stages.add(next(step))
                    except StopIteration as end:
                        reports[at] = end.value
            if stages:
                assert not reports
                [stage] = stages
                self._work(stage, output, spans, batch)
        return [reports[at] for at in range(len(steps))]

    def _work(self, stage: Stage, output: Any, spans: Sequence[ComputedSpan], batch: Batch) -> None:
        match stage:
            case "update":
                for rank in self._ranks:
                    rank.queue(partial(update_blocks, rank.memory, output))
            case "prepare":
                self._move_states([(span, span.move) for span in spans])
            case "forward":
                self._compute(spans, batch, drafter=False)
            case "sample":
                self._sampled = [self._sample(span) for span in spans]
                self._copy_output()
            case "keep":
                self._move_states([(span, span.keep) for span in spans])
            case "draft":
                self._compute(spans, batch, drafter=True)
                if self._copied is not None and not (self._is_async or self._second_runner):
                    self._copied.wait()  # `_bookkeeping_sync`

    def _copy_output(self) -> None:
        """Start to copy the sampled tokens to the host."""
        device = self._ranks[0].device
        if device is None or self._output_stream is None:
            return
        self._output_stream.wait_for(device.engine_stream().record())
        self._copied = self._output_stream.record()

    def _compute(self, spans: Sequence[ComputedSpan], batch: Batch, *, drafter: bool) -> None:
        """Compute the layers of the model or of the drafter, in order."""
        groups = [g for g in self._model.groups if self._is_drafter(g) == drafter]
        for number in range(max((group.layers for group in groups), default=0)):
            for rank in self._ranks:
                for group in groups:
                    if number in rank.memory.layers[group.index]:
                        self._compute_layer(rank, group, number, spans, batch)
        for rank in self._ranks if groups else ():
            rank.queue(partial(mark_unsound, rank.memory, groups, spans))

    def _is_drafter(self, group: PlayedGroup) -> bool:
        return self._model.eagle and group is self._model.groups[-1]

    def _compute_layer(
        self,
        rank: PlayedRank,
        group: PlayedGroup,
        number: int,
        spans: Sequence[ComputedSpan],
        batch: Batch,
    ) -> None:
        """Write the KV of new tokens, and read that of earlier ones, as a layer's attention does.

        It writes before it waits for the layer's load. States are read first.
        """
        memory, at = rank.memory, rank.memory.layers[group.index].index(number)
        read = partial(read_layer, memory, group, at, spans)
        write = partial(write_layer, memory, group, at, spans)
        if group.kind == "state":
            rank.queue(read)
            rank.queue(write)
            return
        rank.queue(write)
        if not batch.replays_graph:
            with rank.current():
                rank.wait_for_layer(layer_name(group.index, number))
        rank.queue(read)

    def _result(self, names: list[str], of_connector: Any) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: at for at, name in enumerate(names)},
            sampled_token_ids=self._sampled,
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
            row, start, end, drafts if end > known else [], numbers, row.unsound, not row.unsound
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

    def _move_states(self, moves: Sequence[tuple[ComputedSpan, tuple[int, int]]]) -> None:
        states = [group.index for group in self._model.groups if group.kind == "state"]
        copies = [
            (span.row.tables[group][source], span.row.tables[group][target])
            for span, (source, target) in moves
            for group in states
            if source != target
        ]
        for rank in self._ranks if copies else ():
            rank.queue(partial(copy_blocks, rank.memory, copies))

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
