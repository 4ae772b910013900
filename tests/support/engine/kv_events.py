"""Scenarios for an engine that publishes KV events, which a subscriber applies.

The subscriber knows nothing but what it receives; it checks of every block that its tokens, its
parent and its extra keys give its hash.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tests.support.engine.engine import BLOCK, Engine, prompt
from tests.support.engine.process import Scenario

LONG_MS = 20_000
BELOW = "disk"
Place = tuple[str, str | None, int]  # medium, tier below L1, vLLM's KV cache group


class Subscriber:
    """Tracks the blocks of one engine, as a router does, from its events."""

    def __init__(self, engine: Engine) -> None:
        import msgspec
        import zmq
        from vllm.distributed.kv_events import KVEventBatch
        from vllm.utils.hashing import get_hash_fn_by_name

        self._decode = msgspec.msgpack.Decoder(KVEventBatch).decode
        self._socket: Any = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(engine.scheduler.get_kv_event_publisher_config().endpoint)
        self._socket.subscribe(b"")
        algorithm = engine.core.vllm_config.cache_config.prefix_caching_hash_algo
        self._digest = get_hash_fn_by_name(algorithm)
        self.held: dict[Place, set[bytes]] = {}
        self.kinds: dict[int, set[tuple[str, int | None]]] = {}  # and windows, by group
        self.received = self.published = 0  # batches
        publisher = engine.scheduler.kv_event_publisher
        publish = publisher.publish

        def counted(batch: Any) -> None:
            self.published += 1
            publish(batch)

        publisher.publish = counted
        self.hear: dict[str, Callable[[Any], None]] = {
            "BlockStored": self.stored,
            "BlockRemoved": self.removed,
            "AllBlocksCleared": self.cleared,
        }

    def receive(self, timeout_ms: int) -> bool:
        """Apply the next batch; return whether one arrived."""
        if not self._socket.poll(timeout_ms):
            return False
        _, _, payload = self._socket.recv_multipart()
        self.received += 1
        for event in self._decode(payload).events:
            self.hear[type(event).__name__](event)
        return True

    def sync(self) -> None:
        """Apply every batch that was published until now."""
        while self.received < self.published:
            assert self.receive(LONG_MS), "a batch was lost"

    def at(self, medium: str, tier: str | None = None, group: int = 0) -> set[bytes]:
        return self.held.setdefault((medium, tier, group), set())

    def stored(self, event: Any) -> None:
        from vllm.v1.core import kv_cache_utils

        tags = hasattr(kv_cache_utils, "to_event_extra_keys")  # before it, hashes had no tags
        if event.medium == "GPU" and len(event.token_ids) > BLOCK * len(event.block_hashes):
            return  # vLLM's own event of a window that leaves out blocks has the tokens of all
        assert event.block_size == BLOCK
        assert len(event.token_ids) == BLOCK * len(event.block_hashes)
        kind = event.kv_cache_spec_kind, event.kv_cache_spec_sliding_window
        self.kinds.setdefault(event.group_idx, set()).add(kind)
        parent = event.parent_block_hash
        for at, key in enumerate(event.block_hashes):
            extra = event.extra_keys[at] if event.extra_keys else None
            if extra and tags:
                extra = [("cache_salt", each) for each in extra]
            tokens = event.token_ids[at * BLOCK : (at + 1) * BLOCK]
            hashed = tuple(extra) if extra else None
            assert key == kv_cache_utils.hash_block_tokens(self._digest, parent, tokens, hashed)
            parent = key
        held = self.at(event.medium, event.ownership, event.group_idx)
        if event.medium != "GPU":
            assert held.isdisjoint(event.block_hashes), "announced twice"
            assert (event.locality == "LOCAL") == (event.medium == "CPU")
        held.update(event.block_hashes)

    def removed(self, event: Any) -> None:
        held = self.at(event.medium, event.ownership, event.group_idx)
        if event.medium != "GPU":
            assert held.issuperset(event.block_hashes), "removed before it was announced"
        held.difference_update(event.block_hashes)

    def cleared(self, event: Any) -> None:
        for group in self.kinds:  # the event is about vLLM's own cache only
            self.at("GPU", group=group).clear()


@cache
def subscriber(engine: Engine) -> Subscriber:
    """Return the subscriber of an engine, which has missed no event since the caches were empty."""
    found = Subscriber(engine)
    hear, found.hear = found.hear, dict.fromkeys(found.hear, lambda event: None)
    while not found.received:
        engine.complete(prompt("is it subscribed", 3 * BLOCK), tokens=1)
        engine.reset_all_caches()
        found.receive(50)
    engine.complete(prompt("the last", 3), tokens=1)  # its steps publish the reset
    while found.receive(200):
        pass
    found.received = found.published  # vLLM published the first before the subscription
    found.hear = hear
    return found


def ready(engine: Engine) -> set[bytes]:
    """Return the keys that L1 holds."""
    return set(engine.stack.front.index.ready())


def written(engine: Engine) -> set[bytes]:
    """Return the keys that the disk holds of this engine's namespace."""
    [lower] = engine.stack.lower.tiers
    space = lower.namespace
    held = list(lower.channel.tier.inner.index.ready())
    return {name[len(space) :] for name in held if name.startswith(space)}


