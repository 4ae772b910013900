"""KV events: which blocks the tiers hold, for routers that send requests by prefix.

::

    --kv-events-config '{"enable_kv_cache_events": true, "publisher": "zmq"}'

    L1       BlockStored, BlockRemoved   medium CPU, locality LOCAL
    below    BlockStored, BlockRemoved   medium STORAGE, ownership: the tier's name in the profile

Invariants:

1. An event describes itself: every stored block has its tokens, its parent block, and the extra
   keys of its hash. A block that was never described is not announced.
2. A block is announced once, and its removal only after that. The announced blocks of L1 are those
   that L1 holds. A block of a lower tier is announced when the stack stores it or finds it there.
   If the tier evicts the block by itself, its removal is announced when a request misses it.
3. Tables are bounded: by the slots of L1, and for each lower tier by ``MOST_ANNOUNCED`` blocks.
   Beyond that, the blocks that were seen longest ago are removed.
4. With events off, nothing is recorded, and a request costs one empty call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from kvcache.events import BlockEventLog
from kvcache.stack import Stack

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.request import Request

    from kvcache.connectors.vllm.groups import CacheGroup

MOST_ANNOUNCED: Final = 1 << 18
MOST_AHEAD: Final = 1 << 14  # blocks described before they are stored, of waiting requests

HashesOf = Callable[["Request", list[bytes]], list[bytes]]


def _same_hashes(_: Request, keys: list[bytes]) -> list[bytes]:
    return keys


class EventSource:
    """Publishes nothing: KV events are off."""

    def describe(
        self,
        request: Request,
        first: int,
        keys: list[bytes],
        parent: bytes | None,
        hashes_of: HashesOf = _same_hashes,
    ) -> None:
        """Describe blocks of a request, for events about them.

        Args:
            request: the request.
            first: position of its first described block.
            keys: of that block and the ones after it.
            parent: key of the block before; ``None`` for the first block of a chain.
            hashes_of: returns vLLM's hashes for keys of the request's blocks.
        """

    def take(self) -> Sequence[KVCacheEvent]:
        """Return the events since the last call."""
        return ()


def events_of(vllm_config: VllmConfig, group: CacheGroup, stack: Stack) -> EventSource:
    """Return the events of ``stack``; none if the engine's KV events are off."""
    config = getattr(vllm_config, "kv_events_config", None)
    if config is None or not config.enable_kv_cache_events:
        return EventSource()
    return StackEvents(group, stack)


@dataclass(frozen=True, slots=True)
class _BlockDescription:
    """The fields of a block in an event.

    Attributes:
        hash: vLLM's, of the block.
        parent_hash: vLLM's, of the block before; ``None`` for the first block of a chain.
        parent: key of the block before.
        lora: id and name of the adapter.
        extra: extra keys of the hash.
    """

    hash: bytes
    parent_hash: bytes | None
    parent: bytes | None
    tokens: Sequence[int]
    lora: tuple[int | None, str | None]
    extra: tuple[Any, ...] | None


class _AnnouncedTier:
    """The blocks of a tier: those announced, with vLLM's hashes, and those not described yet."""

    def __init__(self, block_events: BlockEventLog, most: int, **fields: str) -> None:
        self.block_events = block_events
        self.most = most
        self.fields = fields
        self.announced: OrderedDict[bytes, bytes] = OrderedDict()
        self.undescribed: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.announced) + len(self.undescribed)


