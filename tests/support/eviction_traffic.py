"""Traffic for eviction policies: a recorded trace, generators of others, and what to do with them.

Requests are played into the real index with the calls that a stack makes: ``access`` with the whole
chain, then ``reserve`` and ``publish`` of what is absent, a few blocks per engine step.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from heapq import heappop, heappush
from pathlib import Path
from random import Random

import pytest

from kvcache.eviction import Policy
from kvcache.index import Index

TRACE = Path(
    os.environ.get("KVCACHE_TRACE")
    or Path(__file__).resolve().parents[3] / "shared" / "traces" / "conversation_trace.jsonl"
)
with_conversation = pytest.mark.skipif(
    not TRACE.exists(), reason=f"the trace is not at {TRACE}; KVCACHE_TRACE may say where it is"
)
BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Request:
    """A chain that is asked for at a time, in seconds."""

    time: float
    keys: list[bytes]


@cache
def conversation(*, partial: bool) -> list[Request]:
    """The requests of the conversation trace, with their ``partial`` last blocks or without."""
    requests = []
    with TRACE.open() as lines:
        for line in lines:
            row = json.loads(line)
            ids = row["hash_ids"]
            if not partial:
                ids = ids[: row["input_length"] // BLOCK_TOKENS]
            keys = [b"%d" % number for number in ids]
            requests.append(Request(row["timestamp"] / 1000, keys))
    return requests


class Replay:
    """An index of ``slots`` under a policy, and traffic that was played into it."""

    def __init__(self, policy: Callable[[int], Policy], slots: int, step: int = 1 << 30) -> None:
        self.now = 0.0
        self.policy = policy(slots)
        self.index = Index(self.policy, lambda: self.now)
        self.index.open_slots(slots)
        self._step = step  # blocks per engine step

    def play(self, requests: Sequence[Request]) -> float:
        """Play these; give their hit ratio in per cent."""
        index = self.index
        asked, hit = index.lookup_blocks, index.hit_blocks
        for request in requests:
            self.now = request.time
            self.serve(request.keys)
        return 100 * (index.hit_blocks - hit) / max(1, index.lookup_blocks - asked)

    def serve(self, keys: list[bytes]) -> int:
        """Serve a request for ``keys``; give how many of the leading ones were there."""
        index, step = self.index, self._step
        held = index.access(keys, 0)
        for at in range(held, len(keys), step):
            _, slots = index.reserve(keys[at : at + step], keys[at - 1] if at else None)
            index.publish(slots)
        return held


def belady(requests: Sequence[Request], slots: int, count_from: int) -> float:
    """The hit ratio, in per cent, that no policy exceeds: Belady's MIN, which may decline.

    A parent is used whenever its child is, so what is used last of all, the deepest of equals, is
    never a parent of something that stays.
    """
    never = len(requests)
    following: list[list[int]] = []
    seen: dict[bytes, int] = {}
    for number in range(len(requests) - 1, -1, -1):
        keys = requests[number].keys
        following.append([seen.get(key, never) for key in keys])
        seen.update(dict.fromkeys(keys, number))
    following.reverse()
    held: dict[bytes, int] = {}
    heap: list[tuple[int, int, bytes]] = []
    asked = hits = 0
    for number, request in enumerate(requests):
        found = sum(key in held for key in request.keys)
        if number >= count_from:
            asked, hits = asked + len(request.keys), hits + found
        for depth, (key, use) in enumerate(zip(request.keys, following[number], strict=True)):
            held[key] = use
            heappush(heap, (-use, -depth, key))
        while len(held) > slots:
            use, _, key = heappop(heap)
            if held.get(key) == -use:
                del held[key]
    return 100 * hits / asked


def stretched(requests: Sequence[Request], factor: float) -> list[Request]:
    """The same requests, so many times slower."""
    return [Request(request.time * factor, request.keys) for request in requests]


# Made-up traffic: each gives so many requests, the same ones for the same seed.


def grown(name: str, blocks: int, base: Sequence[bytes] = ()) -> list[bytes]:
    """The chain of ``base`` and ``blocks`` more, of this name."""
    return [*base, *(f"{name}/{at}".encode() for at in range(blocks))]


def chat(count: int, seed: int = 0, every_s: float = 0.5) -> list[Request]:
    """People who talk, in turns some seconds to minutes apart, behind one of four prompts."""
    draw = Random(seed)
    systems = [grown(f"system {at}", 3) for at in range(4)]
    waiting: list[tuple[float, int, list[bytes]]] = []
    requests: list[Request] = []
    now, people = 0.0, 0
    while len(requests) < count:
        now += draw.expovariate(1 / every_s)
        people += 1
        opening = grown(f"chat {people}", draw.randint(1, 12), draw.choice(systems))
        heappush(waiting, (now, people, opening))
        while waiting and waiting[0][0] <= now:
            time, person, chain = heappop(waiting)
            requests.append(Request(time, chain))
            if draw.random() < 0.7:
                longer = grown(f"chat {person} at {time}", draw.randint(1, 3), chain)
                heappush(waiting, (time + draw.lognormvariate(4.0, 1.0), person, longer))
    return requests[:count]


def agents(count: int, seed: int = 0) -> list[Request]:
    """Agents: many quick steps, each longer than the last; who is done never comes back."""
    draw = Random(seed)
    systems = [grown(f"tools {at}", 20) for at in range(4)]
    requests: list[Request] = []
    for number in range(count // 12 + 1):
        time = number * 3.0
        chain = grown(f"agent {number}", 3, draw.choice(systems))
        for step in range(draw.randint(4, 20)):
            requests.append(Request(time, chain))
            chain = grown(f"agent {number} step {step}", draw.randint(1, 4), chain)
            time += draw.lognormvariate(1.5, 0.8)
    return sorted(requests, key=lambda request: request.time)[:count]


def documents(count: int, seed: int = 0, change_every: int = 1 << 30) -> list[Request]:
    """Questions about documents, few of them popular; which ones may change suddenly."""
    draw = Random(seed)
    lengths = [draw.randint(2, 12) for _ in range(1500)]
    weights = [1 / rank for rank in range(1, 1501)]
    order = list(range(1500))
    requests = []
    for number in range(count):
        if not number % change_every:
            draw.shuffle(order)
        document = draw.choices(order, weights)[0]
        chain = grown(f"document {document}", lengths[document], grown("system", 1))
        requests.append(Request(number * 0.4, grown(f"question {number}", 1, chain)))
    return requests


def cycle(count: int, seed: int = 0) -> list[Request]:
    """The same documents in the same order, again and again: the worst there is for LRU."""
    draw = Random(seed)
    lengths = [draw.randint(2, 12) for _ in range(400)]
    return [
        Request(at * 0.5, grown(f"document {at % 400}", lengths[at % 400])) for at in range(count)
    ]


def traps(count: int, seed: int = 0) -> list[Request]:
    """What was learned is wrong by turns: blocks come back soon, then only late, then never."""
    draw = Random(seed)
    requests: list[Request] = []
    for number in range(count):
        phase = number * 6 // count % 3
        back = number - (draw.randint(1, 20), draw.randint(150, 250), 0)[phase]
        which = back if back >= 0 and draw.random() < 0.8 else number
        requests.append(Request(number * 0.5, grown(f"trap {which}", 1 + which % 9)))
    return requests


def turns(count: int, seed: int = 0) -> list[Request]:
    """Phases of any length, each with its own pace, sizes, and how long until who comes back does.

    In some nobody does, and in some all that do are too late for LRU.
    """
    draw = Random(seed)
    reach = [(1, 20), (20, 80), (80, 160), (150, 250), (250, 400), None]
    requests: list[Request] = []
    now = 0.0
    while len(requests) < count:
        length = draw.randint(count // 20, count // 6)
        every_s = draw.choice([0.05, 0.5, 3.0])
        back, share, size = (
            draw.choice(reach),
            draw.choice([0.3, 0.8, 1.0]),
            draw.choice([3, 9, 20]),
        )
        for number in range(len(requests), len(requests) + length):
            which = number - draw.randint(*back) if back is not None else number
            if which < 0 or draw.random() >= share:
                which = number
            requests.append(Request(now, grown(f"turn {which}", 1 + which % size)))
            now += every_s
    return requests[:count]


GENERATORS: dict[str, Callable[[int], list[Request]]] = {
    "chat": chat,
    "agents": agents,
    "documents": documents,
    "shift": lambda count: documents(count, change_every=count // 6),
    "cycle": cycle,
    "traps": traps,
    **{f"turns {seed}": partial(turns, seed=seed) for seed in range(6)},
    "flip": lambda count: [  # from one kind of traffic to another
        *documents(count // 2, 1),
        *(Request(r.time + count, r.keys) for r in chat(count // 2, 1)),
    ],
}