def step(engine: Engine) -> None:
    """Make vLLM publish all events until now, which it does in its steps."""
    assert engine.stack.flush(60)
    engine.complete(prompt("short", 3), tokens=1)


def l1_events(engine: Engine) -> dict[str, Any]:
    """Compare events and L1 after each of many requests: new, repeated, salted, evicted."""
    router = subscriber(engine)
    wrong = []
    for turn in range(4):
        for user in range(5):
            asked = prompt(f"user {user}", (6 + 2 * turn) * BLOCK + 5)
            engine.complete(asked, tokens=2, salt=f"salt {user}" if user % 2 else None)
            engine.reset_own_cache()
            router.sync()
            if router.at("CPU") != ready(engine):
                wrong.append([turn, user])
    stats = engine.l1_stats
    return {"wrong": wrong, "evicted": stats.evicted_blocks, "held": len(router.at("CPU"))}


def disk_events(engine: Engine) -> dict[str, Any]:
    """The events of a block that the disk lost by itself come with the next request for it."""
    router = subscriber(engine)
    chains = []
    for user in range(8):
        engine.add("names", prompt(f"disk {user}", 9 * BLOCK + 3), tokens=1)
        chains.append(list(engine.request("names").block_hashes))
        engine.drain()
        step(engine)  # a full write queue would drop the next chain
    router.sync()
    known = router.at("STORAGE", BELOW)
    lost, missing = len(known - written(engine)), len(written(engine) - known)
    wrong = []
    engine.stack.front.clear()  # so that every block is looked up on disk
    for number, chain in enumerate(chains):
        engine.stack.match(chain).result(60)
        step(engine)
        router.sync()
        if known.intersection(chain) != written(engine).intersection(chain):
            wrong.append(number)
    return {"lost": lost, "missing": missing, "wrong": wrong, "left": len(known - written(engine))}


def reset_events(engine: Engine) -> dict[str, Any]:
    """Count the known blocks before a reset of everything, after it, and after new requests."""
    router = subscriber(engine)
    engine.complete(prompt("before", 3 * BLOCK))
    step(engine)
    router.sync()
    before = [len(router.at("CPU")), len(router.at("STORAGE", BELOW))]
    engine.reset_all_caches()
    step(engine)
    router.sync()
    emptied = [len(router.at("CPU")), len(router.at("STORAGE", BELOW))]
    engine.complete(prompt("after", 3 * BLOCK + 1), tokens=2)
    step(engine)
    router.sync()
    after = [len(router.at("CPU")), len(router.at("STORAGE", BELOW))]
    return {"before": before, "emptied": emptied, "after": after}


def events_of_groups(engine: Engine) -> dict[str, Any]:
    """Compare events and L1 for each of vLLM's groups, in a model of two kept groups.

    The keys of windows are two bytes longer than vLLM's hashes.
    """
    router = subscriber(engine)
    wrong = []
    for turn in range(4):
        for user in range(4):
            engine.complete(prompt(f"user {user}", (4 + 2 * turn) * BLOCK + 5), tokens=2)
            engine.reset_own_cache()
            router.sync()
            keys = ready(engine)
            for group, [kind] in router.kinds.items():
                suffix = 2 if kind[0] == "sliding_window" else 0
                held = {key[:32] for key in keys if len(key) == 32 + suffix}
                if router.at("CPU", group=group) != held:
                    wrong.append([turn, user, group])
    kinds = sorted([group, *kind] for group, [kind] in router.kinds.items())
    return {"wrong": wrong, "kinds": kinds, "evicted": engine.l1_stats.evicted_blocks}


SCENARIOS: tuple[Scenario, ...] = (l1_events, disk_events, reset_events)
