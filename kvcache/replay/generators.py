"""Synthetic traffic, for users without a trace and for tests of policies.

Invariants: the same name, seed and number of requests have the same trace. Tokens and times are of
a plausible size, but not measured: use your own trace before you buy memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import accumulate, count, islice
from random import Random

from kvcache.replay.trace import BLOCK_TOKENS, Request, Trace


def generate(name: str, requests: int, seed: int = 0, *, partial: bool = False) -> Trace:
    """Return the first ``requests`` requests of a traffic.

    Args:
        name: a key of ``GENERATORS``.
        requests: length of the trace.
        seed: of the random numbers.
        partial: keep partial last blocks.
    """
    generated = islice(GENERATORS[name](Random(seed)), requests)
    return Trace.of(generated, BLOCK_TOKENS, partial=partial)


class _Prompt:
    """A prompt that grows.

    Args:
        fresh_ids: yields the numbers of new blocks.
        tokens: its length.
        ids: numbers of its full blocks.
    """

    def __init__(
        self, fresh_ids: Iterator[int], tokens: int = 0, ids: tuple[int, ...] = ()
    ) -> None:
        self._fresh_ids = fresh_ids
        self.tokens = tokens
        self._ids = list(ids)

    def extended(self, tokens: int) -> _Prompt:
        """Return another prompt: this one and ``tokens`` more."""
        other = _Prompt(self._fresh_ids, self.tokens, tuple(self._ids))
        other.grow(tokens)
        return other

    def grow(self, tokens: int) -> None:
        self.tokens += tokens
        new_blocks = self.tokens // BLOCK_TOKENS - len(self._ids)
        self._ids += islice(self._fresh_ids, new_blocks)

    def request(self, now: float) -> Request:
        """Return a request for the whole prompt; no other request has its partial block."""
        tail = [next(self._fresh_ids)] if self.tokens % BLOCK_TOKENS else []
        return Request(now, self.tokens, self._ids + tail)


class _Draw:
    """Draws random prompts, lengths and times."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self._fresh_ids = count()

    def prompt(self, tokens: int) -> _Prompt:
        """Return a prompt of new blocks."""
        prompt = _Prompt(self._fresh_ids)
        prompt.grow(tokens)
        return prompt

    def around(self, median: float, spread: float = 0.8) -> float:
        """Return a log-normal number: it has a long tail above its median."""
        return median * self.random.lognormvariate(0.0, spread)

    def length(self, median: float, spread: float = 0.8) -> int:
        """Return a log-normal number of tokens, at least 1."""
        return 1 + int(self.around(median, spread))


def _sessions(
    draw: _Draw, every_s: float, start: Callable[[float], Iterator[Request]]
) -> Iterator[Request]:
    """Yield the requests of all sessions in order of time.

    Args:
        draw: the random numbers.
        every_s: mean time between the starts of two sessions, a Poisson process.
        start: returns the requests of a session that starts at some time.
    """
    waiting: list[tuple[float, int, Request, Iterator[Request]]] = []
    order = count()
    now = 0.0
    while True:
        now += draw.random.expovariate(1 / every_s)
        while waiting and waiting[0][0] <= now:
            _, _, request, session = heappop(waiting)
            yield request
            if (later := next(session, None)) is not None:
                heappush(waiting, (later.time_s, next(order), later, session))
        session = start(now)
        first = next(session)
        heappush(waiting, (first.time_s, next(order), first, session))


def chat(random: Random) -> Iterator[Request]:
    """Chats: four system prompts, a few turns about a minute apart, some of them much later."""
    draw = _Draw(random)
    systems = [draw.prompt(draw.length(1500)) for _ in range(4)]

    def session(now: float) -> Iterator[Request]:
        prompt = draw.random.choice(systems).extended(draw.length(1500, 1.2))
        while True:
            yield prompt.request(now)
            if draw.random.random() < 0.25:
                return
            pause = 900 if draw.random.random() < 0.2 else 60
            now += draw.around(pause)
            prompt.grow(draw.length(300) + draw.length(150))

    return _sessions(draw, 0.6, session)


def agent(random: Random) -> Iterator[Request]:
    """Agents: long instructions and many quick steps; a finished agent never comes back."""
    draw = _Draw(random)
    instructions = [draw.prompt(draw.length(6000, 0.4)) for _ in range(8)]

    def session(now: float) -> Iterator[Request]:
        prompt = draw.random.choice(instructions).extended(draw.length(1500))
        for _ in range(draw.random.randint(8, 40)):
            yield prompt.request(now)
            now += draw.around(6)
            prompt.grow(draw.length(200) + draw.length(900, 1.0))

    return _sessions(draw, 3.0, session)


class _Library:
    """Documents of different popularity, retrieved into prompts with one system prompt."""

    def __init__(self, draw: _Draw, documents: int) -> None:
        self._draw = draw
        self._lengths = [draw.length(1800, 0.5) for _ in range(documents)]
        # The popularity of the document at rank r is 1 / r (Zipf); these are its running sums.
        self._weights = list(accumulate(1 / rank for rank in range(1, documents + 1)))
        self._by_rank = list(range(documents))
        self._prompts: dict[tuple[int, ...], _Prompt] = {(): draw.prompt(400)}
        self.shuffle_popularity()

    def shuffle_popularity(self) -> None:
        """Make other documents the popular ones."""
        self._draw.random.shuffle(self._by_rank)

    def question(self, now: float, documents: int) -> Request:
        """Return a question behind ``documents`` retrieved documents, sorted by number."""
        drawn = self._draw.random.choices(self._by_rank, cum_weights=self._weights, k=documents)
        chosen = tuple(sorted(set(drawn)))
        for end in range(1, len(chosen) + 1):
            if chosen[:end] not in self._prompts:
                before = self._prompts[chosen[: end - 1]]
                self._prompts[chosen[:end]] = before.extended(self._lengths[chosen[end - 1]])
        return self._prompts[chosen].extended(self._draw.length(60)).request(now)


def rag(random: Random) -> Iterator[Request]:
    """Single questions, each behind one to three retrieved documents."""
    draw = _Draw(random)
    library = _Library(draw, 2000)
    now = 0.0
    while True:
        now += random.expovariate(3.0)
        yield library.question(now, random.randint(1, 3))


def shift(random: Random) -> Iterator[Request]:
    """Questions about one document each; every ten minutes other documents become popular."""
    draw = _Draw(random)
    library = _Library(draw, 3000)
    now, next_change = 0.0, 600.0
    while True:
        now += random.expovariate(3.0)
        if now > next_change:
            next_change += 600
            library.shuffle_popularity()
        yield library.question(now, 1)


def cyclic(random: Random) -> Iterator[Request]:
    """The same 1,500 documents in the same order, over and over: the worst case of LRU."""
    draw = _Draw(random)
    documents = [draw.prompt(draw.length(4000, 0.5)) for _ in range(1500)]
    now = 0.0
    while True:
        for document in documents:
            now += random.expovariate(3.0)
            yield document.extended(draw.length(60)).request(now)


GENERATORS: dict[str, Callable[[Random], Iterator[Request]]] = {
    "chat": chat,
    "agent": agent,
    "rag": rag,
    "shift": shift,
    "cyclic": cyclic,
}
