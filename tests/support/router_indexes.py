"""What routers believe of the blocks of engines, from the payloads that vLLM publishes.

Each index follows the source of one router, in the files and at the commit that its docstring
names. A prefix is the tokens of a prompt up to the end of a block; the routers' own hashes of it
are left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Prefix = tuple[int, ...]

MAIN_KINDS = ("full_attention", "mla_attention", "sink_full_attention")
"""llm-d and Dynamo index the prefixes of groups of these kinds alone."""


def events_of_payload(payload: bytes) -> list[Any]:
    """Decode a batch, an array of time, events and rank, without vLLM's classes."""
    import msgspec

    _, events, *_ = msgspec.msgpack.decode(payload)
    return list(events)


def prefixes(prompt: Sequence[int], block: int) -> Iterator[Prefix]:
    """Yield the prefix of a prompt up to the end of each full block."""
    for end in range(block, len(prompt) + 1, block):
        yield tuple(prompt[:end])


class LlmdIndex:
    """llm-d-router, commit ebab687 of 2026-08-21.

    `pkg/kvevents/engineadapter/vllm_adapter.go`, `common.go`, `pkg/kvevents/pool.go`,
    `event_dedup_filter.go`, `pkg/kvcache/kvblock_scorer.go`, `backend.go`.

    Args:
        weights: `kvCacheBackendConfigs`, by name.
        unknown: the weight of other tiers: 1.0, and 0.0 from pull request 2809 (2026-09) on.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, unknown: float = 1.0) -> None:
        self._weights = {"gpu": 1.0, "cpu": 0.8} if weights is None else weights
        self._unknown = unknown
        self._prefixes: dict[int, Prefix] = {}
        self.held: defaultdict[Prefix, set[tuple[str, str, Any]]] = defaultdict(set)
        self._references: Counter[tuple[str, str, Any, int]] = Counter()
        self.models: set[str] = set()

    def receive(self, topic: str, payload: bytes) -> None:
        parts = topic.split("@")
        pod, model = parts[1:] if len(parts) == 3 else (topic, "")
        self.models.add(model)
        for event in events_of_payload(payload):
            if event["type"] == "AllBlocksCleared":  # of any tier
                for entries in self.held.values():
                    entries -= {entry for entry in entries if entry[0] == pod}
                continue
            entry = pod, (event["medium"] or "gpu").lower(), event.get("group_idx")
            hashes = list(map(self._hash, event["block_hashes"]))
            if event["type"] == "BlockStored":
                self._store(event, entry, hashes)
            else:
                self._remove(entry, hashes)

    def _store(self, event: Mapping[str, Any], entry: tuple[str, str, Any], hashes: Any) -> None:
        if event.get("group_idx") is not None and event["kv_cache_spec_kind"] not in MAIN_KINDS:
            return
        parent: Prefix = ()
        if event["parent_block_hash"] is not None:
            known = self._prefixes.get(self._hash(event["parent_block_hash"]))
            if known is None:
                return
            parent = known
        size = event["block_size"]
        for at, each in enumerate(hashes):
            parent += tuple(event["token_ids"][at * size : (at + 1) * size])
            self._prefixes[each] = parent
            self.held[parent].add(entry)
            self._references[*entry, each] += 1

    def _remove(self, entry: tuple[str, str, Any], hashes: Sequence[int]) -> None:
        for each in hashes:
            self._references[*entry, each] -= 1
            if self._references[*entry, each] <= 0 and each in self._prefixes:
                self.held[self._prefixes[each]].discard(entry)

    @staticmethod
    def _hash(raw: int | bytes) -> int:
        return raw % 2**64 if isinstance(raw, int) else int.from_bytes(raw[-8:], "big")

    def score(self, pod: str, prompt: Sequence[int], block: int) -> float:
        """Sum over the leading blocks that the pod holds the weight of its best tier."""
        total = 0.0
        for prefix in prefixes(prompt, block):
            tiers = [tier for holder, tier, _ in self.held[prefix] if holder == pod]
            if not tiers:
                break
            total += max(self._weights.get(tier, self._unknown) for tier in tiers)
        return total


class AibrixIndex:
    """AIBrix's gateway, commit e3e10f9 of 2026-08-23.

    `pkg/cache/kvcache/msgpack_decoder.go`, `pkg/kvevent/handler.go`,
    `pkg/utils/syncprefixcacheindexer/sync_hash.go`.

    Args:
        reads_maps: whether events may be maps, as vLLM 0.28 and newer publish them: with commit
            059fe5e (2026-08-20, a pull request). Without it, a map is an error of the whole batch.
        removes_for_all: whether a removal is one for all pods; false from pull request 2723
            (2026-09) on.
    """

    def __init__(self, *, reads_maps: bool = True, removes_for_all: bool = True) -> None:
        self._reads_maps = reads_maps
        self._removes_for_all = removes_for_all
        self._keys: dict[int, Any] = {}
        self._pods: defaultdict[Any, set[str]] = defaultdict(set)

    def receive(self, pod: str, payload: bytes) -> None:
        events = events_of_payload(payload)
        if not self._reads_maps and any(isinstance(event, dict) for event in events):
            raise ValueError("event 0: expected msgpack array, got map")
        for event in events:
            if event["type"] == "BlockStored":  # the medium is not read
                size, parent = event["block_size"], self._keys.get(event["parent_block_hash"])
                for at, each in enumerate(event["block_hashes"]):
                    tokens = tuple(event["token_ids"][at * size : (at + 1) * size])
                    # The parent is the event's, for each of its blocks.
                    self._pods[self._keys.setdefault(each, (parent, tokens))].add(pod)
            elif event["type"] == "BlockRemoved":
                for each in event["block_hashes"]:
                    self._remove(pod, self._keys.get(each), each)
            else:
                for pods in self._pods.values():
                    pods.discard(pod)

    def _remove(self, pod: str, key: Any, engine_hash: int) -> None:
        if self._removes_for_all:
            self._pods.pop(key, None)
            self._keys.pop(engine_hash, None)
        else:
            self._pods[key].discard(pod)

    def matched_blocks(self, pod: str, prompt: Sequence[int], block: int) -> int:
        """Return how many leading blocks of the prompt the pod is believed to hold."""
        key: Any = None
        for count, end in enumerate(range(block, len(prompt) + 1, block)):
            key = key, tuple(prompt[end - block : end])
            if pod not in self._pods[key]:
                return count
        return len(prompt) // block


_DYNAMO_MEDIA = {
    "GPU": "device", "DEVICE": "device", "CPU": "host", "CPU_PINNED": "host", "CPU_TIER1": "host",
    "CPU_TIER2": "disk", "DISK": "disk", "NVME": "disk",
}  # fmt: skip


class DynamoIndex:
    """Dynamo's router: `lib/kv-router/src/protocols.rs`, `zmq_wire/{mod,convert,types,filter}.rs`.

    Args:
        is_new: whether `STORAGE` is the tier Disk, and an event with another medium, or with an
            owner that Dynamo does not know, is dropped. Before (commit 2bd0a36), each unknown
            medium is the tier Device.
    """

    def __init__(self, *, is_new: bool) -> None:
        self._is_new = is_new
        self._kinds: dict[int, str] = {}
        self.held: defaultdict[str, set[int]] = defaultdict(set)

    def receive(self, payload: bytes) -> None:
        for event in events_of_payload(payload):
            if event["type"] == "AllBlocksCleared":
                self.held.clear()
                continue
            if any(isinstance(each, bytes) for each in event["block_hashes"]):
                raise ValueError("data did not match any variant of untagged enum BlockHashValue")
            tier = self._tier(event)
            if tier is None:
                continue
            if "kv_cache_spec_kind" in event:
                self._kinds[event["group_idx"]] = event["kv_cache_spec_kind"]
            if self._kinds.get(event.get("group_idx"), "full_attention") not in MAIN_KINDS:
                continue
            if event["type"] == "BlockStored":
                self.held[tier].update(event["block_hashes"])
            else:
                self.held[tier].difference_update(event["block_hashes"])

    def _tier(self, event: Mapping[str, Any]) -> str | None:
        if event.get("locality") not in (None, "LOCAL"):
            return None
        medium = event["medium"] or "GPU"
        if not self._is_new:
            return _DYNAMO_MEDIA.get(medium, "device")
        if event.get("ownership") not in (None, "kvcr"):
            return None
        return _DYNAMO_MEDIA.get(medium, "disk" if medium == "STORAGE" else None)
