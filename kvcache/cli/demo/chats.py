"""The demo's traffic: several users, each talking about a document of their own.

Users take turns round robin, so that everyone else has spoken before a user comes back. A user's
prompt starts with the system prompt (the same for all) and the user's document, and then grows by
one message and one answer a turn. Tokens are random ids from a seed: the same `Chats` asks every
engine the same questions for as long as the engines answer the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine gave back for one prompt.

    `logprobs` has, per token of `tokens`, the (token id, logprob) pairs the engine reported, by id.
    `ttft_s` is the time to the first token in seconds, `cached_tokens` how many leading tokens of
    the prompt the engine did not have to compute.
    """

    tokens: list[int]
    logprobs: list[list[tuple[int, float]]]
    cached_tokens: int
    ttft_s: float


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One question and its answer; `user` and `turn` count from 1."""

    user: int
    turn: int
    prompt_tokens: int
    answer: Answer


@dataclass(frozen=True, slots=True)
class Chats:
    """Who talks how much, in tokens. `message_tokens` and `answer_tokens` are those of one turn."""

    users: int
    turns: int
    system_tokens: int
    document_tokens: int
    message_tokens: int = 48
    answer_tokens: int = 16
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens of one user's whole conversation, the last answer included."""
        growth = self.turns * (self.message_tokens + self.answer_tokens)
        return self.system_tokens + self.document_tokens + growth

    @property
    def distinct(self) -> int:
        """Tokens to keep so that none is computed twice; the system prompt counts once."""
        return self.system_tokens + self.users * (self.longest - self.system_tokens)

    def play(self, vocabulary: int, ask: Callable[[list[int]], Answer]) -> Iterator[ChatTurn]:
        """Ask every question in order, in token ids below `vocabulary`; yield turns as they end."""
        random = Random(self.seed)

        def words(count: int) -> list[int]:
            return [random.randrange(vocabulary) for _ in range(count)]

        system = words(self.system_tokens)
        histories = [system + words(self.document_tokens) for _ in range(self.users)]
        for turn in range(1, self.turns + 1):
            for user, history in enumerate(histories, start=1):
                history.extend(words(self.message_tokens))
                answer = ask(list(history))
                yield ChatTurn(user, turn, len(history), answer)
                history.extend(answer.tokens)
