"""The demo's traffic: several users, each with a document of their own.

Users send prompts round robin. A user's prompt starts with the system prompt, which all share, and
the user's document; it grows by one message and one answer each turn. Tokens are random ids from a
seed: equal `Chats` send every engine the same prompts, as long as the engines return the same
answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Answer:
    """An engine's answer to one prompt.

    Attributes:
        tokens: the ids of the answer's tokens.
        logprobs: for each token, the (token id, logprob) pairs that the engine returned, by id.
        cached_tokens: how many tokens at the start of the prompt the engine did not compute.
        ttft_s: the time to the first token, in seconds.
    """

    tokens: list[int]
    logprobs: list[list[tuple[int, float]]]
    cached_tokens: int
    ttft_s: float


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One prompt and its answer; `user` and `turn` count from 1."""

    user: int
    turn: int
    prompt_tokens: int
    answer: Answer


@dataclass(frozen=True, slots=True)
class Chats:
    """The size of the traffic. `message_tokens` and `answer_tokens` are for one turn."""

    users: int
    turns: int
    system_tokens: int
    document_tokens: int
    message_tokens: int = 48
    answer_tokens: int = 16
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens of one user's whole conversation, with the last answer."""
        growth = self.turns * (self.message_tokens + self.answer_tokens)
        return self.system_tokens + self.document_tokens + growth

    @property
    def distinct(self) -> int:
        """Tokens of all conversations, with the shared system prompt counted once."""
        return self.system_tokens + self.users * (self.longest - self.system_tokens)

    def play(self, vocabulary: int, ask: Callable[[list[int]], Answer]) -> Iterator[ChatTurn]:
        """Send every prompt in order, with token ids below `vocabulary`; yield each turn."""
        random = Random(self.seed)

        def tokens(count: int) -> list[int]:
            return [random.randrange(vocabulary) for _ in range(count)]

        system = tokens(self.system_tokens)
        histories = [system + tokens(self.document_tokens) for _ in range(self.users)]
        for turn in range(1, self.turns + 1):
            for user, history in enumerate(histories, start=1):
                history.extend(tokens(self.message_tokens))
                answer = ask(list(history))
                yield ChatTurn(user, turn, len(history), answer)
                history.extend(answer.tokens)
