"""Replays a trace for a model with several kept groups, on the index and the policy of L1.

A trace has the chain of a request only. The blocks of every group follow from it: a block of a
group gets the name of the trace's block that ends at the same token. For each request, the replay
makes the calls that the vLLM connector makes:

    lookup   the longest resume point that all groups have; it is recorded, side blocks first
    store    for each engine step, the blocks that it completes: of chain groups, of windows and of
             chunks every block, of states the one at the end of the step

Invariants:

* The search and the rules are those of ``kvcache.resume``, the parts those of ``kvcache.parts``.
* An engine step computes up to ``STEP_TOKENS`` of the prompt. A state exists only where a step
  ends, at a multiple of the block size; an engine also keeps the states of an answer, which a
  replay does not have.
* The engine computes at least one token, and everything after the resume point.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain as chained

from kvcache.eviction import Policy, policy_class
from kvcache.index import Index
from kvcache.keys import Branch
from kvcache.models import Model
from kvcache.models.layers import ModelGroup, alignment
from kvcache.parts import choose_parts
from kvcache.replay.simulate import reported
from kvcache.replay.trace import Trace
from kvcache.resume import FrontLookup, GroupKeys

STEP_TOKENS = 8192
"""Tokens of a prompt that an engine step computes: vLLM's default for a server on a large GPU."""


