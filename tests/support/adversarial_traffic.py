"""Synthetic traffic that changes, so that what a policy has learned becomes wrong.

Blocks have one token. The same number of requests and seed have the same trace.
"""

from collections.abc import Callable
from functools import partial
from random import Random

from kvcache.replay.generators import GENERATORS, generate
from kvcache.replay.trace import Request, Trace


def _chain(document: int, blocks: int) -> list[int]:
    """Return the numbers of the first ``blocks`` blocks of a document."""
    return [1000 * document + at for at in range(blocks)]


def _request(now: float, document: int, blocks: int) -> Request:
    return Request(now, blocks, _chain(document, blocks))


def traps(count: int, seed: int = 0) -> Trace:
    """Three phases, each twice: documents come back soon, then only late, then never."""
    random = Random(seed)
    requests: list[Request] = []
    for number in range(count):
        phase = number * 6 // count % 3
        earlier = number - (random.randint(1, 20), random.randint(150, 250), 0)[phase]
        document = earlier if earlier >= 0 and random.random() < 0.8 else number
        requests.append(_request(number * 0.5, document, 1 + document % 9))
    return Trace.of(requests, block_tokens=1)


def turns(count: int, seed: int = 0) -> Trace:
    """Phases of random length, each with its own pace, sizes and reuse distance.

    In some phases no document comes back, and in some all come back too late for LRU.
    """
    random = Random(seed)
    distances = [(1, 20), (20, 80), (80, 160), (150, 250), (250, 400), None]
    requests: list[Request] = []
    now = 0.0
    while len(requests) < count:
        length = random.randint(count // 20, count // 6)
        every_s = random.choice([0.05, 0.5, 3.0])
        distance, share, size = (
            random.choice(distances),
            random.choice([0.3, 0.8, 1.0]),
            random.choice([3, 9, 20]),
        )
        for number in range(len(requests), len(requests) + length):
            document = number - random.randint(*distance) if distance is not None else number
            if document < 0 or random.random() >= share:
                document = number
            requests.append(_request(now, document, 1 + document % size))
            now += every_s
    return Trace.of(requests[:count], block_tokens=1)


def cycle(count: int, documents: int = 400) -> Trace:
    """The same documents in the same order, again and again: the worst case of LRU."""
    random = Random(0)
    lengths = [random.randint(2, 12) for _ in range(documents)]
    return Trace.of(
        (_request(at * 0.5, at % documents, lengths[at % documents]) for at in range(count)),
        block_tokens=1,
    )


def after(first: Trace, second: Trace, pause_s: float = 0.0) -> Trace:
    """Return the requests of ``first``, and after a pause those of ``second``.

    The two have no block in common, unless they are the same trace: it is repeated then.
    """
    requests = [*_requests(first, 0.0, 0)]
    first_id = 0 if second is first else first.distinct
    requests += _requests(second, first.times_s[-1] + pause_s, first_id)
    return Trace.of(requests, block_tokens=1)


def _requests(trace: Trace, start_s: float, first_id: int) -> list[Request]:
    return [
        Request(start_s + now, len(chain), [first_id + block for block in chain])
        for now, chain in zip(trace.times_s, trace.chains(), strict=True)
    ]


def flip(count: int) -> Trace:
    """One kind of traffic, and then another."""
    return after(generate("rag", count // 2, seed=1), generate("chat", count // 2, seed=1))


TRAFFIC: dict[str, Callable[[int], Trace]] = {
    **{name: partial(generate, name) for name in GENERATORS if name != "cyclic"},
    "cycle": cycle,
    "traps": traps,
    **{f"turns {seed}": partial(turns, seed=seed) for seed in range(6)},
    "flip": flip,
}
"""All kinds of traffic by name: functions of the number of requests."""
