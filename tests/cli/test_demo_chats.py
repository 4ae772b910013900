"""The demo's traffic: the order of users, the parts of a prompt, and its distinct tokens."""

from kvcache.cli.demo.chats import Answer, Chats, ChatTurn

CHATS = Chats(
    users=3, turns=2, system_tokens=5, document_tokens=7, message_tokens=3, answer_tokens=2
)


def play(chats: Chats, answer: list[int]) -> tuple[list[ChatTurn], list[list[int]]]:
    prompts: list[list[int]] = []

    def ask(prompt: list[int]) -> Answer:
        prompts.append(prompt)
        return Answer(answer, [[(token, 0.0)] for token in answer], 0, 0.1)

    return list(chats.play(1000, ask)), prompts


def test_chats_users_take_turns_round_robin() -> None:
    turns, _ = play(CHATS, [1, 2])
    assert [(t.turn, t.user) for t in turns] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]


def test_chats_prompt_continues_the_previous_prompt_and_answer() -> None:
    turns, prompts = play(CHATS, [1, 2])
    for first, second in zip(prompts[:3], prompts[3:], strict=True):
        assert second[: len(first) + 2] == [*first, 1, 2]
        assert len(second) == len(first) + 2 + 3
    assert [t.prompt_tokens for t in turns] == [15, 15, 15, 20, 20, 20]


def test_chats_users_share_only_the_system_prompt() -> None:
    _, prompts = play(CHATS, [1, 2])
    assert len({tuple(prompt[:5]) for prompt in prompts}) == 1
    assert len({prompt[5] for prompt in prompts}) == 3


def test_chats_equal_answers_make_equal_prompts() -> None:
    assert play(CHATS, [1, 2])[1] == play(CHATS, [1, 2])[1]
    assert play(CHATS, [1, 2])[1][3:] != play(CHATS, [1, 3])[1][3:]


def test_chats_sizes_equal_those_of_the_prompts() -> None:
    _, prompts = play(CHATS, [1, 2])
    assert CHATS.longest == max(map(len, prompts)) + 2
    whole = [[*prompt, 1, 2] for prompt in prompts]
    prefixes = {tuple(tokens[: end + 1]) for tokens in whole for end in range(len(tokens))}
    assert CHATS.distinct == len(prefixes)
