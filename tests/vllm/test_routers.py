"""What routers learn from the KV events of an engine, by the rules of their own sources."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

pytest.importorskip("vllm")

import yaml
import zmq
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import BlockStored

from tests.support.group_hooks import needs_group_hooks
from tests.support.groups_walk import prepare_walk
from tests.support.played_groups import GroupsEngine
from tests.support.played_models import BLOCK, MODELS
from tests.support.played_scheduler import Play, write_config
from tests.support.router_indexes import AibrixIndex, DynamoIndex, LlmdIndex, events_of_payload

pytestmark = pytest.mark.engine

LONG_MS = 60_000
TOPIC = "kv@pod-1@llama"
PROMPT = list(range(1, 4 * BLOCK + 1))
BLOCKS = len(PROMPT) // BLOCK


@dataclass
class Published:
    """An engine and the payloads that it published, as its replay socket returns them."""

    engine: GroupsEngine
    replay: str
    batches: int = 0

    def __post_init__(self) -> None:
        publisher = self.engine.scheduler.kv_event_publisher
        publish = publisher.publish

        def count_and_publish(batch: Any) -> None:
            self.batches += 1
            publish(batch)

        publisher.publish = count_and_publish

    def ask(self, prompt: Sequence[int], name: str) -> None:
        """Run a request, and publish what write-behind stored afterwards."""
        self.engine.ask(name, [*prompt, 0], 1)
        self.engine.drain()
        assert self.engine.side.stack.flush(LONG_MS / 1000)
        self.engine.ask(f"{name}, then", [9], 1)
        self.engine.drain()

    def payloads(self) -> list[bytes]:
        """Return everything that was published, as AIBrix asks for it at its start."""
        socket: Any = zmq.Context.instance().socket(zmq.DEALER)
        with socket:
            socket.connect(self.replay)
            while len(found := self._replayed(socket)) < self.batches:
                pass  # vLLM's thread has not sent all of them yet
        return found

    def _replayed(self, socket: Any) -> list[bytes]:
        found: list[bytes] = []
        socket.send_multipart((b"", (0).to_bytes(8, "big")))
        while True:
            assert socket.poll(LONG_MS)
            *_, number, payload = socket.recv_multipart()
            if number == self.engine.scheduler.kv_event_publisher.END_SEQ:
                return found
            found.append(payload)


ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Advice:
    """What docs/vllm.md says to set for a router."""

    text: str

    @classmethod
    def of(cls, router: str) -> Advice:
        page = ROOT.joinpath("docs", "vllm.md").read_text(encoding="utf-8")
        [text] = re.findall(rf"^\*\*{router}\*\* .*?(?=^\*\*|^## )", page, re.MULTILINE | re.DOTALL)
        return cls(text)

    @property
    def announced(self) -> dict[str, bool]:
        """The arguments of `open_engine`."""
        hidden = re.findall(r"KVCACHE__(\w+)__ANNOUNCE=false", self.text)
        return {f"announce_{name.lower()}": False for name in hidden}

    @property
    def events(self) -> dict[str, Any]:
        """The JSON of `--kv-events-config`, which vLLM accepts."""
        [text] = re.findall(r"--kv-events-config '(.*?)'", self.text, re.DOTALL)
        config: dict[str, Any] = json.loads(text)
        KVEventsConfig(**config)
        return config

    @property
    def weights(self) -> dict[str, float]:
        [text] = re.findall(r"```yaml\n(.*?)```", self.text, re.DOTALL)
        [plugin] = yaml.safe_load(text)
        configs = plugin["parameters"]["indexerConfig"]["kvCacheBackendConfigs"]
        return {config["name"]: config["weight"] for config in configs}


@pytest.fixture
def open_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    prepare_walk(monkeypatch)
    monkeypatch.setenv("KVCACHE_PROFILE", "l1-disk")
    monkeypatch.setenv("KVCACHE__DISK__PATH", str(tmp_path / "kv"))
    monkeypatch.setenv("KVCACHE__DISK__CAPACITY", "1MiB")
    monkeypatch.setenv("KVCACHE__DISK__DEADLINE_S", "30")
    monkeypatch.setenv("KVCACHE__DISK__IF_SLOWER", "load")
    opened: list[GroupsEngine] = []

    def open_(
        *, announce_l1: bool = True, announce_disk: bool = True, model: str = "full"
    ) -> Published:
        monkeypatch.setenv("KVCACHE__L1__ANNOUNCE", str(announce_l1).lower())
        monkeypatch.setenv("KVCACHE__DISK__ANNOUNCE", str(announce_disk).lower())
        replay = f"ipc://{tmp_path}/replay"
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"ipc://{tmp_path}/events",
            "replay_endpoint": replay,
            "topic": TOPIC,
        }
        folder = write_config(tmp_path)
        opened.append(GroupsEngine(MODELS[model], folder, Random(7), Play(events=events)))
        published = Published(opened[0], replay)
        published.ask(PROMPT, "first")
        return published

    yield open_
    for engine in opened:
        engine.close()


def llmd_score(
    payloads: Sequence[bytes], *args: Any, topic: str = TOPIC, pod: str = "pod-1"
) -> Any:
    index = LlmdIndex(*args)
    for payload in payloads:
        index.receive(topic, payload)
    return index.score(pod, PROMPT, BLOCK)


def aibrix_blocks(payloads: Sequence[bytes], **rules: bool) -> int:
    index = AibrixIndex(**rules)
    for payload in payloads:
        index.receive("pod-1", payload)
    return index.matched_blocks("pod-1", PROMPT, BLOCK)


def dynamo_tiers(payloads: Sequence[bytes], *, is_new: bool) -> dict[str, int]:
    """Return how many blocks of the prompt are believed to be in each tier."""
    index = DynamoIndex(is_new=is_new)
    prompt: set[int] = set()
    for payload in payloads:
        index.receive(payload)
        for event in events_of_payload(payload):
            if event["type"] == "BlockStored" and len(event["token_ids"]) == len(PROMPT):
                prompt.update(event["block_hashes"])
    return {tier: len(prompt & held) for tier, held in index.held.items() if prompt & held}


def test_llmd_with_its_default_weights_takes_storage_for_the_gpu(open_engine: Any) -> None:
    advice = Advice.of("llm-d")
    published = open_engine(**advice.announced)
    assert llmd_score(published.payloads()) == BLOCKS * 1.0
    published.engine.lose_own_cache()
    published.ask([5], "later")
    payloads = published.payloads()
    assert llmd_score(payloads) == BLOCKS * 1.0  # of storage, which has no weight
    assert llmd_score(payloads, advice.weights) == pytest.approx(3.2)
    assert llmd_score(payloads, None, 0.0) == pytest.approx(3.2)
    published.engine.front.remove(published.engine.requests["first"].block_hashes)
    published.ask([6], "last")
    assert llmd_score(published.payloads(), advice.weights) == pytest.approx(1.2)


def test_llmd_takes_pod_and_model_from_the_topic(open_engine: Any) -> None:
    payloads = open_engine().payloads()
    index = LlmdIndex()
    index.receive(Advice.of("llm-d").events["topic"], payloads[0])
    assert index.models == {"MODEL"}
    assert index.score("POD", PROMPT, BLOCK) == BLOCKS
    assert llmd_score(payloads, topic="", pod="pod-1") == 0
    assert llmd_score(payloads, topic="", pod="") == BLOCKS


def test_aibrix_forgets_a_prefix_that_leaves_any_announced_tier(open_engine: Any) -> None:
    published = open_engine()
    assert aibrix_blocks(published.payloads())
    published.engine.front.remove(published.engine.requests["first"].block_hashes)
    published.ask([5], "later")
    payloads = published.payloads()
    assert dynamo_tiers(payloads, is_new=False)["device"] == BLOCKS  # the GPU has them
    assert aibrix_blocks(payloads) == aibrix_blocks(payloads, removes_for_all=False) == 0


def test_aibrix_without_announced_tiers_knows_the_gpu(open_engine: Any) -> None:
    advice = Advice.of("AIBrix")
    ports = advice.events["endpoint"], advice.events["replay_endpoint"]
    assert ports == ("tcp://*:5557", "tcp://*:5558")
    published = open_engine(**advice.announced)
    held = aibrix_blocks(published.payloads())
    assert held == 1  # of each event it matches the first block
    published.engine.front.remove(published.engine.requests["first"].block_hashes)
    published.ask([5], "later")
    assert aibrix_blocks(published.payloads()) == held
    published.engine.lose_own_cache()
    published.ask([6], "last")
    assert aibrix_blocks(published.payloads()) == 0
    media = {
        event["medium"] for payload in published.payloads() for event in events_of_payload(payload)
    }
    assert media == {"GPU"}


def test_aibrix_that_reads_arrays_alone_refuses_the_batches(open_engine: Any) -> None:
    with pytest.raises(ValueError, match="expected msgpack array"):
        aibrix_blocks(open_engine().payloads(), reads_maps=False)


def test_dynamo_before_it_knew_storage_takes_it_for_the_device(open_engine: Any) -> None:
    published = open_engine()
    everywhere = {"device": BLOCKS, "host": BLOCKS}
    if "ownership" not in BlockStored.__struct_fields__:  # before vLLM 0.32
        everywhere["disk"] = BLOCKS
    assert dynamo_tiers(published.payloads(), is_new=True) == everywhere
    published.engine.side.stack.clear()  # the GPU keeps its blocks
    published.ask([5], "later")
    payloads = published.payloads()
    assert dynamo_tiers(payloads, is_new=False) == {}
    assert dynamo_tiers(payloads, is_new=True) == {"device": BLOCKS}


def test_dynamo_before_it_knew_storage_is_right_without_lower_tiers(open_engine: Any) -> None:
    advice = Advice.of("Dynamo")
    assert "topic" not in advice.events
    published = open_engine(**advice.announced)
    published.engine.side.stack.clear()
    published.ask([5], "later")
    assert dynamo_tiers(published.payloads(), is_new=False) == {"device": BLOCKS}


@needs_group_hooks
def test_llmd_and_dynamo_index_the_group_of_full_attention_alone(open_engine: Any) -> None:
    published = open_engine(model="full+window")
    payloads = published.payloads()
    groups = {event["group_idx"] for payload in payloads for event in events_of_payload(payload)}
    assert len(groups) == 2
    assert llmd_score(payloads) == BLOCKS
    index = LlmdIndex()
    for payload in payloads:
        index.receive(TOPIC, payload)
    [indexed] = {group for entries in index.held.values() for _, _, group in entries}
    assert published.engine.model.groups[indexed].kind == "all"
    assert dynamo_tiers(payloads, is_new=True)["host"] == BLOCKS


def test_dynamo_needs_hashes_that_are_numbers(
    open_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", "0")
    payloads = open_engine().payloads()
    with pytest.raises(ValueError, match="BlockHashValue"):
        dynamo_tiers(payloads, is_new=True)
    assert llmd_score(payloads) == BLOCKS