class StackEvents(EventSource):
    """Publishes the events of a stack.

    Args:
        group: the KV cache group of its blocks.
        stack: its tiers are announced.
        kv_events: the module of vLLM's event classes.
    """

    def __init__(self, group: CacheGroup, stack: Stack, *, kv_events: Any = None) -> None:
        from vllm.distributed import kv_events as of_vllm
        from vllm.v1.core import kv_cache_utils

        self._kv_events = kv_events or of_vllm
        self._hash = kv_cache_utils.maybe_convert_block_hash
        self._extra_keys = kv_cache_utils.generate_block_hash_extra_keys
        # Not in every vLLM since 0.29. Before it, extra keys had no tags.
        self._untag = getattr(kv_cache_utils, "to_event_extra_keys", list)
        self._group = group
        self._kind = group.event_kind
        [(_, l1_events), *lower] = stack.subscribe_events()
        slots = stack.front.slab.slots
        self._tiers = [_AnnouncedTier(l1_events, slots, medium="CPU", locality="LOCAL")]
        for named, block_events in lower:
            fields = {"medium": "STORAGE", "ownership": named.name}
            self._tiers.append(_AnnouncedTier(block_events, MOST_ANNOUNCED, **fields))
        self._described: OrderedDict[bytes, _BlockDescription] = OrderedDict()
        self._most_described = 2 * slots + MOST_AHEAD

    @property
    def described_blocks(self) -> int:
        """Descriptions that are kept, of blocks held or expected."""
        return len(self._described)

    @property
    def tracked_blocks(self) -> int:
        """Blocks that are announced, or held and not described, counted for each tier."""
        return sum(map(len, self._tiers))

    def describe(
        self,
        request: Request,
        first: int,
        keys: list[bytes],
        parent: bytes | None,
        hashes_of: HashesOf = _same_hashes,
    ) -> None:
        parent_hash = hashes_of(request, [parent])[0] if parent else None
        size = self._group.block_tokens
        lora = request.lora_request
        for at, (key, name) in enumerate(zip(keys, hashes_of(request, keys), strict=True), first):
            if key in self._described:
                self._described.move_to_end(key)
            else:
                start, end = at * size, (at + 1) * size
                self._described[key] = _BlockDescription(
                    name,
                    parent_hash,
                    parent=parent,
                    tokens=request.all_token_ids[start:end],
                    lora=(lora.adapter_id, lora.name) if lora else (None, None),
                    extra=self._extra_keys(request, start, end, 0)[0],
                )
            parent, parent_hash = key, name
        while len(self._described) > self._most_described:
            self._described.popitem(last=False)

    def take(self) -> Sequence[KVCacheEvent]:
        return [event for tier in self._tiers for event in self._take_tier(tier)]

    def _take_tier(self, tier: _AnnouncedTier) -> Iterator[KVCacheEvent]:
        for stored, keys in tier.block_events.take():
            if keys is None:
                yield from self._remove(tier, [*tier.announced, *tier.undescribed])
            elif stored:
                yield from self._store(tier, keys)
            else:
                yield from self._remove(tier, keys)
        if tier.undescribed:
            described = [key for key in tier.undescribed if key in self._described]
            yield from self._store(tier, described)
        surplus = max(0, len(tier.announced) - tier.most)
        yield from self._remove(tier, list(islice(tier.announced, surplus)))
        while len(tier.undescribed) > tier.most:
            tier.undescribed.popitem(last=False)

    def _store(self, tier: _AnnouncedTier, keys: Collection[bytes]) -> Iterator[KVCacheEvent]:
        """Announce blocks, each segment of a chain in one event."""
        segment: list[bytes] = []
        for key in keys:
            if key in tier.announced:
                tier.announced.move_to_end(key)
                continue
            block = self._described.get(key)
            if block is None:
                tier.undescribed[key] = None
                continue
            if segment and block.parent != segment[-1]:
                yield self._stored_event(tier, segment)
                segment = []
            segment.append(key)
            tier.announced[key] = block.hash
            tier.undescribed.pop(key, None)
        if segment:
            yield self._stored_event(tier, segment)

    def _stored_event(self, tier: _AnnouncedTier, segment: Sequence[bytes]) -> KVCacheEvent:
        blocks = [self._described[key] for key in segment]
        [first, *_] = blocks
        return self._event(
            "BlockStored",
            block_hashes=[self._hash(block.hash) for block in blocks],
            parent_block_hash=first.parent_hash and self._hash(first.parent_hash),
            token_ids=[token for block in blocks for token in block.tokens],
            block_size=self._group.block_tokens,
            lora_id=first.lora[0],
            lora_name=first.lora[1],
            extra_keys=self._untag([block.extra for block in blocks]),
            group_idx=self._group.index,
            kv_cache_spec_kind=self._kind,
            **tier.fields,
        )

    def _remove(self, tier: _AnnouncedTier, keys: Collection[bytes]) -> Iterator[KVCacheEvent]:
        hashes = [self._hash(tier.announced.pop(key)) for key in keys if key in tier.announced]
        for key in keys:
            tier.undescribed.pop(key, None)
        if hashes:
            yield self._event(
                "BlockRemoved", block_hashes=hashes, group_idx=self._group.index, **tier.fields
            )

    def _event(self, name: str, **fields: object) -> KVCacheEvent:
        """Return an event with the fields that this vLLM supports."""
        kind = getattr(self._kv_events, name)
        return kind(**{name: fields[name] for name in kind.__struct_fields__ if name in fields})
