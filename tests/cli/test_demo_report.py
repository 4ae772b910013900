"""The demo's report on runs of the test: equal answers, the turns that are timed, the text."""

import io
import json
from dataclasses import replace
from typing import Any

import pytest

from kvcache.cli.demo.chats import Answer, ChatTurn
from kvcache.cli.demo.engine import EngineRun, L1Usage
from kvcache.cli.demo.report import DemoReport, first_difference
from kvcache.cli.table import painter

PLAIN = painter(io.StringIO())


def turn(number: int, *, cached: int, ttft_s: float, user: int = 1, prompt: int = 3000) -> ChatTurn:
    logprobs = [[(7, -0.25), (9, -1.5)], [(7, -1.0), (8, -0.5)]]
    return ChatTurn(user, number, prompt, Answer([7, 8], logprobs, cached, ttft_s))


def run(*turns: ChatTurn, l1: L1Usage | None = None) -> EngineRun:
    return EngineRun(list(turns), block_nbytes=1 << 18, l1=l1 or L1Usage())


def report(*, pinned: int = 0, kvcache: list[ChatTurn] | None = None) -> DemoReport:
    """Turn 1 is cold in all runs. Turns 2 to 4 are hits of kvcache; turn 4 is too short to time."""
    return DemoReport(
        without=run(
            turn(1, cached=0, ttft_s=1.0),
            turn(2, cached=128, ttft_s=2.0),
            turn(3, cached=128, ttft_s=4.0),
            turn(4, cached=0, ttft_s=50.0, prompt=1999),
        ),
        with_kvcache=run(
            *(
                kvcache
                or [
                    turn(1, cached=0, ttft_s=1.1),
                    turn(2, cached=2944, ttft_s=0.1),
                    turn(3, cached=2944, ttft_s=0.3),
                    turn(4, cached=1984, ttft_s=50.0, prompt=1999),
                ]
            ),
            l1=L1Usage(
                hit_tokens=5500, used_nbytes=3 << 20, capacity_nbytes=4 << 20, pinned_slots=pinned
            ),
        ),
        large=run(
            turn(1, cached=0, ttft_s=1.2),
            turn(2, cached=2944, ttft_s=0.1),
            turn(3, cached=2944, ttft_s=0.2),
            turn(4, cached=1984, ttft_s=50.0, prompt=1999),
        ),
    )


def test_first_difference_of_equal_answers_is_none() -> None:
    one, other = turn(1, cached=0, ttft_s=1.0), turn(1, cached=64, ttft_s=0.1)
    assert first_difference([one], [other]) is None


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"tokens": [7, 3]}, "token 2"),
        ({"logprobs": [[(7, -0.2500001), (9, -1.5)], [(7, -1.0), (8, -0.5)]]}, "token 1"),
        ({"tokens": [7], "logprobs": [[(7, -0.25), (9, -1.5)]]}, "token 2"),
    ],
)
def test_first_difference_is_found_in_tokens_logprobs_and_length(
    change: dict[str, Any], place: str
) -> None:
    same = turn(1, cached=0, ttft_s=1.0)
    other = turn(2, cached=0, ttft_s=1.0, user=5)
    changed = replace(other, answer=replace(other.answer, **change))
    for pair in ([same, changed], [same, other]), ([same, other], [same, changed]):
        difference = first_difference(*pair)
        assert difference is not None
        assert difference.startswith(f"user 5, turn 2, {place}")


def test_report_times_are_medians_of_the_turns_to_compare() -> None:
    figures = report().to_json()
    assert figures["ttft_p50_cold_s"] == 3.0
    assert figures["ttft_p50_hit_s"] == pytest.approx(0.2)
    assert figures["ttft_p50_own_cache_s"] == pytest.approx(0.15)
    assert figures["ttft_speedup"] == pytest.approx(15)
    assert figures["ttft_vs_own_cache"] == pytest.approx(4 / 3)


def test_report_without_turns_to_compare_has_no_times() -> None:
    runs = report()
    cached = [
        replace(t, answer=replace(t.answer, cached_tokens=2944)) for t in runs.with_kvcache.turns
    ]
    nothing_lost = replace(runs, without=run(*cached))
    assert nothing_lost.to_json()["ttft_p50_hit_s"] is None
    assert nothing_lost.to_json()["ttft_speedup"] is None
    assert "no times to compare" in nothing_lost.text(PLAIN)


def test_report_as_json_counts_the_tokens_of_one_run() -> None:
    figures = json.loads(json.dumps(report().to_json()))
    assert figures["identical_outputs"] is True
    assert figures["prompt_tokens"] == 3 * 3000 + 1999
    assert figures["l1_hit_tokens"] == 5500
    assert figures["pinned_slots_after"] == 0
    assert len(figures["turns_played"]) == 12


def test_report_as_text_has_table_facts_and_conclusion() -> None:
    text = report().text(PLAIN)
    assert "50%: 5,500 of 10,999 prompt tokens" in text
    assert "3MiB of 4MiB" in text
    assert "identical" in text
    assert "15.0 times" in text
    [second] = [line.split() for line in text.splitlines() if line.startswith("   2")]
    assert " ".join(second) == "2 3,000 2,000 ms 128 100 ms 2,944 100 ms 2,944"


def test_report_with_a_pinned_slot_or_a_changed_answer_fails() -> None:
    assert report().passed
    assert not report(pinned=1).passed
    turns = report().with_kvcache.turns
    broken = replace(turns[2], answer=replace(turns[2].answer, tokens=[7, 1]))
    changed = report(kvcache=[*turns[:2], broken, turns[3]])
    assert not changed.passed
    assert "DIFFERENT: user 1, turn 3, token 2" in changed.text(PLAIN)
    assert "That is a bug" in changed.text(PLAIN)
