"""Made-up traffic, for want of a trace, and to see what a policy does when the traffic is not kind.

Always true: the same name, seed and number of requests give the same trace; tokens and times are of
a plausible size, and no more than that. Measure with a trace of your own before you buy memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import accumulate, count, islice
from random import Random

from kvcache.replay.trace import BLOCK_TOKENS, Request, Trace


def generate(name: str, requests: int, seed: int = 0, *, partial: bool = False) -> Trace:
    """The first ``requests`` of the traffic ``name`` of ``GENERATORS``; the same for each seed."""
    made = islice(GENERATORS[name](Random(seed)), requests)
    return Trace.of(made, BLOCK_TOKENS, partial=partial)


class _Prompt:
    """A prompt that grows: its tokens, and the numbers of its full blocks."""

    def __init__(self, names: Iterator[int], tokens: int = 0, ids: tuple[int, ...] = ()) -> None:
        self._names = names
        self.tokens = tokens
        self._ids = list(ids)

    def grown(self, tokens: int) -> _Prompt:
        """Another prompt, which begins with all of this one."""
        other = _Prompt(self._names, self.tokens, tuple(self._ids))
        other.grow(tokens)
        return other

    def grow(self, tokens: int) -> None:
        self.tokens += tokens
        more = self.tokens // BLOCK_TOKENS - len(self._ids)
        self._ids += islice(self._names, more)

    def asked(self, now: float) -> Request:
        """A request for all of it; its partial block is its own."""
        tail = [next(self._names)] if self.tokens % BLOCK_TOKENS else []
        return Request(now, self.tokens, self._ids + tail)


class _Draw:
    """Chance, and the numbers of blocks."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.names = count()

    def prompt(self, tokens: int) -> _Prompt:
        fresh = _Prompt(self.names)
        fresh.grow(tokens)
        return fresh

    def around(self, median: float, spread: float = 0.8) -> float:
        """A number with a long tail above its median."""
        return median * self.random.lognormvariate(0.0, spread)

    def length(self, median: float, spread: float = 0.8) -> int:
        """A number of tokens."""
        return 1 + int(self.around(median, spread))


def _sessions(
    draw: _Draw, every_s: float, begin: Callable[[float], Iterator[Request]]
) -> Iterator[Request]:
    """What all sessions send, in order. They begin at random, one in ``every_s``."""
    waiting: list[tuple[float, int, Request, Iterator[Request]]] = []
    order = count()
    now = 0.0
    while True:
        now += draw.random.expovariate(1 / every_s)
        while waiting and waiting[0][0] <= now:
            _, _, request, session = heappop(waiting)
            yield request
            if (following := next(session, None)) is not None:
                heappush(waiting, (following.time_s, next(order), following, session))
        session = begin(now)
        first = next(session)
        heappush(waiting, (first.time_s, next(order), first, session))


def chat(random: Random) -> Iterator[Request]:
    """People who talk: four system prompts, a few turns a minute or so apart, some come back."""
    draw = _Draw(random)
    systems = [draw.prompt(draw.length(1500)) for _ in range(4)]

    def session(now: float) -> Iterator[Request]:
        prompt = draw.random.choice(systems).grown(draw.length(1500, 1.2))
        while True:
            yield prompt.asked(now)
            if draw.random.random() < 0.25:
                return
            pause = 900 if draw.random.random() < 0.2 else 60
            now += draw.around(pause)
            prompt.grow(draw.length(300) + draw.length(150))

    return _sessions(draw, 0.6, session)


def agent(random: Random) -> Iterator[Request]:
    """Agents with long instructions and many quick steps; one that is done never comes back."""
    draw = _Draw(random)
    kinds = [draw.prompt(draw.length(6000, 0.4)) for _ in range(8)]

    def session(now: float) -> Iterator[Request]:
        prompt = draw.random.choice(kinds).grown(draw.length(1500))
        for _ in range(draw.random.randint(8, 40)):
            yield prompt.asked(now)
            now += draw.around(6)
            prompt.grow(draw.length(200) + draw.length(900, 1.0))

    return _sessions(draw, 3.0, session)


class _Library:
    """Documents, some of them popular, put one after another behind one system prompt."""

    def __init__(self, draw: _Draw, documents: int) -> None:
        self._draw = draw
        self._lengths = [draw.length(1800, 0.5) for _ in range(documents)]
        self._popular = list(accumulate(1 / rank for rank in range(1, documents + 1)))
        self._order = list(range(documents))
        self._prompts: dict[tuple[int, ...], _Prompt] = {(): draw.prompt(400)}
        self.change_taste()

    def change_taste(self) -> None:
        """Other documents are the popular ones from now on."""
        self._draw.random.shuffle(self._order)

    def question(self, now: float, documents: int) -> Request:
        """A question about ``documents`` that were found for it, the same order each time."""
        drawn = self._draw.random.choices(self._order, cum_weights=self._popular, k=documents)
        chosen = tuple(sorted(set(drawn)))
        for end in range(1, len(chosen) + 1):
            if chosen[:end] not in self._prompts:
                before = self._prompts[chosen[: end - 1]]
                self._prompts[chosen[:end]] = before.grown(self._lengths[chosen[end - 1]])
        return self._prompts[chosen].grown(self._draw.length(60)).asked(now)


def rag(random: Random) -> Iterator[Request]:
    """Single questions, each behind the one to three documents that were found for it."""
    draw = _Draw(random)
    library = _Library(draw, 2000)
    now = 0.0
    while True:
        now += random.expovariate(3.0)
        yield library.question(now, random.randint(1, 3))


def shift(random: Random) -> Iterator[Request]:
    """Questions about one document each; every ten minutes others become the popular ones."""
    draw = _Draw(random)
    library = _Library(draw, 3000)
    now, until = 0.0, 600.0
    while True:
        now += random.expovariate(3.0)
        if now > until:
            until += 600
            library.change_taste()
        yield library.question(now, 1)


def cyclic(random: Random) -> Iterator[Request]:
    """The same 1,500 documents in the same order, over and over: the worst there is for LRU."""
    draw = _Draw(random)
    documents = [draw.prompt(draw.length(4000, 0.5)) for _ in range(1500)]
    now = 0.0
    while True:
        for document in documents:
            now += random.expovariate(3.0)
            yield document.grown(draw.length(60)).asked(now)


GENERATORS: dict[str, Callable[[Random], Iterator[Request]]] = {
    "chat": chat,
    "agent": agent,
    "rag": rag,
    "shift": shift,
    "cyclic": cyclic,
}
