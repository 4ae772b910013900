"""KV events: which blocks the tiers hold, for routers that send requests by prefix.

::

    --kv-events-config '{"enable_kv_cache_events": true, "publisher": "zmq"}'

    L1       BlockStored, BlockRemoved   medium CPU, locality LOCAL
    below    BlockStored, BlockRemoved   medium STORAGE, ownership: the tier's name in the profile

As in the events of vLLM's own cache, an event is about one of vLLM's KV cache groups, and the
parent of a block is the block before it in that group. A block of a kept group has one event for
each member of the group.

Invariants:

1. An event describes itself: every stored block has its tokens, its parent block, and the extra
   keys of its hash. A block that was never described is not announced.
2. A block is announced once, and its removal only after that. The announced blocks of L1 are those
   that L1 holds. A block of a lower tier is announced when the stack stores it or finds it there.
   If the tier evicts the block by itself, its removal is announced when a request misses it.
3. A tier holds a block while it holds all parts of it. So a block is stored with its last part,
   and removed with the first one that goes.
4. Tables are bounded: by the slots of L1, and for each lower tier by ``MOST_ANNOUNCED`` parts.
   Beyond that, the parts that were seen longest ago are removed.
5. A tier with ``announce = false`` has no events.
6. With events off, or with no announced tier, nothing is recorded, and a request costs one empty
   call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from kvcache.events import BlockEventLog
from kvcache.stack import Stack

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

    from kvcache.connectors.vllm.groups import KeptGroup

MOST_ANNOUNCED: Final = 1 << 18
MOST_AHEAD: Final = 1 << 14  # parts described before they are stored, of waiting requests


class EventSource:
    """Publishes nothing: KV events are off, or no tier is announced.

    Attributes:
        publishes: whether descriptions of blocks are used.
    """

    publishes = False

    def describe(
        self, request: Request, group: KeptGroup, blocks: Sequence[int], keys: Sequence[bytes]
    ) -> None:
        """Describe blocks of a request, for events about them.

        Args:
            request: the request.
            group: the kept group of the blocks.
            blocks: their positions in the request, ascending.
            keys: of all parts of these blocks, in order.
        """

    def take(self) -> Sequence[KVCacheEvent]:
        """Return the events since the last call."""
        return ()


def events_of(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    groups: Sequence[KeptGroup],
    stack: Stack,
    parts: Sequence[int],
) -> EventSource:
    """Return the events of ``stack``.

    There are none if the engine's KV events are off, or no tier is announced.

    Args:
        vllm_config: of the engine.
        kv_cache_config: the scheduler's.
        groups: the kept groups.
        stack: its tiers are announced, except those with ``announce = false``.
        parts: the number of parts of a block, for each kept group.
    """
    config = getattr(vllm_config, "kv_events_config", None)
    if config is None or not config.enable_kv_cache_events or not stack.announces:
        return EventSource()
    return StackEvents(kv_cache_config, groups, stack, parts)


@dataclass(frozen=True, slots=True)
class _BlockDescription:
    """The fields of a block in an event.

    Attributes:
        keys: of its parts.
        hash: vLLM's, of the block.
        parent_hash: vLLM's, of the block before; ``None`` for the first block of a request.
        lora: id and name of the adapter.
        extra: extra keys of the hash.
    """

    group: KeptGroup
    keys: tuple[bytes, ...]
    hash: bytes
    parent_hash: bytes | None
    tokens: Sequence[int]
    lora: tuple[int | None, str | None]
    extra: tuple[Any, ...] | None


class _AnnouncedTier:
    """The parts of blocks in a tier: those described, and those not described yet.

    A block is announced while all of its parts are in ``held``.
    """

    def __init__(self, block_events: BlockEventLog, most: int, **fields: str) -> None:
        self.block_events = block_events
        self.most = most
        self.fields = fields
        self.held: OrderedDict[bytes, _BlockDescription] = OrderedDict()
        self.undescribed: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.held) + len(self.undescribed)

    def has_all(self, block: _BlockDescription) -> bool:
        """Whether the tier holds every part of a block."""
        return len(block.keys) == 1 or all(key in self.held for key in block.keys)


class StackEvents(EventSource):
    """Publishes the events of a stack.

    Args:
        kv_cache_config: the scheduler's.
        groups: the kept groups.
        stack: its tiers are announced, except those with ``announce = false``.
        parts: the number of parts of a block, for each kept group.
        kv_events: the module of vLLM's event classes.
    """

    publishes = True

    def __init__(
        self,
        kv_cache_config: KVCacheConfig,
        groups: Sequence[KeptGroup],
        stack: Stack,
        parts: Sequence[int],
        *,
        kv_events: Any = None,
    ) -> None:
        from vllm.distributed import kv_events as of_vllm
        from vllm.v1.core import kv_cache_utils

        self._kv_events = kv_events or of_vllm
        self._hash = kv_cache_utils.maybe_convert_block_hash
        self._extra_keys = kv_cache_utils.generate_block_hash_extra_keys
        # Before vLLM 0.31 extra keys have no tags.
        self._untag = getattr(kv_cache_utils, "to_event_extra_keys", list)
        self._parts = parts
        self._group_fields = {
            member: _group_fields(kv_cache_config, member)
            for group in groups
            for member in group.members
        }
        slots = stack.front.slab.slots
        self._tiers = []
        for named, block_events in stack.subscribe_events():
            if named == stack.front_name:
                most, fields = slots, {"medium": "CPU", "locality": "LOCAL"}
            else:
                most, fields = MOST_ANNOUNCED, {"medium": "STORAGE", "ownership": named.name}
            self._tiers.append(_AnnouncedTier(block_events, most, **fields))
        self._described: OrderedDict[bytes, _BlockDescription] = OrderedDict()
        self._most_described = 2 * slots + MOST_AHEAD

    @property
    def described_parts(self) -> int:
        """Parts of blocks that are described, held or expected."""
        return len(self._described)

    @property
    def tracked_parts(self) -> int:
        """Parts of blocks that a tier holds, counted for each tier."""
        return sum(map(len, self._tiers))

    def describe(
        self, request: Request, group: KeptGroup, blocks: Sequence[int], keys: Sequence[bytes]
    ) -> None:
        if not blocks:
            return
        described, parts, size = self._described, self._parts[group.index], group.block_tokens
        begin = max(0, blocks[0] - 1)
        hashes = group.hashes(request.block_hashes, begin, blocks[-1] + 1)
        lora = request.lora_request
        for number, at in enumerate(blocks):
            of_block = tuple(keys[number * parts : (number + 1) * parts])
            block = described.get(of_block[0])
            if block is None:
                start, end = at * size, (at + 1) * size
                block = _BlockDescription(
                    group,
                    of_block,
                    hash=hashes[at - begin],
                    parent_hash=hashes[at - begin - 1] if at else None,
                    tokens=request.all_token_ids[start:end],
                    lora=(lora.adapter_id, lora.name) if lora else (None, None),
                    extra=self._extra_keys(request, start, end, 0)[0],
                )
            for key in of_block:
                described[key] = block
                described.move_to_end(key)
        while len(described) > self._most_described:
            described.popitem(last=False)

    def take(self) -> Sequence[KVCacheEvent]:
        return [event for tier in self._tiers for event in self._take_tier(tier)]

    def _take_tier(self, tier: _AnnouncedTier) -> Iterator[KVCacheEvent]:
        for stored, keys in tier.block_events.take():
            if keys is None:
                yield from self._remove(tier, [*tier.held, *tier.undescribed])
            elif stored:
                yield from self._store(tier, keys)
            else:
                yield from self._remove(tier, keys)
        if tier.undescribed:
            described = [key for key in tier.undescribed if key in self._described]
            yield from self._store(tier, described)
        surplus = max(0, len(tier.held) - tier.most)
        yield from self._remove(tier, list(islice(tier.held, surplus)))
        while len(tier.undescribed) > tier.most:
            tier.undescribed.popitem(last=False)

    def _store(self, tier: _AnnouncedTier, keys: Collection[bytes]) -> Iterator[KVCacheEvent]:
        """Announce blocks, each segment of a chain in one event for each of vLLM's groups."""
        segment: list[_BlockDescription] = []
        for key in keys:
            if key in tier.held:
                tier.held.move_to_end(key)
                continue
            block = self._described.get(key)
            if block is None:
                tier.undescribed[key] = None
                continue
            tier.held[key] = block
            tier.undescribed.pop(key, None)
            if not tier.has_all(block):
                continue
            if segment and not (
                block.group is segment[-1].group and block.parent_hash == segment[-1].hash
            ):
                yield from self._stored_events(tier, segment)
                segment = []
            segment.append(block)
        if segment:
            yield from self._stored_events(tier, segment)

    def _stored_events(
        self, tier: _AnnouncedTier, segment: Sequence[_BlockDescription]
    ) -> Iterator[KVCacheEvent]:
        [first, *_] = segment
        for member in first.group.members:
            yield self._event(
                "BlockStored",
                block_hashes=[self._hash(block.hash) for block in segment],
                parent_block_hash=first.parent_hash and self._hash(first.parent_hash),
                token_ids=[token for block in segment for token in block.tokens],
                block_size=first.group.block_tokens,
                lora_id=first.lora[0],
                lora_name=first.lora[1],
                extra_keys=self._untag([block.extra for block in segment]),
                **self._group_fields[member],
                **tier.fields,
            )

    def _remove(self, tier: _AnnouncedTier, keys: Collection[bytes]) -> Iterator[KVCacheEvent]:
        """Announce the removal of blocks, in one event for each of vLLM's groups."""
        removed: dict[int, list[Any]] = {}
        for key in keys:
            tier.undescribed.pop(key, None)
            block = tier.held.get(key)
            if block is None:
                continue
            if tier.has_all(block):
                for member in block.group.members:
                    removed.setdefault(member, []).append(self._hash(block.hash))
            del tier.held[key]
        for member, hashes in removed.items():
            yield self._event("BlockRemoved", block_hashes=hashes, group_idx=member, **tier.fields)

    def _event(self, name: str, **fields: object) -> KVCacheEvent:
        """Return an event with the fields that this vLLM supports."""
        kind = getattr(self._kv_events, name)
        return kind(**{name: fields[name] for name in kind.__struct_fields__ if name in fields})


def _group_fields(kv_cache_config: KVCacheConfig, member: int) -> dict[str, object]:
    """Return the fields of an event about one of vLLM's groups."""
    from vllm.v1 import kv_cache_interface

    spec = kv_cache_config.kv_cache_groups[member].kv_cache_spec
    return {
        "group_idx": member,
        "kv_cache_spec_kind": kv_cache_interface.get_kv_cache_spec_kind(spec).value,
        "kv_cache_spec_sliding_window": kv_cache_interface.get_kv_cache_spec_sliding_window(spec),
    }
