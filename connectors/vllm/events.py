"""KV events: which blocks the tiers hold, for routers that send a request where its prefix is.

::

    --kv-events-config '{"enable_kv_cache_events": true, "publisher": "zmq"}'

    L1       BlockStored, BlockRemoved   medium CPU, locality LOCAL
    below    BlockStored, BlockRemoved   medium STORAGE, ownership: the tier's name in the profile

Always true here:

* An event describes itself: every stored block comes with its tokens, the block it continues, and
  what else its hash covers. What cannot be described is not announced.
* A block is announced once, and removed only after it was announced. Of L1, what is announced is
  what it holds. Of a tier below, it is what the tier was seen to hold: what it loses by itself is
  removed when it is next asked for that block and denies it.
* Tables are bounded: by the slots of L1, and for a tier below by ``SAID`` blocks, of which those
  that were not seen for longest are then removed.
* With events off nothing is written down, and a request costs a call that does nothing.
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
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

SAID: Final = 1 << 18
AHEAD: Final = 1 << 14  # blocks that are described before they come, of requests that wait


HashesOf = Callable[["Request", list[bytes]], list[bytes]]


def _as_they_are(_: Request, keys: list[bytes]) -> list[bytes]:
    return keys


class EventSource:
    """Publishes nothing: what there is when vLLM's events are off."""

    def describe(
        self,
        request: Request,
        first: int,
        keys: list[bytes],
        parent: bytes | None,
        hashes_of: HashesOf = _as_they_are,
    ) -> None:
        """``keys`` are those of the blocks of ``request`` from number ``first`` on.

        ``parent`` is the key of the block before; ``None`` for a chain's first. ``hashes_of`` gives
        vLLM's hashes of the blocks with some keys of a request.
        """

    def take(self) -> Sequence[KVCacheEvent]:
        """What happened since this was called last."""
        return ()


def events_of(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, stack: Stack) -> EventSource:
    """The events of ``stack``, if this engine publishes any."""
    config = getattr(vllm_config, "kv_events_config", None)
    if config is None or not config.enable_kv_cache_events:
        return EventSource()
    return Published(kv_cache_config.kv_cache_groups[0].kv_cache_spec, stack)


@dataclass(frozen=True, slots=True)
class _Block:
    """What an event says of a block."""

    hash: bytes
    parent_hash: bytes | None
    parent: bytes | None  # its key
    tokens: Sequence[int]
    lora: tuple[int | None, str | None]  # id and name
    extra: tuple[Any, ...] | None  # what else its hash covers


class _Place:
    """A tier: what it was said to hold, and what it holds that nobody could describe so far."""

    def __init__(self, journal: BlockEventLog, most: int, **fields: str) -> None:
        self.journal = journal
        self.most = most
        self.fields = fields
        self.said: OrderedDict[bytes, bytes] = OrderedDict()  # with their hashes
        self.nameless: OrderedDict[bytes, None] = OrderedDict()


class Published(EventSource):
    """The events of a stack whose blocks are of this spec."""

    def __init__(self, spec: Any, stack: Stack) -> None:
        from vllm.distributed import kv_events
        from vllm.v1 import kv_cache_interface
        from vllm.v1.core import kv_cache_utils

        self._made = kv_events
        self._hash = kv_cache_utils.maybe_convert_block_hash
        self._extra_keys = kv_cache_utils.generate_block_hash_extra_keys
        # Two that are not in every vLLM since 0.29; before the first, keys had no tags.
        self._untagged = getattr(kv_cache_utils, "to_event_extra_keys", list)
        kind_of = getattr(kv_cache_interface, "get_kv_cache_spec_kind", None)
        self._kind = kind_of(spec).value if kind_of else "full_attention"
        self._block_tokens = spec.block_size
        [(_, journal), *below] = stack.subscribe_events()
        slots = stack.front.slab.slots
        self._places = [_Place(journal, slots, medium="CPU", locality="LOCAL")]
        for named, journal in below:
            self._places.append(_Place(journal, SAID, medium="STORAGE", ownership=named.name))
        self._described: OrderedDict[bytes, _Block] = OrderedDict()
        self._most_described = 2 * slots + AHEAD

    def describe(
        self,
        request: Request,
        first: int,
        keys: list[bytes],
        parent: bytes | None,
        hashes_of: HashesOf = _as_they_are,
    ) -> None:
        before = hashes_of(request, [parent])[0] if parent else None
        size = self._block_tokens
        lora = request.lora_request
        for at, (key, name) in enumerate(zip(keys, hashes_of(request, keys), strict=True), first):
            if key in self._described:
                self._described.move_to_end(key)
            else:
                start, end = at * size, (at + 1) * size
                self._described[key] = _Block(
                    name,
                    before,
                    parent=parent,
                    tokens=request.all_token_ids[start:end],
                    lora=(lora.adapter_id, lora.name) if lora else (None, None),
                    extra=self._extra_keys(request, start, end, 0)[0],
                )
            parent, before = key, name
        while len(self._described) > self._most_described:
            self._described.popitem(last=False)

    def take(self) -> Sequence[KVCacheEvent]:
        return [event for place in self._places for event in self._at(place)]

    def _at(self, place: _Place) -> Iterator[KVCacheEvent]:
        for came, keys in place.journal.take():
            if keys is None:
                yield from self._removed(place, [*place.said, *place.nameless])
            elif came:
                yield from self._stored(place, keys)
            else:
                yield from self._removed(place, keys)
        if place.nameless:
            named = [key for key in place.nameless if key in self._described]
            yield from self._stored(place, named)
        surplus = max(0, len(place.said) - place.most)
        yield from self._removed(place, list(islice(place.said, surplus)))
        while len(place.nameless) > place.most:
            place.nameless.popitem(last=False)

    def _stored(self, place: _Place, keys: Collection[bytes]) -> Iterator[KVCacheEvent]:
        """Blocks that continue each other in one event."""
        run: list[bytes] = []
        for key in keys:
            if key in place.said:
                place.said.move_to_end(key)
                continue
            block = self._described.get(key)
            if block is None:
                place.nameless[key] = None
                continue
            if run and block.parent != run[-1]:
                yield self._run(place, run)
                run = []
            run.append(key)
            place.said[key] = block.hash
            place.nameless.pop(key, None)
        if run:
            yield self._run(place, run)

    def _run(self, place: _Place, keys: Sequence[bytes]) -> KVCacheEvent:
        blocks = [self._described[key] for key in keys]
        [first, *_] = blocks
        return self._event(
            "BlockStored",
            block_hashes=[self._hash(block.hash) for block in blocks],
            parent_block_hash=first.parent_hash and self._hash(first.parent_hash),
            token_ids=[token for block in blocks for token in block.tokens],
            block_size=self._block_tokens,
            lora_id=first.lora[0],
            lora_name=first.lora[1],
            extra_keys=self._untagged([block.extra for block in blocks]),
            group_idx=0,
            kv_cache_spec_kind=self._kind,
            **place.fields,
        )

    def _removed(self, place: _Place, keys: Collection[bytes]) -> Iterator[KVCacheEvent]:
        gone = [place.said.pop(key) for key in keys if key in place.said]
        for key in keys:
            place.nameless.pop(key, None)
        if gone:
            hashes = [self._hash(name) for name in gone]
            yield self._event("BlockRemoved", block_hashes=hashes, group_idx=0, **place.fields)

    def _event(self, name: str, **fields: object) -> KVCacheEvent:
        """An event with those of its fields that this vLLM knows."""
        kind = getattr(self._made, name)
        return kind(**{name: fields[name] for name in kind.__struct_fields__ if name in fields})