@dataclass(frozen=True, slots=True)
class ModelBlocks:
    """The kept groups of a model, and how their blocks are cut into slots.

    Attributes:
        name: of the model.
        groups: the groups, chain groups first.
        parts: parts of a block of each group.
        slot_nbytes: bytes of a slot.
        align_tokens: a resume point is a multiple of these.
    """

    name: str
    groups: tuple[ModelGroup, ...]
    parts: tuple[int, ...]
    slot_nbytes: int
    align_tokens: int

    @classmethod
    def of(cls, model: Model, trace_tokens: int) -> ModelBlocks:
        """Return the groups of a model, with blocks that end where those of a trace end.

        A model with states needs blocks of a least size, as in vLLM: several blocks of the trace
        are one block then.

        Args:
            model: the model.
            trace_tokens: tokens of a block of the trace.
        """
        tokens = trace_tokens
        while any(group.block_tokens % trace_tokens for group in model.groups(block_tokens=tokens)):
            tokens += trace_tokens
        groups = model.groups(block_tokens=tokens)
        sizes = [group.block_nbytes for group in groups]
        parts = choose_parts(sizes)
        slot_nbytes = max(-(-size // count) for size, count in zip(sizes, parts, strict=True))
        return cls(model.name, groups, parts, slot_nbytes, alignment(groups))

    @property
    def token_nbytes(self) -> float:
        """Bytes of a token, if the blocks of all groups are held."""
        slots = zip(self.groups, self.parts, strict=True)
        return sum(parts * self.slot_nbytes / group.block_tokens for group, parts in slots)


@dataclass(frozen=True, slots=True)
class GroupsOutcome:
    """The result of one policy over a trace, for a model with kept groups.

    Attributes:
        policy: its name.
        model: the groups of the model.
        capacity_blocks: slots of L1.
        held_blocks: slots of the blocks of each group, at the end of the trace.
        read_blocks: slots copied to the engine.
        written_blocks: slots stored.
        requests: requests of the trace.
        prompt_tokens: tokens of all prompts.
        hit_tokens: tokens that the engine did not compute.
        lost_tokens: tokens that the engine computed because a side block was missing, although L1
            held their blocks of the chain groups.
        keys: keys looked up and stored.
        cpu_s: processor time of the lookups, the index and the policy.
    """

    policy: str
    model: ModelBlocks
    capacity_blocks: int
    held_blocks: tuple[int, ...]
    read_blocks: int
    written_blocks: int
    requests: int
    prompt_tokens: int
    hit_tokens: int
    lost_tokens: int
    keys: int
    cpu_s: float


def replay_model(
    trace: Trace,
    model: ModelBlocks,
    policy: str,
    capacity: int,
    progress: Callable[[int], None] = lambda _: None,
) -> GroupsOutcome:
    """Replay ``trace`` for a model.

    Args:
        trace: the requests.
        model: its groups, for blocks of this trace.
        policy: name or class path of the policy.
        capacity: slots of L1.
        progress: called from time to time with the number of requests replayed since its last call.
    """
    blocks = TraceBlocks(model, trace.block_tokens)
    front = SimulatedGroups(policy_class(policy), capacity, blocks, model.align_tokens)
    requests = zip(trace.times_s, trace.tokens, trace.chains(), trace.done, strict=True)
    start_s = time.process_time()
    for now, tokens, ids, done in reported(requests, progress):
        front.request(ids, tokens, now)
        if done < len(ids):
            front.mark_done(ids, done * trace.block_tokens)
    cpu_s = time.process_time() - start_s
    return GroupsOutcome(
        policy=policy,
        model=model,
        capacity_blocks=capacity,
        held_blocks=front.held_blocks(),
        read_blocks=front.read_blocks,
        written_blocks=front.index.stored_blocks,
        requests=len(trace),
        prompt_tokens=sum(trace.tokens),
        hit_tokens=front.hit_tokens,
        lost_tokens=front.lost_tokens,
        keys=front.index.lookup_blocks + front.index.stored_blocks,
        cpu_s=cpu_s,
    )


class TraceBlocks:
    """The blocks of a model's groups that belong to the blocks of a trace.

    Args:
        model: the groups.
        trace_tokens: tokens of a block of the trace.

    Attributes:
        has_chain: whether a group needs the blocks of all tokens.
    """

    def __init__(self, model: ModelBlocks, trace_tokens: int) -> None:
        self._model = model
        self._trace_tokens = trace_tokens
        self._part_keys: list[dict[int, tuple[bytes, ...]]] = [{} for _ in model.groups]
        self.has_chain = any(group.needs.kind == "all" for group in model.groups)

    def top(self, ids: Sequence[int], tokens: int) -> int:
        """Return the most tokens after which a request of ``tokens`` tokens can resume."""
        return min(tokens - 1, len(ids) * self._trace_tokens)

    def groups(self, ids: Sequence[int]) -> list[GroupKeys]:
        """Return the groups of a request with these blocks of the trace."""
        return [
            GroupKeys(group.needs, group.block_tokens, parts, self._keys_of(number, ids))
            for number, (group, parts) in enumerate(
                zip(self._model.groups, self._model.parts, strict=True)
            )
        ]

    def steps(self, ids: Sequence[int], begin: int) -> Iterator[tuple[list[Branch], list[Branch]]]:
        """Yield the blocks that each engine step completes after token ``begin``.

        Returns:
            segments of chains, and side blocks, as ``Stack.reserve_branches`` takes them.
        """
        align_tokens, end = self._model.align_tokens, len(ids) * self._trace_tokens
        while begin < end:
            step_end = min(end, begin + STEP_TOKENS)
            if step_end < end:
                step_end = max(begin + align_tokens, step_end // align_tokens * align_tokens)
            yield self._completed(ids, begin, step_end)
            begin = step_end

    def _completed(
        self, ids: Sequence[int], begin: int, end: int
    ) -> tuple[list[Branch], list[Branch]]:
        """Return the blocks that end after token ``begin`` and at most at ``end``."""
        chains: list[Branch] = []
        sides: list[Branch] = []
        chain_tokens = 0  # of a block of the first chain group
        for number, group in enumerate(self._model.groups):
            size, keys = group.block_tokens, self._keys_of(number, ids)
            blocks = range(begin // size, end // size)
            if group.needs.kind == "all":
                chain_tokens = chain_tokens or size
                if blocks:
                    before = keys(blocks.start - 1, blocks.start) if blocks.start else [None]
                    chains.append((keys(blocks.start, blocks.stop), before[-1]))
                continue
            for at in blocks[-1:] if group.needs.kind == "state" else blocks:
                parent = None
                if chain_tokens and (last := (at + 1) * size // chain_tokens):
                    parent = self._keys(0, ids[last * chain_tokens // self._trace_tokens - 1])[-1]
                sides.append((keys(at, at + 1), parent))
        return chains, sides

    def all_keys(self, ids: Sequence[int], tokens: int) -> Iterator[list[bytes]]:
        """Yield for each group the keys of a request's blocks after its first ``tokens``."""
        end = len(ids) * self._trace_tokens
        for number, group in enumerate(self._model.groups):
            size = group.block_tokens
            yield self._keys_of(number, ids)(-(-tokens // size), end // size)

    def known_keys(self) -> list[list[bytes]]:
        """Return for each group the keys of all blocks so far."""
        return [list(chained.from_iterable(known.values())) for known in self._part_keys]

    def _keys_of(self, number: int, ids: Sequence[int]) -> Callable[[int, int], list[bytes]]:
        ratio = self._model.groups[number].block_tokens // self._trace_tokens

        def keys(first: int, end: int) -> list[bytes]:
            named = ids[(first + 1) * ratio - 1 : end * ratio : ratio]
            return list(chained.from_iterable(self._keys(number, each) for each in named))

        return keys

    def _keys(self, number: int, block: int) -> tuple[bytes, ...]:
        """Return the keys of the parts of a group's block that ends with a block of the trace."""
        known = self._part_keys[number]
        if (keys := known.get(block)) is None:
            name = block.to_bytes(8, "big")
            parts = range(self._model.parts[number])
            keys = tuple(name + bytes((number, at)) if number or at else name for at in parts)
            known[block] = keys
        return keys


class SimulatedGroups:
    """An index with the blocks of several groups.

    Args:
        policy: makes the policy from the capacity.
        capacity: slots of L1.
        blocks: the blocks of the model, by those of the trace.
        align_tokens: a resume point is a multiple of these.

    Attributes:
        index: the index of L1.
        hit_tokens, lost_tokens, read_blocks: as in ``GroupsOutcome``.
    """

    def __init__(
        self, policy: Callable[[int], Policy], capacity: int, blocks: TraceBlocks, align_tokens: int
    ) -> None:
        self._now = 0.0
        self.index = Index(policy(capacity), lambda: self._now)
        self.index.open_slots(capacity)
        self._blocks = blocks
        self._align_tokens = align_tokens
        self.hit_tokens = 0
        self.lost_tokens = 0
        self.read_blocks = 0

    # The calls of a lookup

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        index = self.index
        return [key in index for key in keys]

    def count_prefix(self, chain: Sequence[bytes], start: int = 0) -> int:
        return self.index.count_prefix(chain, start)

    def access(self, chain: Sequence[bytes], start: int = 0) -> int:
        return self.index.access(chain, start)

    def request(self, ids: Sequence[int], tokens: int, now: float) -> int:
        """Serve a request: look it up, and store what the engine computes.

        Args:
            ids: the trace's blocks.
            tokens: tokens of the prompt.
            now: when the request arrives, in seconds.

        Returns:
            the tokens that the engine does not compute.
        """
        self._now = now
        blocks, index = self._blocks, self.index
        top = blocks.top(ids, tokens)
        found = FrontLookup(self, blocks.groups(ids), 0, top, self._align_tokens)
        found.record()
        self.hit_tokens += found.tokens
        if blocks.has_chain:
            self.lost_tokens += found.chain_tokens - found.tokens
        self.read_blocks += sum(map(len, found.needed))
        for chains, sides in blocks.steps(ids, found.tokens):
            positions, slots = index.reserve_branches(chains, sides)
            first_side = bisect_left(positions, sum(len(keys) for keys, _ in chains))
            index.publish(slots[first_side:] + slots[:first_side])
        return found.tokens

    def mark_done(self, ids: Sequence[int], tokens: int) -> None:
        """Mark all blocks of a request after its first ``tokens`` as done."""
        for keys in self._blocks.all_keys(ids, tokens):
            self.index.mark_done(keys)

    def held_blocks(self) -> tuple[int, ...]:
        """Return the number of slots of the held blocks of each group."""
        return tuple(sum(self.contains(keys)) for keys in self._blocks.known_keys())
